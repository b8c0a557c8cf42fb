"""Video tokens take exactly their places, whichever rows share a video, and gradients reach text and video."""

from __future__ import annotations

import pytest
import torch

from vlm.nn.splice import splice


def test_places_and_sources() -> None:
    text, video = torch.zeros(7, 2), torch.arange(12.0).view(2, 3, 2)
    slots, sources = torch.tensor([1, 2, 4, 5]), torch.tensor([3, 4, 0, 1])
    out = splice(text, video, slots, sources)
    assert torch.equal(out[slots], video.flatten(0, 1)[sources])
    assert not out[[0, 3, 6]].any()
    assert not text.any()


def test_gradients_reach_both() -> None:
    text, video = torch.randn(4, 2, requires_grad=True), torch.randn(1, 2, 2, requires_grad=True)
    # the video's first token stands in two rows
    splice(text, video, torch.tensor([0, 2]), torch.tensor([0, 0])).sum().backward()
    assert torch.equal(text.grad, torch.tensor([[0.0, 0.0], [1, 1], [0, 0], [1, 1]]))
    assert torch.equal(video.grad, torch.tensor([[[2.0, 2.0], [0, 0]]]))


def test_a_row_without_slots_leaves_video_a_zero_gradient() -> None:
    """So that every rank has the same gradients to exchange."""
    video = torch.randn(1, 2, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    out = splice(torch.ones(3, 2), video, none, none)
    out.sum().backward()
    assert torch.equal(out, torch.ones(3, 2))
    assert video.grad is not None
    assert not video.grad.any()


def test_precision_is_the_texts() -> None:
    out = splice(torch.zeros(2, 2, dtype=torch.bfloat16), torch.ones(1, 1, 2), torch.tensor([1]), torch.tensor([0]))
    assert out.dtype == torch.bfloat16
    assert out[1].all()


def test_slots_and_sources_go_together() -> None:
    with pytest.raises(AssertionError, match="1 slots, 2 sources"):
        splice(torch.zeros(2, 2), torch.ones(1, 2, 2), torch.tensor([1]), torch.tensor([0, 1]))
