"""Tube masks."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.data.masks import num_hidden, tube_mask


@pytest.mark.parametrize(("ratio", "hidden"), [(0.9, 14), (0.75, 12), (0.5, 8)])
def test_the_same_positions_are_hidden_in_every_slice(ratio: float, hidden: int) -> None:
    assert num_hidden(16, ratio) == hidden
    mask = tube_mask(3, 4, 4, ratio, np.random.RandomState(0))
    assert mask.shape == (48,)
    assert mask.dtype == np.bool_
    slices = mask.reshape(3, 16)
    assert (slices == slices[0]).all()
    assert slices[0].sum() == hidden


def test_every_position_is_hidden_equally_often() -> None:
    generator = np.random.RandomState(0)
    often = np.mean([tube_mask(1, 3, 4, 0.5, generator) for _ in range(3000)], axis=0)
    np.testing.assert_allclose(often, 0.5, atol=0.05)
