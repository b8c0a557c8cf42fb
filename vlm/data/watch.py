"""How a dataset tells the process that watches it which sample it is at, so that a hang or a crash costs that one."""

from __future__ import annotations

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
    """Nobody watches: loading in the process that trains."""

    def begin(self, label: str, about: str) -> str | None:
        return None

    def end(self) -> None:
        pass
