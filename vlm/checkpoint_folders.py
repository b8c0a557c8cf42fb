"""Which checkpoint is meant by a folder, and whether it still is as it was written.

What a checkpoint holds, and how it is written: vlm.run.checkpoint.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.files import read_json
from vlm.tensor_files import check_file, seal
from vlm.types import UserError

MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
FORMATS = (1, 2)
"""Those that can be read: 1 has a sha256 of each file and none of tensors, nor, as a rule, of the manifest itself."""
_NAME = re.compile(r"step-\d{8,}")  # what else lies there (a copy that somebody made) is not ours to read or remove


def named(root: Path) -> list[str]:
    """Whatever has the name of a checkpoint under `root`, damaged or not, oldest first."""
    return sorted(path.name for path in root.glob("step-*") if _NAME.fullmatch(path.name))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, compared with its own hash.

    Raises:
        UserError: missing, of a format that this version does not read, or not what was written.
    """
    if not _has_manifest(folder):
        raise UserError(f"{folder}/{MANIFEST}: is missing; use another checkpoint")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") not in FORMATS:
        told = " and ".join(map(str, FORMATS))
        raise UserError(f"{folder}/{MANIFEST}: checkpoint format {manifest.get('format')!r}, this version reads {told}")
    if (manifest["format"] > 1 or "manifest_sha256" in manifest) and seal(manifest) != manifest:
        raise UserError(f"{folder}/{MANIFEST}: is not as it was written (damaged on disk?); use another checkpoint")
    files = manifest.get("files")
    if not (isinstance(files, dict) and files and all(isinstance(entry, dict) for entry in files.values())):
        raise UserError(f"{folder}/{MANIFEST}: lists no files, so nothing can be checked; use another checkpoint")
    return manifest


def verify(folder: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest of a checkpoint after comparing all that it says with the files, to the bit.

    Args:
        needs: files without which it is of no use to the caller.
    Raises:
        UserError: a file is missing or cannot be read, or its content is not what was written.
    """
    manifest = read_manifest(folder)
    for name in dict.fromkeys([*needs, *manifest["files"]]):
        check_file(folder / name, manifest)
    return manifest


def newest(root: Path, needs: Sequence[str]) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint under `root`, None where there is none; and those newer than it, each with a
    sentence why it had to be passed over."""
    passed_over: dict[Path, str] = {}
    for name in reversed(named(root)):  # without a manifest, damaged too
        try:
            verify(root / name, needs)
        except UserError as error:
            passed_over[root / name] = str(error)
            continue
        return root / name, passed_over
    return None, passed_over


def none_intact(reasons: Sequence[str]) -> UserError:
    """What to raise where there are checkpoints and none will do."""
    return UserError("no checkpoint of this run is intact: " + "; ".join(reasons))


def meant(path: Path) -> Path | None:
    """The checkpoint folder meant by `path`: itself, or what a run folder's or checkpoint folder's `latest` names.

    Where `latest` is missing or names what is not there, or is there with a damaged manifest or damaged weights, it is
    the newest intact one, and a warning says so.

    Returns:
        None where `path` is neither of these, or no checkpoint has been written yet.
    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    if _has_manifest(path):
        return path
    return _latest(path) or _latest(path / "checkpoints")


def _latest(root: Path) -> Path | None:
    """What `latest` names under `root`, or what is taken instead."""
    pointer, passed_over = root / "latest", {}
    try:
        name = pointer.read_text(errors="replace").strip()
    except OSError as error:
        says = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
    else:
        folder = root / name
        says = f"names {name!r}, where no checkpoint is (no {MANIFEST})"
        if _has_manifest(folder):
            try:
                check_file(folder / WEIGHTS, read_manifest(folder))
                return folder
            except UserError as error:
                says, passed_over = f"names {name!r}, which is damaged", {folder: str(error)}
    found, newer = newest(root, (WEIGHTS,))
    reasons = list((passed_over | newer).values())
    if found is None:
        if reasons:
            raise none_intact(reasons)
        return None
    told = f" (passed over: {'; '.join(reasons)})" if reasons else ""
    warnings.warn(f"{pointer} {says}: {found} is taken instead{told}", stacklevel=1)
    return found


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False
