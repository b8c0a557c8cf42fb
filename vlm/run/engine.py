"""The DeepSpeed engine: one place where recipe and DeepSpeed JSON meet, and where one optimizer step is made.

The recipe owns the science, the JSON owns the hardware (`vlm.run.hardware` reads and checks it); what both need is
derived here, once.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm.data.loader import MicroBatch, micro_steps
from vlm.distributed import World, sum_over_ranks
from vlm.models import trained
from vlm.models.quantised import is_quantised
from vlm.models.system import System
from vlm.recipe import OptimConfig, Recipe
from vlm.run import zero_state
from vlm.run.modalities import Modalities
from vlm.run.optim import parameter_groups
from vlm.run.veto import Reason, Veto
from vlm.run.watchdog import NOBODY, Heart
from vlm.types import COUNTERS, UserError


def derive(hardware: dict[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The whole DeepSpeed dict of this run: the JSON plus what follows from the recipe and the number of processes."""
    micro = hardware["train_micro_batch_size_per_gpu"]
    micro = min(micro, -(-recipe.global_batch_size // world_size))
    accumulation = micro_steps(recipe.global_batch_size, world_size, micro)
    derived = {
        **hardware,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed insists on this product; a step may hold fewer samples, and the loss is averaged over the real ones.
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "steps_per_print": 10**9,
    }
    derived.setdefault("log_level", "warning")
    return derived


def zero_stage(hardware: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed dict (0 where none is named)."""
    return int(hardware.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(hardware: dict[str, Any]) -> bool:
    """Whether optimizer states live in host memory (DeepSpeed then needs its own CPU Adam)."""
    section = hardware.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") == "cpu"


UNTAUGHT_STEPS = 3
"""Steps on end without anything to learn that end a run. One is no fault: batches of a sample or two meet a sample
whose answer was cut away now and then; its loss is 0, and it is counted as `rows_untaught`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step gave, the same on every rank."""

    loss: float  # weighted sum of the losses
    losses: dict[str, float]  # mean over the global batch, by view
    counts: dict[str, int]  # elements each loss was averaged over
    grad_norm: float  # global L2 norm before clipping
    counters: dict[str, int] = field(default_factory=dict)  # what had to be cut of rows of text, over all ranks
    skipped: Reason | None = None  # why nothing was learnt from it; None: it was
    limit: float = math.inf  # largest gradient norm that was allowed
    here: Here | None = None  # of a step that was skipped: what this rank had


@dataclass(frozen=True, slots=True)
class Here:
    """What one rank's part of a skipped step was."""

    loss: float  # weighted sum of the mean losses of this rank's samples
    keys: tuple[str, ...]  # samples whose loss is not finite; all of them, where each one's is


class Engine:
    """A system wrapped by DeepSpeed. `step` makes one optimizer step from this rank's micro-batches.

    `adam_steps`: of each trained parameter, the steps that its moments have seen, where a checkpoint's will be loaded
    (vlm.run.restore).
    """

    def __init__(
        self,
        model: System,
        recipe: Recipe,
        config: dict[str, Any],
        world: World,
        heart: Heart = NOBODY,
        adam_steps: Mapping[str, int] | None = None,
    ) -> None:
        import deepspeed

        if zero_stage(config) == 3 and is_quantised(model):
            raise UserError(
                "quantise: ZeRO-3 cannot share out matrices of 8 or 4 bits. Mend: ds_configs/zero2.json (each process "
                "then holds the whole frozen model in so few bits), or quantise=none"
            )
        self.model, self.recipe, self.config, self.world, self.heart = model, recipe, config, world, heart
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        groups = parameter_groups(
            model,
            lr=recipe.optim.lr,
            weight_decay=recipe.optim.weight_decay,
            layer_decay=recipe.optim.layer_decay,
            adam_steps=adam_steps,
        )
        with _quiet_build(config):
            optimizer = _adam(groups, recipe.optim, world.device, offloads_optimizer(config))
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=dict(config), dist_init_required=False
            )
        zero_state.forget_warm_up(self)
        self._untaught = 0
        self._norm: float | None = None  # where DeepSpeed keeps none
        self._veto = Veto(self._adams(), self._grad_norm)
        self._buffers = tuple(trained.persistent_buffers(model))
        steps = config["gradient_accumulation_steps"]
        self.modalities = Modalities(model.reads_text, recipe.inputs, recipe.views, steps, world)

    def step(self, micro_batches: Sequence[MicroBatch], lr: float, limit: float | None = None) -> StepResult:
        """One optimizer step over the global batch.

        The loss is averaged over the *global* batch: sums of all micro-batches of all ranks divided by their counts,
        so it does not depend on how the batch was cut. Nor on which rank has which kind of sample, or none at all
        (vlm.run.modalities).

        Args:
            limit: largest norm of the gradient (inf: any finite one) with which the step is made. Else, or where a
                loss is not finite, no rank makes it, and weights, moments and buffers stay as they are, to the bit.
        Raises:
            FloatingPointError: `limit` is None, and a loss or the gradient is not finite; nothing was stepped.
        """
        micro_batches = self.modalities.complete(micro_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.heart.phase("collective")
        totals, counters = self._global_counts(micro_batches)
        self._refuse_untaught(totals, micro_batches)
        buffers = {name: self.model.get_buffer(name).detach().clone() for name in self._buffers}
        tally = _Tally(self.recipe.views)
        self.deepspeed.train()
        for number, item in enumerate(micro_batches, 1):
            self._backward(item, totals, tally)
            if number == len(micro_batches):
                self.heart.phase("collective")
                summed = sum_over_ranks(list(tally.sums.values()), self.world.device)
                losses = {name: value / max(totals[name], 1) for name, value in zip(tally.sums, summed)}
                loss = sum(self.recipe.views[name] * value for name, value in losses.items())
                self._norm = self._plain_grad_norm()
                self._veto.begin(loss, math.inf if limit is None else limit)
            self.heart.phase("optimizer")
            self.deepspeed.step()
        skipped, norm = self._veto.outcome()
        if skipped:
            for name, value in buffers.items():
                self.model.get_buffer(name).data.copy_(value)  # the forward pass writes running statistics
        here = tally.here() if skipped else None
        if here is not None and limit is None:
            what = f"a loss is not finite: {losses}" if skipped == "loss" else f"the gradient norm is {norm}"
            raise FloatingPointError(f"{what}; samples on rank {self.world.rank}: {', '.join(here.keys)}")
        counts = {name: int(total) for name, total in totals.items()}
        return StepResult(loss, losses, counts, norm, counters, skipped, math.inf if limit is None else limit, here)

    def _backward(self, item: MicroBatch, totals: dict[str, float], tally: _Tally) -> None:
        """Forward and backward pass of one micro-batch; `tally` takes note of its losses."""
        self.heart.phase("forward", keys=item.batch.keys)
        terms = self.deepspeed(item.batch.to(self.world.device))
        objective = torch.zeros((), device=self.world.device)
        for name, term in terms.items():
            weight = self.recipe.views[name] * item.weight / max(totals[name], 1)
            # DeepSpeed averages gradients over ranks, hence the factor world size.
            objective = objective + term.total.float() * (weight * self.world.size)
        tally.add(item, {name: (float(term.total.detach()), int(term.count)) for name, term in terms.items()})
        self.heart.phase("backward")
        self.deepspeed.backward(objective, scale_wrt_gas=False)

    def _refuse_untaught(self, totals: dict[str, float], micro_batches: Sequence[MicroBatch]) -> None:
        """UserError where for some steps on end no batch has anything to learn."""
        self._untaught = 0 if any(totals.values()) else self._untaught + 1
        if self._untaught == UNTAUGHT_STEPS:
            raise UserError(
                f"no view ({', '.join(totals)}) has anything to learn in {UNTAUGHT_STEPS} whole batches on end: every "
                f"label is masked or cut away; samples on rank {self.world.rank}: {_keys(micro_batches)}. Look at the "
                "prompts and at inputs.max_length"
            )

    def _global_counts(self, micro_batches: Sequence[MicroBatch]) -> tuple[dict[str, float], dict[str, int]]:
        """Elements of each loss in the global batch, known before the first backward, so nothing is rescaled; and what
        had to be cut of its rows of text. UserError if ranks are about to run different modules."""
        names = list(self.recipe.views)
        counts = dict.fromkeys(names, 0)
        cut = dict.fromkeys(COUNTERS, 0)
        for item in micro_batches:
            for name, count in self.model.counts(item.batch).items():
                if name not in counts:
                    raise UserError(f"views: this system has the loss {name!r}, but the recipe gives it no weight")
                counts[name] += count * item.weight
            for name, count in item.batch.counters.items():
                cut[name] += count * item.weight
        told, marks = [*counts.values(), *cut.values()], self.modalities.marks(micro_batches)
        summed = sum_over_ranks([*told, *marks], self.world.device)
        self.modalities.check(micro_batches, summed[len(told) :])
        totals, counters = summed[: len(names)], summed[len(names) : len(told)]
        lost = {name: int(count) for name, count in zip(COUNTERS, counters)} if any(counters) else {}
        return dict(zip(names, totals)), lost

    def _plain_grad_norm(self) -> float | None:
        """Global gradient norm where DeepSpeed runs the plain optimizer (stage 0, fp32) and keeps none itself."""
        if self.optimizer is not self.deepspeed.basic_optimizer:
            return None
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _grad_norm(self) -> float:
        """The gradient's global norm while DeepSpeed makes its step, when Adam is called."""
        norm = self.optimizer._global_grad_norm if self._norm is None else self._norm
        return math.nan if norm is None else float(norm)

    def _adams(self) -> list[torch.optim.Optimizer]:
        """All that DeepSpeed steps: the Adam given to it, and its own for what it does not offload."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return [inner, *filter(None, [getattr(self.optimizer, "backup_optimizer", None)])]


class _Tally:
    """The losses of this rank's micro-batches, as they come."""

    def __init__(self, views: Mapping[str, float]) -> None:
        self.views = views
        self.sums = dict.fromkeys(views, 0.0)
        self._counts = dict.fromkeys(views, 0)
        self._keys: list[str] = []
        self._bad: list[str] = []

    def add(self, item: MicroBatch, terms: Mapping[str, tuple[float, int]]) -> None:
        """Take note of a micro-batch: loss -> (sum, number of elements)."""
        for name, (total, count) in terms.items():
            self.sums[name] += total * item.weight
            self._counts[name] += count * item.weight
        self._keys += item.batch.keys
        if not all(math.isfinite(total) for total, _ in terms.values()):
            self._bad += item.batch.keys

    def here(self) -> Here:
        means = (self.views[name] * total / max(self._counts[name], 1) for name, total in self.sums.items())
        return Here(sum(means), tuple(self._bad or self._keys))


def _keys(micro_batches: Sequence[MicroBatch]) -> str:
    return ", ".join(key for item in micro_batches for key in item.batch.keys)


def _adam(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device, offload: bool) -> Any:
    """AdamW handed to DeepSpeed ready-made: no JSON optimizer, so no kernel is compiled unless states are offloaded."""
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return _by_count(
            DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True), optim
        )
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=device.type == "cuda")


def _by_count(adam: Any, optim: OptimConfig) -> Any:
    """DeepSpeed's CPU Adam with bias corrections that depend on the count of steps alone.

    It keeps powers of the betas and multiplies them on from step to step; where the count jumps, at a restart or a way
    back, it computes them anew, and the last digits differ. Begun anew at each step it always computes them.
    """
    step = adam.step

    def step_by_count(*arguments: Any, **options: Any) -> Any:
        of_all = (optim.lr, *optim.betas, optim.eps, optim.weight_decay)  # each group's own are given at each update
        adam.ds_opt_adam.create_adam(adam.opt_id, *of_all, adam.adam_w_mode, False)
        return step(*arguments, **options)

    adam.step = step_by_count
    return adam


@contextmanager
def _quiet_build(config: dict[str, Any]) -> Any:
    """Build DeepSpeed's CPU Adam at most once a machine, never hang on a build that was killed.

    torch's extension builder waits for ever on a lock *file* that a killed build left behind. Here processes queue on
    a kernel lock (gone with its holder) and remove the stale file before they build or load.
    """
    if not offloads_optimizer(config):
        yield
        return
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("cpu_adam", verbose=False))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "vlm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        from deepspeed.ops.op_builder import CPUAdamBuilder

        if not any(folder.glob("*.so")):
            print("building DeepSpeed's CPU Adam (once for this machine, one to two minutes) …", flush=True)
        # DS_SKIP_CUDA_CHECK is not needed: this build has no CUDA code, so nothing compares the toolkit's version.
        CPUAdamBuilder().load(verbose=False)
        fcntl.flock(lock, fcntl.LOCK_UN)
    yield
