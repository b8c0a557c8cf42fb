"""Crops, resizing, normalisation and erasing (the recorded values are in tests/parity)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from vlm.data import transforms
from vlm.data.transforms import Box

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (4, 30, 41, 3)).astype(np.uint8)


def inside(box: Box, height: int, width: int) -> bool:
    return 0 <= box.top <= height - box.height and 0 <= box.left <= width - box.width and min(box[2:]) > 0


def test_resized_crops_are_inside_and_as_asked() -> None:
    generator = random.Random(0)
    shares, aspects = [], []
    for _ in range(2000):
        box = transforms.draw_resized_crop(240, 320, (0.08, 1.0), (0.75, 1.3333), generator)
        assert inside(box, 240, 320)
        shares.append(box.height * box.width / (240 * 320))
        aspects.append(box.width / box.height)
    assert min(shares) < 0.1
    assert max(shares) > 0.95
    assert min(aspects) == pytest.approx(0.75, rel=0.02)
    assert max(aspects) == pytest.approx(1.3333, rel=0.02)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_resized_crops_of_tiny_and_long_frames(height: int, width: int) -> None:
    generator = random.Random(0)
    for _ in range(50):
        assert inside(
            transforms.draw_resized_crop(height, width, (0.08, 1.0), (0.75, 1.3333), generator), height, width
        )


def test_erase_boxes() -> None:
    generator = random.Random(0)
    drawn = [transforms.draw_erase_box(64, 48, 0.25, generator) for _ in range(2000)]
    boxes = [box for box in drawn if box]
    assert len(boxes) / len(drawn) == pytest.approx(0.25, abs=0.03)
    for box in boxes:
        assert inside(box, 64, 48)
        assert 0.015 < box.height * box.width / (64 * 48) < 0.35
    assert transforms.draw_erase_box(64, 48, 0.0, random.Random(0)) is None
    for size in (1, 2, 3):  # a box may round to nothing there, which erases nothing
        tiny = transforms.draw_erase_box(size, size, 1.0, random.Random(0))
        if tiny:
            assert transforms.erase(torch.zeros(3, 2, size, size), tiny, torch.Generator()).shape == (3, 2, size, size)


def test_multi_scale_crops() -> None:
    generator = random.Random(0)
    seen = set()
    for _ in range(500):
        box = transforms.draw_multi_scale_crop(240, 320, 224, (1.0, 0.875, 0.75, 0.66), generator)
        assert inside(box, 240, 320)
        seen.add(box)
    assert len({box[2:] for box in seen}) == 10
    # Near the output size a side snaps to it: no resampling; but never beyond a frame that is smaller.
    assert transforms.multi_scale_sizes(226, 300, 224, (1.0,)) == [(224, 224)]
    assert transforms.multi_scale_sizes(227, 300, 224, (1.0,)) == [(227, 227)]
    assert transforms.draw_multi_scale_crop(222, 300, 224, (1.0,), generator)[2:] == (222, 224)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 57), (57, 32), (40, 90)])
@pytest.mark.parametrize("num_crops", [1, 2, 3, 5])
def test_spatial_boxes_cover_the_long_side(height: int, width: int, num_crops: int) -> None:
    boxes = transforms.spatial_boxes(height, width, 32, num_crops)
    assert len(boxes) == num_crops
    assert all(inside(box, height, width) and box[2:] == (32, 32) for box in boxes)
    starts = [box.top if height > width else box.left for box in boxes]
    slack = max(height, width) - 32
    if num_crops == 1:
        assert boxes == [transforms.center_box(height, width, 32)]
        assert abs(starts[0] - slack / 2) <= 0.5
    else:
        assert (starts[0], starts[-1]) == (0, slack)
        assert starts == sorted(starts)


@pytest.mark.parametrize(("height", "width"), [(15, 20), (30, 20), (64, 87), (30, 87), (1, 1), (31, 42)])
def test_bilinear_resize_is_interpolation_without_antialiasing(frames: np.ndarray, height: int, width: int) -> None:
    resized = transforms.resize_bilinear(frames, height, width)
    assert resized.shape == (4, height, width, 3)
    assert resized.dtype == np.uint8
    exact = functional.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).double(), size=(height, width), mode="bilinear"
    ).permute(0, 2, 3, 1)
    difference = np.abs(resized - exact.numpy())
    assert difference.max() <= 1.01, "the two cut-offs of low bits cost at most one level"
    assert difference.mean() < 0.5


def test_bilinear_resize_to_the_same_size_changes_nothing(frames: np.ndarray) -> None:
    assert transforms.resize_bilinear(frames, 30, 41) is frames


def test_flat_pictures_stay_flat() -> None:
    for level in range(0, 256, 15):
        flat = np.full((1, 24, 32, 3), level, dtype=np.uint8)
        assert (transforms.resize_bilinear(flat, 17, 23) == level).all()
        assert (transforms.resize_antialiased(flat, 17) == level).all()


def test_antialiased_resize_averages() -> None:
    stripes = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    averaged = transforms.resize_antialiased(stripes, 16)
    assert np.abs(averaged[:, :, 1:-1].astype(int) - 127).max() <= 2
    assert transforms.resize_antialiased(averaged, 16) is averaged


def test_video_layout_and_normalisation(frames: np.ndarray) -> None:
    video = transforms.to_video(frames)
    assert video.shape == (3, 4, 30, 41)
    assert video.dtype == torch.float32
    assert video.is_contiguous()
    assert video[1, 2, 3, 4] == frames[2, 3, 4, 1]
    normal = transforms.normalize(video, MEAN, STD)
    expected = (frames.astype(np.float64) / 255 - MEAN) / STD
    np.testing.assert_allclose(normal.permute(1, 2, 3, 0).numpy(), expected, atol=1e-6)
    read_only = frames.view()
    read_only.flags.writeable = False
    assert transforms.to_video(read_only[:, :1, :1]).add_(1).shape == (3, 4, 1, 1), "memory of its own"


def test_crop_first_is_the_same_as_normalise_first(frames: np.ndarray) -> None:
    box = Box(3, 5, 20, 25)
    ours = transforms.resize_video(transforms.to_video(transforms.crop(frames, box)), 16)
    ours = transforms.normalize(ours, MEAN, STD)
    whole = transforms.normalize(transforms.to_video(frames), MEAN, STD)
    theirs = transforms.resize_video(transforms.crop_video(whole, box), 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_resize_of_the_right_size_is_no_work() -> None:
    video = torch.rand(3, 2, 16, 16)
    assert transforms.resize_video(video, 16) is video
    assert transforms.resize_video(video, 8).shape == (3, 2, 8, 8)


def test_erasing_touches_the_box_alone() -> None:
    video = torch.zeros(3, 4, 20, 20)
    box = Box(2, 3, 10, 12)
    erased = transforms.erase(video, box, torch.Generator().manual_seed(0))
    assert erased is video
    inner = transforms.crop_video(video, box).clone()
    transforms.crop_video(video, box).zero_()
    assert not video.any()
    assert inner.std() == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(inner[:, 0], inner[:, 1]), "each frame has noise of its own"


def test_a_patch_is_what_erasing_lays_upon_a_clip() -> None:
    box = Box(2, 3, 10, 12)
    erased = transforms.erase(torch.zeros(3, 4, 20, 20), box, torch.Generator().manual_seed(0))
    patch = transforms.draw_patch(box, 4, torch.Generator().manual_seed(0))
    assert patch.pixels.shape == (3, 4, 10, 12)
    assert torch.equal(transforms.apply_patch(torch.zeros(3, 4, 20, 20), patch), erased)


def test_a_box_of_resized_frames(frames: np.ndarray) -> None:
    whole = transforms.resize_bilinear(frames, 17, 23)
    box = Box(2, 5, 13, 11)
    np.testing.assert_array_equal(transforms.resize_bilinear(frames, 17, 23, box), transforms.crop(whole, box))
    same = transforms.resize_bilinear(frames, *transforms.frame_size(frames), box)
    np.testing.assert_array_equal(same, transforms.crop(frames, box))


def test_rounded_resizing_is_a_level_apart_at_most(frames: np.ndarray) -> None:
    for size in (7, 16, 61):
        exact = transforms.resize_video(transforms.to_video(frames), size)
        rounded = transforms.resize_frames(transforms.crop(frames, Box(0, 0, *frames.shape[1:3])), size)
        assert rounded.shape == (len(frames), size, size, 3)
        apart = (transforms.as_video(rounded).float() - exact).abs()
        assert apart.max() <= 1.01
        assert apart.mean() < 0.35
    same = frames[:, :9, :9]
    assert transforms.resize_frames(same, 9) is same


def test_hull() -> None:
    assert transforms.hull([Box(0, 4, 5, 5), Box(0, 0, 5, 5), Box(0, 9, 5, 5)]) == Box(0, 0, 5, 14)
    assert transforms.hull([Box(3, 4, 5, 6)]) == Box(3, 4, 5, 6)


@pytest.mark.parametrize("places", [[0, 1, 2], [1], [2, 0, 1], [1, 1, 1], [0, 2]])
def test_picked_frames(frames: np.ndarray, places: list[int]) -> None:
    video = transforms.as_video(frames[:3])
    picked = transforms.pick(video, np.array(places))
    assert torch.equal(picked, video[:, places])
    assert picked.stride(0) == 1
    assert (picked.untyped_storage().data_ptr() == video.untyped_storage().data_ptr()) == (
        places in ([0, 1, 2], [0, 2])
    )
