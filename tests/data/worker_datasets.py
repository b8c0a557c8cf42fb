"""Datasets for tests/data/test_workers.py, in a module of their own: loader processes import it, and it is cheap."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import numpy as np
import torch

from vlm.data import video
from vlm.data.workers import Loaded
from vlm.types import UserError

HELD: list[bytes] = []


def hang() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    while True:
        ctypes.PyDLL(None).sleep(1000)  # holds Python's lock, as a decoder may


def swell() -> None:
    while True:
        HELD.append(b"x" * (16 << 20))
        time.sleep(0.05)


DEEDS = {
    "hang": hang,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "swell": swell,
}


class Samples:
    """Each item is two samples, 2i and 2i + 1; some do a bad deed on their first attempt, and are then replaced.

    Args:
        deeds: sample -> a name of DEEDS.
        once: a file; a deed is done only while it does not exist, and makes it.
    """

    def __init__(self, deeds: dict[int, str], once: str = "") -> None:
        self.deeds, self.once = deeds, once

    def load(self, item, watch):
        found = []
        for sample in (2 * item, 2 * item + 1):
            reason = watch.begin(f"{sample}.0", f"sample {sample} of the test")
            if reason is None:
                self.do(sample)
            watch.end()
            found.append((sample, reason))
        return found, torch.full((40_000,), item, dtype=torch.int32)

    def do(self, sample: int) -> None:
        if sample in self.deeds and not (self.once and os.path.exists(self.once)):  # noqa: PTH110
            if self.once:
                open(self.once, "x").close()  # noqa: PTH123
            DEEDS[self.deeds[sample]]()


class Outside(Samples):
    """Does the deed after its samples, as joining them to a batch might."""

    def load(self, item, watch):
        watch.begin(f"{item}.0", "")
        watch.end()
        self.do(item)
        return item, os.getpid()


class Heedless(Samples):
    """Does not listen when it is told to leave a sample out."""

    def load(self, item, watch):
        watch.begin(f"{item}.0", "")
        self.do(item)
        return item


class Unbearable(Samples):
    """Ends each process that it comes to."""

    def __setstate__(self, state):
        DEEDS["segfault"]()


class Raising:
    """Raises at some items; a plain dataset."""

    def __init__(self, errors: dict[int, Exception]) -> None:
        self.errors = errors

    def __getitem__(self, item):
        if item in self.errors:
            raise self.errors[item]
        return item


class Picky:
    def __getitem__(self, item):
        raise UserError(f"item {item} is set wrongly")


class Nested:
    """Starts loader processes of its own."""

    def __getitem__(self, item):
        return next(Loaded(Picky(), range(3), 1, "data.workers"))


class Surroundings:
    def __getitem__(self, item):
        return os.getcwd(), os.environ.get("VLM_TEST_OF_WORKERS")  # noqa: PTH109


class Leaky:
    """Keeps some MiB of each item."""

    def load(self, item, watch):
        watch.begin(f"{item}.0", "")
        HELD.append(b"x" * (24 << 20))
        watch.end()
        return item, os.getpid()


class Cheap:
    """Items that are cheap: small ones and ones that travel by a memory of their own."""

    def __getitem__(self, item):
        if item % 4:
            return {"item": item, "x": torch.full((3,), item)}
        return {"item": item, "x": np.full(20_000, item, np.int32)}


class Clips:
    """One clip, decoded again and again by decord, which fails in its ways at some items.

    Args:
        again: where decord cost a process, PyAV alone gets a second attempt, under a label of its own.
    """

    def __init__(self, clip: bytes, deeds: dict[int, str], again: bool) -> None:
        self.clip, self.deeds, self.again = clip, deeds, again

    def load(self, item, watch):
        decoders = ("decord", "pyav")
        reason = watch.begin(f"{item}.0", "a clip")
        if reason and self.again:
            reason, decoders = watch.begin(f"{item}.0.pyav", "a clip, by PyAV"), ("pyav",)
        if reason:
            return reason, None
        as_it_was = video._decode_decord
        if item in self.deeds:
            video._decode_decord = lambda data, wanted: self.fail(self.deeds[item])
        try:
            return None, torch.from_numpy(video.decode(self.clip, [0, 7], decoders=decoders))
        finally:
            video._decode_decord = as_it_was
            watch.end()

    def fail(self, deed: str) -> None:
        if deed == "raise":
            raise video.DecodeError("decord cannot read it")
        DEEDS[deed]()


class Slow:
    """Samples that take a while, and know where they were loaded."""

    def load(self, item, watch):
        watch.begin(f"{item}.0", "a slow one")
        time.sleep(0.1)
        watch.end()
        return item, os.getpid()
