"""Pictures of many videos, decoded in processes, ahead of whoever reads them, and in order all the same.

    reader = RateReader(fps=1.0, prepare=CentreCrop(short_side=224, crop=224))
    for event in read_frames(paths, reader, workers=8):
        ...  # Frames of a video in order, then its End; then the next video

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from vlm.data.shard_format import ShardError
from vlm.data.video import DecodeError

CHUNK = 16  # pictures that travel together
AHEAD = 16  # chunks that wait for the reader at most
EARLY = 256 << 20  # bytes of pictures, of videos whose turn has not come, beyond which their processes have to wait
SECONDS_OF_SILENCE = 300.0  # of a process before it is ended
LOSSES = 2  # times that a process is lost at a video before the video is given up

Reader = Callable[[Any, list[str]], Iterable[np.ndarray]]
"""item, list for warnings -> its pictures, arrays of one shape and dtype; picklable (vlm.data.frame_readers)."""


class Again(Exception):
    """A reader may raise it in the midst: what came of the video counts no more, `pictures` come in its place."""

    def __init__(self, pictures: Iterable[np.ndarray]) -> None:
        super().__init__()
        self.pictures = pictures


class Frames(NamedTuple):
    """Some pictures of the video items[at]."""

    at: int
    begins: bool  # the video's first: what came of it before, as from a process that was lost, counts no more
    pixels: np.ndarray  # (n, …) as the reader gives them
    times: np.ndarray  # (n,) how many times each comes: more than once where the reader gave the same array again


class End(NamedTuple):
    """All has come of the video items[at], or nothing of it counts since it cannot be read."""

    at: int
    failure: str  # one sentence; "": none
    warnings: tuple[str, ...] = ()


def read_frames(items: Sequence[Any], reader: Reader, *, workers: int) -> Iterator[Frames | End]:
    """Events of all videos, one video after the other. workers 0: in this process."""
    if not workers:
        for at, item in enumerate(items):
            yield from _read_video(at, item, reader)
        return
    yield from _ahead(_from_processes(items, reader, min(workers, len(items))))


def _read_video(at: int, item: Any, reader: Reader) -> Iterator[Frames | End]:
    warnings: list[str] = []
    try:
        yield from _chunks(at, reader(item, warnings))
    except (DecodeError, ShardError, MemoryError, OSError) as error:
        yield End(at, str(error) or type(error).__name__)
    else:
        yield End(at, "", tuple(warnings))


def _chunks(at: int, pictures: Iterable[np.ndarray]) -> Iterator[Frames]:
    counted, begins = _counted(pictures), True
    try:
        while chunk := list(itertools.islice(counted, CHUNK)):
            pixels, times = zip(*chunk, strict=True)
            yield Frames(at, begins, np.stack(pixels), np.array(times))
            begins = False
    except Again as other:
        yield from _chunks(at, other.pictures)


def _counted(pictures: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """(picture, how many times the same array came)."""
    last, count = None, 0
    for picture in pictures:
        if picture is last:
            count += 1
            continue
        if last is not None:
            yield last, count
        last, count = picture, 1
    if last is not None:
        yield last, count


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


class _Turn:
    """Whose turn it is, and what came early."""

    def __init__(self) -> None:
        self.at = 0
        self.early: dict[int, list[Frames | End]] = {}
        self.nbytes = 0

    def take(self, event: Frames | End) -> Iterator[Frames | End]:
        """The events that may go on now."""
        if event.at != self.at:
            if isinstance(event, Frames) and event.begins:
                self._forget(event.at)
            self.early.setdefault(event.at, []).append(event)
            self.nbytes += _nbytes(event)
            return
        yield event
        while isinstance(event, End):
            self.at += 1
            waiting = self.early.get(self.at, [])
            yield from waiting
            self._forget(self.at)
            if not waiting:
                return
            event = waiting[-1]

    def _forget(self, at: int) -> None:
        self.nbytes -= sum(map(_nbytes, self.early.pop(at, [])))


def _nbytes(event: Frames | End) -> int:
    return event.pixels.nbytes if isinstance(event, Frames) else 0


def _from_processes(items: Sequence[Any], reader: Reader, workers: int) -> Iterator[Frames | End]:
    jobs = deque(range(len(items)))
    losses: Counter[int] = Counter()
    turn = _Turn()
    crew: list[_Worker] = []
    try:
        crew += [_Worker(reader) for _ in range(workers)]
        for worker in crew:
            worker.give(jobs.popleft(), items)
        while busy := [worker for worker in crew if worker.at is not None]:
            heard = [worker for worker in busy if turn.nbytes <= EARLY or worker.at == turn.at]  # others wait at a pipe
            ready = wait([worker.connection for worker in heard], timeout=1.0)
            for worker in heard:
                at = worker.at
                assert at is not None
                event = worker.listen() if worker.connection in ready else worker.hangs()
                if isinstance(event, str):  # how it was lost
                    losses[at] += 1
                    if losses[at] >= LOSSES:
                        yield from turn.take(End(at, f"decoding {event}, {LOSSES} times"))
                    else:
                        jobs.appendleft(at)
                    worker.stop()
                    crew[crew.index(worker)] = worker = _Worker(reader)
                elif event is not None:
                    yield from turn.take(event)
                if worker.at is None and jobs:
                    worker.give(jobs.popleft(), items)
            idle = [worker for worker in crew if worker.at is None]
            while idle and jobs:  # a video to begin again after its process was replaced
                idle.pop().give(jobs.popleft(), items)
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """A process and the video that it reads."""

    def __init__(self, reader: Reader) -> None:
        # A clean process: nothing of the caller's threads; and unlike a fork server's, no socket file that outlives
        # a caller that is killed.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, reader), daemon=True)
        self.process.start()
        theirs.close()
        self.at: int | None = None
        self._heard = 0.0

    def give(self, at: int, items: Sequence[Any]) -> None:
        self.at, self._heard = at, time.monotonic()
        self.connection.send((at, items[at]))

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


def _work(connection: Connection, reader: Reader) -> None:
    """A worker process: reads the videos that it is given, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    try:
        while True:
            at, item = connection.recv()
            for event in _read_video(at, item, reader):
                connection.send(event)
    except (EOFError, ConnectionError):
        return
