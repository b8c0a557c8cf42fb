"""Videos to choose from on the page: files of a folder, or records of a shard set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.mix import is_elsewhere
from vlm.data.shard_files import ShardGoneError
from vlm.data.shard_format import MANIFEST, ShardError
from vlm.recipe import Recipe
from vlm.run.chat import ChatModel
from vlm.run.chat_videos import Seen
from vlm.run.streams import open_shards
from vlm.types import UserError

MOST = 24
VIDEO_TYPES = (
    ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv", ".gif",
)  # fmt: skip
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")  # a video of one frame


@dataclass(frozen=True, slots=True)
class Examples:
    """Names, and how the model sees each for a holder."""

    names: tuple[str, ...] = ()
    see: Callable[[int, str], Seen] | None = None


def examples_of(model: ChatModel, folder: str | None) -> Examples:
    """Those of a folder of videos or of a shard set; None: of the recipe's test shards, where they are there.

    Raises:
        UserError: the folder has none.
    """
    if folder is None:
        shards = None if model.recipe.eval is None else model.recipe.eval.shards
        if shards is None or is_elsewhere(shards) or not (Path(shards) / MANIFEST).is_file():
            return Examples()
        try:
            return _of_shards(model, model.recipe, shards)
        except UserError:  # not what was asked for
            return Examples()
    if is_elsewhere(folder) or (Path(folder) / MANIFEST).is_file():
        return _of_shards(model, model.recipe, folder)
    if not Path(folder).is_dir():
        raise UserError(f"--examples {folder}: there is no such folder")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (*VIDEO_TYPES, *IMAGE_TYPES))
    if not files:
        raise UserError(f"--examples {folder}: no video is in it ({' '.join((*VIDEO_TYPES, *IMAGE_TYPES))})")
    files = _spread(files)
    names = tuple(str(path.relative_to(folder)) for path in files)
    return Examples(names, partial(_see_file, model, files))


def _of_shards(model: ChatModel, recipe: Recipe, path: str) -> Examples:
    shards = open_shards(recipe.data, path)
    wanted = (*model.inputs.members, "video")
    if not set(wanted if model.can_make else model.inputs.members) & set(shards.members):
        raise UserError(f"{path}: its records have no {' or '.join(model.inputs.members)}, which this recipe reads")
    rows = _spread(range(len(shards)))

    def see(number: int, holder: str) -> Seen:
        try:
            record = shards.read(rows[number], members=wanted)
        except (ShardError, ShardGoneError, OSError) as error:
            raise UserError(f"{shards.key(rows[number])} cannot be read: {error}") from error
        return model.see_record(record, holder)

    return Examples(tuple(shards.key(row) for row in rows), see)


def _see_file(model: ChatModel, files: Sequence[Path], number: int, holder: str) -> Seen:
    return model.see(files[number], holder)


def _spread(items: Sequence[Any]) -> list[Any]:
    """At most `MOST` of them, evenly spread."""
    return [items[int(at)] for at in np.unique(np.linspace(0, len(items) - 1, min(MOST, len(items))).round())]
