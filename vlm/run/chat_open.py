"""A recipe and a checkpoint, opened in one process to talk with, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vlm.data.glance import Limits
from vlm.nn.attention import choose_attention
from vlm.recipe import Recipe, as_continued, check_files, check_inputs
from vlm.run.chat import ChatModel, Encode, check_conversations
from vlm.run.open_weights import fill, locate, place
from vlm.types import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        source: a checkpoint folder, a run folder (its latest), or a published file of a system that reads it; None: the
            weights that training would begin with.
        dtype: of the weights; None: bfloat16 on a GPU, float32 on a processor.
    Raises:
        UserError: recipe, checkpoint and files do not go together.
    """
    check_conversations(recipe)
    if source is not None:
        if not source.exists():
            raise UserError(f"--checkpoint {source}: there is no such file or folder")
        recipe = as_continued(recipe)
    check_inputs(recipe)
    check_files(recipe)
    kind = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    attention = choose_attention(device, kind)
    torch.manual_seed(recipe.seed)
    system = recipe.model.build()
    loaded = fill(system, None if source is None else locate(source, recipe), recipe, say)
    say(f"recipe {name}, checkpoint {loaded}, {attention.sentence}")
    return ChatModel(recipe, place(system, device, kind), device, encode=encode, limits=limits)
