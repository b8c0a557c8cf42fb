"""Forward passes of a whole LLaMA for comparing two of its files, one block in memory at a time.

`meta_logits` is written from the published formulas with Meta's names and numbering: rotation of neighbouring rows as
complex numbers, and what Vamos, Flipped-VQA (arXiv 2310.15747) and ViCo add. It shares no code with the models here, so
that equal logits say that names, numbering and settings were understood. `transformers_logits` is the other side.

Letters: S tokens, D width, H heads, G key heads, E width of a head, A prompt rows of a block, F frames, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from vlm.models.llama_base import LlamaBaseConfig
from vlm.weights import Loader


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a gated checkpoint adds to a LLaMA, and the video it is shown."""

    tensors: Mapping[str, Tensor]  # published names
    adapter_len: int  # A
    adapter_layer: int  # blocks with prompts, counted from the top
    skip_lower: bool  # those below do not run, as in the originals
    features: Tensor | None  # (F, feature_dim); None: no video
    start: int  # where the video begins in the row


def fixed_tokens(words: int, count: int = 24) -> Tensor:
    """(count,) token ids, the same on every machine."""
    return torch.randint(3, words, (count,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def meta_logits(
    tensors: Mapping[str, Loader],
    config: LlamaBaseConfig,
    tokens: Tensor,
    trained: Trained | None = None,
    theta: float | None = None,
) -> Tensor:
    """(S,) token ids -> (S, V) fp32 logits, from tensors by Meta's names.

    Args:
        trained: prompts, gates and video of a gated checkpoint.
        theta: base of the rotary embedding where it is not the LLaMA's own.
    """
    hidden = tensors["tok_embeddings.weight"]()[tokens].float()
    if trained is not None and trained.features is not None:
        video = _project(trained.tensors, trained.features.float())
        hidden[trained.start : trained.start + len(video)] = video
    width = config.dim // config.heads
    frequencies = (theta or config.rope_theta) ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(len(tokens)).float(), frequencies)
    rotation = torch.polar(torch.ones_like(angles), angles)
    skipped = config.layers - trained.adapter_layer if trained is not None and trained.skip_lower else 0
    for number in range(skipped, config.layers):
        block = {name: _get(tensors, number, name) for name in _BLOCK}
        normed = _rms(hidden, block["attention_norm"], config.norm_eps)
        hidden = hidden + _attend(normed, block, config, rotation, trained, number)
        normed = _rms(hidden, block["ffn_norm"], config.norm_eps)
        gated = functional.silu(normed @ block["feed_forward.w1"].T) * (normed @ block["feed_forward.w3"].T)
        hidden = hidden + gated @ block["feed_forward.w2"].T
    hidden = _rms(hidden, tensors["norm.weight"]().float(), config.norm_eps)
    return hidden @ tensors["output.weight"]().float().T


_BLOCK = (
    *(f"attention.w{part}" for part in "qkvo"),
    *(f"feed_forward.w{part}" for part in "123"),
    "attention_norm",
    "ffn_norm",
)


def _get(tensors: Mapping[str, Loader], number: int, name: str) -> Tensor:
    return tensors[f"layers.{number}.{name}.weight"]().float()


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def _attend(
    x: Tensor,
    block: Mapping[str, Tensor],
    config: LlamaBaseConfig,
    rotation: Tensor,
    trained: Trained | None,
    number: int,
) -> Tensor:
    """Causal attention of one block and, in a softmax of its own, attention to its prompt rows: (S, D) -> (S, D)."""

    def split(rows: Tensor, matrix: str) -> Tensor:
        """(rows, D) -> (H, rows, E); key heads repeated."""
        heads = (rows @ block[f"attention.{matrix}"].T).unflatten(-1, (-1, config.dim // config.heads)).transpose(0, 1)
        return heads.repeat_interleave(config.heads // len(heads), dim=0)

    def rotate(heads: Tensor) -> Tensor:
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2)

    query, key, value = rotate(split(x, "wq")), rotate(split(x, "wk")), split(x, "wv")
    scale = query.shape[-1] ** -0.5
    scores = query @ key.transpose(1, 2) * scale
    if trained is not None and number < config.layers - trained.adapter_layer:
        trained = None
    gates = {} if trained is None else trained.tensors
    stem = f"layers.{number}.attention."
    if trained is not None and trained.features is not None and stem + "gate2" in gates:
        stop = trained.start + len(trained.features)
        scores[:, stop:, trained.start : stop] += gates[stem + "gate2"].float().view(-1, 1, 1)
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    out = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
    if trained is not None:
        place = (number - (config.layers - trained.adapter_layer)) * trained.adapter_len
        rows = gates["adapter_query.weight"].float()[place : place + trained.adapter_len]
        gate = gates[stem + "gate1"] if stem + "gate1" in gates else gates[stem + "gate"]
        weights = (query @ split(rows, "wk").transpose(1, 2) * scale).softmax(-1)
        out = out + gate.float().view(-1, 1, 1).tanh() * weights @ split(rows, "wv")
    return out.transpose(0, 1).flatten(1) @ block["attention.wo"].T


def _project(tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """(F, feature_dim) -> (F, D), with the embedding of the frame's number where there is one."""
    if "visual_proj.weight" in tensors:
        video = features @ tensors["visual_proj.weight"].float().T
    else:
        inner = functional.linear(features, tensors["visual_proj.0.weight"], tensors["visual_proj.0.bias"])
        video = functional.linear(
            functional.gelu(inner), tensors["visual_proj.2.weight"], tensors["visual_proj.2.bias"]
        )
    if "temporal_emb.weight" in tensors:
        video = video + tensors["temporal_emb.weight"][: len(video)].float()
    return video


@torch.no_grad()
def transformers_logits(tensors: Mapping[str, Tensor], config: LlamaBaseConfig, tokens: Tensor) -> Tensor:
    """(S,) token ids -> (S, V) fp32 logits of transformers' LLaMA, from tensors by its names."""
    settings = LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    settings._attn_implementation = "sdpa"
    hidden = tensors["model.embed_tokens.weight"][tokens][None].float()
    position = LlamaRotaryEmbedding(settings)(hidden, torch.arange(len(tokens))[None])
    for number in range(config.layers):
        with torch.device("meta"):
            block = LlamaDecoderLayer(settings, number).eval()
        stem = f"model.layers.{number}."
        stored = {name: tensors[stem + name].float() for name in block.state_dict()}
        block.load_state_dict(stored, assign=True)
        output = block(hidden, attention_mask=None, position_embeddings=position)
        hidden = output if isinstance(output, Tensor) else output[0]
    norm = LlamaRMSNorm(config.dim, config.norm_eps)
    norm.load_state_dict({"weight": tensors["model.norm.weight"].float()})
    return norm(hidden)[0] @ tensors["lm_head.weight"].float().T
