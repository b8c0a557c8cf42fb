"""How published checkpoints name their tensors, and how each name maps to ours: one table a family, read both ways.

Our names are the originals' for ViT parts, for what Vamos, LLaMA-VQA and ViCo train, and transformers'
`LlamaDecoderLayer` for frozen LLaMA layers. Sources: VideoMAE (arXiv 2203.12602), ViT-LLaMA (2310.12973), Vamos
(2311.13627), Flipped-VQA (2310.15747) and ViCo checkpoints; transformers' VideoMAE classes.
A later family adds its kinds, its pairs and one row to `FAMILIES`. Sizes and shapes: `vlm/models/vit_sizes.py`,
`vlm/models/gated_sizes.py`; a whole LLaMA, a kind with files of its own: `vlm/models/llama_files.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm.models import video_llama_names as seeing
from vlm.types import UserError
from vlm.weights import META_LAYER_TABLE, Table, rename

PRETRAIN, FINETUNE, VIT_LLAMA = "pretrain", "finetune", "vit_llama"
VAMOS, LLAMA_VQA, LLAMA = "vamos", "llama_vqa", "llama"
VIDEO_LLAMA, LLMVA, TOWER, PROJECTION = "video_llama", "llmva", "tower", "projection"
VIDEO_CHATGPT = "video_chatgpt"
KIND_TITLES = {
    PRETRAIN: "VideoMAE masked pretraining (encoder and decoder)",
    FINETUNE: "ViT video classifier",
    VIT_LLAMA: "ViT video classifier with frozen LLaMA layers",
    VAMOS: "Vamos: prompts and gates for a frozen LLaMA",
    LLAMA_VQA: "LLaMA-VQA or ViCo: prompts, gates and video bias for a frozen LLaMA",
    LLAMA: "whole LLaMA",
    VIDEO_LLAMA: "Video-LLaMA: video Q-Former and projection for a frozen LLaMA",
    LLMVA: "LLMVA-GEBC: Q-Formers of frames and other features for a frozen OPT or LLaMA",
    TOWER: "frozen EVA ViT-g and BLIP-2 Q-Former (or one of them)",
    PROJECTION: "projection of Q-Former tokens to a LLaMA's width (MiniGPT-4)",
    VIDEO_CHATGPT: "Video-ChatGPT: projector and rows of its marks for a LLaMA, or its Breakfast variant",
}
GATED = (VAMOS, LLAMA_VQA)  # kinds that are the trained part alone; the LLaMA under them is never in their files
BRANCHES = (VIDEO_LLAMA, LLMVA)  # trained part for a frozen language model, which whole files have besides
SEEING = (*BRANCHES, TOWER, PROJECTION)  # kinds of vlm/models/video_llama_files.py
TIED = (*BRANCHES, VIDEO_CHATGPT)  # kinds that know their language model by its hash alone
HAS_FROZEN = (VIT_LLAMA,)  # kinds with tensors that are never trained
FROZEN = {**dict.fromkeys(KIND_TITLES, r"(?!)"), VIT_LLAMA: r"llama\..+"}  # their names
FROZEN |= dict.fromkeys(BRANCHES, r"(tower|llm)\..+")
BASE = {**FROZEN, **dict.fromkeys(GATED, r"llm\..+")}
"""Names of all that a run of ours loads besides, frozen; files of some kinds have none of it."""

# --------------------------- pairs (ours, theirs): {i} is a number, {p} is weight or bias, {rest} any names to the end

Pairs = Sequence[tuple[str, str]]

_VIT_BLOCK = (
    "gamma_1", "gamma_2", "norm1.{p}", "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.{p}", "norm2.{p}",
    "mlp.fc1.{p}", "mlp.fc2.{p}",
)  # fmt: skip
_HF_BLOCK = (  # q, k and v are three matrices there: `_split_qkv` stands between
    ("norm1.{p}", "layernorm_before.{p}"),
    ("attn.q_bias", "attention.attention.q_bias"),
    ("attn.v_bias", "attention.attention.v_bias"),
    ("attn.q.weight", "attention.attention.query.weight"),
    ("attn.k.weight", "attention.attention.key.weight"),
    ("attn.v.weight", "attention.attention.value.weight"),
    ("attn.proj.{p}", "attention.output.dense.{p}"),
    ("norm2.{p}", "layernorm_after.{p}"),
    ("mlp.fc1.{p}", "intermediate.dense.{p}"),
    ("mlp.fc2.{p}", "output.dense.{p}"),
)
# transformers 5 also reads query.bias and value.bias; the hub's files and transformers 4 have q_bias: so we write that
_HF_BLOCK_ALSO = (
    ("attn.q_bias", "attention.attention.query.bias"),
    ("attn.v_bias", "attention.attention.value.bias"),
)


def _same(*names: str) -> Pairs:
    return tuple((name, name) for name in names)


def _blocks(ours: str, theirs: str, pairs: Pairs) -> Pairs:
    return tuple((f"{ours}{{i}}.{a}", f"{theirs}{{i}}.{b}") for a, b in pairs)


_LLAMA_LAYER = tuple((hf, meta.replace("\\", "")) for meta, hf in META_LAYER_TABLE)
LLAMA_LAYER_NAMES = tuple(ours for ours, _ in _LLAMA_LAYER)
_MAPPERS = _same("llama_dim_mapper1.weight", "llama_dim_mapper2.weight", "llama.norm.weight")
_HEAD = _same("norm.{p}", "fc_norm.{p}", "head.{p}")
_HF_HEAD = (("norm.{p}", "videomae.layernorm.{p}"), ("fc_norm.{p}", "fc_norm.{p}"), ("head.{p}", "classifier.{p}"))
_HF_PATCH = "videomae.embeddings.patch_embeddings.projection.{p}"

_VIT = (*_same("patch_embed.proj.{p}"), *_blocks("blocks.", "blocks.", _same(*_VIT_BLOCK)), *_HEAD)
_HF_VIT = (("patch_embed.proj.{p}", _HF_PATCH), *_blocks("blocks.", "videomae.encoder.layer.", _HF_BLOCK), *_HF_HEAD)
_MASKED = _same(
    "mask_token",
    "encoder.patch_embed.proj.{p}",
    *(f"encoder.blocks.{{i}}.{name}" for name in _VIT_BLOCK),
    "encoder.norm.{p}",
    *(f"decoder.blocks.{{i}}.{name}" for name in _VIT_BLOCK),
    "decoder.norm.{p}",
    "decoder.head.{p}",
    "encoder_to_decoder.weight",
)
_HF_MASKED = (
    ("encoder.patch_embed.proj.{p}", _HF_PATCH),
    *_blocks("encoder.blocks.", "videomae.encoder.layer.", _HF_BLOCK),
    ("encoder.norm.{p}", "videomae.layernorm.{p}"),
    *_blocks("decoder.blocks.", "decoder.decoder_layers.", _HF_BLOCK),
    *_same("mask_token", "decoder.norm.{p}", "decoder.head.{p}", "encoder_to_decoder.weight"),
)


_HF_ALSO = (
    *_blocks("blocks.", "videomae.encoder.layer.", _HF_BLOCK_ALSO),
    *_blocks("decoder.blocks.", "decoder.decoder_layers.", _HF_BLOCK_ALSO),
)
_HF_MASKED_ALSO = tuple((f"encoder.{a}" if a.startswith("blocks.") else a, b) for a, b in _HF_ALSO)
_OUR_LAYERS = _blocks("llama.layers.", "llama.layers.", _same(*LLAMA_LAYER_NAMES))
_META_LAYERS = _blocks("llama.layers.", "llama.layers.", _LLAMA_LAYER)


_PROMPTS = _same("adapter_query.weight", "visual_proj.weight")
_MLP = _same("visual_proj.{i}.{p}")
_VAMOS = (*_PROMPTS, *_MLP, *_same("layers.{i}.attention.gate"))
_BIASED = (*_PROMPTS, *_same("temporal_emb.weight", "layers.{i}.attention.gate1", "layers.{i}.attention.gate2"))


def _ours(pairs: Pairs) -> Pairs:
    """Our names of pairs, on both sides."""
    return _same(*(ours for ours, _ in pairs))


_ASIDE = _same("published.{rest}")  # what our models have no use for, under its published name
_LLAMA_PROJ = _same("llama_proj.{p}")
_CHATGPT = ("mm_projector.{p}", "pes.{i}.positional_encodings", "reducers.{i}.{p}", "projecters.{i}.{p}")
_WHOLE = (*seeing.TOWER, *_ASIDE)


@dataclass(frozen=True, slots=True)
class Family:
    """One way of naming tensors: pairs (ours, theirs) for each kind of model it has."""

    title: str
    pairs: dict[str, Pairs]  # kind -> pairs
    also_read: dict[str, Pairs] = field(default_factory=dict)  # kind -> further spellings, never written
    split_qkv: bool = False  # theirs has three matrices where ours has attn.qkv.weight

    def table(self, kind: str, *, to_ours: bool) -> Table:
        """The rename table of one kind, in one direction. UserError: the family has no such kind."""
        if kind not in self.pairs:
            has = "; ".join(KIND_TITLES[k] for k in self.pairs)
            raise UserError(f"{self.title} has no form for a {KIND_TITLES[kind]}. It holds: {has}.")
        rows = self.pairs[kind]
        if to_ours:
            rows = [(b, a) for a, b in (*rows, *self.also_read.get(kind, ()))]
        return [(_pattern(left), _replacement(right)) for left, right in rows]


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{i\}", r"(\d+)").replace(r"\{p\}", "(weight|bias)").replace(r"\{rest\}", "(.+)")


def _replacement(name: str) -> str:
    for number in range(1, name.count("{") + 1):
        name = re.sub(r"\{(?:i|p|rest)\}", rf"\\{number}", name, count=1)
    return name


FAMILIES = {
    "ours": Family(
        "ours",
        {
            PRETRAIN: _MASKED,
            FINETUNE: _VIT,
            VIT_LLAMA: (*_VIT, *_MAPPERS, *_OUR_LAYERS),
            VAMOS: (*_VAMOS, *_same("selector.{rest}")),  # a token bottleneck, which no original has
            LLAMA_VQA: (*_BIASED, *_MLP),
            VIDEO_LLAMA: (*_ours(seeing.VIDEO_LLAMA), *_same("tower.{rest}", "llm.{rest}"), *_ASIDE),
            LLMVA: (*_ours(seeing.LLMVA), *_same("tower.{rest}", "llm.{rest}"), *_ASIDE),
            TOWER: (*_same("tower.{rest}"), *_ASIDE),
            PROJECTION: _LLAMA_PROJ,
            VIDEO_CHATGPT: (*_same(*_CHATGPT, "video_marks", "llm.{rest}"), *_ASIDE),
        },
    ),
    "videomae": Family("VideoMAE's .pth", {PRETRAIN: _MASKED, FINETUNE: _VIT}),
    "vit_llama": Family("ViT-LLaMA's .pth", {VIT_LLAMA: (*_VIT, *_MAPPERS, *_META_LAYERS)}),
    "vamos": Family("Vamos' .pth", {VAMOS: _VAMOS}),
    "flipped": Family("Flipped-VQA's .pth", {LLAMA_VQA: _BIASED}),
    "vico": Family("ViCo's .pth", {LLAMA_VQA: _BIASED}),
    "video_llama": Family(
        "Video-LLaMA's .pth", {VIDEO_LLAMA: (*seeing.VIDEO_LLAMA, *_WHOLE, *seeing.LLM), PROJECTION: _LLAMA_PROJ}
    ),
    "llmva": Family("LLMVA-GEBC's .pth", {LLMVA: (*seeing.LLMVA, *_WHOLE, *seeing.LLM)}),
    "lavis": Family("LAVIS' .pth", {TOWER: _WHOLE}),
    "video_chatgpt": Family(
        "Video-ChatGPT's .bin",
        {
            VIDEO_CHATGPT: (
                *((name, f"model.{name}") for name in _CHATGPT),
                ("llm.lm_head.weight", "lm_head.weight"),
                ("llm.model.layers.{i}.{rest}", "model.layers.{i}.{rest}"),
                ("llm.model.norm.weight", "model.norm.weight"),
            )
        },
    ),
    "hf": Family(
        "the Hugging Face form",
        {
            PRETRAIN: _HF_MASKED,
            FINETUNE: _HF_VIT,
            VIT_LLAMA: (*_HF_VIT, *_MAPPERS, *_OUR_LAYERS),
            TOWER: (*seeing.BLIP2, *_ASIDE),
        },
        also_read={PRETRAIN: _HF_MASKED_ALSO, FINETUNE: _HF_ALSO, VIT_LLAMA: _HF_ALSO},
        split_qkv=True,
    ),
}


_SEES = r"(tower|visual_encoder|Qformer|qformer|vision_model|ln_vision)\.|(query_tokens|cls_token)$"


def kind_of(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Which kind of model has these tensor names, of any family. UserError: none that is known."""
    if "video_query_tokens" in names:
        gebc = ("temporal_pos_trans.weight", "opt_proj.weight", "llama_project.weight")
        return LLMVA if any(name in names for name in gebc) else VIDEO_LLAMA
    if any(re.match(_SEES, name) for name in names) and "encoder_to_decoder.weight" not in names:
        return TOWER
    if "llama_proj.weight" in names:
        return PROJECTION
    if "mm_projector.weight" in names or "model.mm_projector.weight" in names:
        return VIDEO_CHATGPT
    if "encoder_to_decoder.weight" in names:
        return PRETRAIN
    if "llama_dim_mapper1.weight" in names:
        return VIT_LLAMA
    if "head.weight" in names or "classifier.weight" in names:
        return FINETUNE
    if any(re.fullmatch(r"layers\.\d+\.attention\.gate[12]", name) for name in names):
        return LLAMA_VQA
    if "adapter_query.weight" in names or any(re.fullmatch(r"layers\.\d+\.attention\.gate", name) for name in names):
        return VAMOS
    if "tok_embeddings.weight" in names or "model.embed_tokens.weight" in names:
        return LLAMA
    shown = ", ".join(list(names)[:6]) or "no tensors"
    raise UserError(
        "no known kind of model: a masked-pretraining file has encoder_to_decoder.weight, a classifier head.weight (or "
        "classifier.weight), ViT-LLaMA llama_dim_mapper1.weight besides, Vamos layers.0.attention.gate, LLaMA-VQA and "
        f"ViCo layers.0.attention.gate1, a LLaMA its embeddings. This one begins with: {shown}."
    )


def to_ours(state: Mapping[str, Tensor], family: str, kind: str) -> dict[str, Tensor]:
    """A family's tensors under our names. UserError: unknown names, or a third of q, k, v missing."""
    source = FAMILIES[family]
    names = rename(state, source.table(kind, to_ours=True))
    renamed = {names[name]: tensor for name, tensor in state.items()}
    return _merge_qkv(renamed) if source.split_qkv else renamed


def from_ours(state: Mapping[str, Tensor], family: str, kind: str) -> dict[str, Tensor]:
    """Our tensors under a family's names: the inverse of `to_ours`, to the bit."""
    target = FAMILIES[family]
    if target.split_qkv:
        state = _split_qkv(state)
    names = rename(state, target.table(kind, to_ours=False))
    return {names[name]: tensor for name, tensor in state.items()}


_QKV = "attn.qkv.weight"


def _split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`attn.qkv.weight` (3D, D) -> `attn.{q,k,v}.weight` (D, D)."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_QKV):
            stem = name.removesuffix("qkv.weight")
            split |= {f"{stem}{part}.weight": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    return split


def _merge_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_split_qkv`; the merged matrix takes the place of the first third."""
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\battn\.)[qkv]\.weight", name)
        if match is None:
            merged[name] = tensor
            continue
        thirds = [f"{match[1]}{part}.weight" for part in "qkv"]
        if f"{match[1]}qkv.weight" in merged:
            continue
        absent = [third for third in thirds if third not in state]
        if absent:
            raise UserError(f"{match[1]}qkv.weight: its part {absent[0]} is not in the file (have {name}).")
        merged[f"{match[1]}qkv.weight"] = torch.cat([state[third] for third in thirds])
    return merged
