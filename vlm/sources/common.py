"""What several sources need: annotation files read with errors that name them, `path label` lists, finding videos."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm.types import Rejected, UserError

VIDEO_SUFFIXES = frozenset((".webm", ".mp4", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".asf", ".flv",
                            ".3gp", ".ts", ".mts", ".m2ts", ".vob", ".ogv", ".gif"))  # fmt: skip

_SPACED = re.compile(r"(.+?)(?:\s*,\s|\s)\s*(-?\d+)")  # path, then blanks (or a comma and blanks), then the label
_COMMA = re.compile(r"(.+?),(-?\d+)")


class ListRow(NamedTuple):
    """One row of a `path label` list."""

    number: int  # from 1, blank lines counted
    path: str
    label: int


def read_text(file: Path) -> str:
    """A whole annotation file, with or without a byte order mark. Raises UserError when it is no UTF-8 text."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if not data.strip():
        raise UserError(f"{file} is empty ({len(data)} bytes): it was not downloaded or not written to the end")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): is it an annotation file?") from error


def read_json(file: Path) -> Any:
    """A JSON file. Raises UserError when it is none, naming line and column."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}): it is damaged "
                        "or was cut short; download it again") from error  # fmt: skip
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, values too deep in one another
        raise UserError(f"{file} cannot be read as JSON ({error!s:.100})") from error


def read_labels(file: Path) -> dict[str, int]:
    """Class name -> number from a labels JSON: an object whose values are numbers or numbers as text."""
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} must be a JSON object of class name: number, not {type(content).__name__}")
    labels: dict[str, int] = {}
    for name, value in content.items():
        if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
            raise UserError(f"{file}: class {name!r} has the number {value!r}, which is not a whole number")
        labels[name] = int(value)
    if len(set(labels.values())) < len(labels):
        raise UserError(f"{file}: two classes have the same number, so their clips could not be told apart")
    return labels


def read_list(file: Path) -> Iterator[ListRow | Rejected]:
    """Rows of VideoMAE's list: `path label` with one blank; also with several, a tab or a comma. No header.

    The label is the last word, so paths may hold blanks. Blank lines are passed over.
    """
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        row = parse_list_row(line)
        if isinstance(row, str):
            yield Rejected(f"{file.name}:{number}", f"{file} row {number}: {row}", str(file))
        else:
            yield ListRow(number, *row)


def parse_list_row(line: str) -> tuple[str, int] | str:
    """(path, label) of one row, or what is wrong with it."""
    text = line.strip()
    spaced = _SPACED.fullmatch(text)
    comma = None if spaced else _COMMA.fullmatch(text)
    found = spaced or comma
    if found is None:
        return f"{text[:80]!r} does not end in a label (a whole number after a blank, tab or comma)"
    path, label = found[1].strip(), int(found[2])
    if comma and re.search(r"\s\d+$", path):
        return f"{text[:80]!r} can be read in two ways: separate path and label by one blank"
    if len(path) > 1 and path[0] == path[-1] == '"':
        path = path[1:-1]
    if label < 0:
        return f"label {label} of {path!r} is negative"
    return path, label


class VideoFinder:
    """Finds video files below a folder by their name without suffix. The folder is listed once, when first needed.

    `id_length`: so many letters of the name count; None: all.
    """

    def __init__(self, root: Path, id_length: int | None = None) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; --root must be the folder of the videos")
        self.root, self.id_length = root, id_length
        self._by_stem: dict[str, list[Path]] | None = None

    def __len__(self) -> int:
        """How many names of videos there are."""
        return len(self._listed())

    def find(self, stem: str) -> Path | str:
        """The file, or why there is none."""
        found = self._listed().get(stem, [])
        if len(found) == 1:
            return found[0]
        if found:
            return (
                f"{len(found)} files have the name {stem!r} ({found[0]}, {found[1]}, …): --root must hold one of them"
            )
        return f"no video file {stem!r} (webm, mp4, …) below {self.root}"

    def _listed(self) -> dict[str, list[Path]]:
        if self._by_stem is None:
            self._by_stem = {}
            for folder, subfolders, names in os.walk(self.root):
                subfolders.sort()
                for name in sorted(names):
                    path = Path(folder, name)
                    if path.suffix.lower() in VIDEO_SUFFIXES:
                        self._by_stem.setdefault(path.stem[: self.id_length], []).append(path)
        return self._by_stem
