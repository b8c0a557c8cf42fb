"""One checkpoint on its way from host memory to disk, in a thread of each rank beside the training."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import Stuck
from vlm.files import sync
from vlm.run import checkpoint_files as files
from vlm.run.checkpoint_group import WAITING, Group, grace
from vlm.run.checkpoint_plan import OPTIMIZER, WEIGHTS, Plan, missing_message
from vlm.types import UserError

FORMAT = 2
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint says beside its tensors."""

    state: str  # state.json
    manifest: Mapping[str, Any]  # step, recipe, hashes of the frozen base
    keep: int  # newest checkpoints that stay
    is_best: bool


class Job:
    """A checkpoint to be written at `final`. `run` does it here and now, `start` in a thread.

    Args:
        plan: this rank's part; its memory holds the bytes, and is not to be touched until the job is done.
        facts: what rank 0 writes beside.
        group: with the other ranks.
        fresh: ranks say anew which bytes they hold, and rank 0 sees whether these are all.
        seconds: how long it may take.
    """

    def __init__(self, final: Path, plan: Plan, facts: Facts, group: Group, *, fresh: bool, seconds: float) -> None:
        self.final, self._plan, self._facts, self._group = final, plan, facts, group
        self._fresh, self._seconds = fresh, seconds
        self._began = time.monotonic()
        self._moved = 0
        self._problem: UserError | None = None
        self._thread = threading.Thread(target=self._in_thread, name=f"save {final.name}", daemon=True)

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._thread.start()

    @property
    def runs(self) -> bool:
        """Whether its thread is at it."""
        return self._thread.is_alive()

    @property
    def waits(self) -> bool:
        """Whether its thread waits for those of other ranks."""
        return self._thread.is_alive() and self._group.doing == WAITING

    def progress(self) -> tuple[str, int]:
        """What this rank does for it, and a number that grows as it gets on."""
        return self._group.doing, self._moved

    def problem(self) -> UserError | None:
        """Why it cannot be written, as far as this rank knows by now."""
        if self._problem is not None or not self._thread.is_alive():
            return self._problem
        spent, doing = time.monotonic() - self._began, self._group.doing
        # The rank that is stuck speaks first, and all hear what it was at.
        allowed = self._seconds + (grace(self._seconds) if doing == WAITING else 0.0)
        if spent < allowed:
            return None
        stuck = Stuck(
            f"{self.final}: has been written for {spent:.0f} s (checkpoint_seconds={self._seconds:g}), and rank "
            f"{self._group.rank} is still at this: {doing}. What was saved before is intact. Mend: look at the file "
            "system, or allow more seconds; then the same command goes on from there"
        )
        stuck.rank = self._group.rank
        return stuck

    def join(self, alive: Callable[[], None]) -> None:
        """Until it is done, or has taken too long (see `problem`). `alive` is called whenever it has got on."""
        seen = self.progress()
        while self._thread.is_alive() and self.problem() is None:
            self._thread.join(0.2)
            seen, before = self.progress(), seen
            if seen != before:
                alive()

    def run(self) -> None:
        """Do it. Collective over the group.

        Raises:
            UserError: on every rank; it could not be written, or would not hold what trains. The one before is intact.
        """
        together, folder = self._group.together, Path()
        try:
            held = self._plan.intervals() if self._fresh else None
            together("looking for inf and nan", self._look, lambda _: None)
            folder = together("making the folder", lambda: held, self._begin)
            together("writing", lambda: self._write(folder), lambda _: None)
            together("reading back", lambda: self._verify(folder), lambda hashes: self._finish(folder, hashes))
        except UserError as error:
            if str(error).startswith(str(self.final)):
                raise
            raise UserError(
                f"{self.final}: the checkpoint could not be written ({error}). What was saved before is intact: make "
                "room, then the same command goes on from there"
            ) from error
        finally:
            if self._group.rank == 0:
                files.remove_unfinished(self.final.parent)

    def _in_thread(self) -> None:
        try:
            self.run()
        except UserError as error:
            self._problem = error
        except BaseException as error:  # nobody else would hear of it
            self._problem = UserError(f"{self.final}: the checkpoint could not be written ({error!r})")
            raise

    def _count(self, count: int) -> None:
        self._moved += count

    def _look(self) -> None:
        """What has gone wrong since the last loss (memory, a kernel) must not become what runs go on from."""
        names = self._plan.not_finite()
        if names:
            raise UserError(
                f"{self.final}: would hold inf or nan in {len(names)} tensors of rank {self._group.rank} "
                f"({', '.join(names[:5])}), and a run that went on from it could not learn: nothing was written. What "
                "was saved before is intact, and the same command goes on from there; if it happens again, look at "
                "optim.lr and at the machine's memory"
            )

    def _begin(self, held: list[np.ndarray | None]) -> Path:
        """Rank 0: all is there, and there is where to write."""
        known = [intervals for intervals in held if intervals is not None]
        missing = self._plan.missing(known) if len(known) == len(held) else []
        if missing:
            raise UserError(missing_message(self.final, missing))
        root = self.final.parent
        files.remove_unfinished(root)
        folder = root / f".{self.final.name}.tmp-{secrets.token_hex(4)}"  # another writer must not meet this one's
        files.prepare(folder, self._plan)
        return folder

    def _write(self, folder: Path) -> None:
        parts = self._plan.files()
        for file, regions in parts.items():
            self._group.doing = f"writing {file}"
            try:
                files._write_fragments(folder, file, regions, self._plan, self._count)
            except FileNotFoundError as error:
                raise UserError(
                    f"{folder / file} is not there for rank {self._group.rank}: run_dir must be on a file system that "
                    "all hosts share, and no other run may write there"
                ) from error
        for file in parts:
            self._group.doing = f"flushing {file}"
            files._sync_file(folder / file)

    def _verify(self, folder: Path) -> dict[tuple[str, str], str]:
        for file, regions in self._plan.files().items():
            self._group.doing = f"reading {file} back"
            files._verify_fragments(folder, file, regions, self._plan, self._count)
        self._group.doing = "hashing tensors"
        return files.hash_tensors(folder, self._plan, self._count)

    def _finish(self, folder: Path, hashes: list[dict[tuple[str, str], str]]) -> None:
        """Rank 0, when all have read back what they wrote: what makes a folder a checkpoint."""
        self._group.doing = "finishing"
        root, name = self.final.parent, self.final.name
        files._write_small(folder / STATE, self._facts.state.encode())
        files._write_manifest(folder, self._manifest(folder, hashes))
        sync(folder)
        files._rename(folder, self.final)
        files._point_latest(root, name)
        if self._facts.is_best:
            files._point_best(root, name)
        files._prune(root, self._facts.keep, name)

    def _manifest(self, folder: Path, hashes: list[dict[tuple[str, str], str]]) -> dict[str, Any]:
        tables = {WEIGHTS: "tensors", OPTIMIZER: "optimizer"}
        of = {key: value for part in hashes for key, value in part.items()}
        state = self._facts.state.encode()
        entries: dict[str, Any] = {STATE: {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}}
        manifest: dict[str, Any] = {"format": FORMAT, **self._facts.manifest, "files": entries}
        for file, layout in self._plan.layouts.items():
            header = hashlib.sha256(layout.header).hexdigest()
            entries[file] = {"bytes": layout.size, "header_sha256": header, "hashes": tables[file]}
            manifest[tables[file]] = self._plan.entries(file, {n: of[file, n] for n in layout.places})
        return manifest
