"""Processes that load data: what they load comes in order, and none of them can hang or end the job.

A process that is lost at a sample, or is at it for too long, costs that sample and no more: another process takes its
place and loads the item again, and the dataset is told to do without the sample.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vlm.data.messages import Closed, Message, Packed
from vlm.data.nursery import Nursery, Worker
from vlm.data.watch import Unwatched, Watch
from vlm.data.worker_process import IDLE, SAMPLE, At, is_worker, load, own_memory
from vlm.types import UserError

AHEAD = 4  # items a process that are taken from the sampler and not yet handed out
LOSSES = 3  # processes that may be lost outside any sample, new ones in a row or any at one item, before the run ends
_OUTSIDE_SECONDS = 600.0  # for what is no sample: importing from a slow disk, joining samples to a batch
_GRACE = 0.1  # share of the time for a sample that it gets on top once it was found too late: all may have stood still
_MEMORY_FACTOR = 2  # of `worker_memory`, to which a process may grow at a sample before it is ended
_TICK = 1.0  # seconds between two looks at what no socket tells

_LIKELY = {
    "SIGKILL": "most likely memory ran out and the kernel killed it (see dmesg, or the job's memory limit), so load "
    "with fewer processes or ask for more memory",
    "SIGBUS": "most likely a file that it maps into memory, such as the index of the shards, was cut short or its "
    "storage is gone",
    "SIGSEGV": "most likely a decoder crashed on a damaged clip, which tools/make_shards.py without --no-check finds "
    "and leaves out",
}
# Signals that come from outside: the kernel short of memory, a person. The sample may not be to blame, and gets
# another chance.
_UNKNOWN = "it is not known how"
_FROM_OUTSIDE = {"SIGKILL", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT", "SIGUSR1", "SIGUSR2", _UNKNOWN}


class Loadable(Protocol):
    """A dataset whose samples can be given up one by one."""

    def load(self, item: Any, watch: Watch) -> Any:
        """Load an item; `watch` is told of each sample, and may answer that it cannot be used."""


class _Failure(NamedTuple):
    """What is to be raised where an item should be."""

    error: Exception


class Loaded(Iterator[Any]):
    """What `workers` processes load of a dataset, in the order of `sampler`. They begin at once.

    The processes are forked from a clean one, so nothing of the trainer's threads is in them; datasets, items and what
    is loaded are pickled, large tensors without a copy on this side. With `workers=0` this process loads, when it is
    asked to: then nothing watches the time and the memory that a sample takes, and a decoder that crashes ends the run.

    Args:
        dataset: has `load(item, watch)` (`Loadable`), or `__getitem__`, which knows no samples: a process that is lost
            there is lost outside any sample.
        knob: the recipe's field of `workers`, for messages.
        sample_seconds: a process that is longer at one sample is ended.
        worker_memory: bytes of its own (mapped files do not count) that a process may have after an item; one that has
            more is replaced. One that grows to twice as much at a sample is ended. 0: no limit.
    Raises:
        UserError: loading met one, at its place in the order; or processes end outside any sample, time after time.
        RuntimeError: loading raised something else, with the process's traceback (with `workers=0`, that itself).
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[Any],
        workers: int,
        knob: str,
        *,
        sample_seconds: float = 60.0,
        worker_memory: int = 0,
    ) -> None:
        assert min(workers, worker_memory) >= 0 < sample_seconds
        self.counts = Counter[str]()
        """Processes that were replaced: lost at "samples", "others" that were lost, "renewed" for their memory."""
        self._knob, self._count, self._seconds, self._most_memory = knob, workers, sample_seconds, worker_memory
        self._dataset, self._sampler = dataset, iter(sampler)
        self._own = Unwatched()  # with no workers
        self._crew: dict[int, Worker] = {}  # by the descriptor of its socket
        self._poll = select.poll()
        self._items: dict[int, Packed] = {}  # taken from the sampler and not yet loaded
        self._backlog: list[int] = []  # heap: those of them that no worker has
        self._results: dict[int, Message | _Failure] = {}  # loaded and not yet handed out
        self._taken = self._handed = 0
        self._failed: dict[str, str] = {}  # label -> why its sample cannot be used
        self._blamed = Counter[str]()  # label -> losses whose cause may lie elsewhere
        self._losses = Counter[int]()  # item -> processes lost at it outside any sample, since the last one that loaded
        self._lost_in_a_row = 0
        self._lost_nursery: Nursery | None = None
        if workers:
            if is_worker():
                raise UserError(
                    f"{sys.argv[0]}: a process that loads data was about to start such processes itself; what this "
                    'script does must stand under `if __name__ == "__main__":`, since they import it'
                )
            self._packed = Packed(dataset)
            for _ in range(workers):
                self._start()
            self._hand_out_work()

    def __next__(self) -> Any:
        if not self._count:
            return load(self._dataset, next(self._sampler), self._own)
        self._listen(0.0)
        self._hand_out_work()
        if self._handed == self._taken:  # the sampler has no more
            self.close()
            raise StopIteration
        while self._handed not in self._results:
            self._listen(min(_TICK, self._seconds * _GRACE))
            self._look_after()
            self._hand_out_work()
        result = self._results.pop(self._handed)
        self._handed += 1
        if isinstance(result, _Failure):
            raise result.error
        return self._opened(result)

    def at_work(self) -> list[tuple[str, str, float]]:
        """(label, about, seconds until now) of each sample that is being loaded; for any thread of this process."""
        own = self._own.at
        places = [at for worker in list(self._crew.values()) if (at := worker.slot.look()) is not None]
        now = time.monotonic()  # after all of them: a sample may have begun meanwhile
        here = [] if own is None else [(own[0], own[1], now - own[2])]
        return here + [(at.label, at.about, now - at.since) for at in places if at.state == SAMPLE]

    def close(self) -> None:
        """End the processes; what was not handed out is lost."""
        for descriptor, worker in self._crew.items():
            self._poll.unregister(descriptor)
            worker.kill()
            worker.close()
        for kept in (self._crew, self._items, self._backlog, self._results):
            kept.clear()
        self._sampler, self._handed = iter(()), self._taken

    def __del__(self) -> None:
        if getattr(self, "_crew", None):
            self.close()

    # What comes

    def _listen(self, seconds: float) -> None:
        """Take what workers have sent, waiting for something at most so long."""
        for descriptor, _ in self._poll.poll(1000 * seconds):
            if descriptor in self._crew:
                self._hear(self._crew[descriptor])

    def _hear(self, worker: Worker) -> None:
        try:
            while message := worker.take():
                self._note(worker, message)
        except Closed:
            self._replace(worker, None)

    def _note(self, worker: Worker, message: Message) -> None:
        kind, index, memory = message.note
        if kind == "unfit":
            raise self._given_up(worker, self._unfit(message.load(), memory))
        self._lost_in_a_row = 0
        self._losses.pop(index, None)
        worker.items.remove(index)
        worker.has_loaded = True
        self._items.pop(index).close()
        self._results[index] = message
        if self._most_memory and memory > self._most_memory:
            self.counts["renewed"] += 1
            worker.renewed = True

    def _opened(self, message: Message) -> Any:
        kind = message.note[0]
        value = message.load()
        if kind == "user":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"a process that loads data ({self._knob}={self._count}) failed:\n{value}")
        return value

    # What is given out

    def _hand_out_work(self) -> None:
        while self._taken - self._handed < AHEAD * self._count:
            try:
                item = next(self._sampler)
            except StopIteration:
                break
            self._items[self._taken] = Packed(item)
            heapq.heappush(self._backlog, self._taken)
            self._taken += 1
        while self._backlog:
            worker = min(self._crew.values(), key=lambda worker: len(worker.items))
            news = dict(itertools.islice(self._failed.items(), worker.known, None))
            if len(worker.items) >= AHEAD or not worker.give(self._backlog[0], news, self._items[self._backlog[0]]):
                break
            worker.known = len(self._failed)
            heapq.heappop(self._backlog)

    def _start(self) -> None:
        worker = Worker((str(Path.cwd()), dict(os.environ), sys.path, _script(), self._most_memory), self._packed)
        self._crew[worker.fileno()] = worker
        self._poll.register(worker.fileno(), select.POLLIN)

    # What goes wrong

    def _look_after(self) -> None:
        """End processes that are at one thing for too long, or have grown too large."""
        now = time.monotonic()
        for worker in list(self._crew.values()):
            at = worker.slot.read()
            since = at.since if at.pid else worker.since
            most = self._seconds if at.state == SAMPLE else max(self._seconds, _OUTSIDE_SECONDS)
            waits = at.pid and at.state == IDLE
            if not waits and now - since > most:
                if worker.late is None or worker.late[0] != since:
                    worker.late = (since, now)
                elif now - worker.late[1] > _GRACE * most:
                    what = "to load" if at.state == SAMPLE else "outside a sample" if at.pid else "to start"
                    self._replace(worker, at, f"took more than {most:g} s {what}")
            elif at.state == SAMPLE and self._most_memory and now - since > _TICK:
                grown = own_memory(at.pid)
                if grown > _MEMORY_FACTOR * self._most_memory:
                    self._replace(worker, at, f"took more than {grown / 2**20:.0f} MiB of memory to load")

    def _replace(self, worker: Worker, seen: At | None = None, reason: str = "") -> None:
        """Put another process in the place of one that has ended, or that is to be ended for a `reason` that was
        `seen`."""
        worker.kill()
        code = worker.exit_code()
        self._poll.unregister(worker.fileno())
        del self._crew[worker.fileno()]
        with contextlib.suppress(Closed):
            while message := worker.take():  # what it had sent before
                self._note(worker, message)
        at = worker.slot.read()
        if code is not None and code != -signal.SIGKILL:
            seen, reason = None, ""  # it had ended by itself
        if not worker.renewed and (seen is None or seen == at):  # else it went on just before it was ended
            self._blame(worker, at, code, reason)
        for index in worker.items:
            if index in self._items:
                heapq.heappush(self._backlog, index)
        worker.close()
        self._start()

    def _blame(self, worker: Worker, at: At, code: int | None, reason: str) -> None:
        """Put down a loss to a sample, to an item or to the process itself."""
        how = _how(code)
        if at.state == SAMPLE and at.label not in self._failed:
            self.counts["samples"] += 1
            self._blamed[at.label] += 1
            if not reason and how in _FROM_OUTSIDE and self._blamed[at.label] < 2:
                return
            twice = ", twice" if self._blamed[at.label] > 1 else ""
            self._failed[at.label] = reason or f"the process that loaded it died: {how}{twice}"
            return
        self.counts["others"] += 1
        error = self._lost(how, reason)
        if at.state != IDLE and worker.items:
            index = worker.items[0]
            self._losses[index] += 1
            if self._losses[index] >= LOSSES:
                self._items.pop(index).close()
                self._results[index] = _Failure(error)
        if code is None:  # all of a nursery are lost with it, and are one loss
            if worker.nursery is self._lost_nursery:
                return
            self._lost_nursery = worker.nursery
        self._lost_in_a_row += not worker.has_loaded
        if self._lost_in_a_row >= LOSSES:
            raise self._given_up(worker, error)

    def _given_up(self, worker: Worker, error: Exception) -> Exception:
        worker.close()
        self.close()
        return error

    def _lost(self, how: str, reason: str) -> UserError:
        happened = reason or f"ended by itself ({how}): {_LIKELY.get(how, 'what it printed says why')}"
        return UserError(
            f"a process that loads data {happened}. There were {self._knob}={self._count} of them for each process "
            "that trains or tests"
        )

    def _unfit(self, problem: str, memory: int) -> Exception:
        if problem:
            return RuntimeError(f"a process that loads data ({self._knob}={self._count}) could not begin:\n{problem}")
        return UserError(
            f"a process that loads data takes {memory / 2**20:.0f} MiB of memory before it has loaded anything, more "
            f"than the {self._most_memory / 2**20:.0f} MiB that it may have: raise data.worker_memory"
        )


def _script() -> dict[str, str]:
    """How a worker finds what is defined in the trainer's script (as multiprocessing.spawn.prepare wants it)."""
    main = sys.modules["__main__"]
    name, file = getattr(getattr(main, "__spec__", None), "name", None), getattr(main, "__file__", None)
    if name:
        return {"init_main_from_name": name}
    return {"init_main_from_path": str(Path(file).resolve())} if file else {}


def _how(code: int | None) -> str:
    """The name of the signal that ended a process, or its exit code."""
    if code is None:
        return _UNKNOWN
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
