"""Q-Formers (BLIP-2, arXiv 2301.12597): learned queries that read what stands before them by cross attention.

transformers' Blip2QFormerModel without its text part; what is added is how videos of different lengths share one pass.

Letters: V videos, T frames of the longest one, F frames of all videos, Q tokens of a frame, N queries, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


@dataclass(kw_only=True, slots=True)
class QFormerConfig:
    """Sizes of a Q-Former; all but `layers` (BLIP-2: 12, cross attention in every other) are those of the published."""

    dim: int = 768
    """Width (D)."""
    heads: int = 12
    """Attention heads of a layer."""
    hidden: int = 3072
    """Width of the feed-forward part."""
    layers: int = 2
    """Layers."""
    cross_every: int = 1
    """Layers 0, this, twice this … have cross attention."""
    dropout: float = 0.1
    """In training, of attention weights and of every layer's outputs."""

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "hidden", "layers", "cross_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a Q-Former is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} of a Q-Former does not divide into {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout of a Q-Former is {self.dropout}; it must be from 0 to below 1")

    def build(self, memory_dim: int) -> Blip2QFormerModel:
        """A fresh one (normal, deviation 0.02, from torch's generator) that reads tokens of width `memory_dim`."""
        return Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=self.dim,
                num_attention_heads=self.heads,
                intermediate_size=self.hidden,
                num_hidden_layers=self.layers,
                cross_attention_frequency=self.cross_every,
                encoder_hidden_size=memory_dim,
                hidden_dropout_prob=self.dropout,
                attention_probs_dropout_prob=self.dropout,
            )
        )

    def flops(self, memory_dim: int, queries: int, memory: int) -> float:
        """Forward FLOPs for one video: N queries, `memory` tokens that they read."""
        crossed = -(-self.layers // self.cross_every)
        width = self.dim
        maps = queries * (4 * width * width + 2 * width * self.hidden) + 2 * queries * queries * width
        cross = 2 * queries * width * width + 2 * memory * memory_dim * width + 2 * queries * memory * width
        return 2.0 * (self.layers * maps + crossed * cross)


def read_memory(qformer: Blip2QFormerModel, queries: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """(V, N, D): what queries make of what they read.

    Args:
        queries: (V, N, D).
        memory: (V, M, memory_dim).
        mask: (V, M) int64, 0 where there is nothing to read; None: all of it is read.
    """
    return qformer(query_embeds=queries, encoder_hidden_states=memory, encoder_attention_mask=mask).last_hidden_state


def frame_numbers(counts: Sequence[int], where: torch.device) -> Tensor:
    """(F,) int64: the number of each frame in its video, from 0; counts of the videos that stand end to end."""
    return torch.cat([torch.arange(count) for count in counts]).to(where)


def by_video(frames: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Tokens of frames that stand end to end (F, Q, D) -> (V, T * Q, D), each video's in its order, and their mask.

    The mask (V, T * Q) int64 is 0 behind a video's end; None where all videos are of one length.
    """
    longest, width = max(counts), frames.shape[1]
    if min(counts) == longest:
        return frames.unflatten(0, (len(counts), longest)).flatten(1, 2), None
    memory = nn.utils.rnn.pad_sequence(frames.split(list(counts)), batch_first=True).flatten(1, 2)
    lengths = torch.tensor(counts) * width
    mask = (torch.arange(longest * width) < lengths[:, None]).long()
    return memory, mask.to(frames.device)
