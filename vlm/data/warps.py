"""Affine warps of all frames of a clip at once, to the bit as Pillow's bicubic transform makes them of each frame.

Pillow works out, for each pixel of each frame and in double precision, where it comes from and what its 16 neighbours
weigh. Frames of a clip share all that, so here it is done once, and each neighbour counts for the pixels of all frames
in one vectorised step (a weighted sum of rows of a table that holds the pixels of all frames side by side), in single
precision. Where a sum comes so close to an integer that its error could matter, it is worked out again as Pillow does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlm.data.box import Box

FILL = 128
"""Level of the pixels that a warp uncovers, in all colours."""

_SLACK = 6e-4  # more than a sum in single precision of 16 products with levels can be off (5.8e-4)
_CHUNK = 4096  # pixels worked on at a time, so that they stay in the processor's cache
_MANY = 0.02  # share of doubtful sums from which flat places are looked for first
_TAPS = np.arange(-1, 3)


class Affine(NamedTuple):
    """The pixel with its centre at x, y comes from a x + b y + c, d x + e y + f."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def sources(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the pixels of columns x and rows y come from: (rows, columns) each, rounded as in Pillow."""
        columns, rows = x + 0.5, (y + 0.5)[:, None]
        return (self.a * columns + self.b * rows) + self.c, (self.d * columns + self.e * rows) + self.f


def source_box(matrix: Affine, box: Box, whole: Box) -> Box:
    """The part of frames, which are `whole`, that a warp reads for `box`; some pixels where it reads nothing."""
    ends = (np.array([at.start, at.stop - 1]) for at in (box.columns, box.rows))
    spans = []
    for source, size in zip(matrix.sources(*ends), (whole.width, whole.height), strict=True):
        first, last = (int(np.floor(end - 0.5)) for end in (source.min(), source.max()))
        first, last = (min(max(end, 0), size - 1) for end in (first + _TAPS[0], last + _TAPS[-1]))
        spans.append((first, last - first + 1))
    return Box(spans[1][0], spans[0][0], spans[1][1], spans[0][1])


def warp(frames: np.ndarray, matrix: Affine, whole: Box, given: Box, box: Box) -> np.ndarray:
    """Frames after a warp, (T, box.height, box.width, 3) uint8.

    Args:
        frames: uint8 (T, given.height, given.width, 3): the part `given` of the frames, which are `whole`; at least
            what `source_box` names.
        box: the part of the warped frames that is wanted.
    """
    num_frames = len(frames)
    across, down = matrix.sources(*(np.arange(at.start, at.stop) for at in (box.columns, box.rows)))
    inside = (across >= 0) & (across < whole.width) & (down >= 0) & (down < whole.height)
    if inside.all():
        warped = _sampled(_Samples(frames, across.ravel(), down.ravel(), whole, given))
    else:
        warped = np.full((inside.size, 3 * num_frames), FILL, np.uint8)
        places = np.flatnonzero(inside)
        if len(places):
            warped[places] = _sampled(_Samples(frames, across.ravel()[places], down.ravel()[places], whole, given))
    warped = np.ascontiguousarray(warped.reshape(-1, num_frames).T)
    return warped.reshape(num_frames, box.height, box.width, 3)


def _sampled(samples: _Samples) -> np.ndarray:
    """uint8 (N, 3 T), the frames innermost."""
    sampled = np.empty((len(samples.first), samples.levels.shape[1]), np.uint8)
    for start in range(0, len(sampled), _CHUNK):
        samples.write(slice(start, start + _CHUNK), sampled[start : start + _CHUNK])
    return sampled


class _Samples:
    """Points (N,) that lie inside of frames, with what is needed to sample these there."""

    def __init__(self, frames: np.ndarray, across: np.ndarray, down: np.ndarray, whole: Box, given: Box) -> None:
        before = (max(0, 2 - given.top), max(0, 2 - given.left))  # levels beyond the frame are those of its edge
        after = (
            max(0, 2 - (whole.height - given.rows.stop)),
            max(0, 2 - (whole.width - given.columns.stop)),
        )
        if any(before + after):
            frames = np.pad(frames, ((0, 0), *zip(before, after, strict=True), (0, 0)), mode="edge")
        self.levels = np.ascontiguousarray(frames.reshape(len(frames), -1).T).reshape(-1, 3 * len(frames))
        self.table = torch.from_numpy(np.add(self.levels, np.float32(_SLACK), dtype=np.float32))
        across, down = across - 0.5, down - 0.5
        column, row = np.floor(across), np.floor(down)
        self.shares = across - column, down - row
        self.moves = bool(self.shares[0].any()), bool(self.shares[1].any())
        stride = frames.shape[2]
        columns, rows = ((_TAPS if moves else _TAPS[1:2]) for moves in self.moves)
        taps = (rows[:, None] * stride + columns).ravel().astype(np.int32)
        first = (row - (given.top - before[0])) * stride + (column - (given.left - before[1]))
        self.first, self.taps = torch.from_numpy(first.astype(np.int32)[:, None]), torch.from_numpy(taps)
        self.starts = torch.arange(0, _CHUNK * len(taps), len(taps), dtype=torch.int32)

    def write(self, part: slice, sampled: np.ndarray) -> None:
        """Sample a part of the points into uint8 (points, 3 T)."""
        index = self.first[part] + self.taps
        values = functional.embedding_bag(
            index.view(-1),
            self.table,
            self.starts[: len(index)],
            mode="sum",
            per_sample_weights=self._weights(part).view(-1),
        )
        values.clamp_(3 * _SLACK, 255.5)  # what is outside of 0 … 255 is never doubtful
        np.copyto(sampled, values.numpy(), casting="unsafe")
        doubtful = values.frac_().numpy() < 2 * _SLACK
        count = np.count_nonzero(doubtful)
        if count > _MANY * doubtful.size:
            self._leave_out_flat(doubtful, index.numpy())
            count = np.count_nonzero(doubtful)
        if count:
            at = np.flatnonzero(doubtful)
            points, values_of = np.divmod(at, doubtful.shape[1])
            levels = self.levels[index.numpy()[points], values_of[:, None]]
            sampled.reshape(-1)[at] = self._exact(levels, part.start + points)

    def _weights(self, part: slice) -> Tensor:
        """(points, taps) float32."""
        along = [torch.from_numpy(_weights(share[part])) for share, moves in zip(self.shares, self.moves) if moves]
        if len(along) == 2:
            weights = torch.empty((len(along[0]), 4, 4))
            for row in range(4):
                torch.mul(along[0], along[1][:, row : row + 1], out=weights[:, row])
            return weights
        return along[0] if along else torch.ones((len(self.first[part]), 1))

    def _leave_out_flat(self, doubtful: np.ndarray, index: np.ndarray) -> None:
        """A sum of equal levels is that level, which rounding has found."""
        points = np.flatnonzero(doubtful.any(axis=1))
        index = index[points]
        low, high = (self.levels[index[:, 0]] for _ in range(2))
        for tap in range(1, index.shape[1]):
            levels = self.levels[index[:, tap]]
            np.minimum(low, levels, out=low)
            np.maximum(high, levels, out=high)
        doubtful[points] &= low != high

    def _exact(self, levels: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Levels (K, taps) at these points -> (K,) as Pillow has them, whose order of operations this is."""
        values = levels.astype(np.float64)
        if self.moves[0]:
            values = _bicubic(values.reshape(len(values), -1, 4), self.shares[0][points, None])
        if self.moves[1]:
            values = _bicubic(values.reshape(len(values), 4), self.shares[1][points])
        return np.clip(values.reshape(-1), 0, 255).astype(np.uint8)


def _bicubic(values: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Between the second and the third of four values (…, 4)."""
    first, second, third, fourth = np.moveaxis(values, -1, 0)
    linear = -first + third
    square = 2 * (first - second) + third - fourth
    cube = -first + second - third + fourth
    return second + share * (linear + share * (square + share * cube))


def _weights(share: np.ndarray) -> np.ndarray:
    """What each of four values counts for in `_bicubic`, (N, 4) float32."""
    square = share * share
    cube = square * share
    weights = np.empty((len(share), 4), np.float32)
    weights[:, 0] = 2 * square - share - cube
    weights[:, 1] = 1 - 2 * square + cube
    weights[:, 2] = share + square - cube
    weights[:, 3] = cube - square
    return weights
