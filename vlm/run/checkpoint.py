"""Checkpoints: trainable weights, Adam moments and the position in the data; written whole or not at all.

    RUN/checkpoints/step-00000100/
        manifest.json           format, step, recipe, hashes: of the frozen base, of every file, of every tensor
        model.safetensors       trainable weights, fp32, by the model's own names
        optimizer.safetensors   exp_avg/<name> and exp_avg_sq/<name>, fp32
        state.json              step, seed, recipe, random rule, quarantined records, best metric
    RUN/checkpoints/latest      name of the newest complete checkpoint
    RUN/checkpoints/best        name of the best one, where a metric decides

Tensors are whole and named, so a checkpoint loads at any ZeRO stage and any number of processes. Frozen weights are
not in it: they come from their own source and are checked by hash. No random state is stored: every draw is made from
(seed, step, rank) or (seed, position), so the step is the state.

Training waits only while each rank copies its own fragments to host memory. Threads of all ranks then write them into
one folder, flush it, read it back and compare; only then does it get its name, and only then do older ones go.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from vlm import checkpoint_folders
from vlm.checkpoint_folders import verify as verify  # told under this name too
from vlm.distributed import from_main, stop_together
from vlm.run import checkpoint_files, zero_state
from vlm.run.checkpoint_files import remove_unfinished
from vlm.run.checkpoint_files import steps as steps  # told under this name too
from vlm.run.checkpoint_group import Group
from vlm.run.checkpoint_job import FORMAT as FORMAT
from vlm.run.checkpoint_job import STATE, Facts, Job
from vlm.run.checkpoint_plan import OPTIMIZER, WEIGHTS, Plan, Source, describe, sources, whole_tensors
from vlm.types import UserError

SECONDS = 1800.0
"""How long writing a checkpoint may take where nothing else is said."""


@dataclass(slots=True)
class Progress:
    """Where a run stands: everything beside tensors that a resumed run needs."""

    step: int = 0  # optimizer steps made; the data position is step * global_batch_size
    best_metric: float | None = None
    best_step: int | None = None
    quarantined: list[tuple[str, str, str]] = field(default_factory=list)
    untested: bool = False  # a signal ended the test that belongs to this step (eval.every)


class Saver:
    """Writes the checkpoints of a run. `save` returns as soon as the state is copied; `wait` when it is on disk.

    With `with`, an error that all ranks have together (UserError, FloatingPointError) leaves what is being written the
    time to come to the disk.

    Args:
        root: the run's checkpoint folder.
        engine: vlm.run.engine.Engine.
        keep: newest checkpoints to keep; the best one is kept besides.
        seconds: how long writing one may take before it counts as stuck.
        say: tells the user a line (rank 0).
        alive: called now and then by who waits for a checkpoint that gets on.
    """

    def __init__(
        self,
        root: Path,
        engine: Any,
        *,
        keep: int,
        seconds: float = SECONDS,
        say: Callable[[str], None] = print,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.engine, self.keep, self.seconds = root, engine, keep, seconds
        self._say, self._alive = say, alive
        self._group = Group(engine.world, seconds)
        self._job: Job | None = None
        self._told: dict[str, float] = {}
        self._plan = self._planned(describe(engine), sources(engine))
        if engine.world.is_main:
            remove_unfinished(root)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, (UserError, FloatingPointError)) and self._job is not None:
            self._job.join(self._alive)

    def save(self, progress: Progress, about: dict[str, Any], *, is_best: bool = False) -> Path:
        """Begin to write a checkpoint; its folder. Collective. `progress` and `about` may change afterwards.

        Args:
            progress: where the run stands.
            about: JSON-able facts stored with it (recipe, seed, world size, …).
            is_best: this one has the best metric so far.
        Raises:
            UserError: on every rank; it does not hold what trains, or the one before could not be written.
        """
        final = self.root / f"step-{progress.step:08d}"
        self._wait_for_the_last(final)
        began = time.monotonic()
        described, held = describe(self.engine), sources(self.engine)
        fits = self._plan.fits(described, held)
        fresh = self._job is None or not fits
        if not fits:
            self._plan = self._planned(described, held)
        checkpoint_files._copy(self._plan, held)
        state = {
            "step": progress.step,
            **adam_steps(self.engine),
            "random": "torch is seeded by (seed, step, rank) at each step, samples by (seed, position)",
            "quarantined": progress.quarantined,
            "best_metric": progress.best_metric,
            "best_step": progress.best_step,
            "untested": progress.untested,
            **about,
        }
        model = self.engine.model
        frozen = {"frozen_hash": model.frozen_hash(), "frozen": model.frozen_hashes()}
        facts = _facts(state, frozen, self.keep, is_best)
        self._job = Job(final, self._plan, facts, self._group, fresh=fresh, seconds=self.seconds)
        self._job.start()
        self._told["save_stall"] = self._told.get("save_stall", 0.0) + time.monotonic() - began
        return final

    def mark_best(self, step: int) -> None:
        """Let `best` name the checkpoint of this step, which is there already. Collective.

        Raises:
            UserError: on every rank; it could not be written.
        """

        def mark() -> None:
            try:
                checkpoint_files._point_best(self.root, f"step-{step:08d}")
            except OSError as error:
                raise UserError(f"{self.root / 'best'}: cannot be written ({error.strerror}): make room") from error

        from_main(self.engine.world, mark)

    def figures(self) -> dict[str, float]:
        """What saves cost training since this was last asked: seconds of copying (`save_stall`) and, where one had to
        wait for the one before, of waiting (`save_wait`)."""
        told, self._told = self._told, {}
        return told

    def problem(self) -> UserError | None:
        """Why what was begun cannot be written, as far as this rank knows by now. Not collective, does not wait."""
        return None if self._job is None else self._job.problem()

    def wait(self) -> None:
        """Until all that was begun is on disk, verified and named by `latest`. Collective.

        Raises:
            UserError: on every rank; it could not be written.
        """
        if self._job is not None:
            self._job.join(self._alive)
            problem, device = self._job.problem(), self.engine.world.device
            stop_together(None if self._job.waits else problem, device)  # the rank that is stuck speaks first
            stop_together(problem, device)

    def close(self) -> None:
        """No more is saved. Collective."""
        self._group.close()

    def _wait_for_the_last(self, final: Path) -> None:
        if self._job is None:
            return
        began, still = time.monotonic(), self._job.runs
        self.wait()
        waited = time.monotonic() - began
        if still:
            self._told["save_wait"] = self._told.get("save_wait", 0.0) + waited
            if self.engine.world.is_main:
                self._say(
                    f"{final.name} waited {waited:.1f} s for {self._job.final.name}, which was still being written"
                )

    def _planned(self, described: Any, held: list[Source]) -> Plan:
        world = self.engine.world
        return Plan(described, held, pinned=world.device.type == "cuda", rank=world.rank, size=world.size)


def save(root: Path, engine: Any, progress: Progress, about: dict[str, Any], *, keep: int, is_best: bool) -> Path:
    """Write one checkpoint of `engine` under `root`, and wait until it is on disk. Collective. As `Saver.save`."""
    saver = Saver(root, engine, keep=keep)
    try:
        folder = saver.save(progress, about, is_best=is_best)
        saver.wait()
    finally:
        saver.close()
    return folder


def write(
    root: Path, state: Mapping[str, Any], weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], frozen_hash: str
) -> Path:
    """Write a checkpoint of whole tensors that this process alone holds, as `state` says (its step, and its recipe).

    Raises:
        UserError: it could not be written.
    """
    plan, held = whole_tensors(weights, moments)
    checkpoint_files._copy(plan, held)
    final = root / f"step-{state['step']:08d}"
    facts = _facts(state, {"frozen_hash": frozen_hash}, keep=1 << 30, is_best=False)
    Job(final, plan, facts, Group(None, SECONDS), fresh=True, seconds=SECONDS).run()
    return final


def _facts(state: Mapping[str, Any], frozen: Mapping[str, Any], keep: int, is_best: bool) -> Facts:
    manifest = {"step": state["step"], "recipe": state.get("recipe"), **frozen}
    return Facts(json.dumps(state, indent=1), manifest, keep, is_best)


def adam_steps(engine: Any) -> dict[str, Any]:
    """How many optimizer steps the moments have seen, as state.json says it: the commonest count, and what differs."""
    counts = zero_state.step_counts(engine)
    common = Counter(counts.values()).most_common(1)[0][0] if counts else 0
    return {"adam_steps": common, "adam_steps_of": {name: n for name, n in counts.items() if n != common}}


def newest(root: Path) -> tuple[Path, list[str]] | None:
    """The newest checkpoint that a run can go on from, and a sentence for each newer one that had to be passed over.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    found, passed_over = checkpoint_folders.newest(root, (WEIGHTS, OPTIMIZER, STATE))
    reasons = list(passed_over.values())
    if found is None and reasons:
        raise checkpoint_folders.none_intact(reasons)
    return None if found is None else (found, reasons)


def resolve(path: Path) -> Path:
    """The checkpoint folder meant by `path` (`vlm.checkpoint_folders.meant`).

    Raises:
        UserError: nothing of the kind is there, or nothing intact.
    """
    if path.is_file():
        raise UserError(
            f"{path}: is a file, and a checkpoint of ours is a folder. If it is a published file, convert it first: "
            f"python tools/convert_ckpt.py {path} FOLDER --from FORMAT --to vlm"
        )
    found = checkpoint_folders.meant(path)
    if found is not None:
        return found
    raise UserError(f"{path}: is neither a checkpoint (manifest.json) nor a run folder with checkpoints/latest")
