"""Evaluation alone: a checkpoint of ours, or a published file of the same system, on a recipe's test shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlm.config import to_dict
from vlm.distributed import World, barrier
from vlm.models.system import System
from vlm.nn.attention import choose_attention
from vlm.recipe import Recipe, check_inputs
from vlm.run import checkpoint, evaluate
from vlm.run.log import command_line, git_commit, versions
from vlm.run.report import write_report
from vlm.types import UserError


class Replica:
    """A whole model on each process: what evaluation needs of an engine."""

    def __init__(self, model: System, world: World, dtype: torch.dtype) -> None:
        self.model = self.deepspeed = model.to(world.device, dtype)


def evaluate_checkpoint(
    recipe: Recipe, name: str, overrides: list[str], hardware: dict[str, Any], source: Path | None, world: World
) -> None:
    """Score `source` on `recipe.eval` and write the same files as the end of training, into `recipe.run_dir`.

    Args:
        hardware: the DeepSpeed JSON (only its bf16 switch matters here), or {} for fp32.
        source: a checkpoint folder, or a run folder (its latest); None: the weights that training would begin with.
    Raises:
        UserError: no test in the recipe; the checkpoint is damaged, absent or does not fit.
    """
    if recipe.eval is None:
        raise UserError(f"{name} has no test (eval is none); evaluate a recipe that fine-tunes from it")
    check_inputs(recipe)
    torch.manual_seed(recipe.seed)
    model = recipe.model.build()
    folder = None if source is None else checkpoint.resolve(source)
    state = {"step": 0} if folder is None else checkpoint.load_weights(folder, model)
    dtype = torch.bfloat16 if hardware.get("bf16", {}).get("enabled") else torch.float32
    attention, sentence = choose_attention(world.device, dtype)
    run_dir = recipe.run_dir
    if world.is_main:
        loaded = folder or "none: initial weights"
        print(f"recipe {name}, checkpoint {loaded} (step {state.get('step', 'unknown')}), {sentence}", flush=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "recipe.json").is_file():
            about = {
                "recipe": name,
                "config": to_dict(recipe),
                "deepspeed": hardware,
                "world_size": world.size,
                "overrides": overrides,
                "versions": versions(),
                "git_commit": git_commit(),
                "device": str(world.device),
                "attention": attention,
                "starter": world.starter,
                "checkpoint": None if folder is None else str(folder),
                "command": command_line(),
            }
            (run_dir / "recipe.json").write_text(json.dumps(about, indent=1))
    barrier()
    say = (lambda text: print(text, flush=True)) if world.is_main else (lambda text: None)
    evaluate.run(recipe, Replica(model, world, dtype), world, run_dir, say)
    if world.is_main:
        print(f"report: {write_report(run_dir)}", flush=True)
    barrier()
