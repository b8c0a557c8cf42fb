"""How ranks tell one another that they are alive, beside the process group that trains: a TCPStore of their own.

Each rank writes its beat under a name of its own. Ranks 0 and 1 read all beats, the others only once they hang
themselves, so the work grows with the number of ranks, not with its square. An alarm is one name that all look at.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError, TCPStore

from vlm.distributed import World, barrier, from_main
from vlm.run import watchdog_report as report
from vlm.run import watchdog_timer as timer
from vlm.run.watchdog_report import Beat, Sight, Told

GRACE = 8.0  # seconds that ranks have to tell what they know, once there is an alarm
LINGER = 1.0  # seconds that rank 0, which keeps the store, stays after the report
OBSERVERS = 2
_AWAKE = 6.0  # seconds that a process which was stopped has to tell by itself where it is
_ALARM, _LEADER, _DONE = "alarm", "leader", "done"


def open_store(world: World, seconds: float) -> TCPStore:
    """The store that all ranks share, kept by rank 0. Collective.

    Args:
        seconds: after which a call that gets no answer fails.
    """
    most = timedelta(seconds=seconds)
    own: list[TCPStore] = []

    def keep() -> int:
        # It listens at all addresses; what MASTER_ADDR says to other hosts need not mean anything on this one.
        own.append(TCPStore("127.0.0.1", 0, world.size, True, most, wait_for_workers=False))
        return own[0].port

    port = from_main(world, keep)
    if own:
        return own[0]
    return TCPStore(os.environ["MASTER_ADDR"], port, world.size, False, most, wait_for_workers=False)


@dataclass(frozen=True, slots=True)
class Alarm:
    """Why a rank says that the run hangs, and what it knows of those that are silent."""

    why: str
    silent: list[tuple[list[Any], list[Any], float]]  # where it is (`Post._mine`), its last beat, how long ago that was

    @property
    def sights(self) -> dict[int, Sight]:
        return {beat[0]: Sight(Beat(*beat), quiet) for _, beat, quiet in self.silent}


class Post(threading.Thread):
    """Sends this rank's beats, and sees the others' and their alarm.

    Args:
        store: of `open_store`.
        world: this process among all.
        descriptor: where this process's stacks go when another one asks for them (vlm.run.watchdog_timer.ask).
        beat: makes this rank's beat.
        late: whether this rank has given no sign of life for too long.
        tick: seconds between two beats.
    """

    def __init__(
        self,
        store: TCPStore,
        world: World,
        descriptor: int,
        beat: Callable[[], Beat],
        late: Callable[[], bool],
        tick: float,
    ) -> None:
        super().__init__(name="watchdog-post", daemon=True)
        self._store, self._world, self._beat, self._late, self._tick = store, world, beat, late, tick
        self._closed = threading.Event()
        self._first: dict[int, tuple[Beat, float]] = {}  # a rank's last beat, and when it was first seen
        self._mine = [world.rank, world.local_rank, timer.here(), os.getpid(), descriptor, os.uname().nodename]
        self._raise: tuple[str, list[Sight]] | None = None
        self._told: Told | None = None
        self._clock, self._looked = 0.0, time.monotonic()  # seconds for which this process ran and the store answered
        self._alone = False
        self._woken: dict[int, tuple[str, float]] = {}  # let go on: rank -> what it was, until when it may tell
        self.heard = time.monotonic()
        """When the store answered last."""
        self.alarm: Alarm | None = None
        """An alarm of any rank."""
        self.ready = threading.Event()
        """Set when ranks have told what they know (this one is to report then: `gathered`), or another has reported."""
        self.gathered: dict[int, Told] | None = None
        """What ranks told, where this one is to report."""
        self.silent: dict[int, str] = {}
        """Of ranks that were silent: where they are, and state and stacks where they can be had."""
        store.set(f"hello/{world.rank}", json.dumps(self._mine))
        store.set(f"beat/{world.rank}", json.dumps(report.beat_to_plain(beat())))
        barrier()
        self._keeper: list[Any] = []
        self._keeper = self._hello(0)

    def sights(self) -> dict[int, Sight]:
        """Every rank as this one saw it when the store answered last, where it looks at the others; else itself."""
        own, clock = self._beat(), self._clock
        seen = {rank: Sight(beat, clock - first) for rank, (beat, first) in list(self._first.items())}
        return seen | {own.rank: Sight(own, 0.0)}

    def whole(self) -> bool:
        """Whether all ranks have been looked at."""
        return len(self._first) == self._world.size

    def is_lost(self) -> bool:
        """Whether the store, and so rank 0, does not answer any more."""
        return time.monotonic() - self.heard > max(10.0, 5 * self._tick)

    def raise_alarm(self, why: str, silent: list[Sight]) -> None:
        """Tell all ranks that the run hangs."""
        self._raise = why, silent

    def keeper(self) -> Sight:
        """Rank 0, which keeps the store, when that does not answer."""
        beat = self._first[0][0] if 0 in self._first else Beat(0, 0, 0.0, False, "not known")
        return Sight(beat, time.monotonic() - self.heard)

    def tell(self, told: Told) -> None:
        """Say what this rank knows; `ready` is set when all have, or have had the time to."""
        self._told = told

    def look_after_keeper(self) -> None:
        """The store does not answer: look at rank 0, which keeps it. If it was only stopped, it answers again."""
        before = self.heard
        self.silent[0] = self._describe(self._keeper, lambda: self.heard > before)

    def go_alone(self) -> None:
        """Make do with what this rank knows, since the store is lost: that rank 0 does not answer."""
        self._alone = True
        if self.alarm is None and self._raise is not None:
            why, silent = self._raise
            self.alarm = Alarm(why, [([], report.beat_to_plain(one.beat), one.quiet) for one in silent])

    def done(self) -> None:
        """This rank has reported."""
        if self._alone:
            return
        with contextlib.suppress(Exception):  # whatever a lost store raises, there is nobody to tell
            self._store.set(_DONE, "1")
        if self._world.is_main:
            time.sleep(LINGER)

    def close(self, together: bool) -> None:
        """Send no more.

        Args:
            together: whether all ranks do so now; then rank 0 keeps the store until they have.
        """
        self._closed.set()
        self.join(timeout=5.0)
        if together and not self.is_alive():
            with contextlib.suppress(Exception):  # the others are gone already
                self._store.set(f"left/{self._world.rank}", "1")
                if self._world.is_main:
                    names = [f"left/{rank}" for rank in range(self._world.size)]
                    self._store.wait(names, timedelta(seconds=LINGER))

    def run(self) -> None:
        told = False
        while not self._closed.wait(self._tick if self._told is None else 0.05):
            # A store that fails is seen by how long it has not answered; what it raises depends on how it failed.
            try:
                self._round()
                if self._told is not None and self.alarm is not None:
                    return self._gather(self._told)
            except DistNetworkError:  # the connection is gone, and with it the process that keeps the store
                return
            except DistError:
                continue
            except Exception as error:  # a fault of ours, which would look like a rank that is silent
                if not told:
                    os.write(2, f"warning: rank {self._world.rank}: the watchdog cannot tell: {error!r}\n".encode())
                told = True

    def _round(self) -> None:
        store, now = self._store, time.monotonic()
        self._clock += min(now - self._looked, 3 * self._tick)
        self._looked = now
        store.set(f"beat/{self._world.rank}", json.dumps(report.beat_to_plain(self._beat())))
        if self._raise is not None and self.alarm is None:
            why, silent = self._raise
            told = [(self._hello(one.beat.rank), report.beat_to_plain(one.beat), one.quiet) for one in silent]
            store.compare_set(_ALARM, "", json.dumps([why, told]))
        if self.alarm is None and store.check([_ALARM]):
            self.alarm = Alarm(*json.loads(store.get(_ALARM)))
        if self._world.rank < OBSERVERS or self._late():
            self._look()
        self.heard = time.monotonic()

    def _look(self) -> None:
        texts = self._store.multi_get([f"beat/{rank}" for rank in range(self._world.size)])
        for text in texts:
            beat = Beat(*json.loads(text))
            before = self._first.get(beat.rank)
            if before is None or before[0].number != beat.number:
                self._first[beat.rank] = (beat, self._clock)
        self.heard = time.monotonic()

    def _gather(self, told: Told) -> None:
        """Everything that ranks tell, on the first that comes here; the others wait for its report."""
        store, rank, size = self._store, self._world.rank, self._world.size
        neighbours = self._ask_neighbours()
        told.neighbours.update(neighbours)
        store.set(f"told/{rank}", json.dumps(report.to_plain(told)))
        until = time.monotonic() + GRACE
        if store.compare_set(_LEADER, "", str(rank)).decode() != str(rank):
            while time.monotonic() < until + GRACE and not store.check([_DONE]):
                time.sleep(0.1)
            return self.ready.set()
        self._look()
        waited = set(range(size))
        while waited and time.monotonic() < until:
            waited = {one for one in waited if not store.check([f"told/{one}"])}
            time.sleep(0.1)
        self.heard = time.monotonic()
        there = [one for one in range(size) if one not in waited]
        texts = store.multi_get([f"told/{one}" for one in there])
        self.gathered = {one: report.from_plain(json.loads(text)) for one, text in zip(there, texts)}
        known = {int(one): text for tells in self.gathered.values() for one, text in tells.neighbours.items()}
        suspects = waited | set(self.alarm.sights if self.alarm else ())
        self.silent = {one: known.get(one) or self._describe_rank(self._hello(one)) for one in suspects}
        self.ready.set()

    def _ask_neighbours(self) -> dict[str, str]:
        """State and stacks of silent ranks of this host, from the first of its ranks that is not silent."""
        here = self._mine[2]
        silent = [hello for hello, _, _ in (self.alarm.silent if self.alarm else []) if hello and hello[2] == here]
        places = {hello[1] for hello in silent}
        first = min(set(range(self._world.local_rank + 1)) - places, default=-1)
        if self._world.local_rank != first:
            return {}
        self._let_go_on(silent)
        return {str(hello[0]): self.silent.get(hello[0]) or self._describe_rank(hello) for hello in silent}

    def _hello(self, rank: int) -> list[Any]:
        if rank == 0 and self._keeper:
            return self._keeper
        try:
            return json.loads(self._store.get(f"hello/{rank}"))
        except Exception:  # the store is gone: nothing is known
            return []

    def _let_go_on(self, hellos: list[list[Any]]) -> None:
        """Processes of this host that are stopped go on; all before the first is waited for."""
        for rank, _, here, pid, _, _ in filter(None, hellos):
            state = timer.state_of(pid)
            if here == self._mine[2] and timer.go_on(pid):
                self._woken[rank] = state, time.monotonic() + _AWAKE

    def _describe_rank(self, hello: list[Any]) -> str:
        return self._describe(hello, lambda: self._store.check([f"told/{hello[0]}"]))

    def _describe(self, hello: list[Any], tells: Callable[[], bool]) -> str:
        """Where a silent rank is, and its state and stacks where this process may look at it.

        Args:
            hello: of that rank.
            tells: whether it tells by itself where it is; looked at where it was stopped.
        """
        if not hello:
            return "nothing is known of it"
        rank, _, here, pid, descriptor, host = hello
        place = f"process {pid} of {host}"
        if here != self._mine[2]:
            return f"{place}, which no rank that answers shares; its stacks are on its own stderr if it still runs"
        if rank not in self._woken:
            self._let_go_on([hello])
        state, until = self._woken.get(rank, (timer.state_of(pid), 0.0))
        if rank in self._woken and _comes_true(tells, until):
            return f"{place}, {state}; it was let go on, and tells where it is"
        found = timer.ask(pid, descriptor)
        return f"{place}, {state}" + (f"; its stacks:\n{found.rstrip()}" if found else "; it shows no stacks")


def _comes_true(holds: Callable[[], bool], until: float) -> bool:
    """Whether this holds before then, by the monotonic clock."""
    while not (held := holds()) and time.monotonic() < until:
        time.sleep(0.1)
    return held
