"""Reading what a run left in its folder: one place that knows the files' form and names the line that is damaged."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.files import beyond
from vlm.files import read_json as read_json  # told under this name too
from vlm.metrics import caption, segments
from vlm.metrics.choice import choice_metrics
from vlm.metrics.classify import classification_metrics
from vlm.metrics.own import with_own
from vlm.types import Prediction, Segmentation, Span, UserError, Writing

Rows = Sequence[Prediction] | Sequence[Writing] | Sequence[Segmentation]
"""What a predictions.jsonl holds: rows of one kind."""

LARGEST = sys.float_info.max  # JSON can hold whole numbers that no float can


def read_rows(path: Path, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, in order.

    Args:
        damaged: where given, a line that is no JSON object adds a sentence to it and is left out; else it is an error.
    Raises:
        UserError: no such file, or a damaged line (with its number).
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else f"holds {type(row).__name__}, expected a JSON object"
        except json.JSONDecodeError as error:
            problem = f"is not JSON ({error.msg})"
        except (ValueError, RecursionError) as error:
            problem = f"has {beyond(error)}"
        if problem is None:
            rows.append(row)
        elif damaged is None:
            raise UserError(f"{path}: line {number} {problem}; the file is damaged: evaluate again")
        else:
            damaged.append(f"{path.name}: line {number} {problem}")
    return rows


def metrics_of(
    rows: Rows, kinds: Mapping[str, Sequence[str]] | None = None, spice: Path | None = None
) -> dict[str, float]:
    """What predictions are worth, of clips, of questions (`kinds` as in EvalConfig), of texts (`spice` as in
    vlm.metrics.caption; nothing where no text has references) or of segmentations; with figures of one's own."""
    writings = [row for row in rows if isinstance(row, Writing)]
    if writings:
        known = [row for row in writings if row.references]
        return with_own("caption", known, caption.score(writings, spice=spice)) if known else {}
    if spice is not None:
        raise UserError("SPICE is a score of captions, but these rows hold scores of classes or options, or segments")
    segmentations = [row for row in rows if isinstance(row, Segmentation)]
    if segmentations:
        return with_own("segments", segmentations, segments.score(segmentations))
    predictions = [row for row in rows if isinstance(row, Prediction)]
    if predictions and predictions[0].kind is not None:
        return with_own("choice", predictions, choice_metrics(predictions, kinds))
    return with_own("classes", predictions, classification_metrics(predictions))


def kinds_of(folder: Path) -> dict[str, list[str]]:
    """The groups of kinds that the evaluation in a run folder reported; none where it does not say."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return {}
    value: Any = read_json(path)
    for name in ("protocol", "eval", "kinds"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def read_predictions(path: Path) -> Rows:
    """The rows of a predictions.jsonl, each checked against the others.

    Raises:
        UserError: naming the line: a field is missing or of the wrong type, a score is not finite, the number of
            scores differs from the first row's, truth or prediction is no class, the key came before, the
            prediction is not the class with the highest score; or there is no row at all.
    """
    rows: list[Any] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(read_rows(path), start=1):
        try:
            row = _checked(line, rows)
            if row.key in lines:
                raise ValueError(f"key {row.key!r} came in line {lines[row.key]} already")
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}; the file is damaged: evaluate again") from error
        lines[row.key] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no prediction; evaluate again")
    return rows


def _checked(line: dict[str, Any], before: Rows) -> Prediction | Writing | Segmentation:
    """A line as a row of the same kind as the rows before it; ValueError says what is wrong with it."""
    first = before[0] if before else None
    kind = Prediction if "text" not in line else Segmentation if "num_frames" in line else Writing
    if first is not None and not isinstance(first, kind):
        names = [name for row, name in _ROWS.items() if row in (kind, type(first))]
        raise ValueError(f"{' and '.join(names)} do not go together")
    if kind is not Prediction:
        probes = None if first is None else sorted(first.probes)
        return _segmentation(line, probes) if kind is Segmentation else _writing(line, probes)
    assert first is None or isinstance(first, Prediction)
    prediction = _prediction(line, None if first is None else len(first.scores))
    if first is not None and (prediction.kind is None) != (first.kind is None):
        raise ValueError("rows of clips and rows of questions (with a kind) do not go together")
    return prediction


_ROWS: dict[type, str] = {Writing: "rows of texts", Segmentation: "rows of segments", Prediction: "rows of scores"}


def _segmentation(line: dict[str, Any], known: list[str] | None) -> Segmentation:
    for name in ("key", "text", "problem"):
        if not isinstance(line.get(name), str):
            raise ValueError(f"{name} is {line.get(name)!r:.60}, expected a text")
    frames = line["num_frames"]
    if not isinstance(frames, int) or isinstance(frames, bool) or not 0 < frames < 2**53:
        raise ValueError(f"num_frames is {frames!r:.60}, expected a number of frames")
    probes = line.get("probes", {})
    if not isinstance(probes, dict) or not all(isinstance(probe, dict) for probe in probes.values()):
        raise ValueError(f"probes is {probes!r:.60}, expected an object of objects")
    if known is not None and sorted(probes) != known:
        raise ValueError(f"has the probes {sorted(probes)}, the first row {known}")
    for name, probe in probes.items():
        for part in ("text", "problem"):
            if not isinstance(probe.get(part), str):
                raise ValueError(f"{part} of the probe {name!r} is {probe.get(part)!r:.60}, expected a text")
    about = {name: str(line.get(name, "")) for name in ("kind", "video", "question")}
    return Segmentation(
        key=line["key"],
        text=line["text"],
        truth=_spans("truth", line.get("truth"), frames),
        prediction=_spans("prediction", line.get("prediction"), frames),
        num_frames=frames,
        problem=line["problem"],
        probes={
            name: {**probe, "prediction": _spans(f"prediction of {name!r}", probe.get("prediction"), frames)}
            for name, probe in probes.items()
        },
        **about,
    )


def _spans(name: str, value: Any, frames: int) -> list[Span]:
    """Spans as JSON has them: lists of two whole numbers and a label."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r:.60}, expected a list of [start, end, label]")
    for span in value:
        if not isinstance(span, list) or [type(part) for part in span] != [int, int, str]:
            raise ValueError(f"{name} holds {span!r:.60}, expected [start, end, label]")
    spans = [(start, end, label) for start, end, label in value]
    problem = segments.what_is_wrong(spans)
    if not problem and spans and spans[-1][1] > frames:
        problem = f"{spans[-1][2]!r} ends at {spans[-1][1]}, but the video has {frames} frames"
    if problem:
        raise ValueError(f"{name}: {problem}")
    return spans


def _writing(line: dict[str, Any], known: list[str] | None) -> Writing:
    for name in ("key", "text"):
        if not isinstance(line.get(name), str):
            raise ValueError(f"{name} is {line.get(name)!r:.60}, expected a text")
    references, probes = line.get("references"), line.get("probes", {})
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise ValueError(f"references is {references!r:.60}, expected a list of texts")
    if not isinstance(probes, dict) or not all(isinstance(text, str) for text in probes.values()):
        raise ValueError(f"probes is {probes!r:.60}, expected an object of texts")
    if known is not None and sorted(probes) != known:
        raise ValueError(f"has the probes {sorted(probes)}, the first row {known}")
    about = {name: str(line.get(name, "")) for name in ("kind", "video", "id", "question")}
    return Writing(key=line["key"], text=line["text"], references=references, probes=probes, **about)


def _prediction(row: dict[str, Any], classes: int | None) -> Prediction:
    for name, kind in (("key", str), ("truth", int), ("prediction", int), ("scores", list)):
        if name not in row:
            raise ValueError(f"has no {name!r}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{name} is {row[name]!r:.60}, expected {kind.__name__}")
    probes = row.get("probes", {})
    if not isinstance(probes, dict):
        raise ValueError(f"probes is {probes!r:.60}, expected an object")
    asked = row.get("kind")
    if not (asked is None or isinstance(asked, str)):
        raise ValueError(f"kind is {asked!r:.60}, expected a text")
    options = row.get("options") or []
    if not isinstance(options, list):
        raise ValueError(f"options is {options!r:.60}, expected a list")
    if classes is None or asked is not None:
        classes = len(row["scores"])  # questions may differ in their number of options
    for name, scores in {"scores": row["scores"], **probes}.items():
        _check_scores(name, scores, classes)
    for name in ("truth", "prediction"):
        if not 0 <= row[name] < len(row["scores"]):
            raise ValueError(f"{name} is {row[name]}, but there are {len(row['scores'])} classes")
    if row["scores"][row["prediction"]] < max(row["scores"]):
        raise ValueError(f"prediction is {row['prediction']}, but another class has a higher score")
    return Prediction(
        key=row["key"],
        truth=row["truth"],
        prediction=row["prediction"],
        scores=row["scores"],
        probes=probes,
        kind=asked,
        video=str(row.get("video", "")),
        id=str(row.get("id", "")),
        question=str(row.get("question", "")),
        options=[str(option) for option in options],
    )


def _check_scores(name: str, scores: Any, classes: int) -> None:
    if not isinstance(scores, list) or not scores:
        raise ValueError(f"{name} is {scores!r:.60}, expected a list of numbers")
    if len(scores) != classes:
        raise ValueError(f"{name} has {len(scores)} entries, expected {classes} (a score a class)")
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and abs(s) <= LARGEST for s in scores):
        raise ValueError(f"{name} holds something that is not a finite number")
