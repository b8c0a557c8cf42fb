"""What the sources of cut-up videos share: MS-TCN's published tree, and segments from files of labels.

The tree (Abu Farha and Gall 2019, https://arxiv.org/abs/1903.01945) has `groundTruth/{name}.txt`, a label a frame,
`mapping.txt`, lines `number label`, and `splits/{train,test}.split{k}.bundle`, the names of files. A segment is
{start, end, label, name}: frames from 0, the end exclusive; class number and name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm.sources.common import read_text
from vlm.sources.common_tables import BadCell
from vlm.types import UserError

ALL = "all"  # a split: every video that has labels

_SPAN = re.compile(r"(\d+)\s*-\s*(\d+)\s+(\S+)")
_CLASS = re.compile(r"([0-9]{1,9})[ \t]+(\S.*)")
_MOST_DIGITS = 9  # of a frame's number; a billion frames are a year of video

Segment = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The annotation files of a dataset."""

    folders: tuple[Path, ...]  # of files of labels
    classes: Mapping[str, int]
    bundle: Path | None  # the list of the split
    names: tuple[str, ...]  # in it


def open_tree(
    root: Path, split: str, annotations: Sequence[Path], *, folders: Sequence[str], classes: Sequence[str]
) -> Tree:
    """The files given in `annotations`, else those of published names under `root`.

    Args:
        folders: names of published folders of labels.
        classes: as published, numbered from 0, where there is no `mapping.txt`.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --root must be the folder of the dataset")
    given = [path for path in annotations if path.is_dir()]
    bundles = [path for path in annotations if path.suffix == ".bundle"]
    mappings = [path for path in annotations if path not in given and path not in bundles]
    for several in (bundles, mappings):
        if len(several) > 1:
            raise UserError(
                f"{several[0]} and {several[1]}: expected one list (.bundle), one mapping (.txt) and folders of labels"
            )
    published = root / "splits" / f"{split}.bundle"
    bundles = bundles or [path for path in (published,) if path.is_file() and split != ALL]
    mappings = mappings or [path for path in (root / "mapping.txt",) if path.is_file()]
    return Tree(
        folders=tuple(given or [folder for name in folders if (folder := root / name).is_dir()]),
        classes=read_mapping(mappings[0]) if mappings else {name: number for number, name in enumerate(classes)},
        bundle=bundles[0] if bundles else None,
        names=read_bundle(bundles[0]) if bundles else (),
    )


def read_mapping(file: Path) -> dict[str, int]:
    """Class name -> number from lines `number name`. Copies differ in their numbers: some count from 1."""
    classes: dict[str, int] = {}
    for number, line in _lines(file):
        found = _CLASS.fullmatch(line)
        if found is None:
            raise UserError(f"{file} row {number}: {line!r:.60} is not of the form `number class`")
        if found[2] in classes or int(found[1]) in classes.values():
            raise UserError(f"{file} row {number}: {line!r:.60} stands in another row too, so classes are not certain")
        classes[found[2]] = int(found[1])
    return classes


def read_bundle(file: Path) -> tuple[str, ...]:
    """Names of videos from a list of files, with or without folders before them; the first line may be a comment."""
    names = tuple(Path(line).stem for _, line in _lines(file) if not line.startswith("#"))
    if not names:
        raise UserError(f"{file} lists no video")
    return names


def _lines(file: Path) -> list[tuple[int, str]]:
    """(row, line) of lines that are not blank."""
    lines = enumerate((line.strip() for line in read_text(file).splitlines()), 1)
    return [(number, line) for number, line in lines if line]


# Files of labels ------------------------------------------------------------------------------------------


def read_segments(
    file: Path, classes: Mapping[str, int], unclassed: Collection[str] = ()
) -> tuple[list[Segment], tuple[str, ...]]:
    """(segments, warnings) of a file of either kind: a label a frame, or lines `first-last label`. Raises BadCell.

    `unclassed`: labels of the second kind that are no classes; their frames stay without a segment.
    """
    try:
        lines = _lines(file)
    except UserError as error:
        raise BadCell(str(error)) from error
    if not lines:
        raise BadCell(f"{file}: holds no label")
    if _SPAN.fullmatch(lines[0][1]):
        return _from_spans(file, lines, classes, unclassed)
    if len(lines) < lines[-1][0]:
        blank = next(place for place, (number, _) in enumerate(lines, 1) if number != place)
        raise BadCell(f"{file} row {blank}: is empty, but each row is the label of a frame")
    for number, line in lines:
        if line not in classes:
            raise BadCell(f"{file} row {number}: {line!r:.60} is no class")
    return from_frames([line for _, line in lines], classes), ()


def from_frames(labels: Iterable[str], classes: Mapping[str, int]) -> list[Segment]:
    """Segments of labels of frames."""
    segments, start = [], 0
    for name, run in groupby(labels):
        end = start + sum(1 for _ in run)
        segments.append(segment(start, end, name, classes))
        start = end
    return segments


def segment(start: int, end: int, name: str, classes: Mapping[str, int]) -> Segment:
    return {"start": start, "end": end, "label": classes[name], "name": name}


def _from_spans(
    file: Path, lines: Sequence[tuple[int, str]], classes: Mapping[str, int], unclassed: Collection[str]
) -> tuple[list[Segment], tuple[str, ...]]:
    """Spans count frames from 1, ends inclusive; a frame in which two meet is the former's, as in MS-TCN's labels."""
    segments: list[Segment] = []
    warnings: list[str] = []
    before = 0  # frames that have a label
    for number, line in lines:
        where, found = f"{file} row {number}", _SPAN.fullmatch(line)
        if found is None:
            raise BadCell(f"{where}: {line!r:.60} is not of the form `first-last label`")
        if max(len(found[1]), len(found[2])) > _MOST_DIGITS:
            raise BadCell(f"{where}: {line!r:.60} goes beyond the end of any video")
        first, last, name = int(found[1]), int(found[2]), found[3]
        if name not in classes and name not in unclassed:
            raise BadCell(f"{where}: {name!r:.60} is no class")
        if not 1 <= first <= last:
            raise BadCell(f"{where}: frames {first} to {last} are none, or end before they begin")
        if first < before:
            raise BadCell(f"{where}: begins at frame {first}, but what stands before it goes on to frame {before}")
        start = max(first - 1, before)
        if start == last:
            warnings.append(f"{where}: its only frame {last} belongs to what stands before it, so {name!r} is left out")
        elif name not in classes:
            warnings.append(f"{where}: {name!r} is no class, so frames {start + 1} to {last} are in no segment")
        else:
            segments.append(segment(start, last, name, classes))
        before = last
    return segments, tuple(warnings)
