"""The DeepSpeed engine: one place where recipe and DeepSpeed JSON meet, and where one optimizer step is made.

The recipe owns the science, the JSON owns the hardware (`vlm.run.hardware` reads and checks it); what both need is
derived here, once.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm.data.loader import MicroBatch, micro_steps
from vlm.distributed import World, sum_over_ranks
from vlm.models.quantised import is_quantised
from vlm.models.system import System
from vlm.recipe import OptimConfig, Recipe
from vlm.run import zero_state
from vlm.run.modalities import Modalities
from vlm.run.optim import parameter_groups
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


class Engine:
    """A system wrapped by DeepSpeed. `step` makes one optimizer step from this rank's micro-batches."""

    def __init__(self, model: System, recipe: Recipe, config: dict[str, Any], world: World) -> None:
        import deepspeed

        if zero_stage(config) == 3 and is_quantised(model):
            raise UserError(
                "quantise: ZeRO-3 cannot share out matrices of 8 or 4 bits. Mend: ds_configs/zero2.json (each process "
                "then holds the whole frozen model in so few bits), or quantise=none"
            )
        self.model, self.recipe, self.config, self.world = model, recipe, config, world
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        groups = parameter_groups(
            model,
            lr=recipe.optim.lr,
            weight_decay=recipe.optim.weight_decay,
            layer_decay=recipe.optim.layer_decay,
        )
        with _quiet_build(config):
            optimizer = _adam(groups, recipe.optim, world.device, offloads_optimizer(config))
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=dict(config), dist_init_required=False
            )
        zero_state.forget_warm_up(self)
        self._untaught = 0
        steps = config["gradient_accumulation_steps"]
        self.modalities = Modalities(model.reads_text, recipe.inputs, recipe.views, steps, world)

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimizer step over the global batch.

        The loss is averaged over the *global* batch: sums of all micro-batches of all ranks divided by their counts,
        so it does not depend on how the batch was cut. Nor on which rank has which kind of sample, or none at all
        (vlm.run.modalities).

        Raises:
            FloatingPointError: a loss or the gradient is not finite; nothing was stepped if it was a loss.
        """
        micro_batches = self.modalities.complete(micro_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        totals, counters = self._global_counts(micro_batches)
        sums = dict.fromkeys(totals, 0.0)
        self._untaught = 0 if any(totals.values()) else self._untaught + 1
        if self._untaught == UNTAUGHT_STEPS:
            raise UserError(
                f"no view ({', '.join(totals)}) has anything to learn in {UNTAUGHT_STEPS} whole batches on end: every "
                f"label is masked or cut away; samples on rank {self.world.rank}: {_keys(micro_batches)}. Look at the "
                "prompts and at inputs.max_length"
            )
        self.deepspeed.train()
        for number, item in enumerate(micro_batches, 1):
            batch = item.batch.to(self.world.device)
            terms = self.deepspeed(batch)
            objective = torch.zeros((), device=self.world.device)
            for name, term in terms.items():
                weight = self.recipe.views[name] * item.weight / max(totals[name], 1)
                # DeepSpeed averages gradients over ranks, hence the factor world size.
                objective = objective + term.total.float() * (weight * self.world.size)
                sums[name] += float(term.total.detach()) * item.weight
            self.deepspeed.backward(objective, scale_wrt_gas=False)
            if number == len(micro_batches):
                losses = self._reduce(sums, totals, micro_batches)
                norm = self._plain_grad_norm()
            self.deepspeed.step()
        norm = self._zero_grad_norm() if norm is None else norm
        if not torch.isfinite(torch.tensor(norm)):
            raise FloatingPointError(
                f"the gradient norm is {norm}; samples on rank {self.world.rank}: {_keys(micro_batches)}"
            )
        loss = sum(self.recipe.views[name] * value for name, value in losses.items())
        return StepResult(loss, losses, {name: int(total) for name, total in totals.items()}, norm, counters)

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

    def _reduce(
        self, sums: dict[str, float], totals: dict[str, float], micro_batches: Sequence[MicroBatch]
    ) -> dict[str, float]:
        values = sum_over_ranks(list(sums.values()), self.world.device)
        losses = {name: value / max(totals[name], 1) for name, value in zip(sums, values)}
        if not all(torch.isfinite(torch.tensor(list(losses.values())))):
            raise FloatingPointError(
                f"a loss is not finite: {losses}; samples on rank {self.world.rank}: {_keys(micro_batches)}"
            )
        return losses

    def _plain_grad_norm(self) -> float | None:
        """Global gradient norm where DeepSpeed runs the plain optimizer (stage 0, fp32) and keeps none itself."""
        if self.optimizer is not self.deepspeed.basic_optimizer:
            return None
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _zero_grad_norm(self) -> float:
        norm = self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)


def _keys(micro_batches: Sequence[MicroBatch]) -> str:
    return ", ".join(key for item in micro_batches for key in item.batch.keys)


def _adam(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device, offload: bool) -> Any:
    """AdamW handed to DeepSpeed ready-made: no JSON optimizer, so no kernel is compiled unless states are offloaded."""
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=device.type == "cuda")


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
