"""Which samples share a pack: planned from their lengths alone, before anything is read.

A pack is a row of samples whose lengths add up to at most the capacity. The plan is a pure function of the lengths, so
every process has the same one, and the packs, not the samples, are then what the order of training permutes: seeking
stays arithmetic, and each sample comes exactly once in an epoch.

Best fit, the longest first (Johnson, 1973), among `LOOK_AHEAD` neighbouring samples: so the samples of a pack lie close
together in the shards. What would make a poor pack waits for the next neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LOOK_AHEAD = 8192
"""Samples among which a pack's are chosen, besides those that wait."""
GOOD = 0.98
"""Packs filled less are put off, and their samples meet the next `LOOK_AHEAD`; once, and at most half as many."""


@dataclass(frozen=True, slots=True)
class Packs:
    """A plan. P packs of n samples in all."""

    starts: np.ndarray  # (P + 1,) int64: where each pack's samples begin in `members`
    members: np.ndarray  # (n,) int64: samples, those of a pack side by side and ascending
    capacity: int
    used: int  # length of all samples that fit
    too_long: int  # samples longer than the capacity; each is a pack of its own

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        """The samples of a pack."""
        return self.members[self.starts[pack] : self.starts[pack + 1]]

    @property
    def fill(self) -> float:
        """Share of the packs' capacity that is used, those of samples that are too long left aside."""
        return self.used / max(1, (len(self) - self.too_long) * self.capacity)


def plan_packs(lengths: np.ndarray, capacity: int, look_ahead: int = LOOK_AHEAD) -> Packs:
    """Plan packs of samples of these lengths, (n,) whole numbers >= 0.

    Raises ValueError for a capacity or look-ahead below 1, or a negative length.
    """
    if capacity < 1 or look_ahead < 1:
        raise ValueError(f"capacity {capacity} and look-ahead {look_ahead} of packs must be at least 1")
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"sample {int(lengths.argmin())} has the length {int(lengths.min())}")
    packs: list[list[int]] = []
    waiting = np.empty(0, np.int64)
    for first in range(0, len(lengths), look_ahead):
        samples = np.concatenate([waiting, np.arange(first, min(first + look_ahead, len(lengths)))])
        last = first + look_ahead >= len(lengths)
        made, poor = _fill(samples, lengths[samples], capacity, 0.0 if last else GOOD)
        packs += made
        left: list[int] = []
        for pack in reversed(poor):  # the last made are the poorest
            if pack[0] < first or len(left) + len(pack) > look_ahead // 2:  # one of them has waited before
                packs.append(pack)
            else:
                left += pack
        waiting = np.array(left, np.int64)
    counts = np.fromiter((len(pack) for pack in packs), np.int64, len(packs))
    fits = lengths <= capacity
    return Packs(
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        members=np.fromiter((sample for pack in packs for sample in pack), np.int64, int(counts.sum())),
        capacity=capacity,
        used=int(lengths[fits].sum()),
        too_long=int((~fits).sum()),
    )


def _fill(
    samples: np.ndarray, lengths: np.ndarray, capacity: int, good: float
) -> tuple[list[list[int]], list[list[int]]]:
    """(packs, those filled less than `good`): the longest sample opens a pack, the longest that still fits joins it."""
    order = np.argsort(-lengths, kind="stable")
    distinct, firsts = np.unique(-lengths[order], return_index=True)
    queues = {
        int(-negative): samples[order[start:stop]].tolist()[::-1]  # taken from the end: the first sample first
        for negative, start, stop in zip(distinct, firsts, [*firsts[1:], len(order)])
    }
    present = 0  # bit L: there are samples of length L
    for length in queues:
        present |= 1 << length
    packs: list[list[int]] = []
    poor: list[list[int]] = []
    while present:
        room, pack = capacity, []
        length = present.bit_length() - 1
        while True:
            queue = queues[length]
            pack.append(queue.pop())
            room -= length
            if not queue:
                present ^= 1 << length
            fitting = present & ((2 << room) - 1) if room >= 0 else 0
            if not fitting:
                break
            length = fitting.bit_length() - 1
        if capacity - room < good * capacity:
            poor.append(sorted(pack))
        else:
            packs.append(sorted(pack))
    return packs, poor
