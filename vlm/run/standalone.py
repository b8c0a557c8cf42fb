"""Evaluation alone: a checkpoint of ours on a recipe's test shards. A published file is taken as it is where the system
can read it (Video-ChatGPT's); else it is converted first (tools/convert_ckpt.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm.distributed import World, barrier, from_main
from vlm.models.system import System
from vlm.nn.attention import choose_attention
from vlm.recipe import Recipe, as_continued, check_inputs
from vlm.run import evaluate, record
from vlm.run.open_weights import fill, locate, place
from vlm.run.record import Launch, precision
from vlm.run.report import write_report
from vlm.run.stored import check_stored
from vlm.run.watchdog import Watchdog
from vlm.types import UserError


class Replica:
    """A whole model on each process: what evaluation needs of an engine."""

    def __init__(self, model: System, world: World, dtype: torch.dtype) -> None:
        self.model = self.deepspeed = place(model, world.device, dtype)


def evaluate_checkpoint(
    recipe: Recipe, name: str, overrides: list[str], hardware: dict[str, Any], source: Path | None, world: World
) -> None:
    """Score `source` on `recipe.eval` and write the same files as the end of training, into `recipe.run_dir`.

    Args:
        hardware: the DeepSpeed JSON (only its bf16 switch matters here), or {} for fp32.
        source: a checkpoint folder, a run folder (its latest), or a published file of a system that reads it; None: the
            weights that training would begin with.
    Raises:
        UserError: no test in the recipe; the checkpoint is damaged, absent or does not fit; `recipe.run_dir` holds a
            training run or another evaluation.
    """
    if source is not None:
        recipe = as_continued(recipe)
    if recipe.eval is None:
        raise UserError(f"{name} has no test (eval is none); evaluate a recipe that fine-tunes from it")
    check_inputs(recipe)
    dtype = precision(hardware)
    launch = Launch(recipe, name, overrides, hardware, world, choose_attention(world.device, dtype))
    say = (lambda text: print(text, flush=True)) if world.is_main else (lambda text: None)
    with record.sole_run(recipe, world), Watchdog(recipe.run_dir, recipe.hang_seconds, world) as heart:
        found = None if source is None else from_main(world, lambda: locate(source, recipe))
        about = record.open_evaluation(launch, found)
        heart.phase("build")
        torch.manual_seed(recipe.seed)
        model = recipe.model.build()
        check_stored(recipe, model, [recipe.eval.shards])
        heart.phase("restore")
        loaded = fill(model, found, recipe, say)
        say(f"recipe {name}, checkpoint {loaded}, {launch.attention.sentence}")
        record.write(launch, about)
        replica = Replica(model, world, dtype)
        heart.watch(model)
        evaluate.run(recipe, replica, world, launch.folder, say, heart)
        heart.phase("report")
        report = from_main(world, lambda: write_report(launch.folder))
        say(f"report: {report}")
        barrier()
