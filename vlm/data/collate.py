"""Examples to batch: stacking, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.types import Batch, Example


def stack(examples: Sequence[Example]) -> Batch:
    """Examples of one shape as one batch: keys, video (B, C, T, H, W), and label (B,) int64 where all have one.

    Raises:
        ValueError: no examples; clips of different shapes; a label in some examples only.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    return Batch(keys=tuple(example.key for example in examples), video=_videos(examples), label=_labels(examples))


def _videos(examples: Sequence[Example]) -> Tensor | None:
    videos = [example.video for example in examples if example.video is not None]
    if not videos:
        return None
    _check_all("video", examples, len(videos))
    for example in examples:
        assert example.video is not None
        if example.video.shape != videos[0].shape:
            raise ValueError(
                f"clips of one batch must have one shape: {examples[0].key!r} is {tuple(videos[0].shape)}, "
                f"{example.key!r} is {tuple(example.video.shape)} (channels, frames, height, width)"
            )
    return torch.stack(videos)


def _labels(examples: Sequence[Example]) -> Tensor | None:
    labels = [example.label for example in examples if example.label is not None]
    if not labels:
        return None
    _check_all("label", examples, len(labels))
    return torch.tensor(labels, dtype=torch.int64)


def _check_all(name: str, examples: Sequence[Example], present: int) -> None:
    if present < len(examples):
        lacking = [example.key for example in examples if getattr(example, name) is None]
        raise ValueError(f"{present} of the {len(examples)} examples of a batch have a {name}; {lacking[0]!r} has none")
