"""Training: load, step, log, save, and at the end evaluate and report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from vlm.config import differences, to_dict
from vlm.data.loader import Samples, TrainLoader
from vlm.data.order import batch_digest
from vlm.data.rng import derive_seed
from vlm.data.shards import ShardSet
from vlm.distributed import World, barrier, share_object
from vlm.nn.attention import choose_attention
from vlm.recipe import Recipe, check_inputs
from vlm.run import checkpoint, evaluate
from vlm.run.audit import Audit
from vlm.run.checkpoint import Progress
from vlm.run.engine import Engine, StepResult, derive, zero_stage
from vlm.run.log import RunLog, command_line, git_commit, versions
from vlm.run.optim import warmup_cosine
from vlm.run.quarantine import Quarantine
from vlm.run.report import write_report
from vlm.run.throughput import Throughput
from vlm.types import UserError


def train(recipe: Recipe, name: str, overrides: list[str], hardware: dict[str, Any], world: World) -> None:
    """Run a recipe from its newest checkpoint (or from the start) to its end.

    Args:
        recipe, name, overrides: the recipe, what it is called and what the command line changed.
        hardware: the DeepSpeed JSON, read by vlm.run.engine.read_hardware.
        world: this process among all.
    Raises:
        UserError: settings, files or data are wrong; FloatingPointError: the loss or gradient is not finite.
    """
    check_inputs(recipe)
    shards = ShardSet(recipe.data.shards)
    samples = len(Samples(shards, recipe.inputs))
    total_steps = steps_of(recipe, samples)
    config = derive(hardware, recipe, world.size)
    torch.manual_seed(recipe.seed)
    model = recipe.model.build()
    attention, sentence = choose_attention(world.device, torch.bfloat16 if "bf16" in config else torch.float32)
    folder = _prepare_run_dir(recipe, world, shards, name, overrides, config, attention)
    found = _find_checkpoint(recipe.run_dir / "checkpoints", world)
    state = checkpoint.load_weights(found, model) if found else {}
    engine = Engine(model, recipe, config, world)
    if found:
        checkpoint.load_optimizer(found, engine, state)
    progress = _progress(state)
    log = RunLog(
        folder,
        active=world.is_main,
        first_step=progress.step,
        total_steps=total_steps,
        every=recipe.log_every,
        wandb_mode=recipe.wandb,
        name=name,
        config=to_dict(recipe),
    )
    log.say(_introduce(recipe, name, shards, samples, total_steps, config, world, model, sentence))
    if found:
        log.say(f"resuming from {found} (step {progress.step})")
    elif recipe.eval is not None and recipe.eval.at_start:
        before = folder / "before_training"
        if world.is_main:
            before.mkdir(exist_ok=True)
        evaluate.run(recipe, engine, world, before, say=log.say)

    _train_steps(recipe, engine, shards, progress, total_steps, log)

    log.close()
    if recipe.eval is not None and recipe.eval.at_end:
        evaluate.run(recipe, engine, world, folder, say=log.say)
    if world.is_main:
        print(f"report: {write_report(folder)}", flush=True)
    barrier()


def _train_steps(
    recipe: Recipe, engine: Engine, shards: ShardSet, progress: Progress, total_steps: int, log: RunLog
) -> None:
    """The training loop: one pass is one optimizer step."""
    world, root = engine.world, recipe.run_dir / "checkpoints"
    loader = TrainLoader(
        shards,
        recipe.inputs,
        views=list(recipe.views),
        seed=recipe.seed,
        global_batch_size=recipe.global_batch_size,
        world_size=world.size,
        rank=world.rank,
        micro_batch_size=engine.config["train_micro_batch_size_per_gpu"],
        start_step=progress.step,
        stop_step=total_steps,
        workers=recipe.data.workers,
        substitutes=recipe.data.substitutes,
    )
    quarantine = Quarantine(recipe, shards, progress.quarantined, world)
    learning_rate = schedule_of(recipe, len(loader.samples), total_steps)
    throughput = Throughput(engine.model, world)
    audit = Audit(engine, recipe.audit_steps, log.say)
    saved_at = progress.step

    for step in range(progress.step, total_steps):
        started = time.monotonic()
        micro_batches = next(loader)
        data_wait = time.monotonic() - started
        quarantine.add(micro_batches, step)
        torch.manual_seed(derive_seed("step", recipe.seed, step, world.rank))
        result = engine.step(micro_batches, lr=learning_rate(step))
        progress.step = step + 1
        elapsed = time.monotonic() - started
        log.step(
            {
                **_row(result, step, learning_rate(step), elapsed, data_wait, recipe, loader, world),
                **throughput.row(micro_batches, elapsed),
                "quarantined": len(quarantine.keys),
            }
        )
        audit.after_step(step, learning_rate(step), micro_batches, result.counts)
        is_best = False
        if recipe.eval is not None and recipe.eval.every and progress.step % recipe.eval.every == 0:
            is_best = evaluate.is_best(recipe, engine, world, progress, log.say)
        due = recipe.checkpoint_every and progress.step % recipe.checkpoint_every == 0
        if due or is_best or progress.step == total_steps:
            progress.quarantined = quarantine.keys
            checkpoint.save(
                root, engine, progress, _about(recipe, world, engine), keep=recipe.checkpoint_keep, is_best=is_best
            )
            saved_at = progress.step
    assert saved_at == progress.step
    audit.finish()


def _row(
    result: StepResult,
    step: int,
    lr: float,
    elapsed: float,
    data_wait: float,
    recipe: Recipe,
    loader: TrainLoader,
    world: World,
) -> dict[str, Any]:
    """The part of a metrics.jsonl line that every system has."""
    keys = loader.keys_of_step(step) if world.is_main else []
    return {
        "step": step + 1,
        "epoch": loader.order.epoch(step * recipe.global_batch_size),
        "loss": result.loss,
        "losses": result.losses,
        "counts": result.counts,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "step_time": elapsed,
        "data_wait": data_wait,
        "samples_per_s": recipe.global_batch_size / elapsed,
        "batch_digest": batch_digest(keys),
        **result.counters,
    }


def steps_of(recipe: Recipe, records: int) -> int:
    """How many optimizer steps a recipe makes over `records` samples (known before step 0 on every rank)."""
    if recipe.steps is not None:
        return recipe.steps
    assert recipe.epochs is not None
    # Rounded up: every record comes at least `epochs` times, and the last batch is filled from the next epoch.
    return max(1, math.ceil(recipe.epochs * records / recipe.global_batch_size - 1e-9))


def schedule_of(recipe: Recipe, records: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate of each step (from 0)."""
    optim = recipe.optim
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = int(optim.warmup_epochs * records / recipe.global_batch_size)
    warmup = min(warmup, total_steps)
    return lambda step: warmup_cosine(
        step, total_steps=total_steps, warmup_steps=warmup, peak=optim.lr, final=optim.min_lr
    )


def _progress(state: dict[str, Any]) -> Progress:
    return Progress(
        step=state.get("step", 0),
        best_metric=state.get("best_metric"),
        best_step=state.get("best_step"),
        quarantined=list(state.get("quarantined", [])),
    )


def _about(recipe: Recipe, world: World, engine: Engine) -> dict[str, Any]:
    return {
        "seed": recipe.seed,
        "global_batch_size": recipe.global_batch_size,
        "world_size": world.size,
        "zero_stage": zero_stage(engine.config),
        "recipe": to_dict(recipe),
    }


def _find_checkpoint(root: Path, world: World) -> Path | None:
    """The newest intact checkpoint, decided by rank 0 for all; what it passed over is printed."""
    found: Any = None
    if world.is_main:
        try:
            newest = checkpoint.newest(root) if root.is_dir() else None
            for sentence in newest[1] if newest else []:
                print(f"passed over a damaged checkpoint: {sentence}", flush=True)
            found = newest[0] if newest else None
        except UserError as error:
            found = error
    found = share_object(found)
    if isinstance(found, UserError):
        raise found
    return found


# What may differ between the run that wrote a folder and the one that continues it, without changing its course.
_MAY_CHANGE = (
    "run_dir",
    "log_every",
    "wandb",
    "audit_steps",
    "checkpoint_every",
    "checkpoint_keep",
    "eval",
    "data.workers",
    "data.quarantine_share",
)


def _prepare_run_dir(
    recipe: Recipe,
    world: World,
    shards: ShardSet,
    name: str,
    overrides: list[str],
    config: dict[str, Any],
    attention: str,
) -> Path:
    """Create the run folder and its recipe.json; refuse to continue another recipe's run in it."""
    folder, complaint = recipe.run_dir, None
    if world.is_main:
        about = {
            "recipe": name,
            "config": to_dict(recipe),
            "deepspeed": config,
            "world_size": world.size,
            "overrides": overrides,
            "versions": versions(),
            "git_commit": git_commit(),
            "device": _device_name(world),
            "attention": attention,
            "starter": world.starter,
            "shards": shards.fingerprint,
            "command": command_line(),
        }
        complaint = _compare(folder, about) if (folder / "checkpoints" / "latest").is_file() else None
        if complaint is None:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / ".recipe.json.tmp"
            temporary.write_text(json.dumps(about, indent=1))
            temporary.replace(folder / "recipe.json")
    complaint = share_object(complaint)
    if complaint is not None:
        raise UserError(complaint)
    return folder


def _compare(folder: Path, about: dict[str, Any]) -> str | None:
    """Why the run in `folder` cannot be continued with these settings, or None."""
    old = json.loads((folder / "recipe.json").read_text())
    changed = [
        text for text in differences(old["config"], about["config"]) if not text.split(":")[0].startswith(_MAY_CHANGE)
    ]
    if old["recipe"] != about["recipe"]:
        changed.insert(0, f"recipe: {old['recipe']} -> {about['recipe']}")
    if old["shards"] != about["shards"]:
        changed.append(f"content of {about['config']['data']['shards']}: {old['shards']} -> {about['shards']}")
    if not changed:
        return None
    return (
        f"{folder} holds a run with other settings ({'; '.join(changed)}), and continuing it would mix the two: give "
        "another run_dir=DIR, the old settings, or remove the folder"
    )


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"cpu ({psutil.cpu_count(logical=False) or psutil.cpu_count()} cores)"


def _introduce(
    recipe: Recipe,
    name: str,
    shards: ShardSet,
    samples: int,
    total_steps: int,
    config: dict[str, Any],
    world: World,
    model: torch.nn.Module,
    attention: str,
) -> str:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    held = "" if samples == len(shards) else f"with {samples:,} questions "
    epochs = math.ceil(total_steps * recipe.global_batch_size / samples * 10) / 10
    return (
        f"recipe {name}: {trainable:,} trainable and {frozen:,} frozen parameters\n"
        f"world size {world.size} (started by {world.starter}) on {_device_name(world)}, ZeRO stage "
        f"{zero_stage(config)}, {'bf16' if config.get('bf16', {}).get('enabled') else 'fp32'}, {attention}\n"
        f"{len(shards):,} records {held}in {shards.path}, {total_steps} steps of {recipe.global_batch_size} "
        f"({epochs} epochs), micro-batch {config['train_micro_batch_size_per_gpu']} x "
        f"{config['gradient_accumulation_steps']} accumulation"
    )
