"""Language models that are published as differences from LLaMA, and how they become whole: Vicuna, Ziya, BiLLa.

    vicuna  whole = base + delta, every tensor; words that the base lacks (v0's [PAD]) stand for themselves
    ziya    the same, but word embeddings and output layer are whole in the delta (its vocabulary is its own)
    billa   everything is whole but the word embeddings: whole = delta - base, for the base's words

Sums are made in the delta's dtype (float16 as published), a base of another dtype rounded to it first, as FastChat's
tool does. Tensors are read and added one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vlm.models.llama_base import LlamaBaseConfig, read_llama
from vlm.models.llama_facts import expected_shapes, llama_config
from vlm.types import UserError
from vlm.weights import Loader, diff_keys, open_tensors

KINDS = ("vicuna", "ziya", "billa")
WORDS = ("model.embed_tokens.weight", "lm_head.weight")
_PROBE = "model.layers.0.self_attn.q_proj.weight"
_SAME = 0.5
"""Cosine between a matrix and LLaMA's above which it is no difference: those of a difference are about 0, those of two
whole models that were trained one from the other about 1."""
_COMPARED = ("dim", "layers", "heads", "num_kv_heads", "hidden", "norm_eps", "rope_theta")


@dataclass(frozen=True, slots=True)
class Llama:
    """A LLaMA in a folder of Meta's or Hugging Face's: its sizes, and its tensors by transformers' names."""

    folder: Path
    config: LlamaBaseConfig
    tensors: Mapping[str, Loader]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[WORDS[0]]().dtype

    @property
    def words(self) -> int:
        return self.config.vocab_size


def open_llama(folder: Path) -> Llama:
    """Nothing but headers is read. UserError: no LLaMA, or not a whole one."""
    config = llama_config(folder)
    tensors = read_llama(open_tensors(folder), config.heads, config.num_kv_heads, str(folder))
    shapes = {name: tuple(load().shape) for name, load in tensors.items()}
    diff_keys(shapes, expected_shapes(config)).require(f"{folder} (whole LLaMA)")
    return Llama(folder, config, tensors)


@dataclass(frozen=True, slots=True)
class Merge:
    """A base and a delta that belong together."""

    base: Llama
    delta: Llama
    kind: str

    def __post_init__(self) -> None:
        refuse_sizes(self.base, self.delta)
        refuse_words(self.base, self.delta, self.kind)
        refuse_whole(self.base, self.delta, self.kind)

    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of every tensor of the result, in the order of the blocks."""
        shapes = expected_shapes(self.delta.config)
        return {name: (self.delta.tensors[name]().dtype, shape) for name, shape in shapes.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor of the result. UserError: the sum overflows, so base and delta are no pair."""
        base, delta = self.base.tensors[name](), self.delta.tensors[name]()
        if self.kind == "billa":
            merged = _on_base_rows(delta.float(), -base.float()).to(delta.dtype) if name == WORDS[0] else delta
        elif self.kind == "ziya" and name in WORDS:
            merged = delta
        else:
            merged = _on_base_rows(delta, base.to(delta.dtype))
        if not bool(torch.isfinite(merged).all()):
            raise UserError(
                f"{name}: base and delta give numbers beyond {merged.dtype}: {self.base.folder} and "
                f"{self.delta.folder} are no pair, or one of them is damaged. Mend: download again, compare checksums."
            )
        return merged


def _on_base_rows(delta: Tensor, base: Tensor) -> Tensor:
    """delta (W, …) + base (V, …), V at most W, as if base had zeros below."""
    if len(base) == len(delta):
        return delta + base
    merged = delta.clone()
    merged[: len(base)] += base
    return merged


# ------------------------------------------------------------------------------------------ what is no pair


def refuse_sizes(base: Llama, delta: Llama) -> None:
    """UserError, with both numbers of each, unless all sizes but the vocabulary are equal."""
    wrong = [name for name in _COMPARED if getattr(base.config, name) != getattr(delta.config, name)]
    if wrong:
        lines = "\n".join(
            f"  {n}: {getattr(base.config, n)} in the base, {getattr(delta.config, n)} in the delta" for n in wrong
        )
        raise UserError(
            f"{base.folder} and {delta.folder}: the delta was made from another LLaMA than this base.\n{lines}\n"
            "Mend: Vicuna v0 and v1.1, Ziya-13B-v1 and BiLLa-7B were made from LLaMA 1 of the same size."
        )


def refuse_words(base: Llama, delta: Llama, kind: str) -> None:
    """UserError, with both numbers, where the vocabularies cannot be of one pair of this kind."""
    more = delta.words - base.words
    told = f"{base.folder} has a vocabulary of {base.words} words, {delta.folder} of {delta.words}"
    if more < 0:
        raise UserError(
            f"{told}: the base has {-more} words too many. LLaMA has 32000, Vicuna v1.1 as many, Vicuna v0 32001 "
            "([PAD]). Mend: give LLaMA itself as the base, not a model that was made from it."
        )
    if more > 1 and kind == "vicuna":
        raise UserError(
            f"{told}: {more} more, where Vicuna v0 has 1 ([PAD]) and v1.1 none, so it is no Vicuna of this base. Mend: "
            "the base that the delta was made from; for Ziya-LLaMA --kind ziya, for BiLLa --kind billa."
        )


def refuse_whole(base: Llama, delta: Llama, kind: str) -> None:
    """UserError where what should be differences resembles LLaMA itself, or the other way round."""
    pair = (base.tensors[_PROBE]().float().flatten(), delta.tensors[_PROBE]().float().flatten())
    cosine = float(functional.cosine_similarity(*pair, dim=0))
    if kind != "billa" and cosine > _SAME:
        raise UserError(
            f"{delta.folder}: is no delta but a whole model: its {_PROBE} is nearly the base's (cosine {cosine:.2f}). "
            "Nothing has to be merged: give this folder as model.llama.path. (Vicuna v1.3 and v1.5 are published "
            "whole.)"
        )
    if kind == "billa" and cosine < _SAME:
        raise UserError(
            f"{delta.folder}: is no BiLLa made from {base.folder}: of a model that is whole but for its embeddings, "
            f"{_PROBE} would resemble the base's (cosine {cosine:.2f}). Mend: the LLaMA it was made from, or another "
            "--kind."
        )
