"""The process from which a trainer's loader processes are forked, and what the trainer holds of each of these."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from vlm.data.messages import Closed, Message, Packed, pair, receive, send
from vlm.data.worker_process import Slot

_PRELOAD = ("vlm.data.loader", "vlm.data.clips", "vlm.data.questions")  # what workers need: imported once, for all
_STOP_SECONDS = 5.0  # how long a killed process may take to end, before it is left to itself (it waits for a dead disk)


class Nursery:
    """Starts workers. It ends by itself when the trainer does, however that ends, and its workers with it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._numbers = itertools.count()
        self._control, theirs = pair()
        lines = (
            f"import sys; sys.path[:] = {sys.path!r}",
            f"import {', '.join(_PRELOAD)}",
            f"from vlm.data.worker_process import serve; serve({theirs.fileno()})",
        )
        # A group of its own: Ctrl-C and Ctrl-Z are for the trainer alone.
        self._process = subprocess.Popen(
            [sys.executable, "-c", "; ".join(lines)],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
        theirs.close()
        atexit.register(self._close)

    def _close(self) -> None:
        """At the end of a trainer that is not killed: nothing of it is left a moment later either."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
            self._control.close()

    def alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def fork(self, connection: socket.socket, slot: int, ended: int) -> int:
        """A worker with these descriptors. Returns its number; ConnectionError where the nursery has just ended."""
        number = next(self._numbers)
        descriptors = [connection.fileno(), slot, ended]
        socket.send_fds(self._control, [f"start {number}".encode()], descriptors, socket.MSG_NOSIGNAL)
        return number

    def kill(self, number: int) -> None:
        if self.owner == os.getpid():  # not a process that was forked from it
            with contextlib.suppress(OSError):  # it has ended, and its workers with it
                self._control.send(f"kill {number}".encode(), socket.MSG_NOSIGNAL)


_nurseries: list[Nursery] = []
_lock = threading.Lock()


def nursery(another: bool = False) -> Nursery:
    """The nursery of this process; another one where the last has ended."""
    with _lock:
        if another or not _nurseries or not _nurseries[-1].alive():
            _nurseries[:] = [Nursery()]
        return _nurseries[-1]


class Worker:
    """A process that loads data, as its parent sees it.

    Args:
        note, dataset: what it is to be told first.
    """

    def __init__(self, note: tuple[Any, ...], dataset: Packed) -> None:
        self._socket, theirs = pair()
        self._socket.setblocking(False)
        self._ended, ended = os.pipe()
        slot = Slot.make()
        try:
            try:
                self.nursery = nursery()
                self._number = self.nursery.fork(theirs, slot, ended)
            except ConnectionError:
                self.nursery = nursery(another=True)
                self._number = self.nursery.fork(theirs, slot, ended)
            self.slot = Slot(slot)
        finally:
            theirs.close()
            for descriptor in (slot, ended):
                os.close(descriptor)
        self.items: list[int] = []  # those it was given and has not answered, in the order in which it takes them
        self.known = 0  # how many failed labels it has been told
        self.since = time.monotonic()
        self.late: tuple[float, float] | None = None  # at what since when it was found too late, and when
        self.has_loaded = False
        self.renewed = False  # it ends by itself, since it has grown too large
        with contextlib.suppress(Closed):
            send(self._socket, note, dataset)

    def fileno(self) -> int:
        return self._socket.fileno()

    def give(self, index: int, news: dict[str, str], item: Packed) -> bool:
        """Hand over an item; False where it takes no more for now."""
        try:
            send(self._socket, (index, news), item)
        except (BlockingIOError, Closed):  # one that is gone is noticed by `take`
            return False
        self.items.append(index)
        return True

    def take(self) -> Message | None:
        """What it has sent, if anything. Raises Closed."""
        try:
            return receive(self._socket)
        except BlockingIOError:
            return None

    def kill(self) -> None:
        self.nursery.kill(self._number)

    def exit_code(self, seconds: float = _STOP_SECONDS) -> int | None:
        """How it ended (-9: SIGKILL), within so many seconds; None: not known."""
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        ready = poll.poll(1000 * seconds)
        text = os.read(self._ended, 64) if ready else b""
        return int(text) if text else None

    def close(self) -> None:
        if self._ended != -1:
            self._socket.close()
            self.slot.close()
            os.close(self._ended)
            self._ended = -1
