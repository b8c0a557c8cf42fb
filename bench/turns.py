"""Those who are compared take turns in one process; how much dearer one is than another, with an interval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Spent(NamedTuple):
    """CPU and wall seconds of a turn."""

    cpu: float
    wall: float


def take_turns(contestants: dict[str, Iterator[Any]], turns: int, batches: int) -> dict[str, list[Spent]]:
    """What each spent in each turn. Who comes first changes from turn to turn; one turn before does not count."""
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(batches):
                next(contestants[name])
            if turn:
                spent[name].append(Spent(time.process_time() - cpu, time.perf_counter() - wall))
    return spent


class Ratio(NamedTuple):
    """Another's CPU seconds by ours: median over turns, and where 95 % of resampled medians lie."""

    median: float
    low: float
    high: float


def ratio(others: Sequence[float], ours: Sequence[float]) -> Ratio:
    ratios = np.array(others) / np.array(ours)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))
