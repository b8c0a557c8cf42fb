"""Altered copies of pictures: by their definitions, and the same whenever they are made."""

from __future__ import annotations

import numpy as np
import pytest
from encoded import pictures

from vlm.data.frame_variants import VARIANTS, sharpened, variant

PICTURE = pictures(1, 64, 48, seed=3)[0]


def test_there_are_eleven() -> None:
    assert len(set(VARIANTS)) == 11
    assert sum(name.endswith("flip") for name in VARIANTS) == 6


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.endswith("_flip")])
def test_flipped_ones_are_mirrored(name: str) -> None:
    alone = variant(name.removesuffix("_flip"), "k")(PICTURE)
    np.testing.assert_array_equal(variant(name, "k")(PICTURE), alone[:, ::-1])


def test_definitions() -> None:
    np.testing.assert_array_equal(variant("flip", "k")(PICTURE), PICTURE[:, ::-1])
    levels = PICTURE.astype(np.float64)
    np.testing.assert_array_equal(variant("bright", "k")(PICTURE), np.minimum(levels + 51, 255))
    np.testing.assert_allclose(variant("contrast", "k")(PICTURE), levels * 0.7, atol=1)
    tall = np.zeros((240, 4, 3), np.uint8)
    tall[50:] = 9
    np.testing.assert_array_equal(variant("crop", "k")(tall), np.full((190, 4, 3), 9))


def test_compressed_pictures_are_coarse_but_the_same_picture() -> None:
    found = variant("compress", "k")(PICTURE)
    assert found.shape == PICTURE.shape
    assert found.dtype == np.uint8
    difference = np.abs(found.astype(int) - PICTURE).mean()
    assert 2 < difference < 40


@pytest.mark.parametrize("shape", [(5, 7), (1, 6), (6, 1), (2, 2)])
def test_sharpening_is_the_convolution(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    share, lightness = 0.25, 0.7
    kernel = -share * np.ones((3, 3))
    kernel[1, 1] = 1 - share + share * (8 + lightness)
    expected = np.zeros(picture.shape)
    height, width = shape

    def mirrored(place: int, size: int) -> int:
        return 0 if size == 1 else 1 if place < 0 else size - 2 if place == size else place

    for row in range(height):
        for column in range(width):
            for down in (-1, 0, 1):
                for across in (-1, 0, 1):
                    near = picture[mirrored(row + down, height), mirrored(column + across, width)]
                    expected[row, column] += kernel[down + 1, across + 1] * near
    found = sharpened(picture, share, lightness)
    np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=0.51)
    plain = np.full((4, 4, 3), 100, np.uint8)  # a kernel whose sum is 1 + share * (lightness - 1)
    np.testing.assert_array_equal(sharpened(plain, share, lightness), np.full((4, 4, 3), 92))


def test_sharpness_is_drawn_by_the_key() -> None:
    made = {key: variant("sharp", key)(PICTURE) for key in ("a", "b")}
    assert not np.array_equal(made["a"], made["b"])
    np.testing.assert_array_equal(made["a"], variant("sharp", "a")(PICTURE))
    assert np.abs(made["a"].astype(int) - PICTURE).max() > 10
