"""A process that cannot run any Python, since something holds the interpreter's lock, still shows its stacks and ends.

Three things that need no lock, all of them set up while all is well:

    faulthandler's timer    a C thread prints all stacks on stderr, where nobody put it off in time
    faulthandler's signal   all stacks into a nameless file, which another process of this host asks for and reads
    a POSIX timer           a C thread calls _exit(status), where nobody put it off in time

The first two read what threads are at without the interpreter's lock. That is safe as long as something holds it for
good; a process whose threads run meanwhile may crash, so nobody asks one that can tell by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import time
from pathlib import Path

SIGNAL = signal.SIGRTMAX - 5  # nobody else's: asks a process for its stacks
_NAME = "vlm-stacks"
_CLOCK_MONOTONIC, _SIGEV_THREAD = 1, 2  # time.h, signal.h of Linux


class _Value(ctypes.Structure):  # struct itimerspec
    _fields_ = [("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2)]


class _Event(ctypes.Structure):  # struct sigevent: 64 bytes in glibc and musl
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    ]


class LastResort:
    """Shows this process's stacks on stderr, and `grace` seconds later ends it, unless `put_off` is called in time.

    Args:
        status: what the process ends with.
        grace: seconds from the stacks to the end.
    """

    def __init__(self, status: int, grace: float) -> None:
        self._grace = grace
        self.descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        """Where the stacks are that another process asks for (`ask`)."""
        faulthandler.register(SIGNAL, file=self.descriptor, all_threads=True)
        self._library = _library()
        end = ctypes.cast(self._library._exit, ctypes.c_void_p).value
        event = _Event(value=status, notify=_SIGEV_THREAD, function=end)
        self._timer = ctypes.c_void_p()
        if self._library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def put_off(self, seconds: float) -> None:
        """Stacks after so many seconds from now, and then the end, instead of when it was set before."""
        faulthandler.dump_traceback_later(seconds, file=2)
        self._set(seconds + self._grace)

    def end_in(self, seconds: float) -> None:
        """The end after so many seconds, whatever happens; it cannot be told any more than it is being told now."""
        faulthandler.cancel_dump_traceback_later()
        self._set(seconds)

    def call_off(self) -> None:
        """Neither, until `put_off` is called again."""
        faulthandler.cancel_dump_traceback_later()
        self._set(0.0)

    def close(self) -> None:
        """Call all off, and answer nobody any more."""
        self.call_off()
        self._library.timer_delete(self._timer)
        faulthandler.unregister(SIGNAL)
        os.close(self.descriptor)

    def _set(self, seconds: float) -> None:
        parts = int(seconds), int(seconds % 1 * 1e9)
        value = _Value((ctypes.c_long * 2)(0, 0), (ctypes.c_long * 2)(*parts))
        if self._library.timer_settime(self._timer, 0, ctypes.byref(value), None):
            raise OSError(ctypes.get_errno(), "timer_settime")


def _library() -> ctypes.CDLL:
    """The C library; before glibc 2.34 timers lie beside it."""
    library = ctypes.CDLL(None, use_errno=True)
    return library if hasattr(library, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)


def here() -> str:
    """The same for all processes that see one another's process ids, and for no others."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    return os.uname().nodename


def ask(pid: int, descriptor: int, seconds: float = 2.0) -> str:
    """The stacks of another process of this host with a `LastResort`; "" where it gives none. One that runs Python
    meanwhile may crash (see above).

    Args:
        pid: the process.
        descriptor: its `LastResort.descriptor`.
        seconds: how long to wait for them.
    """
    place = Path(f"/proc/{pid}/fd/{descriptor}")
    try:
        if _NAME not in str(place.readlink()):  # the number is another process's by now
            return ""
        before = place.stat().st_size
        os.kill(pid, SIGNAL)
        until, size = time.monotonic() + seconds, before
        while time.monotonic() < until:
            time.sleep(0.1)
            now = place.stat().st_size
            if now == size and now > before:
                break
            size = now
        return place.read_bytes()[before:].decode(errors="replace")
    except OSError:
        return ""


def go_on(pid: int) -> bool:
    """Let a process of this host that was stopped by a signal go on, so that it tells where it is and ends as the
    others do. Whether it was stopped."""
    if _letter(pid) != "T":
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGCONT)
    return True


_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a file server (state D)",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "ended (zombie)",
    "X": "ended",
}


def _letter(pid: int) -> str:
    """The kernel's letter for what a process does; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """What the kernel says that a process of this host does."""
    letter = _letter(pid)
    if not letter:
        return "there is no such process any more"
    state = _STATES.get(letter, f"state {letter}")
    with contextlib.suppress(OSError):
        place = Path(f"/proc/{pid}/wchan").read_text().strip("0")
        state += f", in the kernel's {place}" if place else ""
    return state
