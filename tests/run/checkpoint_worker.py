"""Started by test_checkpoint_ranks.py in several processes: what they write together is what they hold together."""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from zero_worker import GLOBAL_BATCH, LR, MICRO_BATCH, batch_of, data, recipe

from vlm.data.loader import MicroBatch, plan_step
from vlm.distributed import barrier, end, gather_objects, join
from vlm.run import checkpoint, checkpoint_files, restore, zero_state
from vlm.run.checkpoint import Progress, Saver
from vlm.run.engine import Engine, derive
from vlm.types import UserError


def build(setting, world, folder=None):
    """An engine of a setting ("2", "3 bf16", "2 offload"), and the step it is at."""
    stage, *more = setting.split()
    hardware = {"train_micro_batch_size_per_gpu": MICRO_BATCH}
    if stage != "0":
        hardware["zero_optimization"] = {"stage": int(stage)}
    if "offload" in more:
        hardware["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if "bf16" in more:
        hardware["bf16"] = {"enabled": True}
    settings = recipe()
    torch.manual_seed(0 if folder is None else 5)
    model = settings.model.build()
    state = restore.load_weights(folder, model) if folder else {"step": 0}
    video_and_label = data(model)
    engine = Engine(model, settings, derive(hardware, settings, world.size), world)
    if folder:
        restore.load_optimizer(folder, engine, state)
    return engine, state["step"], video_and_label


def step(engine, number, material):
    plans = plan_step(number, GLOBAL_BATCH, engine.world.size, engine.world.rank, MICRO_BATCH)
    return engine.step([MicroBatch(batch_of(plan.positions, *material), plan.weight) for plan in plans], lr=LR).loss


def held(engine):
    """All ranks' weights and moments, gathered by DeepSpeed."""
    values = dict(zero_state.read(engine))
    weights = {name: value["param"] for name, value in values.items()}
    return weights, {f"{kind}/{name}": v[kind] for name, v in values.items() for kind in zero_state.MOMENTS}


def same(folder, weights, moments):
    """Names of what differs between a checkpoint and these tensors."""
    have = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    want = weights | moments
    return sorted(n for n in have.keys() | want.keys() if n not in have or n not in want or not have[n].equal(want[n]))


def write(settings, root, world):
    """At each setting: two checkpoints while training goes on, each compared with what was held when it was begun."""
    results = {}
    for setting in settings:
        engine, _, material = build(setting, world)
        folder = root / setting.replace(" ", "-")
        saver, wanted = Saver(folder, engine, keep=2), []
        for number in range(4):
            step(engine, number, material)
            if number % 2:
                wanted.append(held(engine))
                path = saver.save(Progress(step=number + 1), {"recipe": {}})
                assert path.name == f"step-{number + 1:08d}"
        saver.wait()
        barrier()
        names = checkpoint.steps(folder)
        found = [same(folder / name, *want) for name, want in zip(names, wanted, strict=True)]
        for name in names:
            checkpoint.verify(folder / name)
        adam = json.loads((folder / names[-1] / "state.json").read_text())["adam_steps"]
        results[setting] = {"differ": found, "adam_steps": adam, "left": [p.name for p in folder.glob(".*")]}
        saver.close()
    return results


def go_on(setting, root, world, until):
    """From the newest checkpoint (if any) to a step, and a checkpoint there. Losses."""
    newest = checkpoint.newest(root)
    engine, begin, material = build(setting, world, newest[0] if newest else None)
    losses = [step(engine, number, material) for number in range(begin, until)]
    checkpoint.save(root, engine, Progress(step=until), {"recipe": {}}, keep=9, is_best=False)
    return losses


def refuse(how, root, world):
    """Save while rank 1 cannot write ("full"), or does not come back from flushing ("stuck"): what each rank is told,
    and after how many seconds. Training is still possible then."""
    engine, _, material = build("2", world)
    checkpoint.save(root, engine, Progress(step=1), {"recipe": {}}, keep=1, is_best=False)
    saver = Saver(root, engine, keep=1, seconds=30 if how == "full" else 4)

    def fails(*_arguments):
        raise OSError(28, "No space left on device")

    if world.rank == 1 and how == "full":
        checkpoint_files.os.pwrite = fails
    elif world.rank == 1:
        checkpoint_files._sync_file = lambda path: time.sleep(60)
    began = time.monotonic()
    saver.save(Progress(step=2), {"recipe": {}})
    step(engine, 0, material)
    try:
        saver.wait()
        told = None
    except UserError as error:
        told = str(error)
    seconds = time.monotonic() - began
    loss = step(engine, 1, material)
    return gather_objects([told, seconds, loss > 0])


def main(what, root, *arguments):
    world = join()
    if what == "write":
        result = write(arguments, Path(root), world)
    elif what == "refuse":
        result = refuse(arguments[0], Path(root), world)
    else:
        result = go_on(arguments[0], Path(root), world, int(arguments[1]))
    if world.is_main:
        print("RESULT " + json.dumps(result), flush=True)
    end()


if __name__ == "__main__":
    main(*sys.argv[1:])
