"""Frames as an encoder of frames takes them: uint8 pictures of one size, made by Pillow as CLIP's own pipeline does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class CentreCrop:
    """CLIP's: bicubic until the short side is `short_side`, then the square of `crop` pixels in the middle."""

    short_side: int
    crop: int  # at most short_side

    def __post_init__(self) -> None:
        if self.crop > self.short_side:
            raise ValueError(f"a crop of {self.crop} pixels from a short side of {self.short_side}: nothing to fill it")

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (crop, crop, 3)."""
        height, width = picture.shape[:2]
        short = min(height, width)
        size = self.short_side * width // short, self.short_side * height // short
        resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        top, left = (size[1] - self.crop) // 2, (size[0] - self.crop) // 2
        return resized[top : top + self.crop, left : left + self.crop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The whole picture at a fixed size, bicubic; one that has it already stays as it is."""

    width: int
    height: int

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (height, width, 3)."""
        if picture.shape[:2] == (self.height, self.width):
            return picture
        return np.asarray(Image.fromarray(picture).resize((self.width, self.height), Image.Resampling.BICUBIC))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The whole picture at a fixed size, each pixel the nearest one as torch's `interpolate` takes it, nothing mixed.

    Released projectors of Video-ChatGPT were trained on pictures like these.
    """

    width: int
    height: int

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (height, width, 3)."""
        if picture.shape[:2] == (self.height, self.width):
            return picture
        rows, columns = _nearest(picture.shape[0], self.height), _nearest(picture.shape[1], self.width)
        return picture[rows[:, None], columns]


def _nearest(size: int, wanted: int) -> np.ndarray:
    places = np.floor(np.arange(wanted, dtype=np.float32) * (np.float32(size) / np.float32(wanted)))
    return np.minimum(places.astype(np.int64), size - 1)
