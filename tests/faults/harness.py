"""Faults on purpose: a kind injects one into a training run, lets the run be started again, and looks at the result.

A kind is a function of a `Trial` under the decorator `kind`; kinds live in kinds_*.py beside this file. It draws what
it does from `trial.rng` alone, so (kind, seed) says all of it, and returns a short sentence on what it did. What does
not hold is an AssertionError.

    @kind("sigkill", what="a rank is killed at a random moment", process=True)
    def sigkill(trial: Trial) -> str:
        setting = trial.draw()
        job = trial.start(setting, inject=…)
        job.wait()
        return trial.survives(setting)         # restart at the first try, compare with the uninterrupted run
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import jobs
from tests.faults.courses import Course, loaded_of, rows_of
from tests.faults.jobs import ROOT, Inject, Job

SAME = (
    "restart at the first try; weights and moments equal to the uninterrupted run to the bit; samples of every step "
    "equal, none lost or twice; every checkpoint readable; at most one interval of work lost"
)
CHANGED = (
    "restart at the first try; losses within 1e-6 of the uninterrupted run; samples of every step equal, none lost or "
    "twice; every checkpoint readable; at most one interval of work lost"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A run: what decides its course, so that equal settings have one reference."""

    world: int = 1
    stage: int = 1
    bf16: bool = False
    steps: int = 8
    every: int = 2
    """checkpoint_every"""
    workers: int = 0
    recipe: str = "vit_llama.debug"
    shards: Path | None = None
    """Training shards; None: the workshop's 32 clips of moving shapes."""
    overrides: tuple[str, ...] = ("model.drop_path=0.2",)


class Workshop:
    """What trials share: shards, DeepSpeed files, and the uninterrupted runs they are compared with.

    Args:
        folder: a new one; all of it may go when the trials are over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[tuple[Setting, str], Course] = {}

    @property
    def shards(self) -> Path:
        """32 clips of moving shapes in shards of 8. Read only: trials damage copies."""
        from vlm.data.shards import write_shards
        from vlm.sources import shapes

        made = self.folder / "shapes"
        if not made.is_dir():
            corpus = self.folder / "corpus"
            shapes.render(corpus, num_train=32, num_test=8, seed=0, workers=1)
            items = shapes.read(corpus, "train", ())
            write_shards(items, made, arguments={"source": "shapes"}, shard_samples=8)
        return made

    def hardware(self, setting: Setting) -> Path:
        """The DeepSpeed file of a setting."""
        path = self.folder / f"zero{setting.stage}{'-bf16' if setting.bf16 else ''}.json"
        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 32, "zero_optimization": {"stage": setting.stage}}
        if setting.bf16:
            config["bf16"] = {"enabled": True}
        path.write_text(json.dumps(config))
        return path

    def reference(self, setting: Setting, about: str = "", inject: Inject | None = None) -> Course:
        """The uninterrupted run of a setting (made once), with what `about` names and `inject` does in each rank."""
        if (setting, about) not in self._references:
            folder = self.folder / f"reference-{len(self._references)}"
            folder.mkdir()
            trial = Trial(self, "reference", 0, folder)
            trial.run(setting, inject)
            self._references[setting, about] = trial.course()
            shutil.rmtree(folder)
        return self._references[setting, about]


@dataclass(slots=True)
class Trial:
    """One fault and what comes after it, in a folder of its own."""

    workshop: Workshop
    kind: str
    seed: int
    folder: Path
    rng: random.Random = field(init=False)
    attempts: int = 0
    """Runs started so far."""
    started: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.kind}/{self.seed}")

    # What a trial is made of

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def shards(self) -> Path:
        return self.workshop.shards

    def own_shards(self) -> Path:
        """A copy of the shards, to be damaged."""
        copy = self.folder / "shards"
        if not copy.is_dir():
            shutil.copytree(self.shards, copy)
        return copy

    def draw(self, worlds: Sequence[int] = (1, 1, 2), **fixed: Any) -> Setting:
        """A random number of processes, ZeRO stage and precision; what is `fixed` stays."""
        drawn = {
            "world": self.rng.choice(list(worlds)),
            "stage": self.rng.randrange(4),
            "bf16": self.rng.random() < 0.3,
        }
        return Setting(**{**drawn, **fixed})

    # Runs

    def arguments(self, setting: Setting) -> list[str]:
        """launch/train.py's arguments for this trial's run folder."""
        return [
            *("--deepspeed_config", str(self.workshop.hardware(setting)), "--recipe", setting.recipe),
            *(f"data.shards={setting.shards or self.shards}", f"run_dir={self.run_dir}", f"steps={setting.steps}"),
            *(f"checkpoint_every={setting.every}", f"data.workers={setting.workers}"),
            *("log_every=1", "eval=none", "checkpoint_keep=2", *setting.overrides),
        ]

    def start(self, setting: Setting, inject: Inject | None = None) -> Job:
        """Start the run, or its continuation, in forked processes; `inject(rank)` is the fault."""
        self.attempts += 1
        noted = jobs.observe(self.loaded_file, self.attempts)

        def before(rank: int) -> None:
            noted(rank)
            if inject is not None:
                inject(rank)
            if setting.workers:
                jobs.warm_nursery(rank)

        output = self.folder / f"out-{self.attempts}"
        self.started.append(jobs.fork(self.arguments(setting), setting.world, output, before))
        return self.started[-1]

    def launch(self, command: Sequence[str], extra: dict[str, str] | None = None) -> Job:
        """Start a command line instead. It has to call `jobs.observe(trial.loaded_file, trial.attempts)(rank)` itself
        (`attempts` as it is once this has returned, so one more than before)."""
        self.attempts += 1
        self.started.append(jobs.launch(command, self.folder / f"out-{self.attempts}", extra))
        return self.started[-1]

    def end(self) -> None:
        """Nothing that this trial started is left running."""
        for job in self.started:
            job.kill()

    def run(self, setting: Setting, inject: Inject | None = None, expect: int | None = 0) -> str:
        """`start` and wait for the end; what was printed. AssertionError: a rank ended by itself with another status
        than `expect` (None: any)."""
        job = self.start(setting, inject)
        statuses = job.wait()
        printed = job.printed()
        own = {status for rank, status in enumerate(statuses) if rank not in job.told}
        assert expect is None or own == {expect}, f"ended with {statuses}, not {expect}: {printed[-1500:]}"
        return printed

    # The fault's trace

    @property
    def loaded_file(self) -> Path:
        return self.folder / "loaded.jsonl"

    def strike(self, text: str) -> None:
        """Called where the fault happens, in whichever process: leaves a note that it did."""
        jobs.append(self.folder / "struck", text + "\n")

    def struck(self) -> list[str]:
        """What `strike` was told. AssertionError: nothing, so the trial shows nothing."""
        path = self.folder / "struck"
        assert path.is_file(), "the fault did not happen"
        return path.read_text().splitlines()

    # What is looked at

    def steps_done(self) -> int:
        """The last step in metrics.jsonl."""
        return max((row["step"] for row in rows_of(self.run_dir)), default=0)

    def last_copied(self) -> int:
        """The last step whose state a run began to save (0: none)."""
        path = self.loaded_file.with_name("saves.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return max((row["step"] for row in rows), default=0)

    def course(self) -> Course:
        """What the run left; AssertionError where it did not come to its end."""
        from safetensors.torch import load_file

        folder = self.checkpoints / (self.checkpoints / "latest").read_text().strip()
        state = json.loads((folder / "state.json").read_text())
        weights, moments = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
        return Course(weights, moments, state, rows_of(self.run_dir), loaded_of(self.loaded_file))

    def check_checkpoints(self, damaged: Sequence[str] = ()) -> list[str]:
        """Names of the complete checkpoints; AssertionError where one, other than the `damaged`, cannot be read."""
        from vlm.run import checkpoint

        names = checkpoint.steps(self.checkpoints)
        for name in names:
            if name not in damaged:
                checkpoint.verify(self.checkpoints / name, ("model.safetensors", "optimizer.safetensors", "state.json"))
        return names

    def survives(
        self,
        setting: Setting,
        *,
        reference: Course | None = None,
        damaged: Sequence[str] = (),
        tolerance: float | None = None,
        inject: Inject | None = None,
        again: Callable[[], str] | None = None,
    ) -> str:
        """After a fault that ended the run: start it again and compare with the uninterrupted run. A sentence on it.

        Args:
            setting: of the continuation.
            reference: what to compare with; None: the uninterrupted run of the same setting.
            damaged: checkpoints that the fault destroyed: they may be unreadable, and cost their interval.
            tolerance: relative, of losses, where bits cannot be equal (another number of processes); None: bits.
            inject: the fault, where it is still there.
            again: starts it again instead, runs it to its end and gives what it printed.
        """
        done, copied = self.steps_done(), self.last_copied()
        self.check_checkpoints(damaged)
        printed = self.run(setting, inject) if again is None else again()
        for name in damaged:
            assert any("passed over" in line and name in line for line in printed.splitlines()), f"{name} was not told"
        from_step, cost = self.resumed_at(), setting.every * len(damaged)
        assert from_step >= copied - setting.every - cost, f"saving step {copied}, then back to {from_step}"
        assert from_step >= done - 2 * setting.every - cost, f"from step {done} back to {from_step}"
        self.compare(reference or self.workshop.reference(setting), tolerance)
        return f"{describe(setting)}: at step {done} of {setting.steps}, went on from {from_step}"

    def resumed_at(self) -> int:
        """The step that the last start went on from (0: it began)."""
        resumed = json.loads((self.run_dir / "recipe.json").read_text()).get("resumed")
        return resumed[-1]["step"] if resumed else 0

    def compare(self, want: Course, tolerance: float | None = None) -> None:
        """AssertionError unless the run came to the end that the reference `want` has, sample by sample."""
        have = self.course()
        steps = [row["step"] for row in want.rows]
        assert steps == list(range(1, len(steps) + 1)), f"the reference has steps {steps}"
        assert [row["step"] for row in have.rows] == steps, f"steps {[row['step'] for row in have.rows]}"
        for name in ("batch_digest", "epoch", "lr", "quarantined"):
            assert [row[name] for row in have.rows] == [row[name] for row in want.rows], f"{name} differs"
        assert have.loaded == want.loaded, "other samples were trained on"
        losses = [(row["loss"], other["loss"]) for row, other in zip(have.rows, want.rows)]
        if tolerance is None:
            assert all(one == other for one, other in losses), f"losses differ: {losses}"
            for kind, one, other in (("weight", have.weights, want.weights), ("moment", have.moments, want.moments)):
                assert one.keys() == other.keys(), f"other {kind}s"
                for name in one:
                    assert one[name].equal(other[name]), f"{kind} {name} differs"
        else:
            worst = max(abs(one - other) / abs(other) for one, other in losses)
            assert worst <= tolerance, f"losses differ by {worst:.1e}: {losses}"
        names = self.check_checkpoints()
        assert names[-1] == f"step-{steps[-1]:08d}", f"the last checkpoint is {names[-1:]}"
        assert (self.checkpoints / "latest").read_text().strip() == names[-1], "latest is not the last"
        left = [path.name for path in self.checkpoints.iterdir() if ".step-" in path.name or ".tmp" in path.name]
        assert not left, f"left behind: {left}"


def at_step(step: int, act: Callable[[], None]) -> None:
    """In a run's process: have it `act` as it asks for the samples of a step (from 0)."""
    from vlm.data.loader import TrainLoader

    following = TrainLoader.__next__

    def struck(loader: Any) -> Any:
        if loader._step == step:
            act()
        return following(loader)

    TrainLoader.__next__ = struck  # type: ignore[method-assign]


def describe(setting: Setting) -> str:
    """A setting in words."""
    processes = f"{setting.world} process{'es' if setting.world > 1 else ''}"
    return f"{processes}, ZeRO {setting.stage}, {'bf16' if setting.bf16 else 'fp32'}"


# Kinds ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. `process`: it starts real jobs (tens of seconds), not forked ones (seconds)."""

    name: str
    run: Callable[[Trial], str]
    what: str
    checked: str
    process: bool


KINDS: dict[str, Kind] = {}


def kind(
    name: str, *, what: str, checked: str = SAME, process: bool = False
) -> Callable[[Callable[[Trial], str]], Callable[[Trial], str]]:
    """Make a function a kind.

    Args:
        what: what is injected, a sentence for docs/reliability.md.
        checked: what is looked at afterwards.
        process: it starts real jobs, not forked ones.
    """

    def keep(function: Callable[[Trial], str]) -> Callable[[Trial], str]:
        assert name not in KINDS, f"two kinds {name}"
        KINDS[name] = Kind(name, function, what, checked, process)
        return function

    return keep


def load_kinds() -> dict[str, Kind]:
    """All kinds, from kinds_*.py."""
    for path in sorted((ROOT / "tests" / "faults").glob("kinds_*.py")):
        importlib.import_module(f"tests.faults.{path.stem}")
    return KINDS
