"""Started by test_engine.py in two processes: the same ten steps at every ZeRO stage, losses as one JSON line."""

import json
import sys

import torch

from vlm.config import override
from vlm.data.loader import MicroBatch, plan_step
from vlm.distributed import end, join
from vlm.recipe import load
from vlm.run.engine import Engine, derive
from vlm.types import Batch

STEPS, GLOBAL_BATCH, MICRO_BATCH, LR = 10, 10, 3, 1e-3


def recipe():
    settings = [f"global_batch_size={GLOBAL_BATCH}", f"steps={STEPS}", "optim.max_grad_norm=1.0"]
    settings += ["model.activation_checkpointing=true", "optim.layer_decay=0.7", "model.label_smoothing=0.1"]
    return override(load("vit_llama.debug"), settings)


def data(model):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(STEPS * GLOBAL_BATCH, *model.input_shape, generator=generator)
    return video, torch.randint(0, model.config.num_classes, (len(video),), generator=generator)


def batch_of(positions, video, label):
    positions = list(positions)
    return Batch(keys=tuple(map(str, positions)), video=video[positions], label=label[positions])


def main(stages, precisions):
    world, results = join(), {}
    for precision in precisions:
        for stage in stages:
            settings = recipe()
            hardware = {"train_micro_batch_size_per_gpu": MICRO_BATCH}
            if stage in ("1", "2", "3", "3_offload"):
                hardware["zero_optimization"] = {"stage": int(stage[0])}
            if stage == "3_offload":
                hardware["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
                hardware["zero_optimization"]["offload_param"] = {"device": "cpu"}
            if precision == "bf16":
                hardware["bf16"] = {"enabled": True}
            torch.manual_seed(0)
            model = settings.model.build()
            video, label = data(model)
            engine = Engine(model, settings, derive(hardware, settings, world.size), world)
            losses = []
            for step in range(STEPS):
                plans = plan_step(step, GLOBAL_BATCH, world.size, world.rank, MICRO_BATCH)
                micro = [MicroBatch(batch_of(plan.positions, video, label), plan.weight) for plan in plans]
                result = engine.step(micro, lr=LR)
                losses.append((result.loss, result.grad_norm))
            results[f"{precision}/{stage}"] = losses
    if world.is_main:
        print("RESULT " + json.dumps(results), flush=True)
    end()


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2].split(","))
