"""Numbers that go wrong: steps that were refused (vlm.run.veto) are told, counted against a budget, and answered.

    RUN/skipped.jsonl   a line for each step that was not made:
                        {step, reason: "loss"|"gradient"|"spike", value, limit, ranks: {rank: {loss, keys}}, in_budget}
                        and one where the run went back:
                        {step, reason: "rolled_back", to, passed_over: [first, last], …}

Every rank decides from the same numbers, so all do the same. What it decides from (norms, skipped steps, how often it
went back) is in each checkpoint's state.json: a run that goes on decides as the one that was not interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.distributed import from_main, gather_objects, share_object
from vlm.errors import DamagedMemory
from vlm.recipe import GuardConfig, Recipe
from vlm.run import checkpoint, restore, zero_state
from vlm.run.checkpoint import Saver
from vlm.run.engine import Engine, Here, StepResult
from vlm.run.log import drop_after, plain
from vlm.run.rewind import rewind
from vlm.types import UserError

NAME = "skipped.jsonl"


class Guard:
    """Watches the numbers of a run. `limit` before each step, `after_step` after it, `state` into each checkpoint.

    Args:
        recipe: for its `guard` and run_dir.
        engine: what makes the steps.
        known: `state` of the checkpoint that the run goes on from; None: it begins.
        first_step: lines of skipped.jsonl after it are dropped (of work that was lost and is done again).
        say: prints a line (on one rank).
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        known: dict[str, Any] | None,
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        self.config: GuardConfig = recipe.guard
        self.engine, self.say, self.path = engine, say, recipe.run_dir / NAME
        self._first_step = first_step
        known = known or {}
        self.norms: list[float] = list(known.get("norms", ()))[-self.config.window :]
        self.skipped: list[int] = list(known.get("skipped", ()))
        self.rollbacks: int = known.get("rollbacks", 0)
        if engine.world.is_main:
            drop_after(self.path, first_step)

    def state(self) -> dict[str, Any]:
        """What it decides from, as JSON holds it without loss."""
        return {"norms": list(self.norms), "skipped": list(self.skipped), "rollbacks": self.rollbacks}

    @property
    def limit(self) -> float:
        """Largest norm of the gradient that is no spike; inf where too few are known."""
        if not self.config.spike_factor or len(self.norms) < self.config.least:
            return math.inf
        return self.config.spike_factor * max(self.norms)

    def after_step(self, result: StepResult, step: int, saver: Saver) -> bool:
        """Answer what a step gave. Collective.

        Args:
            step: its number, from 1.
            saver: what writes the run's checkpoints.
        Returns:
            whether the run went back to a checkpoint, and is to write one now.
        Raises:
            FloatingPointError: on every rank: the budget is spent, or what was loaded holds inf or nan.
            DamagedMemory: on every rank: tensors hold what nobody gave them.
        """
        if result.skipped is None:
            if result.grad_norm > 0:  # a batch without anything to learn says nothing about norms
                self.norms = [*self.norms, result.grad_norm][-self.config.window :]
            return False
        self.skipped = [one for one in self.skipped if one > step - self.config.budget_steps] + [step]
        what = self._tell(result, step)
        damaged = not_finite(self.engine) if result.skipped != "spike" else []
        if damaged:
            saver.wait()
            # In the first step after a start it was loaded so, most likely, and another start would load it again.
            raise (FloatingPointError if step == self._first_step + 1 else DamagedMemory)(
                f"{what}. Tensors in memory are damaged, with inf or nan: {', '.join(damaged)}. Nothing was learnt "
                "with them. The same command loads them anew; if it comes to the same, the file that they come from is "
                "damaged, or memory is"
            )
        if len(self.skipped) <= self.config.skip_budget:
            return False
        self._roll_back(what, step, saver)
        return True

    # ------------------------------------------------------------------------------------------------------- telling

    def _tell(self, result: StepResult, step: int) -> str:
        """Write a skipped step down, and say it: the line that was said."""
        assert result.here is not None
        gathered = gather_objects(result.here)
        ranks: dict[str, Here] = share_object(_to_blame(gathered, result) if gathered else None)
        value = result.loss if result.skipped == "loss" else result.grad_norm
        row = {
            "step": step,
            "reason": result.skipped,
            "value": plain(value, str),
            "limit": plain(result.limit),
            "ranks": {rank: {"loss": plain(here.loss, str), "keys": list(here.keys)} for rank, here in ranks.items()},
            "in_budget": len(self.skipped),
        }
        what = f"step {step} was skipped: {_sentence(result, ranks)}"
        self.say(
            f"{what}; {len(self.skipped)} of {self.config.skip_budget} that may be within {self.config.budget_steps} "
            f"steps ({self.path})"
        )
        self._write(row)
        return what

    def _write(self, row: dict[str, Any]) -> None:
        def write() -> None:
            try:
                with self.path.open("a") as stream:
                    stream.write(json.dumps(row, allow_nan=False) + "\n")
            except OSError as error:
                raise UserError(
                    f"{self.path}: what happened in step {row['step']} could not be written ({error.strerror}): make "
                    "room, then the same command goes on from the last checkpoint"
                ) from error

        from_main(self.engine.world, write)

    # ------------------------------------------------------------------------------------------------------ answering

    def _roll_back(self, what: str, step: int, saver: Saver) -> None:
        """Go back to a checkpoint from before the trouble; only the weights: no batch is trained on twice."""
        config = self.config
        spent = (
            f"{what}. It is the {_ordinal(len(self.skipped))} of the last {config.budget_steps} steps, and "
            f"guard.skip_budget={config.skip_budget}"
        )
        mend = (
            f"{self.path} names the steps and their samples. Mend: look at these samples; a lower optim.lr, a longer "
            "warmup, optim.max_grad_norm; where such numbers are no fault, guard.spike_factor, guard.skip_budget"
        )
        saver.wait()
        if config.skip_budget == 0 or self.rollbacks >= config.rollbacks:
            before = f", after going back to a checkpoint {self.rollbacks} times" if self.rollbacks else ""
            raise FloatingPointError(f"{spent}{before}; the run ends. {mend}")
        self.engine.heart.phase("restore")
        trains = set(self.engine.names.values())
        found = from_main(self.engine.world, lambda: checkpoint_before(saver.root, self.skipped[0], trains))
        if found is None:
            raise FloatingPointError(f"{spent}; there is no checkpoint yet to go back to, so the run ends. {mend}")
        state = rewind(found, self.engine)
        known = state.get("guard") or {}
        self.norms, self.skipped = list(known.get("norms", ()))[-config.window :], []
        self.rollbacks += 1
        self._write(
            {
                "step": step,
                "reason": "rolled_back",
                "value": None,
                "limit": None,
                "ranks": {},
                "to": state["step"],
                "passed_over": [state["step"] + 1, step],
                "rollbacks": self.rollbacks,
            }
        )
        self.say(
            f"{spent}: went back to the weights of {found} ({_ordinal(self.rollbacks)} time of {config.rollbacks}); "
            f"what was learnt in steps {state['step'] + 1} to {step} is gone, their samples are passed over and not "
            f"trained on again, and step {step + 1} is next"
        )


def checkpoint_before(root: Path, step: int, trains: Collection[str]) -> Path | None:
    """The newest checkpoint from before `step` (from 1) that can be gone back to; where none is kept, the oldest one.

    Args:
        trains: names of all that trains now; a checkpoint from before another choice of it does not have their values.
    """
    names = checkpoint.steps(root)
    before = [name for name in names if int(name.removeprefix("step-")) < step]
    for name in [*reversed(before), *names[len(before) :]]:
        try:
            checkpoint.verify(root / name, (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE))
            moments = restore.Tensors(root / name / checkpoint.OPTIMIZER).names()
        except UserError as error:
            print(f"passed over a damaged checkpoint: {error}", flush=True)
            continue
        if all(f"{zero_state.MOMENTS[0]}/{one}" in moments for one in trains):
            return root / name
    return None


def not_finite(engine: Engine) -> list[str]:
    """Tensors in memory that hold inf or nan, on any rank: weights, frozen and trained, buffers, masters, moments.

    Collective. Each name once, with the ranks that have it so.
    """
    mine = [name for name, values in _held(engine) if not _is_finite(values)]
    gathered = gather_objects(mine)
    if gathered is None:
        return share_object(None)
    names = dict.fromkeys(name for part in gathered for name in part)
    found = []
    for name in names:
        ranks = [str(rank) for rank, part in enumerate(gathered) if name in part]
        found.append(f"{name} ({_ranks(ranks)})")
    return share_object(found[:20] + ([f"and {len(found) - 20} more"] if len(found) > 20 else []))


def _held(engine: Engine) -> list[tuple[str, Tensor]]:
    """Every tensor of numbers that this rank keeps from step to step."""
    found = [(name, p.detach()) for name, p in engine.model.named_parameters()]  # under ZeRO-3 empty, or a whole copy
    found += [(n, p.ds_tensor.detach()) for n, p in engine.model.named_parameters() if hasattr(p, "ds_tensor")]
    found += [(name, value.detach()) for name, value in engine.model.named_buffers()]
    for part in zero_state.fragments(engine, all_held=True):
        found += [(f"{part.name} ({_KINDS[kind]})", values) for kind, values in part.values.items()]
    return found


_KINDS = {"param": "its fp32 master", "exp_avg": "Adam's first moment", "exp_avg_sq": "Adam's second moment"}


def _is_finite(values: Tensor) -> bool:
    if not values.is_floating_point() or values.element_size() == 1:  # quantised: codes, not numbers
        return True
    return bool(torch.isfinite(values).all())


def _to_blame(gathered: Sequence[Here], result: StepResult) -> dict[str, Here]:
    """What each rank had, by rank; where a loss is not finite, of the ranks whose own is not."""
    bad = [math.isfinite(here.loss) for here in gathered]
    some = result.skipped == "loss" and not all(bad)
    return {str(rank): here for rank, here in enumerate(gathered) if not (some and bad[rank])}


def _sentence(result: StepResult, ranks: dict[str, Here]) -> str:
    """What went wrong, where, and with which samples."""
    samples = [key for here in ranks.values() for key in here.keys]
    shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
    if result.skipped == "loss":
        return f"the loss is {result.loss} ({_ranks(list(ranks))}, samples {shown})"
    if result.skipped == "gradient":
        return f"the gradient is not finite, though the loss is {result.loss:.4g} (samples {shown})"
    return f"the gradient's norm {result.grad_norm:.4g} is above {result.limit:.4g}, a spike (samples {shown})"


def _ranks(ranks: Sequence[str]) -> str:
    shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
