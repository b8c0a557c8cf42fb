"""Kinetics (Kay et al. 2017, https://arxiv.org/abs/1705.06950) and whatever is laid out like it.

Two forms:

- VideoMAE's list, lines `path label` or `path,label`, given by `annotations` or found as `{root}/{split}.csv`;
- folders of clips, one a class: `{root}/{split}/{class}/…` or `{root}/{class}/…`. Classes are numbered in alphabetical
  order, over all splits that lie side by side, so that train and test agree.

Class names may be given in a file besides: a text file with one a line, in the order of the numbers, or a JSON object
of name: number. With folders that file decides the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlm.sources.common import VIDEO_SUFFIXES, read_labels, read_list, read_text
from vlm.types import Rejected, Sample, UserError

_SPLITS = ("train", "val", "validation", "test")


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `label` and, where it is known, `name`; keys are paths below the root, without suffix.

    Args:
        root: folder that relative paths of the list start from, or that holds the folders of classes.
        split: name of the list or folder.
        annotations: a `.csv` list, and class names as `.txt` or `.json`; both optional.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --root must be the folder of the videos")
    listing, labels = None, None
    for file in annotations:
        suffix = file.suffix.lower()
        if suffix == ".csv" and listing is None:
            listing = file
        elif suffix in (".txt", ".json") and labels is None:
            labels = read_labels(file) if suffix == ".json" else _read_names(file)
        else:
            raise UserError(f"{file}: expected one list (.csv) and at most one file of class names (.txt, .json)")
    if listing is None and (root / f"{split}.csv").is_file():
        listing = root / f"{split}.csv"
    if listing is not None:
        yield from _read_list(listing, labels, root)
    else:
        yield from _read_folders(root, split, labels)


def _read_names(file: Path) -> dict[str, int]:
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: class {double!r} stands there twice, so its number is not known")
    return {name: number for number, name in enumerate(names)}


def _read_list(file: Path, labels: Mapping[str, int] | None, root: Path) -> Iterator[Sample | Rejected]:
    first = next(line for line in read_text(file).splitlines() if line.strip())
    if first.startswith("label,youtube_id"):
        raise UserError(
            f"{file} is the published table of YouTube ids, which does not say where the clips lie: give VideoMAE's "
            "list (lines `path label`), or arrange the clips as one folder a class"
        )
    names = {number: name for name, number in labels.items()} if labels else None
    for row in read_list(file):
        if isinstance(row, Rejected):
            yield row
            continue
        video = root / row.path  # an absolute path stays as it is
        below = video.relative_to(root) if video.is_relative_to(root) else Path(row.path.lstrip("/"))
        key = below.with_suffix("").as_posix()
        if not video.is_file():
            yield Rejected(key, f"{file} row {row.number}: no file {video}", str(video))
        elif names is not None and row.label not in names:
            yield Rejected(key, f"{file} row {row.number}: label {row.label} has no class name", str(video))
        else:
            annotation = {"label": row.label} | ({"name": names[row.label]} if names else {})
            yield Sample(key=key, video=video, annotation=annotation)


def _read_folders(root: Path, split: str, labels: Mapping[str, int] | None) -> Iterator[Sample | Rejected]:
    base = root / split if (root / split).is_dir() else root
    if base is root and any((root / name).is_dir() for name in _SPLITS):
        there = [name for name in _SPLITS if (root / name).is_dir()]
        raise UserError(f"{root} has no folder {split!r}, but {', '.join(there)}: is --split right?")
    classes = _folders(base)
    if not classes:
        raise UserError(f"{base}: no list {split}.csv and no folders of classes: give the list with --annotations")
    if labels is None:
        beside = [root / name for name in _SPLITS if (root / name).is_dir()] if base is not root else []
        every = sorted({folder.name for place in (base, *beside) for folder in _folders(place)})
        labels = {name: number for number, name in enumerate(every)}
    for folder in classes:
        name = next((name for name in (folder.name, folder.name.replace("_", " ")) if name in labels), None)
        for video in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
            key = video.relative_to(base).with_suffix("").as_posix()
            if name is None:
                yield Rejected(key, f"folder {folder} is not in the file of class names", str(video))
            elif video.suffix and video.suffix.lower() not in VIDEO_SUFFIXES:
                yield Rejected(key, f"{video}: {video.suffix!r} is not the suffix of a video", str(video))
            else:
                yield Sample(key=key, video=video, annotation={"label": labels[name], "name": name})


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
