"""Where videos and images lie that an annotation names. An image is a video of one frame."""

from __future__ import annotations

from pathlib import Path

from vlm.sources.common_tables import BadCell, id_of
from vlm.types import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def media_folder(root: Path, *names: str) -> Path:
    """The first of the folders `names` that is below `root`, else `root` itself."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --root must be the folder of the dataset")
    return next((folder for name in names if (folder := root / name).is_dir()), root)


def file_id(cells: dict, column: str) -> str:
    """An id that is part of a file's name, so it must not lead elsewhere."""
    found = id_of(cells, column)
    if "/" in found or "\0" in found or found.startswith("."):
        raise BadCell(f"column {column!r}: {found!r:.60} is not an id: it would lead to another folder")
    return found


def image_file(folder: Path, name: str) -> Path:
    """The image of a name, given with or without suffix; jpg where there is none of any suffix."""
    if name.lower().endswith(IMAGE_SUFFIXES):
        return folder / name
    files = (folder / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES)
    return next((file for file in files if file.is_file()), folder / f"{name}{IMAGE_SUFFIXES[0]}")
