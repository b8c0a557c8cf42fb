"""A run is told to stop by a signal: it saves at the next step boundary, for which a test within training is broken
off, ends with status 85, and goes on when the same command is given again (slurm/env.sh requeues it).

SIGUSR1 comes ahead of a time limit (`sbatch --signal`), SIGTERM when a job is preempted, or from a launcher that ends.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from vlm.errors import Preempted

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stop:
    """Listens to `SIGNALS` from `with` on: notes them inside the training loop, ends the run at once elsewhere.

    Before the loop nothing is lost, and after it all is saved, so nothing is gained by going on; in the loop ranks must
    stop together, at the same step.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        """Name of the signal that came."""
        self.waits = False
        """Whether somebody looks at `asked` (the training loop)."""
        self._before: dict[int, Any] = {}

    def is_asked(self) -> bool:
        """Whether a signal came to this process."""
        return self.asked is not None

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked():  # it is on its way out already
            return
        self.asked = signal.Signals(number).name
        if not self.waits:
            raise Preempted(f"{self.asked} came outside of training steps: nothing is lost")
