"""Segmentations in files of others: labels of frames as MS-TCN writes them, or the texts of "Video Llama on Breakfast".

Our own answers are read strictly (vlm.metrics.segment_answers); texts of others as far as they can be read, as they
were when their figures were published.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.metrics import segments_fork as fork
from vlm.metrics.segments import spans_of
from vlm.sources.breakfast import ACTIVITIES
from vlm.sources.common import read_text
from vlm.sources.common_segments import read_bundle, read_mapping, read_segments
from vlm.sources.common_tables import BadCell
from vlm.types import Segmentation, Span, UserError

_SPAN = re.compile(r"\d+\s*-\s*\d+\s+\S+")
_HEAD = re.compile(r"#+.*#+")  # `### Frame level recognition: ###`, above one line of all labels


def read_texts(file: Path) -> tuple[list[Segmentation], list[fork.Sample]]:
    """The videos of a JSON list of {name, truth, pred}, and the texts themselves.

    Raises:
        UserError: it cannot be read, or an item is not of that form, comes twice, or has a truth that cannot be read.
    """
    try:
        items: Any = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({error!s:.100})") from error
    if not isinstance(items, list) or not items:
        raise UserError(f"{file}: expected a list of objects with name, truth and pred")
    samples: dict[str, fork.Sample] = {}
    rows = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in fork.Sample._fields):
            raise UserError(f"{file}: item {number} is not an object with the texts name, truth and pred")
        sample = fork.Sample(*(item[name] for name in fork.Sample._fields))
        if sample.name in samples:
            raise UserError(f"{file}: item {number}: {sample.name!r:.60} comes twice, so it would count twice")
        samples[sample.name] = sample
        rows.append(_row_of(sample, f"{file}: item {number}"))
    return rows, list(samples.values())


def _row_of(sample: fork.Sample, where: str) -> Segmentation:
    try:
        truth, said = fork.read(sample)
    except ValueError as error:
        raise UserError(f"{where} ({sample.name!r:.60}): {error}") from error
    prediction = fork.spans_of(said)
    return Segmentation(
        key=sample.name,
        text=sample.pred,
        truth=fork.spans_of(truth),
        prediction=prediction,
        num_frames=len(truth),
        problem="" if prediction else "no line of it could be read",
        kind=activity_of(sample.name),
    )


def read_frames(truth: Path, said: Path, bundle: Path | None = None) -> tuple[list[Segmentation], list[str]]:
    """The videos of two folders of labels of frames, and what is to be known of them, in sentences.

    Args:
        truth: MS-TCN's `groundTruth`; with a `mapping.txt` beside it, its labels must be in it.
        said: files named as those of the truth, with or without `.txt`: a label a line, or below a head
            `### Frame level recognition: ###` all labels in one line, as MS-TCN's code writes them.
        bundle: a list of the videos that count; one that has no prediction is scored as an empty one. Without, videos
            that have a prediction count.
    Raises:
        UserError: a folder or the truth of a video is missing, a file cannot be read, no video counts.
    """
    for folder in (truth, said):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of labels of frames, a file a video")
    mapping = truth.parent / "mapping.txt"
    classes = read_mapping(mapping) if mapping.is_file() else None
    files = [file for file in sorted(said.iterdir()) if file.is_file() and file.name[0] != "."]
    predictions = {_name(file): file for file in files}
    names = read_bundle(bundle) if bundle is not None else tuple(map(_name, files))
    for where, listed in ((said, list(map(_name, files))), (bundle, names)):
        twice = [name for name, count in Counter(listed).items() if count > 1]
        if twice:
            raise UserError(f"{where}: {twice[0]!r:.60} comes twice, so it is not certain what counts")
    rows, notes = [], []
    for name in names:
        file = truth / f"{name}.txt"
        if not file.is_file():
            raise UserError(f"{file}: no truth of {bundle or predictions[name]}")
        spans, prediction = _truth(file, classes), predictions.get(name)
        found = [] if prediction is None else _labels(prediction)
        frames = spans[-1][1]
        if len(found) != frames:
            what = f"{len(found)} frames of {frames}" if prediction else "no prediction"
            more = (
                "those beyond the truth count in edit and F1 alone" if len(found) > frames else "the others are wrong"
            )
            notes.append(f"{name}: {what}; {more}")
        rows.append(
            Segmentation(
                key=name,
                text="",
                truth=spans,
                prediction=spans_of(found),
                num_frames=frames,
                problem="" if found else "there is no prediction",
                kind=activity_of(name),
            )
        )
    if not rows:
        raise UserError(f"{said}: holds no prediction; files are named as those of {truth}")
    others = len({_name(file) for file in truth.glob("*.txt")} - set(names))
    if others:
        notes.append(
            f"{others} videos of {truth} have no prediction in {said} or are not of the list: they do not count"
        )
    return rows, notes


def activity_of(name: str) -> str:
    """The activity of Breakfast that is a part of a video's name; "" where none is, or several are."""
    found = {part for part in name.split("_") if part in ACTIVITIES}
    return found.pop() if len(found) == 1 else ""


def _name(file: Path) -> str:
    return file.name.removesuffix(".txt")


def _truth(file: Path, classes: Mapping[str, int] | None) -> list[Span]:
    if classes is None:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        labels = [line.split()[-1] if _SPAN.fullmatch(line) else line for line in lines]
        classes = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    try:
        segments, _ = read_segments(file, classes)
    except (BadCell, IndexError) as error:
        raise UserError(f"{file}: holds no label" if isinstance(error, IndexError) else str(error)) from error
    return [(segment["start"], segment["end"], segment["name"]) for segment in segments]


def _labels(file: Path) -> list[str]:
    """The label of each frame."""
    lines = [line.strip() for line in read_text(file).splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if lines and _HEAD.fullmatch(lines[0]):
        return " ".join(lines[1:]).split()
    for number, line in enumerate(lines, 1):
        if len(line.split()) != 1:
            raise UserError(f"{file} row {number}: {line!r:.60} is not the label of a frame")
    return lines
