"""A recipe and a checkpoint, opened in one process to talk with, without DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vlm.data.glance import Limits
from vlm.models.trained import other_rows
from vlm.nn.attention import choose_attention
from vlm.recipe import Recipe, as_continued, check_files, check_inputs
from vlm.run import checkpoint
from vlm.run.chat import ChatModel, Encode, check_conversations
from vlm.types import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_here() -> torch.device:
    """The first GPU, unless DS_ACCELERATOR=cpu; else the processor."""
    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda", 0) if on_cuda else torch.device("cpu")


def open_model(
    recipe: Recipe,
    name: str,
    source: Path | None,
    *,
    device: torch.device,
    dtype: str | None = None,
    encode: Encode | None = None,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> ChatModel:
    """The model of a recipe with the weights of a checkpoint.

    Args:
        name: of the recipe.
        source: a checkpoint folder, a run folder (its latest), or a file of a published projection, where the model
            knows how to begin with one (`model.projection_from`); None: the weights that training would begin with.
        dtype: of the weights; None: bfloat16 on a GPU, float32 on a processor.
    Raises:
        UserError: recipe, checkpoint and files do not go together.
    """
    check_conversations(recipe)
    recipe, note = _with_start(recipe, source)
    check_inputs(recipe)
    check_files(recipe)
    kind = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    attention = choose_attention(device, kind)
    torch.manual_seed(recipe.seed)
    system = recipe.model.build()
    if source is not None and not source.is_file():
        folder = checkpoint.resolve(source)
        state = checkpoint.load_weights(folder, system)
        note = f"checkpoint {folder} (step {state.get('step', 'unknown')})"
        rows = other_rows(folder, recipe.inputs)
        if rows:
            say(f"note: {rows}")
    say(f"recipe {name}, {note}, {attention.sentence}")
    # fp32 is what trains; what is frozen stays as it is stored, and is not made twice as large
    placed = system.to(device) if kind == torch.float32 else system.to(device, kind)
    return ChatModel(recipe, placed, device, encode=encode, limits=limits)


def _with_start(recipe: Recipe, source: Path | None) -> tuple[Recipe, str]:
    """(the recipe that builds the model to begin with, what to say of its weights)."""
    if source is None:
        return recipe, "no checkpoint: the weights that training would begin with"
    if not source.exists():
        raise UserError(f"--checkpoint {source}: there is no such file or folder")
    if not source.is_file():
        return as_continued(recipe), ""
    if "projection_from" not in {field.name for field in fields(recipe.model)}:
        checkpoint.resolve(source)  # says how it is converted
    starting: dict[str, Any] = {"projection_from": source}
    if "init_from" in {field.name for field in fields(recipe.model)}:
        starting["init_from"] = None
    return replace(recipe, model=replace(recipe.model, **starting)), f"projection {source}"
