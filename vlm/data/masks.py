"""Which tokens masked pretraining hides: tube masks (VideoMAE, arXiv 2203.12602, §3.3)."""

from __future__ import annotations

import numpy as np
from numpy.random import RandomState


def num_hidden(num_positions: int, ratio: float) -> int:
    """How many of the positions of one time slice are hidden: rounded down."""
    return int(ratio * num_positions)


def tube_mask(slices: int, rows: int, columns: int, ratio: float, generator: RandomState) -> np.ndarray:
    """A mask over the tokens of one clip, (slices * rows * columns,) bool, True = hidden.

    One random choice of positions, the same in every time slice: a patch that hardly moves cannot be copied from its
    neighbour in time. Token index = slice * rows * columns + row * columns + column.
    """
    positions = rows * columns
    hidden = np.zeros(positions, dtype=bool)
    hidden[positions - num_hidden(positions, ratio) :] = True
    generator.shuffle(hidden)
    return np.tile(hidden, slices)
