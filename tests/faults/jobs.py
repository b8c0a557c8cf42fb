"""Training runs as processes: forked from this one, which has imported everything, or started by a command line.

A forked run costs what the run itself costs (half a second for a tiny one): nothing is imported again. The process that
forks must have no threads and be in no process group.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400.0  # seconds after which a run that has not ended counts as hanging
_SIGKILL_AFTER = 5.0  # seconds that the other ranks get after SIGTERM, once one has ended badly
_PR_SET_PDEATHSIG = 1

Inject = Callable[[int], None]
"""What is done in rank `argument` before training begins: patches, timers, limits."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """As a user's shell, on the processor, with one thread a process and no leftovers of an outer launcher."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in outer and not name.startswith("SLURM_")}
    own = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return {**kept, **own}


class Job:
    """Processes that train together, and what they print.

    Attributes:
        pids: of the ranks, in order (of a launched job: of the launcher alone, until `ranks` is asked).
        statuses: exit status by rank (launched: of the launcher), negative for a signal; None while it runs.
    """

    def __init__(self, pids: list[int], outputs: list[Path], process: subprocess.Popen | None = None) -> None:
        self.pids, self.outputs, self._process = pids, outputs, process
        self.statuses: list[int | None] = [None] * len(pids)
        self.told: set[int] = set()
        """Ranks that were ended since another had ended badly."""

    def poll(self) -> bool:
        """Whether all have ended."""
        for place, pid in enumerate(self.pids):
            if self.statuses[place] is None:
                if self._process is not None:
                    self.statuses[place] = self._process.poll()
                else:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    self.statuses[place] = os.waitstatus_to_exitcode(status) if ended else None
        return None not in self.statuses

    def wait(self, limit: float = LIMIT, grace: float = 0.2) -> list[int]:
        """The exit statuses, once all have ended. As a launcher does, ends the others when one has ended badly: SIGTERM
        after `grace` seconds, SIGKILL in the end. AssertionError, and all are killed: it takes longer than `limit`."""
        began, failed = time.monotonic(), None
        while not self.poll():
            now = time.monotonic()
            if failed is None and any(self.statuses):
                failed = now
            if failed is not None and self._process is None:
                for limit_seconds, number in ((grace, signal.SIGTERM), (grace + _SIGKILL_AFTER, signal.SIGKILL)):
                    if now - failed > limit_seconds:
                        self.told |= {place for place, status in enumerate(self.statuses) if status is None}
                        self.signal(number)
                        failed = failed if number == signal.SIGTERM else now
            if now - began > limit:
                printed = self.printed()
                self.kill()
                raise AssertionError(f"the run has not ended after {limit:.0f} s: {printed[-1500:]}")
            time.sleep(0.01)
        return [status for status in self.statuses if status is not None]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that still run."""
        for place, pid in enumerate(self.pids):
            if self.statuses[place] is None and rank in (None, place):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all that still run, whatever they started with them."""
        for place, pid in enumerate(self.pids):
            if self.statuses[place] is None:
                for process in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid)):
                    try:
                        process.kill()
                    except psutil.NoSuchProcess:
                        continue
        while not self.poll():
            time.sleep(0.01)

    def printed(self) -> str:
        """What all ranks have printed so far."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs if path.is_file())


def fork(arguments: Sequence[str], world: int, output: Path, before: Inject) -> Job:
    """launch/train.py with these arguments in `world` processes that are forked from this one.

    Args:
        output: beginning of the names of the files that hold what the ranks print.
        before: what is done in each rank first, given its number: patches, the fault.
    """
    port, pids = free_port(), []
    outputs = [output.with_name(f"{output.name}.{rank}") for rank in range(world)]
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(world):
        pid = os.fork()
        if not pid:
            mine = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            _train(arguments, rank, mine, outputs[rank], before)
        pids.append(pid)
    return Job(pids, outputs)


def _train(arguments: Sequence[str], rank: int, place: dict[str, str], output: Path, before: Inject) -> NoReturn:
    """Be rank `rank` of a run, to the end of this process."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.environ.update(environment() | place)
        sys.argv = ["launch/train.py", *arguments]
        before(rank)
        from vlm.run.command import finish, train_main

        finish(train_main(list(arguments)))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def launch(command: Sequence[str], output: Path, extra: dict[str, str] | None = None) -> Job:
    """A command line (torchrun, srun …) in a session of its own, as a user starts it."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | (extra or {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job([process.pid], [output], process)


def observe(path: Path, attempt: int) -> Inject:
    """Have a process write down, in `path`, the keys of all samples that it really trains on, step by step; and beside
    it, in saves.jsonl, of which step the state was copied to be saved.

    Rows: {attempt, step (from 0), world, rank, keys}; {attempt, step}.
    """

    def patch(rank: int) -> None:
        from vlm.data.loader import TrainLoader
        from vlm.run import checkpoint, checkpoint_files

        saving, copying, steps = checkpoint.Saver.save, checkpoint_files._copy, [0]

        def begun(saver: Any, progress: Any, *rest: Any, **named: Any) -> Any:
            steps[0] = progress.step
            return saving(saver, progress, *rest, **named)

        def copied(*arguments: Any, **named: Any) -> None:
            copying(*arguments, **named)
            if rank == 0:
                append(path.with_name("saves.jsonl"), json.dumps({"attempt": attempt, "step": steps[0]}) + "\n")

        checkpoint.Saver.save, checkpoint_files._copy = begun, copied  # type: ignore[method-assign]
        following = TrainLoader.__next__

        def noted(loader: Any) -> Any:
            step, (_, world, own, _) = loader._step, loader._arguments
            batches = following(loader)
            keys = [key for item in batches if item.weight for key in item.batch.keys]
            row = {"attempt": attempt, "step": step, "world": world, "rank": own, "keys": keys}
            append(path, json.dumps(row) + "\n")
            return batches

        TrainLoader.__next__ = noted  # type: ignore[method-assign]

    return patch


def append(path: Path, text: str) -> None:
    """Add to a file in one write, so that lines of several processes do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


class _ForkedNursery:
    """What `vlm.data.nursery.Nursery` holds of its process, where that was forked, not started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.005)


def warm_nursery(rank: int) -> None:
    """Have the loader processes of this run forked from it as it is now, which saves importing (3 s) and carries the
    patches that are in place into them. Once: a nursery that is lost is started anew as in any run."""
    from vlm.data import nursery
    from vlm.data.messages import pair
    from vlm.data.worker_process import serve

    control, theirs = pair()
    pid = os.fork()
    if not pid:
        control.close()
        os.setpgid(0, 0)
        try:
            serve(theirs.fileno())
        finally:
            os._exit(1)
    theirs.close()
    usual, first = nursery.Nursery.__init__, [pid]

    def begin(self: Any) -> None:
        if not first:
            usual(self)
            return
        self.owner, self._numbers, self._control = os.getpid(), itertools.count(), control
        self._process = _ForkedNursery(first.pop())
        import atexit

        atexit.register(self._close)

    nursery.Nursery.__init__ = begin  # type: ignore[method-assign]
