"""Examples to batch: stacking, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.types import Batch, Example


def stack(examples: Sequence[Example]) -> Batch:
    """Examples of one shape as one batch: keys, video (B, C, T, H, W), and label (B,) int64 where all have one.

    Clips keep their order in memory: colours stay innermost where they are.

    Raises:
        ValueError: no examples; clips of different shapes or dtypes; a label in some examples only.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    patches = tuple(example.patch for example in examples)
    return Batch(
        keys=tuple(example.key for example in examples),
        video=_videos(examples),
        patches=patches if any(patch is not None for patch in patches) else (),
        label=_labels(examples),
    )


def _videos(examples: Sequence[Example]) -> Tensor | None:
    videos = [example.video for example in examples if example.video is not None]
    if not videos:
        return None
    _check_all("video", examples, len(videos))
    for example in examples:
        assert example.video is not None
        if (example.video.shape, example.video.dtype) != (videos[0].shape, videos[0].dtype):
            raise ValueError(
                f"clips of one batch must have one shape and dtype: {examples[0].key!r} is {tuple(videos[0].shape)}, "
                f"{example.key!r} is {tuple(example.video.shape)} (channels, frames, height, width); "
                f"{videos[0].dtype} and {example.video.dtype}"
            )
    if videos[0].stride(0) == 1:
        return torch.stack([video.permute(1, 2, 3, 0) for video in videos]).permute(0, 4, 1, 2, 3)
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
