"""Tiny engines that are saved and go on with another choice of what trains."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from vlm.config import override
from vlm.data.loader import MicroBatch, plan_step
from vlm.distributed import World
from vlm.recipe import Recipe, load
from vlm.run import checkpoint, restore
from vlm.run.engine import Engine, derive
from vlm.run.restore import Chosen
from vlm.types import Batch

GLOBAL_BATCH, LR = 4, 1e-2
BASE = "llama.layers.0.mlp.up_proj.weight"
HEAD = ("head.weight", "head.bias")


def recipe(*settings: str) -> Recipe:
    fixed = [f"global_batch_size={GLOBAL_BATCH}", "steps=9", "optim.weight_decay=0", "optim.layer_decay=0.8"]
    return override(load("vit_llama.debug"), [*fixed, *settings])


def start(world: World, form: str, settings: tuple[str, ...] = (), folder: Path | None = None) -> tuple[Engine, Chosen]:
    """An engine as vlm.run.train makes it: fresh, or from a checkpoint.

    Args:
        form: ZeRO stage, and `_bf16` where the engine computes in bf16.
        settings: overrides of the recipe.
    """
    stage, _, precision = form.partition("_")
    hardware: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2}
    if stage != "0":
        hardware["zero_optimization"] = {"stage": int(stage)}
    if precision:
        hardware["bf16"] = {"enabled": True}
    made = recipe(*settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA layer has RANDOM weights")
        model = made.model.build()
    state = restore.load_weights(folder, model) if folder else {}
    chosen = restore.choose(model, made, folder, state)
    engine = Engine(model, made, derive(hardware, made, world.size), world, adam_steps=chosen.adam_steps)
    if folder:
        restore.load_optimizer(folder, engine, state)
    return engine, chosen


def step(engine: Engine, number: int) -> float:
    """One step on the batch of this number; its loss."""
    draw = torch.Generator().manual_seed(number)
    video = torch.randn(GLOBAL_BATCH, *engine.model.input_shape, generator=draw)
    label = torch.randint(0, 4, (GLOBAL_BATCH,), generator=draw)
    torch.manual_seed(number)
    micro = []
    for plan in plan_step(0, GLOBAL_BATCH, engine.world.size, engine.world.rank, 2):
        places = list(plan.positions)
        batch = Batch(keys=tuple(map(str, places)), video=video[places], label=label[places])
        micro.append(MicroBatch(batch, plan.weight))
    return engine.step(micro, lr=LR).loss


def save(engine: Engine, root: Path, number: int) -> Path:
    return checkpoint.save(root, engine, checkpoint.Progress(step=number), {}, keep=9, is_best=False)
