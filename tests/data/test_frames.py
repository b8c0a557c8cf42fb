"""Frames for encoders that see each frame alone."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.encoded import encode, pictures
from vlm.data.frames import Look, enlarge, seconds_of, see, stretch
from vlm.data.rng import SampleRng
from vlm.data.sampling import headtail_frames, uniform_frames
from vlm.data.video import DecodeError
from vlm.types import Record

WHOLE = Look(num_frames=4, size=16, sampling="uniform")


def record(data: bytes | None, num_frames: int, fps: float = 12.0) -> Record:
    return Record(
        key="v", shard="s", row=0, video=data, annotation={}, num_frames=num_frames, fps=fps, decoders=("pyav",)
    )


def levels(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of one grey each, which say their number: 8 * (number + 1)."""
    return np.stack([np.full((height, width, 3), 8 * (number + 1), np.uint8) for number in range(count)])


def picture(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def numbers(frames: torch.Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 8) - 1 for frame in frames]


# Which frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 8, 9, 300])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_both_samplings_give_all_that_a_short_video_has(num_frames: int, count: int) -> None:
    for frames in (headtail_frames(num_frames, count, random.Random(0)), uniform_frames(num_frames, count)):
        assert len(set(frames.tolist())) == min(num_frames, count)
        assert (np.diff(frames) > 0).all()
        assert 0 <= frames[0] <= frames[-1] < num_frames


def test_headtail_takes_from_both_halves() -> None:
    drawn = [headtail_frames(100, 8, random.Random(seed)) for seed in range(20)]
    assert all((frames < 50).sum() == 4 for frames in drawn)
    assert len({tuple(frames) for frames in drawn}) == 20


def test_seconds() -> None:
    assert seconds_of([0, 12, 31], 12.5) == (0.0, 1.0, 2.5)
    assert seconds_of([0, 12], 0) == ()


# What is seen ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [20, -1])
def test_a_video_is_stretched(num_frames: int) -> None:
    """-1: shards made without looking."""
    seen = see(record(encode(levels(20)), num_frames), WHOLE, SampleRng(0))
    assert (seen.frames.dtype, seen.frames.shape, seen.is_image) == (torch.uint8, (4, 3, 16, 16), False)
    assert numbers(seen.frames) == [0, 5, 10, 15]
    assert seen.seconds == (0.0, 0.4, 0.8, 1.2)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_short_video_has_fewer_frames(num_frames: int) -> None:
    for look in (WHOLE, WHOLE._replace(sampling="headtail", crop_scale=(0.5, 1.0))):
        seen = see(record(encode(levels(num_frames)), num_frames), look, SampleRng(0))
        assert numbers(seen.frames) == list(range(num_frames))


def test_a_crop_is_the_same_of_all_frames() -> None:
    still = np.repeat(pictures(1, 64, 48), 6, 0)
    look = WHOLE._replace(crop_scale=(0.5, 0.6))
    data = encode(still, options={"qp": "0"})
    crops = [see(record(data, 6), look, SampleRng(seed)).frames for seed in range(4)]
    for crop in crops:
        assert (crop.float() - crop[:1].float()).abs().max() <= 4  # what coding leaves of difference
    assert (crops[0].float() - crops[1].float()).abs().mean() > 4
    assert torch.equal(crops[2], see(record(data, 6), look, SampleRng(2)).frames)


def test_an_image_is_one_frame() -> None:
    image = pictures(1, 64, 40)[0]
    seen = see(record(picture(image), 1, 0.0), WHOLE, SampleRng(0))
    want = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
    assert (seen.is_image, seen.seconds) == (True, ())
    assert np.array_equal(seen.frames[0].permute(1, 2, 0).numpy(), want)
    cropped = see(record(picture(image), 1, 0.0), WHOLE._replace(crop_scale=(0.5, 0.6)), SampleRng(1))
    assert cropped.frames.shape == seen.frames.shape
    assert not torch.equal(cropped.frames, seen.frames)


def test_no_video() -> None:
    with pytest.raises(DecodeError, match="no video member"):
        see(record(None, 3), WHOLE, SampleRng(0))


def test_levels_beyond_the_scale() -> None:
    """A hard edge, enlarged: clamped, no level is out of place; wrapped, black turns bright and white dark."""
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    frames[:, :, 4:] = 255
    clamped, wrapped = (enlarge(frames, 32, wrap=wrap).to(torch.int64) for wrap in (False, True))
    rising = clamped[0, 0, 16].diff()
    assert (rising >= 0).all()
    wrong = (clamped - wrapped).abs() > 128
    assert wrong.any()
    assert torch.equal(clamped[~wrong], wrapped[~wrong])
    assert wrapped[:, :, :, :12].max() > 200
    assert wrapped[:, :, :, 20:].min() < 55


def test_stretching_leaves_frames_of_the_size_alone() -> None:
    frames = pictures(2, 16, 16)
    assert stretch(frames, 16) is frames
