"""Tiny models that read videos, and batches for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.data.packing import Row, pack
from vlm.models.eva import TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import Llmva, LlmvaConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.models.video_llama import VideoLlama, VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.types import IGNORE, Batch, TextRows

WORDS, SIDE, QUERIES, DIM, PLACES, OTHER, OTHER_DIM = 60, 28, 3, 16, 4, 2, 10


def tower(**settings: Any) -> TowerConfig:
    sizes = {"image_size": SIDE, "dim": 24, "layers": 2, "heads": 4, "hidden": 32, "queries": QUERIES}
    seer = {"query_dim": DIM, "query_layers": 2, "query_heads": 2, "query_hidden": 24}
    return TowerConfig(**{**sizes, **seer, **settings})


def qformer(**settings: Any) -> QFormerConfig:
    return QFormerConfig(**{"dim": DIM, "heads": 2, "hidden": 24, **settings})


def llama(**settings: Any) -> LlamaBaseConfig:
    return LlamaBaseConfig(**{"dim": 32, "layers": 3, "heads": 4, "hidden": 48, "vocab_size": WORDS, **settings})


def opt(**settings: Any) -> OptBaseConfig:
    sizes = {"dim": 32, "layers": 3, "heads": 4, "hidden": 48, "vocab_size": WORDS, "max_positions": 64}
    return OptBaseConfig(**{**sizes, **settings})


def _frames() -> dict[str, Any]:
    sizes = {"frame_tokens": QUERIES, "frame_dim": DIM, "num_video_tokens": PLACES, "max_frames": 5}
    return {**sizes, "qformer": qformer()}


def video_llama_config(**settings: Any) -> VideoLlamaConfig:
    return VideoLlamaConfig(**{**_frames(), "tower": tower(), "llama": llama(), **settings})


def llmva_config(**settings: Any) -> LlmvaConfig:
    own = {"opt": opt(), "other_tokens": OTHER, "other_dim": OTHER_DIM, "max_other": 6}
    return LlmvaConfig(**{**_frames(), **own, **settings})


def build(config: Any) -> Any:
    """A model in evaluation mode, the same each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        return config.build().eval()


def video_llama(**settings: Any) -> VideoLlama:
    return build(video_llama_config(**settings))


def llmva(**settings: Any) -> Llmva:
    return build(llmva_config(**settings))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(
    lengths: Sequence[int], places: int = PLACES, learnt: int = 4, videos: Sequence[int] | None = None
) -> TextRows:
    """Rows of random tokens, the last `learnt` to be predicted; `videos`: which of the batch each has, -1: none."""
    made = []
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 + length)
        ids = torch.randint(3, WORDS, (length,), generator=generator).tolist()
        labels = [IGNORE] * (length - learnt) + ids[length - learnt :]
        video = number if videos is None else videos[number]
        made.append(Row(tuple(ids), tuple(labels), (1, 1 + places) if video >= 0 else (0, 0), max(video, 0)))
    return pack(made, places)


def pixels(counts: Sequence[int], text: TextRows | None = None, seed: int = 1, view: str = "caption") -> Batch:
    """Videos of `counts` frames."""
    return Batch(
        keys=tuple(f"clip{number}" for number in range(max(1, len(counts)))),
        frames=noise(seed, sum(counts), 3, SIDE, SIDE) if counts else None,
        frame_counts=tuple(counts),
        views={} if text is None else {view: text},
    )


def features(counts: Sequence[int], text: TextRows | None = None, seed: int = 1, other: int = 5) -> Batch:
    """Boundaries in videos of `counts` frames, as tokens."""
    count = len(counts)
    return Batch(
        keys=tuple(f"clip{number}" for number in range(count)),
        frame_tokens=noise(seed, sum(counts), QUERIES, DIM),
        frame_counts=tuple(counts),
        extra={"boundary": noise(seed + 1, count, 2).sigmoid(), "other": noise(seed + 2, count, other, OTHER_DIM)},
        views={} if text is None else {"caption": text},
    )
