"""launch/train.py in which a rank goes wrong: `torchrun … tests/faults/faulty.py SPEC ARGUMENTS …`, SPEC a JSON file:

loaded, attempt     what `jobs.observe` is to write down where
struck, statuses    files that get a line when the fault happens, and when a rank ends by itself
act                 what happens (ACTS); none: nothing
ranks               on which ranks
phase, call         where: as the run tells its watchdog for the `call`-th time that it begins this phase
after               so many seconds later (in a thread, if above 0)
…                   what the act needs
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.faults import jobs
from tests.faults.jobs import append

Spec = Mapping[str, Any]


def _segfault(spec: Spec) -> None:
    ctypes.string_at(8)


def _lock(spec: Spec) -> None:
    """Hold the interpreter's lock for ever, so that no thread of this process runs any Python again."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def _raise(spec: Spec) -> None:
    raise RuntimeError("a fault on purpose")


def _signal(spec: Spec) -> None:
    """To this rank, or to what launched it."""
    os.kill(os.getppid() if spec.get("launcher") else os.getpid(), getattr(signal, spec["signal"]))


ACTS: dict[str, Callable[[Spec], Any]] = {
    "signal": _signal,
    "segfault": _segfault,
    "lock": _lock,
    "raise": _raise,
    "exit": lambda spec: os._exit(spec["status"]),
    "sleep": lambda spec: time.sleep(spec["seconds"]),
}


def inject(spec: Spec) -> Callable[[], None]:
    """Have the spec's fault happen in this process when it comes to its point. What this returns waits for a fault that
    comes somewhat later; so does a run that has made all its steps, while it is still watched."""
    from vlm.run.watchdog import Watchdog

    telling, left, act = Watchdog.phase, [spec["call"]], ACTS[spec["act"]]
    later: list[threading.Thread] = []

    def settle() -> None:
        for thread in later:
            thread.join(10)

    def strike() -> None:
        time.sleep(spec["after"])
        append(Path(spec["struck"]), f"{spec['said']}\n")
        act(spec)

    def phase(self: Any, name: str, **named: Any) -> None:
        telling(self, name, **named)
        if name == "report":
            settle()
        if name in spec["phase"]:
            left[0] -= 1
            if -spec.get("times", 1) < left[0] <= 0:
                if spec["after"]:
                    later.append(threading.Thread(target=strike, daemon=True))
                    later[-1].start()
                else:
                    strike()

    Watchdog.phase = phase  # type: ignore[method-assign]
    return settle


def train(spec_file: str, *arguments: str) -> int:
    """Be a rank, to the end of training: its exit status."""
    spec, rank = json.loads(Path(spec_file).read_text()), int(os.environ["RANK"])
    from vlm.run.command import train_main

    jobs.observe(Path(spec["loaded"]), spec["attempt"])(rank)
    settle = inject(spec) if rank in spec.get("ranks", ()) else lambda: None
    status = train_main(list(arguments))
    settle()
    append(Path(spec["statuses"]), json.dumps({"rank": rank, "status": status}) + "\n")
    return status


def forked(spec_file: str, *arguments: str) -> int:
    """The same in a process that torchrun's agent forks, which waits for what this returns, unless it ends badly."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["launch/train.py", *arguments]
    try:
        status = train(spec_file, *arguments)
    except Exception:  # as the interpreter does it, at once; what forks processes would tell it to the agent, later
        traceback.print_exc()
        status = 1
    from vlm.distributed import end, leave

    if status:
        end(status)
    leave()
    return 0


if __name__ == "__main__":
    from vlm.run.command import finish

    own = sys.argv.pop(1)
    finish(train(own, *sys.argv[1:]))
