"""Worker processes that build the shards of a plan.

Each process builds whole shards, so the bytes do not depend on how many there are. A clip that crashes or hangs a
decoder takes its process with it, not the run: its shard is begun again, and the second time the clip is rejected.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from vlm.data.shard_build import Settings, build_shard
from vlm.data.shard_format import shard_name
from vlm.data.shard_plan import Cut
from vlm.types import UserError

# How long an item may take before its process is ended: some time to begin with, and more for a large file.
SECONDS_PER_ITEM = 300.0
SECONDS_PER_MEGABYTE = 2.0
REENCODING = 5  # times as much where clips are encoded again
LOSSES = 2  # times that a process is lost at an item before the item is blamed (once may be another's doing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a process must know to build shards of a plan."""

    out: Path  # folder of the set
    lines: Path  # the plan file
    plan: str  # its digest
    settings: Settings


def build_shards(
    work: Work,
    cuts: Mapping[int, Cut],
    *,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Build the shards of `cuts` (number -> its lines of the plan file) in `workers` processes.

    `progress` is told how many items are done, about every second. Raises UserError when a shard cannot be written.
    """
    jobs = deque(_Job(number, cut) for number, cut in sorted(cuts.items()))
    crew: list[_Worker] = []
    finished = 0
    try:
        for _ in range(min(workers, len(jobs))):
            crew.append(_Worker(work))
            crew[-1].give(jobs.popleft())
        while busy := [worker for worker in crew if worker.job is not None]:
            ready = wait([worker.connection for worker in busy], timeout=1.0)
            for worker in busy:
                job = worker.job
                assert job is not None
                loss = worker.listen() if worker.connection in ready else worker.hangs()
                if loss:
                    jobs.appendleft(_after_loss(job, worker.at, loss))
                    worker.stop()
                    crew[crew.index(worker)] = worker = _Worker(work)
                elif worker.job is None:
                    finished += job.cut.items
                if worker.job is None and jobs:
                    worker.give(jobs.popleft())
            progress(finished + sum(worker.done for worker in crew if worker.job is not None))
    finally:
        for worker in crew:
            worker.stop()


@dataclass(slots=True)
class _Job:
    """A shard to build. `skip`: item -> why it is rejected unseen."""

    number: int
    cut: Cut
    skip: dict[int, str] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)


def _after_loss(job: _Job, at: int | None, loss: str) -> _Job:
    """The job to begin again after its process was lost at an item."""
    if at is None:
        raise RuntimeError(f"a worker process was lost before it began an item of {shard_name(job.number)}: {loss}")
    if at in job.skip:
        raise RuntimeError(f"worker processes are lost at item {at}, which they only had to pass over: {loss}")
    job.losses[at] += 1
    if job.losses[at] >= LOSSES:
        job.skip[at] = f"decoding {loss}, {LOSSES} times"
    return job


class _Worker:
    """A process, the shard that it builds, the item it is at and since when."""

    def __init__(self, work: Work) -> None:
        # A clean process: nothing of the caller's threads; and unlike a fork server's, no socket file that outlives
        # a caller that is killed.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.job: _Job | None = None
        self.at: int | None = None  # the item begun last
        self.done = 0
        self._deadline = float("inf")
        self._seconds = 0.0
        self._slower = 1 if work.settings.reencode is None else REENCODING

    def give(self, job: _Job) -> None:
        self.job, self.at, self.done, self._deadline = job, None, 0, float("inf")
        self.connection.send((job.number, job.cut, job.skip))

    def listen(self) -> str:
        """Take in one message. Returns how the process was lost, or "" when it was not."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            code = self.process.exitcode
            return f"ended its process ({signal.Signals(-code).name if code and code < 0 else f'exit code {code}'})"
        if kind == "item":
            self.done += self.at is not None
            self.at, size = content
            self._seconds = self._slower * (SECONDS_PER_ITEM + SECONDS_PER_MEGABYTE * size / 2**20)
            self._deadline = time.monotonic() + self._seconds
        elif kind == "finished":
            self.job = None
        elif kind == "unwritable":
            raise UserError(content[0])
        else:
            raise RuntimeError(f"a worker process failed:\n{content[0]}")
        return ""

    def hangs(self) -> str:
        """How long the process has been silent when that is too long, else ""."""
        return f"took more than {self._seconds:.0f} s" if time.monotonic() > self._deadline else ""

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _work(connection: Connection, work: Work) -> None:
    """A worker process: builds the shards that it is given, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers

    def report(at: int, size: int) -> None:
        connection.send(("item", at, size))

    try:
        while True:
            number, cut, skip = connection.recv()
            try:
                with work.lines.open("rb") as file:
                    file.seek(cut.offset)
                    lines = file.read(cut.nbytes).splitlines()
                build_shard(work.out, number, lines, work.plan, work.settings, skip, report)
            except ConnectionError:
                return
            except OSError as error:
                connection.send(("unwritable", f"{work.out / shard_name(number)} cannot be written: {error}"))
            except Exception:
                connection.send(("broken", traceback.format_exc()))
            else:
                connection.send(("finished", number))
    except (EOFError, ConnectionError):
        return
