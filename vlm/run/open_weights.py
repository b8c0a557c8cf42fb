"""Weights for a model that does not train: for tests and for talking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vlm.models.system import System
from vlm.models.trained import other_rows
from vlm.recipe import Recipe
from vlm.run import checkpoint, restore


def locate(source: Path, recipe: Recipe) -> Path:
    """The checkpoint folder that is meant, or a published file that the recipe's model takes as it is. UserError: there
    is neither."""
    if source.is_file() and getattr(recipe.model, "reads_published", False):
        return source
    return checkpoint.resolve(source)


def fill(model: System, found: Path | None, recipe: Recipe, say: Callable[[str], None]) -> str:
    """Load what `locate` found; None: the weights that training would begin with stay.

    Returns:
        what was loaded, for a person. Rows that the recipe makes otherwise than those it was trained on are told.
    Raises:
        UserError: damaged, or another model's.
    """
    if found is None:
        return "none: the weights that training would begin with"
    if found.is_file():
        return model.take_published(found)
    state = restore.load_weights(found, model)
    note = other_rows(found, recipe.inputs)
    if note:
        say(f"note: {note}")
    return f"{found} (step {state.get('step', 'unknown')})"


def place(model: System, device: torch.device, dtype: torch.dtype) -> System:
    """The model on a device, in a precision. Where that is fp32, which is what trains, what is frozen stays as it is
    stored, and is not made twice as large."""
    return model.to(device) if dtype == torch.float32 else model.to(device, dtype)
