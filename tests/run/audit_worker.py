"""Started by test_audit.py in two processes: LLaMA-VQA, broken in four ways, under each ZeRO stage.

The result, one JSON line, holds for each stage and way the lines that the audit printed and the error that it raised.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import vamos_worker as w

from vlm.data.loader import MicroBatch, plan_step
from vlm.distributed import end, join, share_object
from vlm.run import checkpoint, zero_state
from vlm.run.audit import Audit
from vlm.run.engine import Engine, derive
from vlm.types import UserError

AUDITED, STEPS = 3, 6
FROZEN = "llm.model.layers.1.mlp.up_proj.weight"
LOST = "layers.2.attention.gate1"


def steps(engine: Engine, audit: Audit, between: Callable[[int], None] = lambda step: None) -> None:
    """Six steps; the first has a learning rate of 0, as warmup gives it."""
    world = engine.world
    for step in range(STEPS):
        plans = plan_step(step, w.GLOBAL_BATCH, world.size, world.rank, w.MICRO_BATCH)
        micro = [MicroBatch(w.batch_of(plan.positions), plan.weight) for plan in plans]
        lr = w.LR if step else 0.0
        result = engine.step(micro, lr=lr)
        between(step)
        audit.after_step(step, lr, micro, result.counts)
    audit.finish()


def case(engine: Engine, between: Callable[[int], None] = lambda step: None) -> list[str]:
    lines: list[str] = []
    audit = Audit(engine, AUDITED, lines.append)
    try:
        steps(engine, audit, between)
    except UserError as error:
        lines.append(f"error: {error}")
    return lines


def run(stage: str, world: Any, folder: Path) -> dict[str, list[str]]:
    hardware: dict[str, Any] = {"train_micro_batch_size_per_gpu": w.MICRO_BATCH}
    hardware["zero_optimization"] = {"stage": int(stage[0])}
    if stage.endswith("_bf16"):
        hardware["bf16"] = {"enabled": True}
    settings, model = w.recipe(), w.build()
    with torch.no_grad():
        for layer in model.layers:  # as in a real run: behind closed gates the prompts get zeros at first
            layer.attention.gate1.zero_()
    engine = Engine(model, settings, derive(hardware, settings, world.size), world)
    parameters = dict(model.named_parameters())

    def nudge(step: int) -> None:
        if step == 5:  # after the audited steps
            with deepspeed.zero.GatheredParameters([parameters[FROZEN]], modifier_rank=0), torch.no_grad():
                parameters[FROZEN].view(-1)[5] *= 1.01

    def lose(step: int) -> None:
        zero_state.prime(engine)
        shape = getattr(parameters[LOST], "ds_shape", parameters[LOST].shape)
        zero_state.write(engine, LOST, {"exp_avg": torch.zeros(shape)})

    results = {"frozen": case(engine, nudge)}
    results["hooks"] = [name for name, p in parameters.items() if p._backward_hooks]
    results["lost"] = case(engine, lose)
    hook = model.visual_proj.register_forward_hook(lambda module, args, out: out.detach())
    results["cut"] = case(engine)
    hook.remove()
    parameters["temporal_emb.weight"].requires_grad_(False)
    try:
        checkpoint.save(folder / stage, engine, checkpoint.Progress(step=1), {}, keep=1, is_best=False)
        results["checkpoint"] = []
    except UserError as error:
        results["checkpoint"] = [str(error)]
    return results


def main(stages: list[str]) -> None:
    world = join()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(share_object(scratch))
        results = {stage: run(stage, world, folder) for stage in stages}
        if world.is_main:
            print("RESULT " + json.dumps(results), flush=True)
    end()


if __name__ == "__main__":
    main(sys.argv[1].split(","))
