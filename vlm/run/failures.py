"""What failures cost a long run: how often machines fail, how often to save, what is left for training.

Young (1974, "A first order approximation to the optimum checkpoint interval") and Daly (2006, "A higher order estimate
of the optimum checkpoint interval for restart dumps"). Failures come independently, at a constant rate for each GPU.
All times are in seconds.
"""

from __future__ import annotations

import math

import numpy as np

from vlm.data.order import mix64
from vlm.data.rng import derive_seed

HOUR, WEEK = 3600.0, 7 * 24 * 3600.0


def mean_time_between(gpus: int, rate: float) -> float:
    """Mean seconds between two failures that end the run.

    Args:
        rate: failures of one GPU in an hour.
    """
    return HOUR / (gpus * rate)


def best_interval(stall: float, mean_time: float) -> float:
    """Seconds of training between two saves with which a run ends first (Daly 2006, equation 37; Young's
    sqrt(2 * stall * mean_time) with two terms more).

    Args:
        stall: training stands still so long at each save; above 0.
        mean_time: between two failures.
    """
    if stall >= 2 * mean_time:
        return mean_time
    ratio = stall / (2 * mean_time)
    return math.sqrt(2 * stall * mean_time) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def effective_share(interval: float, stall: float, mean_time: float, restart: float) -> float:
    """The share of a run's time that is training and is not lost again (Daly 2006, equation 20).

    Args:
        interval: seconds of training between two saves.
        restart: from a failure until training goes on.
    """
    return interval / (mean_time * math.exp(restart / mean_time) * math.expm1((interval + stall) / mean_time))


def simulated_share(
    interval: float, stall: float, mean_time: float, restart: float, written: float = 0.0, failures: int = 200_000
) -> float:
    """The same share, counted over drawn failures; a checkpoint counts only once it is on disk.

    Args:
        written: seconds after which a checkpoint that was copied is on disk, while training goes on.
    """
    counters = np.arange(1, failures + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        drawn = mix64(counters * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive_seed("failures")))
    gaps = -mean_time * np.log((drawn >> np.uint64(11)).astype(np.float64) / 2**53 + 2**-54)
    saved = np.floor(np.maximum(gaps - restart - written, 0.0) / (interval + stall))
    return float((saved * interval).sum() / gaps.sum())
