"""Randomness is passed, never global: every random choice on data draws from a `SampleRng` made from integers."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (machine, process, library version)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SampleRng:
    """Three generators from one seed.

    The originals draw some numbers from `random`, some from numpy and some from torch; the same split here lets a
    test reproduce their seeded results.
    """

    __slots__ = ("numpy", "python", "torch")

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed)
        self.numpy = np.random.RandomState(seed % 2**32)
        self.torch = torch.Generator().manual_seed(seed)
