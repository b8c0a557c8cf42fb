"""One shard set written by several jobs that know nothing of one another, such as the tasks of a Slurm array.

Nothing here relies on locks that work between machines. One task lists the source and publishes the plan, the others
wait for it; should two list, they publish the same. A shard is there when its sidecar is, whoever wrote it. Whoever
finds all of them there writes index and manifest; should two, they write the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.shard_build import unfinished_name
from vlm.data.shard_format import UNFINISHED, shard_name
from vlm.data.shard_plan import Plan, read_head

HEAD = "plan.json"
CLAIM = "planning"  # the file in which the task that lists the source says every few seconds how far it is
BEAT = 5.0
SILENCE = 120.0
"""Seconds without a word of the task that lists the source after which another takes over."""


@dataclass(frozen=True, slots=True)
class Task:
    """Task `index`, from 0, of `count`: it builds the shards index, index + count, index + 2 count, …"""

    index: int
    count: int

    def share(self, shards: int) -> range:
        return range(self.index, shards, self.count)


def wait_or_plan(
    work: Path, make: Callable[[Callable[[int], None]], Plan], progress: Callable[[int], None]
) -> tuple[dict[str, Any], bool]:
    """(head of the plan, whether this task made it), once one task has made it.

    Args:
        make: lists the source and publishes the plan; calls what it is given at every item.
        progress: told how many items are listed, by this task or by the one that is waited for.
    """
    claim = work / CLAIM
    heard, since = "", time.monotonic()
    while (head := read_head(work / HEAD)) is None:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            mine = True
        except FileExistsError:
            mine = time.monotonic() - since > SILENCE
        if mine:
            try:
                return make(_telling(claim, progress)).head(), True
            finally:
                claim.unlink(missing_ok=True)
        said = _read(claim)
        if said != heard:
            heard, since = said, time.monotonic()
            progress(int(said.split()[-1]) if said.strip() else 0)
        time.sleep(0.2)
    return head, False


def unfinished(out: Path, numbers: Iterable[int]) -> list[int]:
    """Those of the shards that have no sidecar.

    By listing the folder: asking for one file after another, a network file system may answer from what it remembers,
    and then each of two tasks that finish within seconds would take the other for unfinished.
    """
    there = {entry.name for entry in os.scandir(out / UNFINISHED)}
    return [number for number in numbers if f"shard-{number:06d}.json" not in there]


def remove_left(out: Path, numbers: Iterable[int]) -> None:
    """Remove what a killed task of the same share was writing. Should it live after all, it fails and this one wins."""
    mine = {f"{shard_name(number)}.tmp" for number in numbers}
    for entry in os.scandir(out / UNFINISHED):
        if entry.name.split(".tmp-")[0] + ".tmp" in mine:
            Path(entry.path).unlink(missing_ok=True)


def _telling(claim: Path, progress: Callable[[int], None]) -> Callable[[int], None]:
    last = 0.0

    def tell(done: int) -> None:
        nonlocal last
        progress(done)
        if time.monotonic() - last > BEAT:
            last = time.monotonic()
            temporary = claim.with_name(unfinished_name(CLAIM))
            temporary.write_text(f"{os.getpid()} {done}")
            temporary.replace(claim)

    return tell


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
