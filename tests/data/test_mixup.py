"""Mixup and CutMix of a batch (the recorded values are in tests/parity)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vlm.data import mixup
from vlm.data.mixup import Mix
from vlm.types import UserError

SETTINGS: dict[str, Any] = {
    "num_classes": 5,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "probability": 1.0,
    "switch_probability": 0.5,
}


def draws(**changes: float) -> list[Mix]:
    settings = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch_probability": 0.5, **changes}
    generator = np.random.RandomState(0)
    return [mixup.draw_mix(**settings, generator=generator) for _ in range(1000)]


def test_which_kind_is_drawn() -> None:
    assert np.mean([mix.cut for mix in draws()]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([mix.cut for mix in draws(switch_probability=0.2)]) == pytest.approx(0.2, abs=0.05)
    assert all(mix.cut for mix in draws(mixup=0))
    assert not any(mix.cut for mix in draws(cutmix=0))
    assert {mix.share for mix in draws(mixup=0, cutmix=0)} == {1.0}
    unmixed = [mix.share == 1.0 for mix in draws(probability=0.3)]
    assert np.mean(unmixed) == pytest.approx(0.7, abs=0.05)
    assert all(0 <= mix.share <= 1 for mix in draws())


def test_targets_sum_to_one_and_agree_with_the_pixels() -> None:
    """Clip i is filled with the value i, so that its pixels say how much of which clip it holds."""
    label = torch.tensor([0, 1, 2, 3])
    for seed in range(30):
        video = torch.eye(4)[:, :, None, None, None].expand(4, 4, 2, 6, 8).clone()
        mixing, target = mixup.mix_batch(
            video.shape, label, **{**SETTINGS, "smoothing": 0.0}, generator=np.random.RandomState(seed)
        )
        assert mixing is not None
        video = mixup.apply_mixing(video, mixing)
        torch.testing.assert_close(video.mean((2, 3, 4)), target[:, :4], rtol=0, atol=1e-5)
        torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_blend_and_paste_mix_each_clip_with_its_mirror() -> None:
    video = torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 2, 4, 6)
    blended = mixup.blend(video.clone(), 0.75)
    for i in range(4):
        torch.testing.assert_close(blended[i], torch.full((3, 2, 4, 6), 0.75 * i + 0.25 * (3 - i)))
    pasted = mixup.paste(video.clone(), mixup.Cut(1, 3, 2, 6))
    for i in range(4):
        assert (pasted[i, :, :, 1:3, 2:6] == 3 - i).all()
        assert (pasted[i] == i).sum() == 3 * 2 * (4 * 6 - 2 * 4)


def test_an_empty_box_keeps_everything() -> None:
    cut = mixup.cut_around(32, 32, 0.9999, 5, 5)
    assert mixup.kept_share(32, 32, cut) == 1.0
    assert mixup.kept_share(32, 32, mixup.cut_around(32, 32, 0.0, 16, 16)) == 0.0


def test_smoothed_targets() -> None:
    target = mixup.soft_targets(torch.tensor([1, 0]), 4, 0.2)
    torch.testing.assert_close(target, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]))


def test_a_video_twice_in_a_batch_of_two_mixes_with_itself() -> None:
    _, target = mixup.mix_batch((2, 3, 2, 4, 4), torch.tensor([3, 3]), **SETTINGS, generator=np.random.RandomState(0))
    torch.testing.assert_close(target, mixup.soft_targets(torch.tensor([3, 3]), 5, 0.1))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_an_odd_batch_is_refused_whether_or_not_it_would_be_mixed(probability: float) -> None:
    settings = {**SETTINGS, "probability": probability}
    with pytest.raises(UserError, match=r"has 3 \(an odd number\).*inputs.repeats=2"):
        mixup.mix_batch((3, 3, 2, 4, 4), torch.tensor([0, 1, 2]), **settings, generator=np.random.RandomState(0))


def test_equal_generators_give_equal_batches() -> None:
    label = torch.tensor([0, 1, 2, 3])
    first, again = (
        mixup.mix_batch((4, 3, 2, 8, 8), label, **SETTINGS, generator=np.random.RandomState(7)) for _ in range(2)
    )
    assert first[0] is not None
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    unmixed = mixup.mix_batch(
        (4, 3, 2, 8, 8), label, **{**SETTINGS, "probability": 0.0}, generator=np.random.RandomState(7)
    )
    assert unmixed[0] is None
    assert torch.equal(unmixed[1], mixup.soft_targets(label, 5, 0.1))
