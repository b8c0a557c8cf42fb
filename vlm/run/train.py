"""Training: load, step, log, save, and at the end evaluate and report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vlm.config import to_dict
from vlm.data.loader import MicroBatch, TrainLoader
from vlm.data.order import batch_digest
from vlm.data.rng import derive_seed
from vlm.data.stream import Stream
from vlm.distributed import World, barrier, from_main, stop_together, sum_over_ranks
from vlm.errors import Preempted, Stuck
from vlm.nn.attention import choose_attention
from vlm.recipe import Recipe, check_inputs
from vlm.run import evaluate, record, restore
from vlm.run.audit import Audit
from vlm.run.checkpoint import Progress, Saver
from vlm.run.engine import Engine, StepResult, derive, zero_stage
from vlm.run.guard import Guard
from vlm.run.log import RunLog
from vlm.run.optim import warmup_cosine
from vlm.run.quarantine import Quarantine, met
from vlm.run.record import Launch, precision
from vlm.run.report import write_report
from vlm.run.stop import Stop
from vlm.run.stored import check_recipe
from vlm.run.streams import open_stream
from vlm.run.throughput import Throughput
from vlm.run.watchdog import Watchdog
from vlm.types import UserError


def train(recipe: Recipe, name: str, overrides: list[str], hardware: dict[str, Any], world: World) -> None:
    """Run a recipe from its newest checkpoint (or from the start) to its end.

    Args:
        recipe, name, overrides: the recipe, what it is called and what the command line changed.
        hardware: the DeepSpeed JSON, read by vlm.run.hardware.read_hardware.
        world: this process among all.
    Raises:
        UserError: settings, files or data are wrong. FloatingPointError: more steps than are allowed had numbers that
            cannot be learnt from (vlm.run.guard).
        Preempted: a signal came (vlm.run.stop), and all that was done is saved.
    """
    check_inputs(recipe)
    config = derive(hardware, recipe, world.size)
    watchdog = Watchdog(recipe.run_dir, recipe.hang_seconds, world)
    with Stop() as stop, watchdog:
        watchdog.phase("build")
        stream = open_stream(recipe)
        launch = Launch(recipe, name, overrides, config, world, choose_attention(world.device, precision(config)))
        with record.sole_run(recipe, world):
            try:
                _train(launch, stream, stop, watchdog)
            except Stuck as error:  # told to all ranks together
                watchdog.report(str(error), error.rank)
                raise


def _train(launch: Launch, stream: Stream, stop: Stop, watchdog: Watchdog) -> None:
    """`train` in a run folder that no other process writes."""
    recipe, world, folder = launch.recipe, launch.world, launch.folder
    total_steps = steps_of(recipe, len(stream))
    watchdog.phase("restore")  # looking for the newest intact checkpoint reads all of it
    found, about = record.open_training(launch, stream.fingerprint)
    watchdog.phase("build")
    torch.manual_seed(recipe.seed)
    model = recipe.model.build()
    check_recipe(recipe, model)
    watchdog.phase("restore")
    state = restore.load_weights(found, model, verified=True) if found else {}
    chosen = restore.choose(model, recipe, found, state)
    record.write(launch, about)
    introduction = _introduce(launch, stream, total_steps, model)
    engine = Engine(model, recipe, launch.deepspeed, world, heart=watchdog, adam_steps=chosen.adam_steps)
    watchdog.watch(model)
    if found:
        restore.load_optimizer(found, engine, state)
    progress = _progress(state)
    log = RunLog(
        folder,
        active=world.is_main,
        first_step=progress.step,
        total_steps=total_steps,
        every=recipe.log_every,
        wandb_mode=recipe.wandb,
        name=launch.name,
        config=to_dict(recipe),
    )
    log.say("\n".join([introduction, *chosen.sentences]))
    if found:
        log.say(f"resuming from {found} (step {progress.step})")
    elif recipe.eval is not None and recipe.eval.at_start:
        evaluate.run(recipe, engine, world, folder / "before_training", log.say, watchdog)

    guard = Guard(recipe, engine, state.get("guard"), progress.step, log.say)
    try:
        with _open_saver(recipe, engine, log) as saver:
            _train_steps(recipe, engine, stream, progress, total_steps, log, stop, guard, saver)
    except Preempted:
        record.note_stop(launch, about, progress.step, stop.asked or "a signal to another process")
        raise

    log.close()
    if recipe.eval is not None and recipe.eval.at_end:
        evaluate.run(recipe, engine, world, folder, log.say, watchdog)
    watchdog.phase("report")
    report = from_main(world, lambda: write_report(folder))
    log.say(f"report: {report}")
    barrier()


def _train_steps(
    recipe: Recipe,
    engine: Engine,
    stream: Stream,
    progress: Progress,
    total_steps: int,
    log: RunLog,
    stop: Stop,
    guard: Guard,
    saver: Saver,
) -> None:
    """The training loop: one pass is one optimizer step."""
    world, heart = engine.world, engine.heart
    loader = _open_loader(recipe, engine, stream, progress.step, total_steps)
    quarantine = Quarantine(recipe, stream, progress.quarantined, world)
    learning_rate = schedule_of(recipe, len(stream), total_steps)
    throughput = Throughput(engine.model, world)
    audit = Audit(engine, recipe.audit_steps, log.say)
    saved_at = progress.step
    stop.waits, stopping = True, False
    if progress.untested and _is_best(recipe, engine, progress, log, stop):
        saver.mark_best(progress.step)

    for step in range(progress.step, total_steps):
        started = time.monotonic()
        heart.loading(loader.at_work)
        heart.phase("load", step=step + 1)
        micro_batches, problem = _next(loader)
        data_wait = time.monotonic() - started
        heart.phase("collective", keys=[key for item in micro_batches for key in item.batch.keys])
        stopping, incidents = _agree(problem or saver.problem(), stop, micro_batches, world)
        if stopping:
            break
        if incidents:
            quarantine.add(micro_batches, step)
        torch.manual_seed(derive_seed("step", recipe.seed, step, world.rank))
        result = engine.step(micro_batches, lr=learning_rate(step), limit=guard.limit)
        progress.step = step + 1
        elapsed = time.monotonic() - started
        heart.phase("log")
        keys = loader.keys_of_step(step) if world.is_main else []
        log.step(
            {
                "step": progress.step,
                "epoch": stream.epoch(step * recipe.global_batch_size),
                **_measured(result),
                "lr": learning_rate(step),
                "step_time": elapsed,
                "data_wait": data_wait,
                "samples_per_s": len(keys) / elapsed,
                "batch_digest": batch_digest(keys),
                **throughput.row(micro_batches, elapsed),
                "quarantined": len(quarantine.known),
                **saver.figures(),
            }
        )
        heart.phase("check")
        went_back = guard.after_step(result, progress.step, saver)
        if result.skipped:
            audit.disregard(moments=went_back)
        else:
            audit.after_step(step, learning_rate(step), micro_batches, result.counts)
        is_best = False
        if recipe.eval is not None and recipe.eval.every and progress.step % recipe.eval.every == 0:
            is_best = _is_best(recipe, engine, progress, log, stop)
        due = recipe.checkpoint_every and progress.step % recipe.checkpoint_every == 0
        if due or is_best or went_back or progress.step == total_steps:
            heart.phase("save")
            progress.quarantined = quarantine.known
            saver.save(progress, _about(recipe, world, engine, guard), is_best=is_best)
            saved_at = progress.step
    heart.phase("save")
    if stopping and saved_at != progress.step:
        progress.quarantined = quarantine.known
        saver.save(progress, _about(recipe, world, engine, guard))
    saver.wait()
    # A signal that came within the last step: what follows is no part of a step, and may take longer than is left.
    asked = sum_over_ranks([float(stop.is_asked())], world.device)[0]
    stop.waits = False
    if stopping or asked:
        raise Preempted(f"{stop.asked or 'a signal to another rank'} came; saved at step {progress.step}")
    audit.finish()


def _is_best(recipe: Recipe, engine: Engine, progress: Progress, log: RunLog, stop: Stop) -> bool:
    """Test; whether this step has the best metric so far. A signal ends the test, which is noted in `progress`."""
    progress.untested = True
    try:
        found = evaluate.is_best(recipe, engine, engine.world, progress, log.say, engine.heart, stop.is_asked)
        progress.untested = False
        return found
    except evaluate.Interrupted:
        log.say(f"the test of step {progress.step} was stopped by a signal; it is made when the run goes on")
        return False


def _open_saver(recipe: Recipe, engine: Engine, log: RunLog) -> Saver:
    """What writes the run's checkpoints."""
    return Saver(
        recipe.run_dir / "checkpoints",
        engine,
        keep=recipe.checkpoint_keep,
        seconds=recipe.checkpoint_seconds,
        say=log.say,
        alive=partial(engine.heart.phase, "save"),
    )


def _open_loader(recipe: Recipe, engine: Engine, stream: Stream, start_step: int, stop_step: int) -> TrainLoader:
    """This rank's micro-batches of the steps from `start_step` to `stop_step`."""
    return TrainLoader(
        stream,
        recipe.inputs,
        views=list(recipe.views),
        global_batch_size=recipe.global_batch_size,
        world_size=engine.world.size,
        rank=engine.world.rank,
        micro_batch_size=engine.config["train_micro_batch_size_per_gpu"],
        start_step=start_step,
        stop_step=stop_step,
        workers=recipe.data.workers,
        substitutes=recipe.data.substitutes,
        gone=recipe.data.gone,
        sample_seconds=recipe.data.sample_seconds,
        worker_memory=recipe.data.worker_memory,
    )


def _agree(problem: UserError | None, stop: Stop, micro_batches: list[MicroBatch], world: World) -> tuple[bool, bool]:
    """Before each step, by one all-reduce: whether any rank was told to stop, and whether loading met anything.

    Raises:
        UserError: on every rank; a rank has a problem.
    """
    mine = [problem is not None, stop.is_asked(), bool(met(micro_batches))]
    failed, stopping, incidents = sum_over_ranks([float(flag) for flag in mine], world.device)
    if failed:
        stop_together(problem, world.device)
    return bool(stopping), bool(incidents)


def _measured(result: StepResult) -> dict[str, Any]:
    """What a step gave, as a line of metrics.jsonl says it."""
    return {
        "loss": result.loss,
        "losses": result.losses,
        "counts": result.counts,
        "grad_norm": result.grad_norm,
        "skipped": result.skipped,
        **result.counters,
    }


def _next(loader: TrainLoader) -> tuple[list[MicroBatch], UserError | None]:
    """This rank's micro-batches of the next step; or why there are none, to be told to all ranks together."""
    try:
        return next(loader), None
    except UserError as error:
        return [], error


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
    if warmup is None and optim.warmup_share is not None:
        warmup = math.ceil(optim.warmup_share * total_steps)
    elif warmup is None:
        warmup = int(optim.warmup_epochs * records / recipe.global_batch_size)
    warmup = min(warmup, total_steps)
    return lambda step: warmup_cosine(
        step,
        total_steps=total_steps,
        warmup_steps=warmup,
        peak=optim.lr,
        final=optim.min_lr,
        peak_twice=optim.warmup_peak_twice,
        start=optim.warmup_lr,
        restart=optim.warmup_restart,
        from_start=optim.cosine_from_start,
    )


def _progress(state: dict[str, Any]) -> Progress:
    return Progress(
        step=state.get("step", 0),
        best_metric=state.get("best_metric"),
        best_step=state.get("best_step"),
        quarantined=list(state.get("quarantined", [])),
        untested=state.get("untested", False),
    )


def _about(recipe: Recipe, world: World, engine: Engine, guard: Guard) -> dict[str, Any]:
    return {
        "guard": guard.state(),
        "seed": recipe.seed,
        "global_batch_size": recipe.global_batch_size,
        "world_size": world.size,
        "zero_stage": zero_stage(engine.config),
        "recipe": to_dict(recipe),
    }


def _introduce(launch: Launch, stream: Stream, total_steps: int, model: torch.nn.Module) -> str:
    recipe, config, world = launch.recipe, launch.deepspeed, launch.world
    dtype = "bf16" if precision(config) == torch.bfloat16 else "fp32"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    epochs = math.ceil(total_steps * recipe.global_batch_size / len(stream) * 10) / 10
    what = "" if stream.pack_length is None else " packs"
    return (
        f"recipe {launch.name}: {trainable:,} trainable and {frozen:,} frozen parameters\n"
        f"world size {world.size} (started by {world.starter}) on {launch.device_name}, ZeRO stage "
        f"{zero_stage(config)}, {dtype}, {launch.attention.sentence}\n"
        f"{stream.describe()}; {total_steps} steps of {recipe.global_batch_size}{what} "
        f"({epochs} epochs), micro-batch {config['train_micro_batch_size_per_gpu']} x "
        f"{config['gradient_accumulation_steps']} accumulation"
    )
