"""Stacking examples."""

from __future__ import annotations

import pytest
import torch

from vlm.data.collate import stack
from vlm.types import Example


def example(key: str, size: int = 4, label: int | None = 1) -> Example:
    return Example(key=key, video=torch.full((3, 2, size, size), float(size)), label=label)


def test_stack() -> None:
    batch = stack([example("a", label=2), example("b", label=0), example("a", label=2)])
    assert batch.keys == ("a", "b", "a")
    assert batch.video is not None
    assert batch.video.shape == (3, 3, 2, 4, 4)
    assert batch.label is not None
    assert batch.label.tolist() == [2, 0, 2]
    assert batch.label.dtype == torch.int64
    assert batch.target is None
    assert batch.mask is None


def test_unlabelled_examples_and_examples_without_video() -> None:
    assert stack([example("a", label=None)]).label is None
    batch = stack([Example(key="a", label=1)])
    assert batch.video is None
    assert batch.label is not None


def test_what_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="at least one"):
        stack([])
    with pytest.raises(ValueError, match=r"'a' is \(3, 2, 4, 4\), 'b' is \(3, 2, 6, 6\)"):
        stack([example("a"), example("b", size=6)])
    with pytest.raises(ValueError, match="1 of the 2 examples of a batch have a label; 'b' has none"):
        stack([example("a"), example("b", label=None)])
    with pytest.raises(ValueError, match="have a video; 'b' has none"):
        stack([example("a"), Example(key="b", label=1)])
