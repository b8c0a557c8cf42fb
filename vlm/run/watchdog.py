"""Tells within seconds that a rank has stalled, where, and which one; then ends all of them with status 86.

    RUN/hang/20261121-191205-step-12-rank-0.txt     what the rank that reports knows of all; on its stderr too

A run says what it is at (`Heart.phase`); modules say so themselves (`Watchdog.watch`). A thread looks whether anything
has been said lately, another one tells the other ranks (vlm.run.watchdog_post). A rank that cannot run any thread is
seen by the others, and shows its stacks and ends by timers of the C library (vlm.run.watchdog_timer).
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor, nn

from vlm.distributed import World, gather_objects
from vlm.errors import HUNG
from vlm.run import watchdog_post as post
from vlm.run import watchdog_report as report
from vlm.run.watchdog_report import Beat, Sight, Told
from vlm.run.watchdog_timer import LastResort

AtWork = Callable[[], Sequence[tuple[str, str, float]]]

BUSY_PHASES = ("build", "restore", "save", "metrics", "report")
"""In these one call can take minutes and says nothing meanwhile: there, time on the processor of any thread, and data
from and to a disk, are signs of life too."""
_BUSY = 0.05  # share of a processor from which a process counts as busy
# Seconds from the limit to a locked process's stacks, and from these to its end. Before the first, others have let a
# stopped process go on: stacks that are shown while Python runs can crash it (watchdog_timer).
_LAST_RESORT = 15.0, 10.0
_SILENCE = 5.0  # seconds without a beat from which a rank counts as silent, once the run hangs
_MOST_TO_END = 28.0  # seconds from the alarm to the end, whatever happens
_WRITING = 5.0  # seconds that a report may take to write: it may be the file system that hangs


class Heart(Protocol):
    """What a run tells the watchdog as it goes on: every call is a sign of life."""

    def phase(self, name: str, *, step: int | None = None, module: str = "", keys: Sequence[str] = ()) -> None:
        """What begins now.

        Args:
            name: "load", "forward", "backward", "collective", "optimizer", "save", "evaluate", …
            step: the optimizer step (from 1) that is being made; None: as before.
            module: where in the model.
            keys: samples in hand; none: as before.
        """

    def loading(self, at_work: AtWork) -> None:
        """How to see which samples loader processes are at (vlm.data.workers.Loaded.at_work), while batches are
        awaited."""


class Unwatched:
    """Nobody watches."""

    def phase(self, name: str, *, step: int | None = None, module: str = "", keys: Sequence[str] = ()) -> None:
        pass

    def loading(self, at_work: AtWork) -> None:
        pass


NOBODY = Unwatched()


class Watchdog:
    """Watches this process and, with the others' watchdogs, the run. Collective to enter where there are several.

    Args:
        folder: the run's; reports go to its `hang`.
        seconds: without a sign of life after which a rank has stalled; 0: nothing is watched.
        world: this process among all.
    """

    def __init__(self, folder: Path, seconds: float, world: World) -> None:
        self._folder, self._limit, self._world = folder / "hang", seconds, world
        self._tick = min(2.0, max(0.1, seconds / 20))
        self._silence = min(_SILENCE, seconds)
        self._phase, self._module, self._step, self._keys = "start", "", 0, tuple[str, ...]()
        self._phase_since = time.monotonic()
        self._signs = 0  # of life since the step began
        self._all_signs = 0
        self._age = 0.0  # seconds since the last sign, as far as this process has run
        self._beats = 0
        self._at_work: AtWork | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._post: post.Post | None = None
        self._hooks: list[Any] = []

    # What the run says

    def phase(self, name: str, *, step: int | None = None, module: str = "", keys: Sequence[str] = ()) -> None:
        if step is not None and step != self._step:
            self._step, self._signs = step, 0
        if keys:
            self._keys = tuple(keys)
        self._phase, self._module, self._phase_since = name, module, time.monotonic()
        self._signs += 1
        self._all_signs += 1

    def loading(self, at_work: AtWork) -> None:
        self._at_work = at_work

    def watch(self, model: nn.Module) -> None:
        """From now on, each block of the model that is reached, forward or backward, is a sign of life."""
        if self._limit:
            for name, block in _blocks(model):
                self._hooks += [
                    block.register_forward_pre_hook(functools.partial(self._enters, name)),
                    block.register_forward_hook(functools.partial(self._leaves, name)),
                ]

    def _enters(self, name: str, module: nn.Module, arguments: Any) -> None:
        self._module = name
        self._signs += 1
        self._all_signs += 1

    def _leaves(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is not None and tensor.grad_fn is not None:
            tensor.register_hook(functools.partial(self._returns, name))

    def _returns(self, name: str, gradient: Tensor) -> None:
        self._module = name
        self._signs += 1
        self._all_signs += 1

    # Its life

    def __enter__(self) -> Watchdog:
        if self._limit:
            grace, more = _LAST_RESORT
            self._last_resort = LastResort(HUNG, more)
            self._last_resort.put_off(self._limit + grace)
            if self._world.size > 1:
                store = post.open_store(self._world, max(30.0, 2 * self._tick))
                descriptor = self._last_resort.descriptor
                self._post = post.Post(store, self._world, descriptor, self._beat, self._is_late, self._tick)
                self._post.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._limit:
            self._closed.set()
            self._thread.join()
            if self._post is not None:
                self._post.close(together=kind is None)
            self._last_resort.close()

    # What the threads do

    def _watch(self) -> None:
        try:
            self._keep_watch()
        except Exception as error:  # a fault of ours, or no room for a thread: no reason to end a run that is well
            self._last_resort.call_off()
            _print(f"warning: rank {self._world.rank}: {error!r}: nobody watches this process any more\n")

    def _keep_watch(self) -> None:
        signs, more, looked = self._all_signs, self._more_signs(), time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            self._last_resort.put_off(self._limit + _LAST_RESORT[0])
            now_signs, now_more = self._all_signs, self._more_signs()
            if now_signs != signs or _differ(more, now_more, now - looked):
                self._age = 0.0
            else:  # a process that was stopped meanwhile (Ctrl-Z) has not stalled
                self._age += min(now - looked, 3 * self._tick)
            signs, more, looked = now_signs, now_more, now
            why = self._alarm()
            if why:
                self._end(why)

    def _more_signs(self) -> tuple[str, Any]:
        """What else shows that this process goes on, by its phase."""
        phase = self._phase
        try:
            if phase == "load" and self._at_work is not None:
                return phase, [(label, about) for label, about, _ in self._at_work()]
        except (RuntimeError, ValueError, KeyError, OSError):  # it changed as it was looked at
            return phase, time.monotonic()
        if phase in BUSY_PHASES:
            used = resource.getrusage(resource.RUSAGE_SELF)
            return phase, (used.ru_utime + used.ru_stime, used.ru_majflt + used.ru_inblock + used.ru_oublock)
        return phase, None

    def _beat(self) -> Beat:
        self._beats += 1
        waits = self._age > self._tick and report.waits_for_ranks()
        seconds = time.monotonic() - self._phase_since
        place = self._phase, self._module, self._step, self._signs
        return Beat(self._world.rank, self._beats, self._age, waits, *place, seconds)

    def _is_late(self) -> bool:
        return self._age >= self._limit

    def _alarm(self) -> str:
        """Why the run hangs, as far as this rank knows; "" if it does not."""
        other = self._post
        own = f"rank {self._world.rank} has given no sign of life for {self._age:.1f} s"
        if other is None:
            return own if self._is_late() else ""
        if other.alarm is not None:
            return other.alarm.why
        if self._is_late() and not report.waits_for_ranks():
            other.raise_alarm(own, [])
            return own
        if other.is_lost():
            if not self._is_late():
                return ""
            why = f"{own}, and rank 0 answers no more"
            other.raise_alarm(why, [other.keeper()])
            return why
        if not other.whole():
            return ""
        sights = self._sharp(list(other.sights().values()))
        if not report.hangs(sights, self._limit):
            return ""
        late = [sight for sight in sights if sight.age >= self._limit]
        worst = max(late, key=lambda sight: (not sight.beat.waits, sight.age))
        why = f"rank {worst.beat.rank} has given no sign of life for {worst.age:.1f} s"
        other.raise_alarm(why, [sight for sight in late if sight.quiet >= self._silence])
        return why

    def _sharp(self, sights: list[Sight]) -> list[Sight]:
        """As seen by a rank that hangs itself and only then looks at the others: one that is silent for a while has
        been so for longer."""
        if not self._is_late() or self._world.rank < post.OBSERVERS:
            return sights
        silence = min(10.0, self._limit)
        return [Sight(one.beat, max(one.quiet, self._limit)) if one.quiet >= silence else one for one in sights]

    def report(self, why: str, stuck: int | None) -> None:
        """Write the report of ranks that found out together why they cannot go on. Collective.

        Args:
            why: what they found.
            stuck: the rank that is to blame.
        """
        if self._limit:
            plain = gather_objects(report.to_plain(self._tell()))
            if plain is not None:
                told = {one.beat.rank: one for one in map(report.from_plain, plain)}
                sights = {rank: Sight(one.beat, 0.0) for rank, one in told.items()}
                self._write(report.compose(told, sights, {}, self._limit, self._silence, why, stuck))

    def _tell(self) -> Told:
        """What this rank knows of itself."""
        skip = [self._thread.ident, None if self._post is None else self._post.ident]
        loading: list[str] = []
        with contextlib.suppress(RuntimeError, ValueError, KeyError, OSError):
            loading = [f"{about} ({seconds:.1f} s)" for _, about, seconds in (self._at_work or tuple)()]
        place = f"process {os.getpid()} of {os.uname().nodename}"
        return Told(self._beat(), place, list(self._keys), loading, report.stacks(skip))

    def _end(self, why: str) -> None:
        """Tell, and end this process."""
        self._last_resort.end_in(_MOST_TO_END)
        told = self._tell()
        gathered, silent, sights = {told.beat.rank: told}, dict[int, str](), {told.beat.rank: Sight(told.beat, 0.0)}
        if self._post is not None:
            lost = self._post.is_lost()
            if lost:
                self._post.look_after_keeper()
            self._post.tell(told)
            if not self._post.ready.wait(post.GRACE if lost else 2 * post.GRACE + 2):
                self._post.go_alone()
            elif self._post.gathered is None:  # another rank reports
                os._exit(HUNG)
            gathered, silent = self._post.gathered or gathered, self._post.silent
            sights = {rank: one for rank, one in self._post.sights().items() if rank in silent}
            sights |= {rank: Sight(one.beat, 0.0) for rank, one in gathered.items()}
            sights |= self._post.alarm.sights if self._post.alarm else {}
        text = report.compose(gathered, sights, silent, self._limit, self._silence, why)
        self._write(text)
        if self._post is not None:
            self._post.done()
        os._exit(HUNG)

    def _write(self, text: str) -> None:
        """The report to stderr and to a file, neither of which may hold up the end."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-step-{self._step}-rank-{self._world.rank}.txt"
        end = f"this run ends with status {HUNG}; the same command goes on from the last checkpoint. This report: "
        told = text + end + str(self._folder / name) + "\n"

        def to_file() -> None:
            with contextlib.suppress(OSError):  # it stands on stderr
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / name).write_text(text)

        writers = [threading.Thread(target=job, daemon=True) for job in (lambda: _print(told), to_file)]
        for writer in writers:
            writer.start()
        until = time.monotonic() + _WRITING
        for writer in writers:
            writer.join(max(0.0, until - time.monotonic()))


def _print(text: str) -> None:
    """To the descriptor of stderr: whoever hangs may hold the lock of the stream."""
    data = text.encode(errors="replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def _differ(before: tuple[str, Any], now: tuple[str, Any], seconds: float) -> bool:
    """Whether what else shows life (`Watchdog._more_signs`) has gone on."""
    if before[0] != now[0] or now[0] not in BUSY_PHASES:
        return before != now
    (time_before, reads_before), (time_now, reads_now) = before[1], now[1]
    return time_now - time_before > _BUSY * seconds or reads_now != reads_before


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a model is made of: its parts, and the layers of its stacks."""
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        if name and (parent is model or isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential)):
            yield name, module


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of what a module gives."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
