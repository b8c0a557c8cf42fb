"""Pixels of one clip: crops, resizing, normalisation, random erasing (RandAugment: randaugment.py).

Frames are numpy uint8 (T, H, W, 3) until `to_video` makes the float32 (3, T, H, W) that models eat. All frames of
a clip share the parameters of every transform. Drawing (from a passed generator) and applying are separate functions.

The maths and the order of the draws are those of the published VideoMAE / ViT-LLaMA training code; where the order of
the work differs (crop before float, normalise after resize, point operations after the crop), the steps commute.
Random erasing: arXiv 1708.04896. Multi-scale crop: TSN, arXiv 1608.00859.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

from vlm.data.box import Box
from vlm.types import Patch

# ---------------------------------------------------------------------------------------------------- boxes, drawn


def draw_resized_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: random.Random
) -> Box:
    """A box of uniform area and log-uniform aspect (width / height); after 10 that do not fit, the centre."""
    area = height * width
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        target = generator.uniform(*scale) * area
        aspect = math.exp(generator.uniform(*log_ratio))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = generator.randint(0, height - h)
            return Box(top, generator.randint(0, width - w), h, w)
    return fallback_crop(height, width, ratio)


def fallback_crop(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest centred box whose aspect is within `ratio`."""
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return Box((height - h) // 2, (width - w) // 2, h, w)


ERASE_AREA = (0.02, 1 / 3)
ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


def draw_erase_box(height: int, width: int, probability: float, generator: random.Random) -> Box | None:
    """With `probability`, a box of 2 % to 1/3 of the area, smaller than the frame both ways; None: erase nothing."""
    if generator.random() > probability:
        return None
    for _ in range(100):
        target = generator.uniform(*ERASE_AREA) * height * width
        aspect = math.exp(generator.uniform(*ERASE_LOG_ASPECT))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if w < width and h < height:
            top = generator.randint(0, height - h)
            return Box(top, generator.randint(0, width - w), h, w)
    return None


def multi_scale_sizes(height: int, width: int, size: int, scales: Sequence[float]) -> list[tuple[int, int]]:
    """Crop sizes (height, width) to choose from: sides `scale * short side`, at most one scale apart.

    A side within 2 pixels of the output size is taken as the output size, so that it needs no resampling.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    return [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]


# (column, row) in quarters of the free space: corners and centre, mid-edges, quarter points.
_OFFSETS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))


def multi_scale_boxes(height: int, width: int, crop_height: int, crop_width: int) -> list[Box]:
    """The 13 fixed places of a crop in a frame."""
    row, column = (height - crop_height) // 4, (width - crop_width) // 4
    return [Box(y * row, x * column, crop_height, crop_width) for x, y in _OFFSETS]


def draw_multi_scale_crop(height: int, width: int, size: int, scales: Sequence[float], generator: random.Random) -> Box:
    """A crop of one of the sizes at one of the 13 places (pretraining)."""
    crop_height, crop_width = generator.choice(multi_scale_sizes(height, width, size, scales))
    # A frame a pixel or two smaller than the output cannot hold a side that was rounded up to it.
    crop_height, crop_width = min(crop_height, height), min(crop_width, width)
    return generator.choice(multi_scale_boxes(height, width, crop_height, crop_width))


# -------------------------------------------------------------------------------------------------- boxes, computed


def frame_size(frames: np.ndarray) -> tuple[int, int]:
    """(height, width) of frames (T, H, W, 3)."""
    return frames.shape[1], frames.shape[2]


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) after the shorter side is scaled to `short_side`; the longer one is rounded down."""
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def center_box(height: int, width: int, size: int) -> Box:
    """The central square; halves are rounded to even, as the original does."""
    return Box(round((height - size) / 2), round((width - size) / 2), size, size)


def spatial_boxes(height: int, width: int, size: int, num_crops: int) -> list[Box]:
    """`num_crops` squares evenly along the longer side, first to last, central across; a single one is the centre."""
    if num_crops == 1:
        return [center_box(height, width, size)]
    step = (max(height, width) - size) / (num_crops - 1)
    starts = [int(crop * step) for crop in range(num_crops)]
    across = round((min(height, width) - size) / 2)
    if height >= width:
        return [Box(start, across, size, size) for start in starts]
    return [Box(across, start, size, size) for start in starts]


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of these."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.rows.stop for box in boxes), max(box.columns.stop for box in boxes)
    return Box(top, left, bottom - top, right - left)


# ------------------------------------------------------------------------------------------------- pixels to pixels


def crop(frames: np.ndarray, box: Box) -> np.ndarray:
    """The box of all frames, (T, box.height, box.width, 3), a view."""
    return frames[:, box.rows, box.columns]


def resize_bilinear(frames: np.ndarray, height: int, width: int, box: Box | None = None) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 resized without antialiasing, to the bit as OpenCV's INTER_LINEAR does it; or a box of
    them.

    OpenCV interpolates 8-bit pictures with 11-bit weights and cuts off low bits between the passes, so rounding an
    exact interpolation would differ by one level at about a tenth of the pixels.
    """
    num_frames, old_height, old_width, channels = frames.shape
    if (old_height, old_width) == (height, width):
        return frames if box is None else crop(frames, box)
    box = box or Box(0, 0, height, width)
    near, far, near_weight, far_weight = (values[box.columns] for values in _taps(old_width, width))
    columns = np.arange(channels)
    near, far = (near[:, None] * channels + columns).ravel(), (far[:, None] * channels + columns).ravel()
    near_weight, far_weight = np.repeat(near_weight, channels), np.repeat(far_weight, channels)
    above, below, above_weight, below_weight = (values[box.rows] for values in _taps(old_height, height))
    above_weight, below_weight = above_weight[:, None], below_weight[:, None]
    resized = np.empty((num_frames, box.height, box.width * channels), dtype=np.uint8)
    # memory that the frames share: new arrays for each would take two fifths of the time
    taken = np.empty((old_height, box.width * channels), dtype=np.uint8)
    across, other_across = np.empty((2, *taken.shape), dtype=np.int32)
    down, other_down = np.empty((2, *resized.shape[1:]), dtype=np.int32)
    for frame, place in zip(frames.reshape(num_frames, old_height, old_width * channels), resized, strict=True):
        # mode="clip" spares a copy of the output; no index is outside
        np.multiply(np.take(frame, near, axis=1, out=taken, mode="clip"), near_weight, out=across)
        np.multiply(np.take(frame, far, axis=1, out=taken, mode="clip"), far_weight, out=other_across)
        across += other_across
        across >>= 4
        np.take(across, above, axis=0, out=down, mode="clip")
        down *= above_weight
        down >>= 16
        np.take(across, below, axis=0, out=other_down, mode="clip")
        other_down *= below_weight
        other_down >>= 16
        down += other_down
        down += 2
        down >>= 2
        place[:] = down
    return resized.reshape(num_frames, box.height, box.width, channels)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` samples along an axis: two source positions and their weights, which add up to 2048."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    outside = (first < 0) | (first >= old - 1)
    share[outside] = 0
    first = np.clip(first, 0, old - 1)
    weight = np.rint((1 - share) * 2048).astype(np.int32), np.rint(share * 2048).astype(np.int32)
    return first, np.minimum(first + 1, old - 1), *weight


def resize_antialiased(frames: np.ndarray, size: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 as (T, size, size, 3): Pillow's bilinear filter, which averages when it shrinks."""
    if frames.shape[1:3] == (size, size):
        return frames
    resized = np.empty((len(frames), size, size, 3), dtype=np.uint8)
    for frame, place in zip(np.ascontiguousarray(frames), resized, strict=True):
        place[:] = np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))
    return resized


# ------------------------------------------------------------------------------------------------ pixels to tensors


def as_video(frames: np.ndarray) -> Tensor:
    """Frames (T, H, W, 3) as (3, T, H, W): the same memory, colours innermost."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)


def to_video(frames: np.ndarray) -> Tensor:
    """Frames (T, H, W, 3) uint8 as float32 (3, T, H, W), still 0 … 255, in memory of its own."""
    return torch.from_numpy(np.array(frames.transpose(3, 0, 1, 2), dtype=np.float32, order="C"))


def pick(video: Tensor, places: np.ndarray) -> Tensor:
    """The frames at these places of a video (3, T, H, W), colours innermost; a view where they are evenly spaced."""
    steps = np.diff(places)
    if len(steps) and steps[0] > 0 and (steps == steps[0]).all():
        return video[:, places[0] : places[-1] + 1 : steps[0]]
    return as_video(video.permute(1, 2, 3, 0).numpy()[places])


def crop_video(video: Tensor, box: Box) -> Tensor:
    """The box of a video (…, H, W), a view."""
    return video[..., box.rows, box.columns]


def resize_video(video: Tensor, size: int) -> Tensor:
    """Video (3, T, H, W) float as (3, T, size, size): bilinear, pixel centres aligned, no antialiasing."""
    if video.shape[-2:] == (size, size):
        return video
    return functional.interpolate(video, size=(size, size), mode="bilinear", align_corners=False)


def resize_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """As `resize_video` of frames (T, H, W, 3) uint8, rounded to uint8 (T, size, size, 3) after each direction.

    So at most one level from what `resize_video` makes.
    """
    if frames.shape[1:3] == (size, size):
        return frames
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).numpy()


def normalize(video: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Video (…, 3, T, H, W) float32 0 … 255 as (video / 255 - mean) / std per channel, in place."""
    deviation = torch.tensor(std, dtype=torch.float32)
    center = torch.tensor(mean, dtype=torch.float32)
    factor, shift = (values.view(3, 1, 1, 1).to(video.device) for values in (1 / (255 * deviation), center / deviation))
    return video.mul_(factor).sub_(shift)


def draw_patch(box: Box, num_frames: int, generator: Generator) -> Patch:
    """Normal noise for the box of every frame, each its own."""
    pixels = torch.empty((3, num_frames, box.height, box.width))
    for frame in pixels.unbind(dim=1):
        frame.copy_(torch.empty(frame.shape).normal_(generator=generator))
    return Patch(box.top, box.left, pixels)


def apply_patch(video: Tensor, patch: Patch) -> Tensor:
    """Video (3, T, H, W) with the patch laid upon it, in place."""
    height, width = patch.pixels.shape[-2:]
    crop_video(video, Box(patch.top, patch.left, height, width)).copy_(patch.pixels)
    return video


def erase(video: Tensor, box: Box, generator: Generator) -> Tensor:
    """Video (3, T, H, W) with the box of every frame replaced, in place, by normal noise of its own."""
    return apply_patch(video, draw_patch(box, video.shape[1], generator))
