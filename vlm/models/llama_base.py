"""The frozen language model that causal systems stand on: LLaMA 1, 2 or 3 through transformers' LlamaForCausalLM.

Weights come from Meta's files (consolidated.*.pth, any number of shards) or a Hugging Face folder. What the recipe says
about the model is checked against the files, so a run never goes on with another LLaMA than the one it names.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vlm.models.quantised import Quantise, quantise
from vlm.nn.language import ATTENTION, ExactRotary
from vlm.nn.llama_layers import use_lean_layers
from vlm.types import UserError
from vlm.weights import META_LAYER_TABLE, Loader, Table, diff_keys, open_tensors, pairs_to_halves, rename

_CONSTANTS = re.compile(r".*rope\.freqs|.*rotary_emb\.inv_freq")  # tables of the rotary embedding, worked out anew here
_BESIDE = re.compile(r"model\.(mm_projector|vision_tower)\..*")  # what a folder of LLaVA holds beside its LLaMA
_META_TABLE: Table = (
    (r"tok_embeddings\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    *((rf"layers\.(\d+)\.{old}", rf"model.layers.\1.{new}") for old, new in META_LAYER_TABLE),
)
_ROTATED = re.compile(r"layers\.\d+\.attention\.w([qk])\.weight")

# name -> dim, layers, heads, key heads, hidden, vocab, norm_eps, rope_theta: Meta's published params.json
SIZES = {
    "llama1_7b": (4096, 32, 32, 32, 11008, 32000, 1e-6, 10000.0),
    "llama1_13b": (5120, 40, 40, 40, 13824, 32000, 1e-6, 10000.0),
    "llama1_33b": (6656, 60, 52, 52, 17920, 32000, 1e-6, 10000.0),
    "llama1_65b": (8192, 80, 64, 64, 22016, 32000, 1e-5, 10000.0),
    "llama2_7b": (4096, 32, 32, 32, 11008, 32000, 1e-5, 10000.0),
    "llama2_13b": (5120, 40, 40, 40, 13824, 32000, 1e-5, 10000.0),
    "llama3_8b": (4096, 32, 32, 8, 14336, 128256, 1e-5, 500000.0),
}

# name -> the LLaMA that it was trained from, words of its vocabulary. Vicuna v1.1 has the sizes of llama1, v1.5 and
# LLaMA-2-chat those of llama2; v0's one word more is its [PAD], LLaVA's three are its image's
DERIVED = {
    "vicuna_7b_v0": ("llama1_7b", 32001),
    "vicuna_13b_v0": ("llama1_13b", 32001),
    "llava_lightning_7b": ("llama1_7b", 32003),
    "ziya_13b": ("llama1_13b", 39424),
    "billa_7b": ("llama1_7b", 46943),
}


@dataclass(kw_only=True, slots=True)
class LlamaBaseConfig:
    """A frozen LLaMA. `llama("llama3_8b", path=...)` fills in the published sizes."""

    path: Path | None = None
    """Meta's folder (consolidated.*.pth, params.json) or a Hugging Face folder; none: random weights, for debugging
    only."""
    dim: int = 4096
    """Width (D)."""
    layers: int = 32
    """Blocks."""
    heads: int = 32
    """Attention heads of a block."""
    kv_heads: int | None = None
    """Key and value heads of a block (grouped-query attention); none: as many as `heads`."""
    hidden: int = 11008
    """Width of the feed-forward part."""
    vocab_size: int = 32000
    """Words of the vocabulary (LLaMA 1, 2: 32000; LLaMA 3: 128256)."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm (LLaMA 1: 1e-6, LLaMA 2 and 3: 1e-5)."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding (LLaMA 1, 2: 10000, LLaMA 3: 500000)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How the frozen weights are stored. A bf16 engine stores them so in any case."""
    quantise: Quantise = None
    """Store the matrices of the blocks in 8 or 4 bits (bitsandbytes, extra "quantise"); none: as `dtype` says."""
    random_seed: int = 0
    """Decides the random weights where `path` is none."""

    def __post_init__(self) -> None:
        self.path = None if self.path is None else Path(self.path)
        for name in ("dim", "layers", "heads", "hidden", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.llama.{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % (2 * self.heads):
            raise ValueError(f"model.llama.dim={self.dim} does not divide into {self.heads} heads of even width")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"model.llama.kv_heads={self.kv_heads} does not divide heads={self.heads}")

    @property
    def num_kv_heads(self) -> int:
        """G, key heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def build(self, skip: int = 0, rope_theta: float | None = None) -> LlamaForCausalLM:
        """The frozen model; on the meta device it stays without weights.

        Args:
            skip: lowest blocks to leave out.
            rope_theta: base of the rotary embedding where it is not to be the LLaMA's own.
        Raises:
            UserError: the files are not of the model that this config describes.
        """
        config = LlamaConfig(
            hidden_size=self.dim,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers - skip,
            num_attention_heads=self.heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta or self.rope_theta},
            tie_word_embeddings=False,
            pad_token_id=None,
        )
        config._attn_implementation = ATTENTION
        with torch.device("cpu"):
            rotary = ExactRotary(LlamaRotaryEmbedding(config))
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
            use_lean_layers(model)
        model.model.rotary_emb = rotary
        model.to(getattr(torch, self.dtype)).requires_grad_(False)
        if torch.get_default_device().type != "meta":
            model.load_state_dict(self._random(model) if self.path is None else self._read(model, skip), assign=True)
        quantise(model, self.quantise)
        return model.requires_grad_(False)

    def _random(self, model: LlamaForCausalLM) -> dict[str, Tensor]:
        warnings.warn(
            "the frozen LLaMA has RANDOM weights (model.llama.path is none): good for tests and demonstrations, not "
            "for a result that is compared with published ones",
            stacklevel=3,
        )
        generator = torch.Generator().manual_seed(self.random_seed)
        tensors = {}
        for name, value in model.state_dict().items():
            tensors[name] = filled = torch.ones(value.shape, device="cpu")
            if value.ndim == 2:
                deviation = 0.02 if name == "model.embed_tokens.weight" else value.shape[1] ** -0.5
                filled.normal_(0, deviation, generator=generator)
        return {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in tensors.items()}

    def _read(self, model: LlamaForCausalLM, skip: int) -> dict[str, Tensor]:
        assert self.path is not None
        self._compare(self.path)
        loaders = read_llama(open_tensors(self.path), self.heads, self.num_kv_heads, str(self.path))
        want = {_shift(name, skip): value for name, value in model.state_dict().items()}
        shapes, stored = {}, {}
        for name, load in loaders.items():
            if 0 <= _block(name) < skip:
                continue
            tensor = load()
            shapes[name] = tuple(tensor.shape)
            # a copy, never a view of the file that the tensor may be mapped from
            stored[_shift(name, -skip)] = tensor.to(dtype=getattr(torch, self.dtype), copy=True)
        diff_keys(shapes, want).require(
            f"{self.path}: is not the LLaMA that this recipe describes (dim {self.dim}, {self.layers} layers, "
            f"{self.num_kv_heads} key heads, vocabulary {self.vocab_size})"
        )
        return stored

    def _compare(self, path: Path) -> None:
        """Refuse a folder whose params.json or config.json contradicts the recipe."""
        folder = path if path.is_dir() else path.parent
        names = {
            "params.json": {
                "n_heads": "heads",
                "norm_eps": "norm_eps",
                "rope_theta": "rope_theta",
                "n_layers": "layers",
            },
            "config.json": {
                "num_attention_heads": "heads",
                "rms_norm_eps": "norm_eps",
                "rope_theta": "rope_theta",
                "num_hidden_layers": "layers",
            },
        }
        for file, pairs in names.items():
            if not (folder / file).is_file():
                continue
            try:
                stated = json.loads((folder / file).read_text())
                assert isinstance(stated, dict)
            except (ValueError, AssertionError) as error:
                raise UserError(f"{folder / file}: is not a JSON object; download it again") from error
            stated = {**stated, **(stated.get("rope_parameters") or {})}
            scaled = stated.get("use_scaled_rope") or stated.get("rope_scaling")
            if scaled or stated.get("rope_type", "default") != "default":
                raise UserError(f"{folder / file}: scaled rotary embedding (LLaMA 3.1) is not supported; use LLaMA 3")
            for theirs, ours in pairs.items():
                if theirs in stated and stated[theirs] != getattr(self, ours):
                    raise UserError(
                        f"{folder / file}: says {theirs} = {stated[theirs]}, the recipe model.llama.{ours} = "
                        f"{getattr(self, ours)}: another LLaMA than the recipe's. Mend: give the path of the model "
                        f"that the recipe names, or tell the recipe this one's: model.llama.{ours}={stated[theirs]} "
                        "(docs/migrating.md, On another LLaMA, has all that belongs together)"
                    )


def llama(name: str, **settings: Any) -> LlamaBaseConfig:
    """The config of a published LLaMA; `settings` are further fields. UserError: no such model."""
    if name in DERIVED:
        origin, words = DERIVED[name]
        return llama(origin, **{"vocab_size": words, **settings})
    if name not in SIZES:
        raise UserError(f"there is no LLaMA called {name!r}; known: {', '.join((*SIZES, *DERIVED))}")
    keys = ("dim", "layers", "heads", "kv_heads", "hidden", "vocab_size", "norm_eps", "rope_theta")
    return LlamaBaseConfig(**{**dict(zip(keys, SIZES[name])), **settings})


def read_llama(tensors: Mapping[str, Loader], heads: int, kv_heads: int, source: str) -> dict[str, Loader]:
    """The tensors of a whole LLaMA under transformers' names: Meta's are renamed and their q and k renumbered.

    Raises:
        UserError: a tensor that is not LLaMA's.
    """
    aside = (_CONSTANTS, _BESIDE)
    tensors = {name: load for name, load in tensors.items() if not any(kind.fullmatch(name) for kind in aside)}
    if "tok_embeddings.weight" not in tensors:
        found = dict(tensors)
        if "lm_head.weight" not in found and "model.embed_tokens.weight" in found:
            found["lm_head.weight"] = found["model.embed_tokens.weight"]  # stored once where both are the same
        return found
    try:
        names = rename(tensors, _META_TABLE)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    renamed: dict[str, Loader] = {}
    for name, load in tensors.items():
        match = _ROTATED.fullmatch(name)
        renamed[names[name]] = load if match is None else _Renumbered(load, heads if match[1] == "q" else kv_heads)
    return renamed


class _Renumbered:
    def __init__(self, load: Loader, heads: int) -> None:
        self.load, self.heads = load, heads

    def __call__(self) -> Tensor:
        return pairs_to_halves(self.load(), self.heads)


def _block(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _shift(name: str, by: int) -> str:
    return re.sub(r"^model\.layers\.(\d+)\.", lambda m: f"model.layers.{int(m[1]) + by}.", name)
