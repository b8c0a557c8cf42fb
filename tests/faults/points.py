"""Where a fault strikes: at a call of one of our functions, before, within or after it; or in a call to the system.

Patches are made in a forked run (`Trial.start(…, inject)`), so nothing has to be put back.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

Act = Callable[[], None]
WHEN = ("before", "during", "after")


def modules_with(prefix: str, name: str) -> list[ModuleType]:
    """Loaded modules under `prefix` in which `name` is a function. AssertionError: none."""
    found = [
        module
        for path, module in sorted(sys.modules.items())
        if path.startswith(prefix) and callable(vars(module).get(name))
    ]
    assert found, f"no module {prefix}* has a function {name}: the points of saving are not what the kinds know"
    return found


def replace(prefix: str, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(function)` in the place of a function of ours, wherever it is known by that name."""
    modules = modules_with(prefix, name)
    changed = make(vars(modules[0])[name])
    for module in modules:
        setattr(module, name, changed)


def kill_self() -> None:
    """As the kernel does it: nothing is flushed, nothing is said."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


class Countdown:
    """Says once that it is time: at the `call`-th question after `arm` was called `saves` times."""

    def __init__(self, saves: int, call: int = 1) -> None:
        self._saves, self._call, self._lock = saves, call, threading.Lock()

    def arm(self) -> None:
        self._saves -= 1

    def due(self) -> bool:
        with self._lock:
            if self._saves <= 0:
                self._call -= 1
            return self._saves <= 0 and self._call == 0


def strike_at(prefix: str, name: str, when: str, line: int, due: Callable[[], bool], act: Act) -> None:
    """Have `act` happen at the call of a function of ours for which `due()` first is true.

    Args:
        when: before it, after it, or "during": as it comes to its `line`-th line, those of what it calls included (or
            just before it returns, if it has fewer).
    """

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def struck(*arguments: Any, **named: Any) -> Any:
            if not due():
                return function(*arguments, **named)
            if when == "before":
                act()
            if when == "during":
                result = _traced(function, line, act)(*arguments, **named)
            else:
                result = function(*arguments, **named)
            act()
            return result

        return struck

    replace(prefix, name, make)


def _traced(function: Callable[..., Any], line: int, act: Act) -> Callable[..., Any]:
    left = iter(range(line, 0, -1))

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and next(left, 0) == 1:
            act()
        return trace

    def traced(*arguments: Any, **named: Any) -> Any:
        sys.settrace(trace)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(None)

    return traced


def system_calls(names: tuple[str, ...], folder: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(call)` in the place of functions of `os`, for descriptors of files under `folder` alone."""

    def concerns(descriptor: Any) -> bool:
        try:
            return isinstance(descriptor, int) and folder in str(Path(f"/proc/self/fd/{descriptor}").readlink())
        except OSError:
            return False

    for name in names:
        usual = getattr(os, name)
        changed = make(usual)

        def chosen(descriptor: Any, *rest: Any, usual: Any = usual, changed: Any = changed, **named: Any) -> Any:
            return (changed if concerns(descriptor) else usual)(descriptor, *rest, **named)

        setattr(os, name, chosen)


def obey_permissions() -> None:
    """Take from this process the right to pass over the modes of files, which root has."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0, os.strerror(ctypes.get_errno())
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        for kind in (0, 1):  # effective, permitted
            data[kind] &= ~(1 << capability)
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def flip(path: Any, rng: Any) -> int:
    """Change one random bit of a file. Returns its byte."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return place


def lines_drawn(rng: Any) -> int:
    """How far into a function: few lines as likely as many."""
    return round(2 ** rng.uniform(0, 7))
