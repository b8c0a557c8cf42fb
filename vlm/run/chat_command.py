"""What launch/chat.py does with its options: a model is opened, then talked with on a page or in the terminal."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlm.data.glance import Limits
from vlm.data.mix import is_elsewhere
from vlm.data.shard_format import MANIFEST, ShardError
from vlm.distributed import alone
from vlm.recipe import Recipe
from vlm.run.chat import Encode, Settings
from vlm.run.chat_examples import examples_of
from vlm.run.chat_open import open_model
from vlm.run.chat_page import gradio_here, serve
from vlm.run.chat_terminal import Terminal
from vlm.run.streams import open_shards
from vlm.types import UserError

OpenEncoder = Callable[[Recipe, torch.device, Path | None, float | None], Encode | None]
"""recipe, device, --encoder, frames a second that it reads at (None: as the encoder's layout has it)."""


def chat(options: argparse.Namespace, recipe: Recipe, open_encoder: OpenEncoder) -> None:
    """launch/chat.py, once its options are known to be right."""
    if options.video is None:
        gradio_here()  # before anything takes minutes to load
    device = alone().device
    encode = open_encoder(recipe, device, options.encoder, rate_of(recipe, options.fps))
    limits = Limits(seconds=options.max_seconds, nbytes=int(options.max_upload * 2**20))
    model = open_model(
        recipe,
        options.recipe,
        options.checkpoint,
        device=device,
        dtype=options.dtype,
        encode=encode,
        limits=limits,
        say=_say,
    )
    settings = settings_of(recipe)
    if options.video is not None:
        for stream in (sys.stdin, sys.stdout):  # letters that the terminal's encoding does not know end nothing
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        Terminal(model, settings, sys.stdin, sys.stdout).run(options.video)
        return
    examples = examples_of(model, options.examples)
    if not model.can_make and not examples.names:
        raise UserError(
            f"{options.recipe} reads features of videos, and there is nothing to make them with and no example that "
            "has them: give --encoder, a folder of CLIP or a file NAME.encoder.safetensors, or --examples, a shard set "
            "that holds them"
        )
    serve(model, options.recipe, examples, settings, host=options.host, port=options.port, say=_say)


def settings_of(recipe: Recipe) -> Settings:
    """How a recipe's tests write, as far as one answer without beams can."""
    config = None if recipe.eval is None else recipe.eval.generation
    if config is None:
        return Settings()
    return Settings(
        temperature=config.temperature if config.sample else 0.0,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
    )


def rate_of(recipe: Recipe, given: float | None) -> float | None:
    """Frames a second that a recipe's features are of: as given, or as its shards say; None: neither, or they are of so
    many frames whatever the video's length."""
    if not hasattr(recipe.inputs, "num_frames"):
        if given is not None:
            raise UserError(f"--fps {given:g}: {type(recipe.inputs).__name__} reads as many frames of every video")
        return None
    if given is not None:
        if not 0 < given <= 1000:
            raise UserError(f"--fps {given:g}: frames a second are more than 0 and at most 1000")
        return given
    for path in (recipe.eval.shards if recipe.eval is not None else "", recipe.data.shards):
        if not path or is_elsewhere(path) or not (Path(path) / MANIFEST).is_file():
            continue
        try:
            said: Any = open_shards(recipe.data, path).read(0, members=()).annotation.get("features")
        except (UserError, ShardError, IndexError):
            continue
        if isinstance(said, dict) and said.get("fps"):
            return float(said["fps"])
    return None


def _say(text: str) -> None:
    print(text, flush=True)
