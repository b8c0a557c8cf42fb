"""How a dataset tells the process that watches it which sample it is at, so that a hang or a crash costs that one."""

from __future__ import annotations

import time
from typing import Protocol


class Watch(Protocol):
    """Told of each sample before and after work on it."""

    def begin(self, label: str, about: str) -> str | None:
        """Work on a sample begins.

        Args:
            label: the same whenever the same sample is tried again.
            about: the sample in words, for messages.
        Returns:
            why it is not to be tried again, where it has already cost a process its life or its time; else None.
        """

    def end(self) -> None:
        """Work on it is over."""


class Unwatched:
    """Nobody ends what takes too long: loading in the process that trains. What it is at can be seen."""

    def __init__(self) -> None:
        self.at: tuple[str, str, float] | None = None
        """(label, about, CLOCK_MONOTONIC when it began) of the sample that is being loaded."""

    def begin(self, label: str, about: str) -> str | None:
        self.at = label, about, time.monotonic()
        return None

    def end(self) -> None:
        self.at = None
