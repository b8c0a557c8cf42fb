"""Tells within seconds that a rank has stalled, where, and which one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Heart(Protocol):
    """What a run tells the watchdog as it goes on: every call is a sign of life."""

    def phase(self, name: str, *, step: int | None = None, module: str = "", keys: Sequence[str] = ()) -> None:
        """What begins now.

        Args:
            name: "load", "forward", "backward", "collective", "optimizer", "save", "evaluate", …
            step: the optimizer step (from 1) that is being made; None: as before.
            module: where in the model.
            keys: samples in hand; none: as before.
        """


class Unwatched:
    """Nobody watches."""

    def phase(self, name: str, *, step: int | None = None, module: str = "", keys: Sequence[str] = ()) -> None:
        pass
