"""Faults of numbers: losses and gradients that are not finite, spikes, damaged memory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.faults.harness import Setting, Trial, kind
from tests.faults.jobs import Inject

SKIPPED = (
    "all ranks skip that step alone; skipped.jsonl names step, reason, ranks and samples; killed afterwards and "
    "started again at the first try, weights, moments and samples equal to the bit to those of a run with the same "
    "fault that is not killed"
)
BACK = (
    "the budget spent, it goes back to a checkpoint, once; no sample is trained on twice; killed afterwards and "
    "started again at the first try, it is equal to the bit to a run with the same fault that is not killed"
)
ENDS = (
    "the run ends and names the tensor, the step and the samples, before anything is learnt with it; "
    "restart at the first try; weights, moments and samples equal to the uninterrupted run to the bit"
)
Spoil = Callable[[Any, Any], tuple[Any, list[Any]]]
"""(engine, micro-batch) -> what is trained on instead, hooks to be taken away once its backward pass is over."""


def _at_steps(steps: list[int], ranks: set[int], spoil: Spoil, trial: Trial | None = None, said: str = "") -> Inject:
    """Have `spoil` happen before the backward pass of the first micro-batch of these steps (from 1), on these ranks."""

    def inject(rank: int) -> None:
        from vlm.run.engine import Engine
        from vlm.run.watchdog import Watchdog

        telling, learning, now, done = Watchdog.phase, Engine._backward, [0], set[int]()

        def phase(self: Any, name: str, **named: Any) -> None:
            telling(self, name, **named)
            now[0] = self._step

        def backward(self: Any, item: Any, totals: Any, tally: Any) -> None:
            hooks: list[Any] = []
            if now[0] in steps and now[0] not in done and self.world.rank in ranks:
                done.add(now[0])
                item, hooks = spoil(self, item)
                if trial is not None:
                    trial.strike(f"{said} in step {now[0]} on rank {self.world.rank}")
            learning(self, item, totals, tally)
            for hook in hooks:
                hook.remove()

        Watchdog.phase, Engine._backward = phase, backward  # type: ignore[method-assign]

    return inject


def _not_a_number(engine: Any, item: Any) -> tuple[Any, list[Any]]:
    """A sample's pixels are NaN, so its loss is."""
    from vlm.data.loader import MicroBatch
    from vlm.data.pixels import finished

    batch = finished(item.batch)
    batch.video[0] = float("nan")
    return MicroBatch(replace(batch), item.weight), []


def _gradients_times(factor: float) -> Spoil:
    def spoil(engine: Any, item: Any) -> tuple[Any, list[Any]]:
        trained = [p for p in engine.model.parameters() if p.requires_grad]
        return item, [p.register_hook(lambda gradient: gradient * factor) for p in trained]

    return spoil


def _kill_in(trial: Trial, step: int, rank: int) -> Inject:
    """SIGKILL as a step (from 1) begins."""

    def inject(own: int) -> None:
        from vlm.run.watchdog import Watchdog

        telling = Watchdog.phase

        def phase(self: Any, name: str, **named: Any) -> None:
            telling(self, name, **named)
            if name == "load" and self._step == step and own == rank:
                trial.strike(f"rank {own} killed in step {step}")
                os.kill(os.getpid(), signal.SIGKILL)

        Watchdog.phase = phase  # type: ignore[method-assign]

    return inject


def _both(*injects: Inject) -> Inject:
    def inject(rank: int) -> None:
        for one in injects:
            one(rank)

    return inject


def _skipped(trial: Trial) -> list[dict[str, Any]]:
    path = trial.run_dir / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _wrong_steps(
    trial: Trial, setting: Setting, said: str, reason: str, steps: list[int], ranks: set[int], spoil: Spoil
) -> str:
    """Steps with numbers that go wrong, and a kill after the first of them; against the same run without the kill."""
    about = f"{said} {steps} {sorted(ranks)}"
    reference = trial.workshop.reference(setting, about, _at_steps(steps, ranks, spoil))
    killed = trial.rng.randrange(steps[0] + 1, setting.steps + 1)
    fault = _at_steps(steps, ranks, spoil, trial, said)
    statuses = trial.start(setting, _both(fault, _kill_in(trial, killed, trial.rng.randrange(setting.world)))).wait()
    assert any(statuses)
    text = trial.survives(setting, reference=reference, inject=fault)
    rows, course = [row for row in _skipped(trial) if row["reason"] != "rolled_back"], trial.course()
    assert [row["step"] for row in rows] == steps, rows
    assert {row["reason"] for row in rows} == {reason}, rows
    assert [row["step"] for row in course.rows if row["skipped"]] == steps
    for row in rows:
        batch = set(course.loaded[row["step"] - 1])
        for rank, here in row["ranks"].items():
            assert int(rank) in ranks or reason != "loss", row
            assert here["keys"], row
            assert set(here["keys"]) <= batch, row
    killed_at = trial.struck()[-1] if "killed" in trial.struck()[-1] else f"killed in step {killed}"
    return f"{said} in steps {steps} on ranks {sorted(ranks)}, {killed_at}; {text}"


def _draw(trial: Trial, *overrides: str, **fixed: Any) -> Setting:
    return trial.draw(worlds=(1, 2, 2), steps=10, overrides=(*Setting().overrides, *overrides), **fixed)


@kind("nan_loss", what="the loss of a sample on one rank is NaN, in one step or several", checked=SKIPPED)
def nan_loss(trial: Trial) -> str:
    setting = _draw(trial)
    steps = sorted(trial.rng.sample(range(2, setting.steps), trial.rng.randrange(1, 4)))
    return _wrong_steps(trial, setting, "NaN", "loss", steps, {trial.rng.randrange(setting.world)}, _not_a_number)


@kind("inf_gradient", what="the loss is finite, but a gradient on one rank is infinite", checked=SKIPPED)
def inf_gradient(trial: Trial) -> str:
    setting = _draw(trial)
    steps, ranks = [trial.rng.randrange(2, setting.steps)], {trial.rng.randrange(setting.world)}
    spoil = _gradients_times(float(trial.rng.choice(("inf", "nan"))))
    return _wrong_steps(trial, setting, "infinite gradients", "gradient", steps, ranks, spoil)


@kind("gradient_spike", what="the gradient of one rank, or of all, is thousands of times larger in one step",
      checked=SKIPPED)  # fmt: skip
def gradient_spike(trial: Trial) -> str:
    setting = _draw(trial, "guard.least=2")
    steps = [trial.rng.randrange(4, setting.steps)]
    ranks = trial.rng.choice(({trial.rng.randrange(setting.world)}, set(range(setting.world))))
    factor = 10 ** trial.rng.uniform(3, 6)
    return _wrong_steps(trial, setting, f"gradients x {factor:.0f}", "spike", steps, ranks, _gradients_times(factor))


@kind("rolled_back", what="more steps in a row are NaN than the budget allows", checked=BACK)
def rolled_back(trial: Trial) -> str:
    setting = _draw(trial, "guard.skip_budget=2")
    first = trial.rng.randrange(4, 7)
    steps, ranks = [first, first + 1, first + 2], {trial.rng.randrange(setting.world)}
    text = _wrong_steps(trial, setting, "NaN", "loss", steps, ranks, _not_a_number)
    back = [row for row in _skipped(trial) if row["reason"] == "rolled_back"]
    assert len(back) == 1, back
    assert back[0]["step"] == first + 2, back
    assert back[0]["to"] < first, back
    return f"{text}; went back to step {back[0]['to']}"


def _damaged(trial: Trial, said: str, spoil: Callable[[Any], str]) -> str:
    """Memory of one rank is damaged: inf where a number was. What is on disk is not."""
    setting = trial.draw(worlds=(1, 2, 2))
    step, rank = trial.rng.randrange(1, setting.steps + 1), trial.rng.randrange(setting.world)

    def damage(engine: Any, item: Any) -> tuple[Any, list[Any]]:
        trial.strike(f"{spoil(engine)}, {said}, in step {step} on rank {rank}")
        return item, []

    printed = trial.run(setting, _at_steps([step], {rank}, damage), expect=None)
    name = trial.struck()[0].partition(",")[0]
    lines = [line for line in printed.splitlines() if f"step {step} was skipped" in line and "damaged" in line]
    assert lines, printed[-1500:]
    assert name in lines[0], f"{name} is not named in {lines[0]}"
    assert trial.steps_done() == step
    assert trial.check_checkpoints() == _saved(trial, step, setting.every), "a step was saved with damaged tensors"
    reference = trial.workshop.reference(replace(setting, overrides=Setting().overrides))
    return f"{trial.struck()[0]}; {trial.survives(setting, reference=reference)}"


def _saved(trial: Trial, step: int, every: int) -> list[str]:
    """The two newest checkpoints of a run that ended within `step`."""
    return [f"step-{number:08d}" for number in range(every, step, every)][-2:]


@kind("inf_frozen", what="a number of the frozen tower becomes inf in one rank's memory", checked=ENDS)
def inf_frozen(trial: Trial) -> str:
    which, place = trial.rng.random(), trial.rng.random()

    def spoil(engine: Any) -> str:
        # Only matrices: they are used in every pass, by every sample.
        frozen = [(n, p) for n, p in engine.model.named_parameters() if not p.requires_grad and "proj" in n]
        name, p = frozen[int(which * len(frozen))]
        for held in (p, getattr(p, "ds_tensor", p)):  # ZeRO-3 has its part, and at times all of it besides
            values = held.data.view(-1)
            if len(values):
                values[int(place * len(values))] = float("inf")
        return name

    return _damaged(trial, "frozen", spoil)
