"""What is done to the pixels of a batch where the model is: the same as was done to each clip in its loader."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vlm.data import mixup, pixels, transforms
from vlm.data.box import Box
from vlm.data.collate import stack
from vlm.data.messages import Packed, pair, receive, send
from vlm.types import Batch, Colours, Example, Mixing

COLOURS = Colours((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (4, 3, 6, 8, 3)).astype(np.uint8)


def batch_of(frames: np.ndarray, patched: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(0)
    patches = [transforms.draw_patch(Box(1, 2, 3, 4), 3, generator) if n in patched else None for n in range(4)]
    examples = [
        Example(key=str(n), video=transforms.as_video(clip), patch=patch, label=n)
        for n, (clip, patch) in enumerate(zip(frames, patches, strict=True))
    ]
    return dataclasses.replace(stack(examples), colours=COLOURS)


@pytest.mark.parametrize("mixing", [None, Mixing(0.7, None), Mixing(0.8, (1, 4, 0, 5))])
@pytest.mark.parametrize("patched", [(), (1, 3)])
def test_as_in_the_loader_to_the_bit(frames: np.ndarray, mixing: Mixing | None, patched: tuple[int, ...]) -> None:
    batch = dataclasses.replace(batch_of(frames, patched), mixing=mixing)
    clips = []
    generator = torch.Generator().manual_seed(0)
    for number, clip in enumerate(frames):
        video = transforms.normalize(transforms.to_video(clip), *COLOURS)
        clips.append(transforms.erase(video, Box(1, 2, 3, 4), generator) if number in patched else video)
    expected = torch.stack(clips)
    if mixing is not None:
        mixup.apply_mixing(expected, mixing)
    before = batch.video.clone()  # type: ignore[union-attr]
    done = pixels.finished(batch)
    assert torch.equal(done.video, expected)  # type: ignore[arg-type]
    assert (done.colours, done.patches, done.mixing) == (None, (), None)
    assert torch.equal(batch.video, before), "the batch stays as it was"  # type: ignore[arg-type]
    assert torch.equal(done.label, batch.label)  # type: ignore[arg-type]


def test_frames_are_normalised_too(frames: np.ndarray) -> None:
    pictures = torch.from_numpy(frames[0]).permute(0, 3, 1, 2)
    done = pixels.finished(Batch(keys=("a",), frames=pictures, frame_counts=(3,), colours=COLOURS))
    assert done.frames is not None
    assert done.frames.dtype == torch.float32
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in COLOURS)
    torch.testing.assert_close(done.frames, (pictures / 255 - mean) / std, rtol=0, atol=1e-6)


def test_what_is_normalised_stays() -> None:
    batch = Batch(keys=("a",), video=torch.rand(1, 3, 2, 4, 4))
    assert pixels.finished(batch) is batch
    again = pixels.finished(pixels.finished(batch_of(np.zeros((4, 3, 6, 8, 3), np.uint8))))
    assert again.video is not None
    assert again.video.min() > -3


def test_patches_move_with_their_batch(frames: np.ndarray) -> None:
    moved = batch_of(frames, (2,)).to("meta")
    assert [patch is not None for patch in moved.patches] == [False, False, True, False]
    assert moved.patches[2] is not None
    assert moved.patches[2].pixels.device.type == "meta"
    assert batch_of(frames).patches == ()


def test_colours_stay_innermost_and_clips_must_be_alike(frames: np.ndarray) -> None:
    batch = batch_of(frames)
    assert batch.video is not None
    assert batch.video.stride() == (3 * 6 * 8 * 3, 1, 6 * 8 * 3, 8 * 3, 3)
    video = transforms.as_video(frames[0])
    with pytest.raises(ValueError, match=r"one shape and dtype.*uint8.*float32"):
        stack([Example(key="a", video=video), Example(key="b", video=video.float())])


def test_batches_come_from_a_process_as_they_lie_in_memory() -> None:
    clips = np.random.RandomState(0).randint(0, 256, (4, 3, 60, 80, 3)).astype(np.uint8)
    batch = batch_of(clips, (1,))
    wide = torch.from_numpy(clips)[:, :, 5:50, ::2]
    here, there = pair()
    send(here, (), Packed((batch, wide, torch.tensor(2.5))))
    came, part, number = receive(there).load()
    assert came.video.stride() == batch.video.stride()  # type: ignore[union-attr]
    assert torch.equal(came.video, batch.video)  # type: ignore[arg-type]
    assert torch.equal(came.patches[1].pixels, batch.patches[1].pixels)  # type: ignore[union-attr]
    assert came.colours == COLOURS
    assert torch.equal(part, wide)
    assert number == 2.5
