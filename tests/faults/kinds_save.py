"""Faults of saving: a run is killed at each point of it, the disk is full or fails, files are damaged or stale."""

from __future__ import annotations

import os
import signal
import threading
import time

from tests.faults.harness import Trial, kind


@kind("kill_anywhere", what="all processes are killed (SIGKILL) at a random moment of the run")
def kill_anywhere(trial: Trial) -> str:
    setting = trial.draw()
    moment = trial.rng.uniform(0.05, 1.0)

    def inject(rank: int) -> None:
        def end() -> None:
            time.sleep(moment)
            trial.strike(f"rank {rank}")
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=end, daemon=True).start()

    statuses = trial.start(setting, inject).wait(grace=0.0)
    if set(statuses) == {0}:
        return "the run had ended before"
    return f"after {moment:.2f} s; {trial.survives(setting)}"
