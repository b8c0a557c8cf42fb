"""The frozen language model of LLMVA-GEBC: OPT (arXiv 2205.01068) through transformers' OPTForCausalLM.

Weights come from a Hugging Face folder, tensor by tensor into a model without weights, so that it is never there twice.
What the recipe says about the model is checked against the folder's config.json.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from vlm.models.quantised import Quantise, quantise
from vlm.nn.language import ATTENTION
from vlm.types import UserError
from vlm.weights import Loader, diff_keys, open_tensors

# name -> dim, layers, heads, hidden: Meta's published sizes that norm before attention and embed in full width
SIZES = {
    "opt_125m": (768, 12, 12, 3072),
    "opt_1_3b": (2048, 24, 32, 8192),
    "opt_2_7b": (2560, 32, 32, 10240),
    "opt_6_7b": (4096, 32, 32, 16384),
    "opt_13b": (5120, 40, 40, 20480),
}

_WORDS, _HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


@dataclass(kw_only=True, slots=True)
class OptBaseConfig:
    """A frozen OPT. `opt("opt_13b", path=...)` fills in the published sizes."""

    path: Path | None = None
    """Hugging Face folder (facebook/opt-13b: safetensors or pytorch_model*.bin); none: random weights, for debugging
    only."""
    dim: int = 5120
    """Width (D)."""
    layers: int = 40
    """Blocks."""
    heads: int = 40
    """Attention heads of a block."""
    hidden: int = 20480
    """Width of the feed-forward part."""
    vocab_size: int = 50272
    """Words of the vocabulary; OPT's tokenizer has 50265, the rest is never used."""
    max_positions: int = 2048
    """Tokens that a row may have."""
    dropout: float = 0.0
    """Of the frozen blocks, in training. The original trained with 0.1, since it left its frozen OPT in training mode;
    0 is what a frozen model should have."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How the frozen weights are stored. A bf16 engine stores them so in any case."""
    quantise: Quantise = None
    """Store the matrices of the blocks in 8 or 4 bits (bitsandbytes, extra "quantise"); none: as `dtype` says."""
    random_seed: int = 0
    """Decides the random weights where `path` is none."""

    def __post_init__(self) -> None:
        self.path = None if self.path is None else Path(self.path)
        for name in ("dim", "layers", "heads", "hidden", "vocab_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.opt.{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"model.opt.dim={self.dim} does not divide into {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.opt.dropout is {self.dropout}; it must be from 0 to below 1")

    def build(self) -> OPTForCausalLM:
        """The frozen model; on the meta device it stays without weights.

        Raises:
            UserError: the files are not of the model that this config describes.
        """
        config = OPTConfig(
            hidden_size=self.dim,
            word_embed_proj_dim=self.dim,
            ffn_dim=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_positions,
            dropout=self.dropout,
            attention_dropout=0.0,
            tie_word_embeddings=True,
            pad_token_id=None,
        )
        config._attn_implementation = ATTENTION
        with torch.device("meta"):
            model = OPTForCausalLM(config)
        model.to(getattr(torch, self.dtype)).requires_grad_(False)
        if torch.get_default_device().type != "meta":
            stored = self._random(model) if self.path is None else self._read(model)
            model.load_state_dict(stored, assign=True, strict=False)  # without the head, which is the embedding
        model.lm_head.weight = model.model.decoder.embed_tokens.weight
        quantise(model, self.quantise)
        return model.requires_grad_(False)

    def _random(self, model: OPTForCausalLM) -> dict[str, Tensor]:
        warnings.warn(
            "the frozen OPT has RANDOM weights (model.opt.path is none): good for tests and demonstrations, not for a "
            "result that is compared with published ones",
            stacklevel=3,
        )
        generator = torch.Generator().manual_seed(self.random_seed)
        tensors = {}
        for name, value in _own(model).items():
            norm = "layer_norm" in name and name.endswith("weight")
            filled = (torch.ones if norm else torch.zeros)(value.shape, device="cpu")
            if value.ndim == 2:
                filled.normal_(0, 0.02 if "embed" in name else value.shape[1] ** -0.5, generator=generator)
            tensors[name] = filled.to(getattr(torch, self.dtype))
        return tensors

    def _read(self, model: OPTForCausalLM) -> dict[str, Tensor]:
        assert self.path is not None
        self._compare(self.path)
        loaders = read_opt(open_tensors(self.path), str(self.path))
        # a copy, never a view of the file that the tensor may be mapped from
        stored = {name: load().to(dtype=getattr(torch, self.dtype), copy=True) for name, load in loaders.items()}
        diff_keys(stored, _own(model)).require(
            f"{self.path}: is not the OPT that this recipe describes (dim {self.dim}, {self.layers} layers, vocabulary "
            f"{self.vocab_size})"
        )
        return stored

    def _compare(self, path: Path) -> None:
        """Refuse a folder whose config.json contradicts the recipe."""
        file = (path if path.is_dir() else path.parent) / "config.json"
        if not file.is_file():
            return
        try:
            stated = json.loads(file.read_text())
            assert isinstance(stated, dict)
        except (ValueError, AssertionError) as error:
            raise UserError(f"{file}: is not a JSON object; download it again") from error
        if not stated.get("do_layer_norm_before", True) or stated.get("word_embed_proj_dim", self.dim) != self.dim:
            raise UserError(f"{file}: an OPT with norms behind or narrower embeddings (opt-350m) is not supported")
        pairs = {"hidden_size": "dim", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
        pairs |= {"ffn_dim": "hidden", "vocab_size": "vocab_size", "max_position_embeddings": "max_positions"}
        for theirs, ours in pairs.items():
            if theirs in stated and stated[theirs] != getattr(self, ours):
                raise UserError(
                    f"{file}: says {theirs} = {stated[theirs]}, the recipe model.opt.{ours} = {getattr(self, ours)}: "
                    "another OPT than the recipe's. Mend: give the path of the model that the recipe names, or tell "
                    f"the recipe this one's: model.opt.{ours}={stated[theirs]}"
                )


def opt(name: str, **settings: Any) -> OptBaseConfig:
    """The config of a published OPT; `settings` are further fields. UserError: no such model."""
    if name not in SIZES:
        raise UserError(f"there is no OPT called {name!r}; known: {', '.join(SIZES)}")
    return OptBaseConfig(**{**dict(zip(("dim", "layers", "heads", "hidden"), SIZES[name])), **settings})


def read_opt(tensors: dict[str, Loader], source: str) -> dict[str, Loader]:
    """The tensors of an OPT under transformers' names, each once: the output layer is the embedding.

    Raises:
        UserError: an output layer of its own.
    """
    named = {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": t for name, t in tensors.items()}
    named.pop("model.decoder.version", None)
    head = named.pop(_HEAD, None)
    if head is not None and _WORDS in named and not torch.equal(head(), named[_WORDS]()):
        raise UserError(f"{source}: its {_HEAD} is not its embedding, as OPT's is: another kind of model")
    return named


def _own(model: OPTForCausalLM) -> dict[str, Tensor]:
    """The model's tensors, each once."""
    return {name: value for name, value in model.state_dict().items() if name != _HEAD}
