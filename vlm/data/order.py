"""The order of training samples: a pure function of (number of records, seed, position).

Position p counts samples from the start of training and never ends; epoch e covers positions [e*size, (e+1)*size), in
which each record comes exactly once. Nothing else is state: a run resumes by starting at another position, for any
number of processes and workers.

Within an epoch, blocks of `BLOCK` neighbouring records are permuted, then records are shuffled inside windows of
`WINDOW` blocks. So a window of BLOCK*WINDOW = 4,096 records reads WINDOW = 64 contiguous stretches of the shards, and
no table longer than size/BLOCK is held.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

BLOCK = 64
WINDOW = 64


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., 2014) on uint64: a fixed bijection, equal on every machine."""
    z = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(count: int, *parts: int | str) -> np.ndarray:
    """A permutation of range(count) that depends on `count` and `parts` alone, not on a library's generator."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    start = np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):
        keys = mix64(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start)
    return np.argsort(keys, kind="stable")


@dataclass(slots=True)
class Order:
    """Which record stands at each position of training."""

    size: int
    seed: int
    block: int = BLOCK
    window: int = WINDOW
    _cache: OrderedDict[tuple[int, int], np.ndarray] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("an order needs at least one record")

    def epoch(self, position: int) -> int:
        """The epoch (from 0) that `position` belongs to."""
        return position // self.size

    @property
    def held(self) -> int:
        """Bytes of the permutations that it remembers."""
        return sum(value.nbytes for value in self._cache.values())

    def row(self, position: int) -> int:
        """The index row at `position` >= 0. Cost: one permutation of size/block numbers an epoch, then lookups."""
        epoch, offset = divmod(position, self.size)
        span = self.block * self.window
        return int(self._window_rows(epoch, offset // span)[offset % span])

    def rows(self, positions: Iterable[int]) -> list[int]:
        """`row` of each position."""
        return [self.row(position) for position in positions]

    def _window_rows(self, epoch: int, window: int) -> np.ndarray:
        """Rows of one window of an epoch, shuffled. The short last block keeps its place in the block permutation,
        so windows are cut by rows, not by blocks: the concatenation of permuted blocks is cut every block*window."""
        cached = self._cache.get((epoch, window))
        if cached is None:
            span = self.block * self.window
            flat = self._epoch_blocks(epoch)
            starts = flat[0]
            low, high = window * span, min((window + 1) * span, self.size)
            first = int(np.searchsorted(starts, low, side="right")) - 1
            last = int(np.searchsorted(starts, high, side="left"))
            rows = np.concatenate(
                [np.arange(b * self.block, min((b + 1) * self.block, self.size)) for b in flat[1][first:last]]
            )
            rows = rows[low - int(starts[first]) : high - int(starts[first])]
            cached = rows[permutation(len(rows), "window", self.seed, epoch, window)]
            self._remember((epoch, window), cached)
        return cached

    def _epoch_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(start offset of each permuted block in the epoch, block numbers in permuted order)."""
        key = (epoch, -1)
        cached = self._cache.get(key)
        if cached is None:
            blocks = permutation(-(-self.size // self.block), "blocks", self.seed, epoch)
            lengths = np.minimum(self.block, self.size - blocks * self.block)
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            cached = np.stack([starts, blocks])
            self._remember(key, cached)
        return cached[0], cached[1]

    def _remember(self, key: tuple[int, int], value: np.ndarray) -> None:
        self._cache[key] = value
        while len(self._cache) > 8:
            self._cache.popitem(last=False)


def batch_digest(keys: Sequence[str]) -> str:
    """16 hex digits that identify a global batch: sha256 over its keys in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
