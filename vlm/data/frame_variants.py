"""Altered copies of pictures: what eleven further .avi files beside each of Breakfast's were made for.

    alter = variant("sharp_flip", key)
    alter(picture)  # uint8 (H, W, 3) -> uint8 (h, W, 3)

flip       mirrored, left for right
bright     each level higher by 0.2 of the scale, cut at white
contrast   each level times 0.7
crop       without the top 50 of 240 rows (of other heights: the same share)
compress   as WebP of quality 5 leaves it
sharp      mixed, by a share of 0.2 to 0.3, with what a sharpening kernel makes of it
bright_flip, contrast_flip, crop_flip, compress_flip, sharp_flip: both

`sharp` draws its share and its kernel's centre once a video, by its key alone, so a copy is the same wherever and
whenever it is made. Unlike the .avi files these copies were not encoded a second time. This file imports no torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

Alter = Callable[[np.ndarray], np.ndarray]

BRIGHTER, LESS_CONTRAST = 0.2, 0.7
TOP = 50 / 240  # share of the rows that `crop` takes away
QUALITY = 5  # of WebP
SHARP_SHARE, SHARP_LIGHTNESS = (0.2, 0.3), (0.5, 1.0)

_LEVELS = np.arange(256, dtype=np.float32)
_BRIGHT = np.clip(_LEVELS + BRIGHTER * 255, 0, 255).astype(np.uint8)
_CONTRAST = np.clip(_LEVELS * np.float32(LESS_CONTRAST), 0, 255).astype(np.uint8)
_ALONE = ("bright", "contrast", "crop", "compress", "sharp")

VARIANTS = ("flip", *_ALONE, *(f"{name}_flip" for name in _ALONE))


def variant(name: str, key: str) -> Alter:
    """What makes the copy `name` (of VARIANTS) of each picture of the video `key`."""
    assert name in VARIANTS, name
    if name == "flip":
        return _flip
    alone = name.removesuffix("_flip")
    alter = _sharp(key) if alone == "sharp" else _ALTERATIONS[alone]
    return alter if alone == name else partial(_then_flip, alter)


def _then_flip(alter: Alter, picture: np.ndarray) -> np.ndarray:
    return _flip(alter(picture))


def _flip(picture: np.ndarray) -> np.ndarray:
    return picture[:, ::-1]


def _crop(picture: np.ndarray) -> np.ndarray:
    return picture[round(len(picture) * TOP) :]


def _compress(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=QUALITY)
    return np.asarray(Image.open(file).convert("RGB"))


_ALTERATIONS: dict[str, Alter] = {
    "bright": _BRIGHT.__getitem__,
    "contrast": _CONTRAST.__getitem__,
    "crop": _crop,
    "compress": _compress,
}


def _sharp(key: str) -> Alter:
    # The same draws for all pictures of a video, also for its flipped copy.
    drawn = np.random.default_rng(list(hashlib.blake2b(key.encode(), digest_size=8).digest()))
    share, lightness = drawn.uniform(*SHARP_SHARE), drawn.uniform(*SHARP_LIGHTNESS)
    return partial(sharpened, share=share, lightness=lightness)


def sharpened(picture: np.ndarray, share: float, lightness: float) -> np.ndarray:
    """(1 - share) of the picture and `share` of (8 + lightness) times itself less its eight neighbours.

    Beyond the border the picture is mirrored, without the border itself.
    """
    height, width = picture.shape[:2]
    wide = np.pad(picture, ((min(1, height - 1),) * 2, (min(1, width - 1),) * 2, (0, 0)), mode="reflect").astype(
        np.int16
    )
    if height == 1:
        wide = np.concatenate([wide] * 3)
    if width == 1:
        wide = np.concatenate([wide] * 3, axis=1)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]  # all nine
    own = picture.astype(np.float32)
    mixed = np.float32(1 - share + share * (9 + lightness)) * own - np.float32(share) * around
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
