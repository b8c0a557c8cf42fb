"""What ranks tell of themselves, who is to blame when they stall, and the report of it in words."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SHOWN = 32  # samples, threads, and ranks with stacks of their own, that a report lists
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/")  # anywhere among the calls
_READING = "vlm/distributed.py"  # as the innermost call: on a GPU, it reads what a collective gives
_THREADING = ("/threading.py", "/concurrent/futures/", "/queue.py")  # as the innermost call
_WAITING, _WAITERS = ("wait", "synchronize"), ("deepspeed/", "torch/distributed/")  # as the innermost call


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is."""

    rank: int
    number: int  # of this beat: it goes on as long as the process does
    age: float  # seconds since the last sign of life
    waits: bool  # for other ranks, in a collective
    phase: str
    module: str = ""
    step: int = 0  # from 1; 0: before the first
    signs: int = 0  # of life in this step; the same place in the code has the same number on each rank
    phase_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Sight:
    """A rank as another one sees it: its last beat, and how many seconds ago that was first seen."""

    beat: Beat
    quiet: float

    @property
    def age(self) -> float:
        return self.beat.age + self.quiet


@dataclass(frozen=True, slots=True)
class Told:
    """All that a rank tells when a run hangs."""

    beat: Beat
    place: str  # host and process
    keys: list[str] = field(default_factory=list)  # samples in hand
    loading: list[str] = field(default_factory=list)  # samples that loader processes are at
    stacks: str = ""
    neighbours: dict[str, str] = field(default_factory=dict)  # silent rank of the same host -> its state and stacks


def hangs(sights: Sequence[Sight], limit: float) -> bool:
    """Whether the run hangs: a rank gives no sign of life and does not wait for another, or all wait for one another.

    A rank that waits in a collective while another one goes on, however slowly, does not hang.
    """
    late = [sight for sight in sights if sight.age >= limit]
    return len(late) == len(sights) or any(sight.quiet >= limit or not sight.beat.waits for sight in late)


def to_blame(sights: Sequence[Sight], limit: float, silence: float) -> list[int]:
    """Ranks that the others wait for, the one furthest behind first; none where nothing tells them apart.

    Args:
        limit: seconds without a sign of life.
        silence: seconds after which a rank whose beats stopped counts as silent.
    """

    def behind(sight: Sight) -> tuple[int, int]:
        return sight.beat.step, sight.beat.signs

    silent = [sight for sight in sights if sight.quiet >= silence]
    found = silent or [sight for sight in sights if sight.age >= limit and not sight.beat.waits]
    if not found:
        last = min(behind(sight) for sight in sights)
        found = [sight for sight in sights if behind(sight) == last]
    if len(found) == len(sights) > 1:
        last = min(behind(sight) for sight in found)
        found = [sight for sight in found if behind(sight) == last]
    if len(found) == len(sights) > 1:
        return []
    return [sight.beat.rank for sight in sorted(found, key=behind)]


# Stacks --------------------------------------------------------------------------------------------------------------


def _walk(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def waits_for_ranks() -> bool:
    """Whether this process waits for others: its main thread stands in a collective, or waits for a thread that does
    (one that saves)."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    frame = frames.pop(main, None) if main is not None else None
    if frame is None:
        return False
    if any(part in frame.f_code.co_filename for part in _THREADING):
        return any(map(_in_collective, frames.values()))
    return _in_collective(frame)


def _in_collective(frame: FrameType) -> bool:
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    if file.endswith(_READING) or (name in _WAITING and any(part in file for part in _WAITERS)):
        return True
    return any(part in one.f_code.co_filename for one in _walk(frame) for part in _COLLECTIVES)


def stacks(leave_out: Sequence[int | None] = ()) -> str:
    """The stacks of this process's threads, the main one first, innermost call last. Opens no file."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    lines = []
    for ident, frame in [item for item in frames if item[0] not in leave_out][:SHOWN]:
        lines.append(f"  thread {names.get(ident, ident)}:")
        for one in reversed(list(_walk(frame))):
            lines.append(f"    {one.f_code.co_filename}:{one.f_lineno} in {one.f_code.co_name}")
    return "\n".join(lines)


# The report ----------------------------------------------------------------------------------------------------------


def compose(
    told: dict[int, Told],
    sights: dict[int, Sight],
    silent: dict[int, str],
    limit: float,
    silence: float,
    why: str,
    stuck: int | None = None,
) -> str:
    """The report of a run that hangs.

    Args:
        told: what ranks told of themselves.
        sights: what is known of each rank, also of those that tell nothing; of silent ones, when the alarm was raised.
        silent: rank that was silent -> its host, process, state and stacks, as far as others know them.
        limit: seconds without a sign of life that were allowed.
        silence: see `to_blame`.
        why: what raised the alarm.
        stuck: the rank that is to blame, where that is known.
    """
    if stuck is None:
        blamed = to_blame([sights[rank] for rank in sorted(sights)], limit, silence)
        lines = [f"the run hangs: {why} (hang_seconds={limit:g})", _accuse(blamed, sights)]
    else:
        blamed, lines = [stuck], [f"the run hangs: {why}", f"to blame: rank {stuck}"]
    for rank in sorted(sights):
        mark = "  <- to blame" if rank in blamed[:SHOWN] else ""
        if rank < SHOWN or rank in blamed[:SHOWN]:
            lines.append(f"  {_line(sights[rank])}{mark}")
    if len(sights) > SHOWN:
        lines.append(f"  ({len(sights)} ranks in all)")
    for rank, one in sorted(told.items())[:SHOWN]:
        lines += [f"rank {rank} has in hand: {_some(one.keys)}"] if one.keys else []
        lines += [f"rank {rank} loads: {_some(one.loading)}"] if one.loading else []
    lines += [f"rank {rank} was silent: {text}" for rank, text in sorted(silent.items())[:SHOWN]]
    alike: dict[str, list[int]] = {}
    for rank, one in sorted(told.items()):
        alike.setdefault(one.stacks, []).append(rank)
    for text, ranks in list(alike.items())[:SHOWN]:
        where = f" ({told[ranks[0]].place})" if len(ranks) == 1 else ""
        lines.append(f"stacks of rank {', '.join(map(str, ranks[:SHOWN]))}{where}:\n{text}")
    return "\n".join(lines) + "\n"


def _accuse(blamed: list[int], sights: dict[int, Sight]) -> str:
    if not blamed:
        return "no rank is behind the others: all wait, or all stand at the same place"
    names = ", ".join(map(str, blamed[:SHOWN])) + (" …" if len(blamed) > SHOWN else "")
    if len(sights) == 1:
        return "there is one process only"
    sight = sights[blamed[0]]
    beat = sight.beat
    where = f"phase {beat.phase}" + (f", module {beat.module}" if beat.module else "")
    silent = ", and answers no more" if sight.quiet else ""
    return f"to blame: rank {names}, for which the others wait (rank {blamed[0]}: {where}, step {beat.step}{silent})"


def _line(sight: Sight) -> str:
    beat = sight.beat
    where = f"phase {beat.phase} for {beat.phase_seconds + sight.quiet:.1f} s"
    where += f", module {beat.module}" if beat.module else ""
    waits = ", waits for other ranks" if beat.waits else ""
    silent = f", silent for {sight.quiet:.1f} s" if sight.quiet else ""
    return f"rank {beat.rank}: step {beat.step}, {where}, no sign of life for {sight.age:.1f} s{waits}{silent}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def to_plain(told: Told) -> dict[str, Any]:
    """For JSON."""
    plain = {name: getattr(told, name) for name in ("place", "keys", "loading", "stacks", "neighbours")}
    return plain | {"beat": beat_to_plain(told.beat)}


def from_plain(plain: dict[str, Any]) -> Told:
    return Told(**{**plain, "beat": Beat(*plain["beat"])})


def beat_to_plain(beat: Beat) -> list[Any]:
    return [getattr(beat, name) for name in Beat.__slots__]
