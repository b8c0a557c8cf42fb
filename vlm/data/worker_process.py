"""What runs in the processes that load data, and what they show of themselves while they do.

`serve` is the main loop of a clean process from which workers are forked: it has imported what they need and has no
threads of the trainer's. It is ours since multiprocessing's leaves a socket with a name behind when it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import spawn
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from vlm.data.messages import Closed, Packed, receive, send
from vlm.data.watch import Watch
from vlm.types import UserError

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_inside: list[int] = []  # the process id of a worker, in that worker


def is_worker() -> bool:
    """Whether this is a process that loads data for another."""
    return os.getpid() in _inside


# What a worker shows -------------------------------------------------------------------------------------------------

_SLOT_BYTES = 4096
_SLOT = struct.Struct("<QIIdHH")  # version (odd: being written), state, process id, since (monotonic s), two lengths
_TEXT_BYTES = (_SLOT_BYTES - _SLOT.size) // 2
IDLE, BUSY, SAMPLE = range(3)  # waits for an item or for room to send one; is at an item; at a sample of it


class At(NamedTuple):
    """Where a worker is."""

    state: int
    pid: int  # 0: it has not started yet
    since: float  # CLOCK_MONOTONIC
    label: str
    about: str


class Slot:
    """A page of memory in which a worker says where it is, for its parent to read also after its death."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _SLOT_BYTES)
        self._version = 0

    @staticmethod
    def make() -> int:
        """The descriptor of a new page."""
        descriptor = os.memfd_create("vlm-worker", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SLOT_BYTES)
        return descriptor

    def write(self, state: int, label: bytes = b"", about: bytes = b"") -> None:
        numbers = (state, os.getpid(), time.monotonic(), len(label), len(about))
        struct.pack_into("<Q", self._memory, 0, self._version + 1)
        _SLOT.pack_into(self._memory, 0, self._version + 1, *numbers)
        self._memory[_SLOT.size : _SLOT.size + len(label) + len(about)] = label + about
        self._version += 2
        struct.pack_into("<Q", self._memory, 0, self._version)

    def read(self) -> At:
        """Where the worker is; of one that died while it wrote, that it was between samples."""
        for _ in range(100):
            version, state, pid, since, label, about = _SLOT.unpack_from(self._memory, 0)
            text = self._memory[_SLOT.size : _SLOT.size + label + about]
            if version % 2 == 0 and struct.unpack_from("<Q", self._memory, 0)[0] == version:
                return At(state, pid, since, text[:label].decode(), text[label:].decode(errors="replace"))
            time.sleep(0)
        return At(BUSY, pid, since, "", "")

    def look(self) -> At | None:
        """Where the worker is, for a thread that does not own this; None: it is over."""
        try:
            return self.read()
        except ValueError:  # closed
            return None

    def close(self) -> None:
        self._memory.close()


class SlotWatch:
    """Shows in a slot which sample a dataset is at (vlm.data.watch.Watch).

    Args:
        failed: labels that have cost a process its life or its time -> the reason.
    """

    def __init__(self, slot: Slot, failed: dict[str, str]) -> None:
        self._slot, self._failed = slot, failed

    def begin(self, label: str, about: str) -> str | None:
        reason = self._failed.get(label)
        if reason is None:
            name = label.encode()
            assert len(name) <= _TEXT_BYTES, f"a label of {len(name)} bytes"
            self._slot.write(SAMPLE, name, about.encode(errors="replace")[:_TEXT_BYTES])
        return reason

    def end(self) -> None:
        self._slot.write(BUSY)


# A worker ------------------------------------------------------------------------------------------------------------


def own_memory(pid: int | str = "self") -> int:
    """Resident bytes of a process of its own, without files that it maps and memory that it shares; 0: it ended."""
    try:
        resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    except (OSError, ValueError):
        return 0
    return max(0, resident - shared) * mmap.PAGESIZE


def keep_memory() -> None:
    """Have this process keep the memory that it frees, up to 32 MiB at a time, and take it again.

    The C library gives large arrays back to the kernel, which then has to clear as much for the next ones, page by
    page: for clips, up to a quarter of the processor time. Nothing happens where the library knows no such setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc accepts
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def load(dataset: Any, item: Any, watch: Watch) -> Any:
    """One item, from a dataset that has `load(item, watch)`, or else `__getitem__`."""
    return dataset.load(item, watch) if hasattr(dataset, "load") else dataset[item]


def work(connection: socket.socket, slot: Slot) -> None:
    """Loads what the parent sends until the parent is gone. Messages to the parent: (kind, index, bytes of memory).

    Kinds: "item" (what was loaded), "user" (text of a UserError), "error" (a traceback), "unfit" (a traceback, or the
    memory that a process has at birth where that is too much: the process is of no use).
    """
    torch.set_num_threads(1)
    keep_memory()
    slot.write(BUSY)
    try:
        message = receive(connection, shared=False)
        folder, environment, sys.path[:], main, most_memory = message.note
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        dataset = message.load(lambda: spawn.prepare(main))  # the trainer's script, where classes come from it
        del message
        if most_memory and own_memory() > most_memory:
            return send(connection, ("unfit", -1, own_memory()), Packed(""))
    except Exception:
        return send(connection, ("unfit", -1, 0), Packed(traceback.format_exc()))
    failed: dict[str, str] = {}
    watch = SlotWatch(slot, failed)
    while True:
        slot.write(IDLE)
        message = receive(connection)
        index, news = message.note
        failed.update(news)
        slot.write(BUSY)
        kind, packed = _load_one(dataset, message.load(lambda: spawn.prepare(main)), watch)
        slot.write(IDLE)
        memory = own_memory()
        send(connection, (kind, index, memory), packed)
        packed.close()
        if most_memory and memory > most_memory:
            return None


def _load_one(dataset: Any, item: Any, watch: Watch) -> tuple[str, Packed]:
    try:
        return "item", Packed(load(dataset, item, watch))
    except UserError as error:
        return "user", Packed(str(error))
    except BaseException:
        return "error", Packed(traceback.format_exc())


# Where workers come from ---------------------------------------------------------------------------------------------


def serve(descriptor: int) -> NoReturn:
    """Forks a worker for each "start" that comes, kills one for each "kill", until the trainer is gone.

    Messages are datagrams of text: "start NUMBER" with the descriptors of the worker's socket, of its slot, and of a
    pipe that gets the worker's exit code (as text) at its end; "kill NUMBER".
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends its workers
    control = socket.socket(fileno=descriptor)
    awake, alarm = os.pipe()
    for end in (awake, alarm):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    workers: dict[int, tuple[int, int]] = {}  # number -> process id, pipe
    poll = select.poll()
    for source in (awake, descriptor):
        poll.register(source, select.POLLIN)
    trainer = os.getppid()
    while True:
        ready = {place for place, _ in poll.poll(5000)}
        if os.getppid() != trainer:  # gone, though a process that it forked may hold its end of the socket
            os._exit(0)
        if awake in ready:
            os.read(awake, 4096)
            _bury(workers)
        if descriptor in ready:
            try:
                text, descriptors, _, _ = socket.recv_fds(control, 256, 3)
            except ConnectionError:
                text, descriptors = b"", []
            if not text:  # the trainer is gone; workers go with this process
                os._exit(0)
            verb, number = text.decode().split()
            if verb == "start":
                workers[int(number)] = (_fork(descriptors, (control.fileno(), awake, alarm), workers), descriptors[2])
                for used in descriptors[:2]:
                    os.close(used)
            elif int(number) in workers:
                os.kill(workers[int(number)][0], signal.SIGKILL)


def _bury(workers: dict[int, tuple[int, int]]) -> None:
    """Tell of each worker that has ended how it did."""
    for number, (pid, pipe) in list(workers.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(pipe)
            del workers[number]


def _fork(descriptors: list[int], foreign: tuple[int, ...], workers: dict[int, tuple[int, int]]) -> int:
    """The process id of a new worker."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also out of a decoder that never returns
        if os.getppid() != server:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (*foreign, descriptors[2], *(pipe for _, pipe in workers.values())):
            os.close(other)
        _inside.append(os.getpid())
        slot = Slot(descriptors[1])
        os.close(descriptors[1])
        _quietly(lambda: work(socket.socket(fileno=descriptors[0]), slot))
        code = 0
    finally:
        os._exit(code)


def _quietly(run: Callable[[], None]) -> None:
    """End without words where the trainer is gone; show what else goes wrong."""
    try:
        run()
    except (Closed, KeyboardInterrupt):
        pass
    except BaseException:
        traceback.print_exc()
        raise
