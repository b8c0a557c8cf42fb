"""Pictures of many videos at a steady rate, decoded in processes, ahead of whoever reads them.

    for event in read_frames(paths, fps=1.0, prepare=CentreCrop(short_side=224, crop=224), workers=8):
        ...  # Frames of a video in order, then its End

A file that crashes or hangs a decoder takes its process with it, not the run: it is begun again, and the second time
it is given up, with its reason.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm.data.video import DecodeError, frames_at

CHUNK = 16  # pictures that travel together
AHEAD = 64  # chunks that wait for the reader at most
SECONDS_OF_SILENCE = 300.0  # of a process before it is ended
LOSSES = 2  # times that a process is lost at a video before the video is given up

Prepare = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) of any size -> uint8 (h, w, 3) of one size; picklable


class Frames(NamedTuple):
    """Some pictures of the video paths[at]."""

    at: int
    begins: bool  # the video's first: what came of it before, from a process that was lost, counts no more
    pixels: np.ndarray  # uint8 (n, h, w, 3)


class End(NamedTuple):
    """All has come of the video paths[at], or nothing of it counts since it cannot be read."""

    at: int
    failure: str  # one sentence; "": none
    warnings: tuple[str, ...] = ()


def read_frames(paths: Sequence[Path], *, fps: float, prepare: Prepare, workers: int) -> Iterator[Frames | End]:
    """Events of all videos; those of one are in order, those of several may be mixed. workers 0: in this process."""
    if not workers:
        for at, path in enumerate(paths):
            yield from _read_video(at, path, fps, prepare)
        return
    yield from _ahead(_from_processes(paths, fps, prepare, min(workers, len(paths))))


def _read_video(at: int, path: Path, fps: float, prepare: Prepare) -> Iterator[Frames | End]:
    warnings: list[str] = []
    begins = True
    try:
        pictures = map(prepare, frames_at(path, fps, warnings))
        while chunk := list(itertools.islice(pictures, CHUNK)):
            yield Frames(at, begins, np.stack(chunk))
            begins = False
    except (DecodeError, MemoryError, OSError) as error:
        yield End(at, str(error) or type(error).__name__)
    else:
        yield End(at, "", tuple(warnings))


def _ahead(events: Iterator[Frames | End]) -> Iterator[Frames | End]:
    """The same events, taken in by a thread, so that the processes go on while the reader is busy."""
    waiting: queue.Queue[Frames | End | BaseException | None] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: Frames | End | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.2)
            except queue.Full:
                continue

    def take_in() -> None:
        try:
            for event in events:
                put(event)
                if stop.is_set():
                    break
            put(None)
        except BaseException as error:  # handed over to the reader
            put(error)
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator: its processes end here

    thread = threading.Thread(target=take_in, name="frames ahead")
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


# Processes -----------------------------------------------------------------------------------------------------------


def _from_processes(paths: Sequence[Path], fps: float, prepare: Prepare, workers: int) -> Iterator[Frames | End]:
    jobs = deque(range(len(paths)))
    losses: Counter[int] = Counter()
    crew: list[_Worker] = []
    try:
        crew += [_Worker(fps, prepare) for _ in range(workers)]
        for worker in crew:
            worker.give(jobs.popleft(), paths)
        while busy := [worker for worker in crew if worker.at is not None]:
            ready = wait([worker.connection for worker in busy], timeout=1.0)
            for worker in busy:
                at = worker.at
                assert at is not None
                event = worker.listen() if worker.connection in ready else worker.hangs()
                if isinstance(event, str):  # how it was lost
                    losses[at] += 1
                    if losses[at] >= LOSSES:
                        yield End(at, f"decoding {event}, {LOSSES} times")
                    else:
                        jobs.appendleft(at)
                    worker.stop()
                    crew[crew.index(worker)] = worker = _Worker(fps, prepare)
                elif event is not None:
                    yield event
                if worker.at is None and jobs:
                    worker.give(jobs.popleft(), paths)
            idle = [worker for worker in crew if worker.at is None]
            while idle and jobs:  # a video to begin again after its process was replaced
                idle.pop().give(jobs.popleft(), paths)
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """A process and the video that it reads."""

    def __init__(self, fps: float, prepare: Prepare) -> None:
        # A clean process: nothing of the caller's threads; and unlike a fork server's, no socket file that outlives
        # a caller that is killed.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, fps, prepare), daemon=True)
        self.process.start()
        theirs.close()
        self.at: int | None = None
        self._heard = 0.0

    def give(self, at: int, paths: Sequence[Path]) -> None:
        self.at, self._heard = at, time.monotonic()
        self.connection.send((at, paths[at]))

    def listen(self) -> Frames | End | str:
        """One event, or how the process was lost."""
        try:
            event: Frames | End = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            code = self.process.exitcode
            return f"ended its process ({signal.Signals(-code).name if code and code < 0 else f'exit code {code}'})"
        self._heard = time.monotonic()
        if isinstance(event, End):
            self.at = None
        return event

    def hangs(self) -> str | None:
        """How long the process has been silent when that is too long."""
        silent = time.monotonic() - self._heard
        return f"took more than {SECONDS_OF_SILENCE:.0f} s" if silent > SECONDS_OF_SILENCE else None

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _work(connection: Connection, fps: float, prepare: Prepare) -> None:
    """A worker process: reads the videos that it is given, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    try:
        while True:
            at, path = connection.recv()
            for event in _read_video(at, path, fps, prepare):
                connection.send(event)
    except (EOFError, ConnectionError):
        return
