"""Started by test_guard.py in two processes: steps that are refused, and steps that are gone back behind, leave no
trace, at every ZeRO stage."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
import zero_worker

from vlm.data.loader import MicroBatch, plan_step
from vlm.distributed import barrier, end, gather_objects, join, share_object
from vlm.run import zero_state
from vlm.run.checkpoint import Progress, Saver
from vlm.run.engine import Engine, derive
from vlm.run.rewind import rewind

STEPS = 5
BAD_STEP = 2
LR = 1e-3


def make_engine(world, stage, precision, offload=False):
    settings = zero_worker.recipe()
    hardware = {"train_micro_batch_size_per_gpu": zero_worker.MICRO_BATCH}
    if stage:
        hardware["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 1_000_000}  # no gigabytes to fill
    if offload:
        hardware["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            hardware["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if precision == "bf16":
        hardware["bf16"] = {"enabled": True}
    torch.manual_seed(0)
    model = settings.model.build()
    model.register_buffer("mean", torch.zeros(1))  # as running statistics: the forward pass writes it
    model.register_forward_pre_hook(note_mean)
    return Engine(model, settings, derive(hardware, settings, world.size), world)


def note_mean(model, inputs):
    model.mean.add_(1 + 0 * inputs[0].video.mean().to(model.mean))


def micro_batches(engine, step, spoil=False):
    world = engine.world
    video, label = zero_worker.data(engine.model)
    plans = plan_step(step, zero_worker.GLOBAL_BATCH, world.size, world.rank, zero_worker.MICRO_BATCH)
    micro = [MicroBatch(zero_worker.batch_of(plan.positions, video, label), plan.weight) for plan in plans]
    if spoil:
        micro[0].batch.video[1] = float("nan")
    return micro


def state(engine):
    """Everything that a step changes, on this rank: to the bit."""
    found = {
        f"{part.name}/{part.start}/{kind}": bits(values)
        for part in zero_state.fragments(engine, all_held=True)
        for kind, values in part.values.items()
    }
    for name, p in engine.model.named_parameters():
        found[f"weights of {name}"] = bits(getattr(p, "ds_tensor", p))
    found["mean"] = float(engine.model.mean)
    found["adam"] = zero_state.step_counts(engine)
    return found


def bits(values):
    return hashlib.sha256(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def run(world, stage, precision, kind, offload=False):
    """`STEPS` steps, after `BAD_STEP` of which comes one of this kind; what it said, and the state at the end."""
    engine = make_engine(world, stage, precision, offload)
    said = None
    for step in range(STEPS):
        if step == BAD_STEP and kind:
            said = bad_step(engine, kind)
        engine.step(micro_batches(engine, step), lr=LR, limit=1e6)
    return said, state(engine)


def run_and_go_back(world, stage, precision, root, offload=False):
    """As `run` without bad steps, but some steps are made, gone back behind, and made again."""
    engine = make_engine(world, stage, precision, offload)
    for step in range(BAD_STEP):
        engine.step(micro_batches(engine, step), lr=LR, limit=1e6)
    saver = Saver(root, engine, keep=1)
    saver.save(Progress(step=BAD_STEP), {})
    for step in (7, 8):
        engine.step(micro_batches(engine, step), lr=LR, limit=1e6)
    saver.wait()
    rewind(root / f"step-{BAD_STEP:08d}", engine)
    for step in range(BAD_STEP, STEPS):
        engine.step(micro_batches(engine, step), lr=LR, limit=1e6)
    return state(engine)


def is_last(world):
    return world.rank == world.size - 1


def bad_step(engine, kind):
    hook = None
    if kind == "gradient" and is_last(engine.world):  # the loss is finite
        weight = dict(engine.model.named_parameters())["blocks.0.attn.qkv.weight"]
        hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    spoil = kind == "loss" and is_last(engine.world)
    result = engine.step(micro_batches(engine, 9, spoil), lr=LR, limit=1e-9 if kind == "spike" else 1e6)
    if hook is not None:
        hook.remove()
    return {"skipped": result.skipped, "norm": result.grad_norm, "loss": result.here.loss, "keys": result.here.keys}


def main(stages, precisions, offload):
    world, results = join(), {}
    for precision in precisions:
        for stage in stages:
            _, want = run(world, stage, precision, None, offload)
            for kind in ("loss", "gradient", "spike"):
                said, have = run(world, stage, precision, kind, offload)
                differs = [name for name in want if want[name] != have[name]]
                told = gather_objects((said, differs))
                results[f"{precision}/{stage}/{kind}"] = told
            with tempfile.TemporaryDirectory() as folder:
                root = Path(share_object(folder)) / f"{precision}{stage}"
                have = run_and_go_back(world, stage, precision, root, offload)
                barrier()
            differs = [name for name in want if want[name] != have[name]]
            results[f"{precision}/{stage}/back"] = gather_objects((None, differs))
    if world.is_main:
        print("RESULT " + json.dumps(results), flush=True)
    end()


if __name__ == "__main__":
    main([int(stage) for stage in sys.argv[1].split(",")], sys.argv[2].split(","), sys.argv[3:] == ["offload"])
