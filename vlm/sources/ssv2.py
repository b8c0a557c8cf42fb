"""Something-Something v2 (Goyal et al. 2017, https://arxiv.org/abs/1706.04261): actions told apart by motion.

Two forms of annotation, given by `annotations` or found beside the videos:

- the official JSON, a list of {id, label, template, placeholders}, with the labels JSON (class -> number). The class is
  the template without its brackets; the JSON's own `label` is free text and becomes the caption. The official test
  list has ids alone: its labels are in the answers file (lines `id;class`), which must be given too;
- VideoMAE's list, lines `path label`, optionally with the labels JSON for the names.

Videos are webm (as published) or anything else, found below `root` by id. The official validation split is what papers
report on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.sources.common import VideoFinder, read_json, read_labels, read_list, read_text
from vlm.types import Rejected, Sample, UserError

_FOLDERS = ("", "labels", "annotations")
_PREFIX = "something-something-v2-"


@dataclass(slots=True, kw_only=True)
class _Files:
    """The annotation files by what they hold."""

    items: Path | None = None  # official list of items
    labels: Path | None = None
    answers: Path | None = None  # labels of the official test split
    list: Path | None = None  # VideoMAE's list


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `label`, and where the annotation has them `name`, `template`, `placeholders`, `caption`.

    Args:
        root: folder of the videos.
        split: only used to find the annotation files where none are given.
        annotations: the files, in any order; each is known by its content.

    Raises UserError for a file that is missing or damaged as a whole, or does not suffice.
    """
    finder = VideoFinder(root)
    files = _sort_files(annotations or _default_files(root, split))
    labels = read_labels(files.labels) if files.labels else None
    if files.list is not None:
        yield from _read_list(files.list, labels, finder)
        return
    assert files.items is not None
    if labels is None:
        raise UserError(
            f"{files.items} names classes, their numbers are in the labels JSON ({_PREFIX}labels.json, labels.json), "
            "which is missing: give both files with --annotations"
        )
    yield from _read_items(files, labels, finder)


def _read_list(file: Path, labels: Mapping[str, int] | None, finder: VideoFinder) -> Iterator[Sample | Rejected]:
    names = {number: name for name, number in labels.items()} if labels else None
    for row in read_list(file):
        if isinstance(row, Rejected):
            yield row
            continue
        key = Path(row.path).stem
        where = f"{file} row {row.number}"
        video: Path | str = finder.root / row.path  # an absolute path stays as it is
        if not (isinstance(video, Path) and video.is_file()):
            video = finder.find(key)
        if isinstance(video, str):
            yield Rejected(key, f"{where}: {row.path!r} is missing: {video}", row.path)
        elif names is not None and row.label not in names:
            yield Rejected(key, f"{where}: label {row.label} is not in the labels JSON", str(video))
        else:
            annotation = {"label": row.label} | ({"name": names[row.label]} if names else {})
            yield Sample(key=key, video=video, annotation=annotation)


def _read_items(files: _Files, labels: Mapping[str, int], finder: VideoFinder) -> Iterator[Sample | Rejected]:
    assert files.items is not None
    rows = read_json(files.items)
    answers = _read_answers(files.answers) if files.answers else {}
    if not answers and not any(isinstance(row, Mapping) and "template" in row for row in rows):
        raise UserError(
            f"{files.items}: its {len(rows)} items have no template, as in the official test split, whose labels are "
            "published apart: give the answers file (test-answers.csv, lines `id;class`) with --annotations too, or "
            "take the validation split"
        )
    for number, row in enumerate(rows, 1):
        where = f"{files.items} item {number}"
        annotation = _annotation(row, answers, labels)
        if isinstance(annotation, str):
            key = str(row.get("id", "")) if isinstance(row, Mapping) else ""
            yield Rejected(key or f"{files.items.name}:{number}", f"{where}: {annotation}", str(files.items))
            continue
        video = finder.find(str(row["id"]))
        if isinstance(video, str):
            yield Rejected(str(row["id"]), f"{where}: {video}", str(row["id"]))
        else:
            yield Sample(key=str(row["id"]), video=video, annotation=annotation)


def _annotation(row: Any, answers: Mapping[str, str], labels: Mapping[str, int]) -> dict[str, Any] | str:
    """The annotation of one official item, or what is wrong with it."""
    if not isinstance(row, Mapping):
        return f"{row!r:.80} is not an object"
    if not isinstance(row.get("id"), str | int) or isinstance(row["id"], bool) or not str(row["id"]).strip():
        return f"id {row.get('id')!r} is not an id"
    template = row.get("template")
    if template is None and str(row["id"]) in answers:
        name = answers[str(row["id"])]
    elif isinstance(template, str) and template.strip():
        name = template
    else:
        return f"template {template!r} is not a text, so the class is not known"
    name = name.replace("[", "").replace("]", "")
    if name not in labels:
        near = difflib.get_close_matches(name, labels, 1)
        return f"class {name!r} is not in the labels JSON" + (f" (nearest: {near[0]!r})" if near else "")
    annotation: dict[str, Any] = {"label": labels[name], "name": name}
    placeholders = row.get("placeholders")
    if placeholders is not None:
        if not isinstance(placeholders, list) or not all(isinstance(word, str) for word in placeholders):
            return f"placeholders {placeholders!r:.80} are not a list of texts"
        annotation["placeholders"] = placeholders
    if template is not None:
        annotation["template"] = template
    if isinstance(row.get("label"), str):
        annotation["caption"] = row["label"]
    return annotation


def _read_answers(file: Path) -> dict[str, str]:
    """Id -> class from the answers of the official test split."""
    answers = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            key, separator, name = line.partition(";")
            if not separator or not name.strip():
                raise UserError(f"{file} row {number}: {line[:80]!r} is not `id;class`: the file is damaged")
            answers[key.strip()] = name.strip()
    return answers


def _sort_files(files: Sequence[Path]) -> _Files:
    """Tell the files apart by what is in them."""
    sorted_files = _Files()
    for file in files:
        if file.suffix.lower() == ".json":
            content = read_json(file)
            kind = "items" if isinstance(content, list) else "labels"
            if not content or not isinstance(content, list | dict):
                raise UserError(f"{file} is neither a list of items nor an object of class: number")
        else:
            first = next(line for line in read_text(file).splitlines() if line.strip())
            kind = "answers" if first.partition(";")[0].strip().isdigit() and ";" in first else "list"
        if getattr(sorted_files, kind) is not None:
            raise UserError(f"{file} and {getattr(sorted_files, kind)} hold the same kind of annotation: give one")
        setattr(sorted_files, kind, file)
    if (sorted_files.items is None) == (sorted_files.list is None):
        raise UserError(
            f"{', '.join(map(str, files))}: one list of clips is needed, the official JSON or VideoMAE's `path label`, "
            f"found {'both' if sorted_files.items else 'none'}"
        )
    return sorted_files


def _default_files(root: Path, split: str) -> list[Path]:
    """The annotation files of a split by the names under which they are published."""
    names = [split, *({"val": ["validation"], "validation": ["val"]}.get(split, []))]
    wanted = [f"{start}{name}.json" for start in (_PREFIX, "") for name in names] + [f"{name}.csv" for name in names]
    found = [path for folder in _FOLDERS for name in wanted if (path := root / folder / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{root}: {'no' if not found else len(found)} annotation files for split {split!r} "
            f"({', '.join(str(path) for path in found) or 'looked for ' + ', '.join(wanted)}): give them with "
            "--annotations"
        )
    also = [f"{_PREFIX}labels.json", "labels.json", *(["test-answers.csv"] if split == "test" else [])]
    return found + [path for folder in _FOLDERS for name in also if (path := root / folder / name).is_file()]
