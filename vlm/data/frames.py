"""Frames of videos and images for encoders that see each frame alone (EVA-CLIP and its like): uint8, of one size.

As Video-LLaMA (arXiv 2306.02858) reads them. A video is stretched to the encoder's square, whatever its aspect; in
training one random part of that square, the same of all frames, is enlarged to the whole. An image is a video of one
frame: in training a random part of it is resized, else all of it. Pixels stay whole numbers; the model normalises them
(`Batch.colours`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vlm.data import transforms as tf
from vlm.data.rng import SampleRng
from vlm.data.sampling import headtail_frames, uniform_frames
from vlm.data.shard_reencode import is_still
from vlm.data.video import DecodeError, decode, inspect
from vlm.types import Colours, Record

CLIP_COLOURS = Colours((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CROP_RATIO = (3 / 4, 4 / 3)
Sampling = Literal["headtail", "uniform"]


class Seen(NamedTuple):
    """What is seen of one record."""

    frames: Tensor  # (T, 3, size, size) uint8
    is_image: bool
    seconds: tuple[float, ...]  # of each frame, from the beginning; (): an image, or the video does not tell


class Look(NamedTuple):
    """How records are looked at."""

    num_frames: int  # most frames of a video
    size: int
    sampling: Sampling
    crop_scale: tuple[float, float] | None = None  # share of the area that a random crop takes; None: no crop
    uint8_wrap: bool = False  # see `enlarge`


def see(record: Record, look: Look, rng: SampleRng) -> Seen:
    """Decode a record's video or image; raises DecodeError."""
    if record.video is None:
        raise DecodeError(f"record {record.key!r} of {record.shard} has no video member")
    decoders = record.decoders or ("pyav",)
    if is_still(record.video):
        picture = decode(record.video, [0], decoders=decoders)
        return Seen(_see_image(picture[0], look, rng), True, ())
    num_frames, fps = record.num_frames, record.fps
    if num_frames < 0:  # made with --no-check: nobody has looked yet
        info = inspect(record.video)
        num_frames, fps = info.num_frames, info.fps
    indices = sample(num_frames, look.num_frames, look.sampling, rng)
    frames = stretch(decode(record.video, indices.tolist(), decoders=decoders), look.size)
    if look.crop_scale is None:
        pixels = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    else:
        box = tf.draw_resized_crop(look.size, look.size, look.crop_scale, CROP_RATIO, rng.python)
        pixels = enlarge(tf.crop(frames, box), look.size, wrap=look.uint8_wrap)
    return Seen(pixels, False, seconds_of(indices, fps))


def sample(num_frames: int, count: int, sampling: Sampling, rng: SampleRng) -> np.ndarray:
    """Which frames of a video are seen, in order: `count`, or all of a shorter one."""
    if sampling == "headtail":
        return headtail_frames(num_frames, count, rng.python)
    return uniform_frames(num_frames, count)


def seconds_of(indices: Sequence[int] | np.ndarray, fps: float) -> tuple[float, ...]:
    """When frames are on show, to a tenth of a second; () where the frame rate is not known (0)."""
    return tuple(round(int(index) / fps, 1) for index in indices) if fps > 0 else ()


def stretch(frames: np.ndarray, size: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 as (T, size, size, 3): bicubic with antialiasing, aspect not kept."""
    if frames.shape[1:3] == (size, size):
        return frames
    return np.stack([_resize(Image.fromarray(frame), size) for frame in np.ascontiguousarray(frames)])


def enlarge(frames: np.ndarray, size: int, *, wrap: bool = False) -> Tensor:
    """A part of frames (T, h, w, 3) uint8 as (T, 3, size, size) uint8: bicubic, no antialiasing, cut to whole levels.

    Beside hard edges a bicubic curve leaves 0 … 255. `wrap`: such levels come out at the other end of the scale, bright
    specks in the dark, as they did where the released Video-LLaMA weights were trained; else the nearest one is taken.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float()
    pixels = functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
    if wrap:
        return pixels.to(torch.int32).to(torch.uint8)
    return pixels.clamp_(0, 255).to(torch.uint8)


def _see_image(picture: np.ndarray, look: Look, rng: SampleRng) -> Tensor:
    """An image (H, W, 3) uint8 as one frame (1, 3, size, size)."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    if look.crop_scale is not None:
        height, width = picture.shape[:2]
        box = tf.draw_resized_crop(height, width, look.crop_scale, CROP_RATIO, rng.python)
        image = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return torch.from_numpy(_resize(image, look.size).transpose(2, 0, 1).copy())[None]


def _resize(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
