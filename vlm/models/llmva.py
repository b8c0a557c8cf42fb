"""LLMVA-GEBC (arXiv 2306.10354): captions of a boundary in a video, what is there and its state before and after.

Video-LLaMA's model with three additions: an embedding of where the boundary is is added to the queries, a second
Q-Former reads other features of the video (InternVideo, Omnivore, CLIP), and the language model is OPT. With a LLaMA
(`llama` given) it is the original's second form: no other features.

Letters: V boundaries (videos of the batch), L places of other features, N video tokens, D width of the Q-Formers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm.models.eva import TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.models.padded_prompts import pad_prompts
from vlm.models.trained import start_from
from vlm.models.video_base import VideoConfig, VideoSystem
from vlm.nn.qformer import read_memory
from vlm.types import Batch, TextRows, UserError


@dataclass(kw_only=True, slots=True)
class LlmvaConfig(VideoConfig):
    """LLMVA-GEBC; every default is that of its best published run, but for the size of its OPT, which is `opt`'s."""

    tower: TowerConfig | None = None
    """The frozen EVA and Q-Former; none, as published: frames come as its stored tokens, 12 of a video."""
    opt: OptBaseConfig | None = field(default_factory=OptBaseConfig)
    """The frozen OPT …"""
    llama: LlamaBaseConfig | None = None
    """… or, where `opt` is none, the frozen LLaMA."""
    other_tokens: int = 8
    """Tokens that the second Q-Former makes of the other features; 0: there are none."""
    other_dim: int = 3072
    """Width of the other features, side by side (InternVideo 768, Omnivore 1536, CLIP 768)."""
    max_other: int = 128
    """Places of other features that a video may have: rows of the embedding of their number."""
    prompt_pad: Literal["none", "right"] = "none"
    """right: as the original, which pads the prompts of a micro-batch to the longest and lets the captions of shorter
    ones begin at a pad, so that a loss depends on what else is in the batch."""

    def __post_init__(self) -> None:
        VideoConfig.__post_init__(self)
        if (self.opt is None) == (self.llama is None):
            raise ValueError("one of model.opt and model.llama must be given, and the other must be none")
        for name, least in (("other_tokens", 0), ("other_dim", 1), ("max_other", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def places(self) -> int:
        """Places that a video takes in a row (N): of its frames, then of other features."""
        return self.num_video_tokens + self.other_tokens

    @property
    def language_model(self) -> OptBaseConfig | LlamaBaseConfig:
        """The one that is given."""
        chosen = self.opt or self.llama
        assert chosen is not None
        return chosen

    def check_inputs(self, inputs: Any) -> None:
        """UserError where rows of these inputs are not this model's: sizes, or a tokenizer of another model."""
        llm = self.language_model
        self.check_frames_and_words(inputs, llm.vocab_size, llm.path, "model.opt" if self.opt else "model.llama")

    def build(self) -> Llmva:
        """The model with what is frozen loaded, its trainable parameters fresh or, where `init_from` is a checkpoint of
        Video-LLaMA, with that one's video Q-Former, queries and positions."""
        model = Llmva(self)
        if self.init_from is not None:
            start_from(model, self.init_from, shared=("video_",))
        return model


class Llmva(VideoSystem):
    """See the file's beginning."""

    def __init__(self, config: LlmvaConfig) -> None:
        self.projection = "llama_project" if config.opt is None else "opt_proj"
        super().__init__(config, config.language_model.build())
        dim = config.frame_dim
        self.temporal_pos_trans = nn.Linear(dim, dim)
        self.temporal_pos_trans_norm = nn.LayerNorm(dim)
        if config.other_tokens:
            self.other_feat_query_tokens = nn.Parameter(torch.empty(1, config.other_tokens, dim).normal_(0, 0.02))
            self.other_feat_position_embedding = nn.Embedding(config.max_other, dim)
            self.other_feat_linear = nn.Linear(config.other_dim, dim)
            self.other_feat_temporal_pos_trans = nn.Linear(dim, dim)
            self.other_feat_temporal_pos_trans_norm = nn.LayerNorm(dim)
            self.other_feat_Qformer = config.qformer.build(dim)
        self.freeze()

    def arrange(self, batch: Batch) -> Batch:
        """Prompts filled up as the original's, where `prompt_pad` is right. UserError: rows beyond OPT's positions."""
        if self.config.opt is not None:
            longest, known = max(map(_longest, batch.views.values())), self.config.opt.max_positions
            if longest > known:
                raise UserError(
                    f"{', '.join(batch.keys)}: a row of {longest} tokens, but model.opt.max_positions is {known}: OPT "
                    "has no embedding for those beyond. Mend: shorter texts (inputs.max_caption_length)"
                )
        if self.config.prompt_pad == "none":
            return batch
        is_opt = self.config.opt is not None
        pad = 1 if is_opt else 0  # OPT's own; LLaMA's unknown word
        views = {name: pad_prompts(rows, pad, counted=not is_opt) for name, rows in batch.views.items()}
        return replace(batch, views=views)

    def encode_video(self, batch: Batch) -> Tensor | None:
        """(V, N, width of the language model): tokens of the frames, then of the other features."""
        tokens = self.see(batch)
        if tokens is None:
            return None
        place = boundary_embedding(self._extra("boundary", batch), self.config.frame_dim).to(tokens.dtype)
        memory, mask = self.memory(tokens, batch.frame_counts)
        where = self.temporal_pos_trans_norm(self.temporal_pos_trans(place))
        made = [read_memory(self.video_Qformer, self.video_query_tokens + where, memory, mask)]
        if self.config.other_tokens:
            made.append(self._read_other(self._extra("other", batch).to(tokens.dtype), place))
        return self.project(torch.cat(made, dim=1))

    def _read_other(self, features: Tensor, place: Tensor) -> Tensor:
        """(V, L, other_dim) features and (V, 1, D) embedded boundaries -> (V, other_tokens, D)."""
        length = features.shape[1]
        want = self.config.other_dim
        if features.shape[2] != want or length > self.config.max_other:
            raise UserError(
                f"other features are {length} places x {features.shape[2]}, but model.other_dim is {want} and "
                f"model.max_other {self.config.max_other}: shards and recipe do not fit"
            )
        numbers = torch.arange(length, device=features.device)
        memory = self.other_feat_linear(features) + self.other_feat_position_embedding(numbers)
        where = self.other_feat_temporal_pos_trans_norm(self.other_feat_temporal_pos_trans(place))
        return read_memory(self.other_feat_Qformer, self.other_feat_query_tokens + where, memory, None)

    def _extra(self, name: str, batch: Batch) -> Tensor:
        if name not in batch.extra:
            raise UserError(f"{', '.join(batch.keys)}: the batch has no {name!r}, which this model reads of each video")
        return batch.extra[name]

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See VideoSystem; and what the language model's shapes do not say."""
        name = "llama" if settings["opt"] is None else "opt"
        llm = settings[name]
        own = ("norm_eps", "rope_theta", "vocab_size") if name == "llama" else ("vocab_size",)
        return super().decisive(settings) | {f"{name}.{key}": llm[key] for key in (*own, "heads")}

    def trained_flops(self, batch: Batch, tokens: int) -> float:
        """Forward FLOPs of both Q-Formers and of the projection."""
        flops, c = super().trained_flops(batch, tokens), self.config
        if "other" not in batch.extra or not c.other_tokens:
            return flops
        videos, length = batch.extra["other"].shape[:2]
        read = c.qformer.flops(c.frame_dim, c.other_tokens, length) + 2.0 * length * c.other_dim * c.frame_dim
        return flops + videos * read


def _longest(rows: TextRows) -> int:
    """Tokens of the longest row with what it goes on from."""
    ends: list[int] = []
    for length, parent in zip(rows.lengths, rows.parents):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    return max(ends)


def boundary_embedding(boundary: Tensor, dim: int) -> Tensor:
    """Where a boundary is and how long what it ends and begins is, both as shares of the video, as sines and cosines.

    Args:
        boundary: (V, 2), worked out in fp64.
    Returns:
        (V, 1, dim) fp32; half of it for each number. The sigmoid before is the original's: it presses 0 … 1 together.
    """
    half = dim // 2
    number = torch.arange(half, dtype=torch.float64, device=boundary.device)
    wave = 10000.0 ** (2 * (number // 2) / half)
    angles = boundary.double().sigmoid()[..., None] * (2 * math.pi) / wave
    pairs = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)
    return pairs.flatten(-2).flatten(-2)[:, None].float()
