"""50 Salads (Stein and McKenna 2013, https://doi.org/10.1145/2493432.2493482): 25 people make two salads each.

Labels in either form: MS-TCN's `groundTruth/rgb-01-1.txt`, a label a frame, or the original
`activityAnnotation/01-1-activityAnnotation.txt`, lines `start end label` in ticks of the sensors' clock, with
`timestamps/timestamps-01-1.txt`, whose rows begin with the tick of each frame. Of the three levels in the original the
lowest is taken, without its phases (`_prep`, `_core`, `_post`): the 17 actions of MS-TCN, between `action_start` and
`action_end`. Videos are `rgb-01-1.avi`, found below the root by name.

Splits are MS-TCN's lists (`train.split1` … `test.split5`), or `all`; `train.fork` and `test.fork` are those of the
published fork of Video-ChatGPT, which leak (`common_fork`).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm.sources.common import VideoFinder, read_text
from vlm.sources.common_chat import Row, make_chat
from vlm.sources.common_features import take_features
from vlm.sources.common_fork import SALADS_TEST, salads_leak_of
from vlm.sources.common_fork import SPLITS as FORK_SPLITS
from vlm.sources.common_segments import ALL, Segment, Tree, open_tree, read_segments, segment
from vlm.sources.common_tables import BadCell
from vlm.sources.common_written import is_written, read_written
from vlm.types import Rejected, Sample, UserError

ACTIONS = (
    "cut_tomato", "place_tomato_into_bowl", "cut_cheese", "place_cheese_into_bowl", "cut_lettuce",
    "place_lettuce_into_bowl", "add_salt", "add_vinegar", "add_oil", "add_pepper", "mix_dressing", "peel_cucumber",
    "cut_cucumber", "place_cucumber_into_bowl", "add_dressing", "mix_ingredients", "serve_salad_onto_plate",
    "action_start", "action_end",
)  # fmt: skip

_WRITTEN = ("LLM/50Salads", "LLM")
_FOLDERS = ("groundTruth", "activityAnnotation", "ann-ts/activityAnnotation")
_ORIGINAL = "-activityAnnotation"
_PHASES = ("prep", "core", "post")
_HIGH = ("cut_and_mix_ingredients", "prepare_dressing", "serve_salad")  # the highest level, left out
_ROW = re.compile(r"([0-9]{1,18})\s+([0-9]{1,18})\s+(\S+)")
_VIDEO = re.compile(r"rgb-\d\d-\d\.(avi|mp4)")
_TICK = re.compile(r"[0-9]{1,18}")
_START, _END = ACTIONS[-2:]
FPS = 30.0
ACTIVITY = "making salads"  # as the published question for segments says it


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `segments` and `chat`; the key is MS-TCN's name of the video.

    Args:
        root: the folder of the dataset.
        split: the name of a list in `{root}/splits`, all, or train.fork and test.fork.
        annotations: folders of labels, a list (`.bundle`) and `mapping.txt`, each instead of that under `root`; a
            folder of questions that a language model wrote (files `rgb-01-1`); features.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    annotations, features = take_features(annotations)
    written = [path for path in annotations if _is_written(path)]
    tree = _open(root, split, [path for path in annotations if path not in written])
    finder = VideoFinder(root)
    files = _files(root, tree)
    for name in _names(split, tree, files):
        try:
            if name not in files:
                raise BadCell(f"{tree.bundle}: no labels of {name!r} in {', '.join(map(str, tree.folders))}")
            segments, warnings = _segments(files[name], tree.classes)
            chat, warned = _chat(name, segments, written or [root / place for place in _WRITTEN], bool(written))
            video = finder.find(name)
            sample = Sample(
                key=name,
                video=video if isinstance(video, Path) else None,
                annotation={"name": ACTIVITY, "segments": segments, "chat": chat},
                warnings=(*(() if isinstance(video, Path) else (video,)), *warnings, *warned),
            )
            features.add_to(sample, FPS)
            if isinstance(video, str) and not sample.members:
                raise BadCell(f"{video}; features in its place are given with --annotations")
            if isinstance(video, str):  # the times of questions are parts of a whole
                sample.annotation["num_frames"] = segments[-1]["end"]
        except BadCell as error:
            yield Rejected(name, str(error), str(files.get(name, name)))
            continue
        yield sample


def notes(root: Path, split: str, annotations: Sequence[Path] = ()) -> dict[str, Any]:
    """What a user should know of a split as a whole: how much the fork's leaks."""
    if split not in FORK_SPLITS:
        return {}
    others = [path for path in take_features(annotations)[0] if not _is_written(path)]
    return {"leak": salads_leak_of(_files(root, _open(root, split, others)))}


def unlabelled(root: Path) -> Iterator[Sample | Rejected]:
    """The videos of a tree that has no labels at all, for what needs none (features); else nothing."""
    if any((root / folder).is_dir() for folder in _FOLDERS):
        return
    files: dict[str, Path] = {}
    for file in sorted(root.rglob("rgb-*")):
        if _VIDEO.fullmatch(file.name):
            if file.stem in files:
                yield Rejected(file.stem, f"the key is taken by {files[file.stem]}", str(file))
                continue
            files[file.stem] = file
            yield Sample(key=file.stem, video=file, annotation={})


def _open(root: Path, split: str, annotations: Sequence[Path]) -> Tree:
    tree = open_tree(root, split, annotations, folders=_FOLDERS, classes=ACTIONS)
    if tree.bundle is None and split not in (ALL, *FORK_SPLITS):
        raise UserError(f"{root} has no list splits/{split}.bundle: give it with --annotations, or take the split all")
    return tree


def _files(root: Path, tree: Tree) -> dict[str, Path]:
    """Name of a video -> the file of its labels."""
    files: dict[str, Path] = {}
    for file in sorted(file for folder in reversed(tree.folders) for file in folder.glob("*.txt")):
        name = f"rgb-{file.stem.removesuffix(_ORIGINAL)}" if file.stem.endswith(_ORIGINAL) else file.stem
        if name not in files or not file.stem.endswith(_ORIGINAL):  # labels of frames need no other file
            files[name] = file
    if not files:
        raise UserError(f"{root} has no labels ({', '.join(_FOLDERS)}): give their folder with --annotations")
    return files


def _names(split: str, tree: Tree, files: Mapping[str, Path]) -> Sequence[str]:
    if split in FORK_SPLITS:
        return [name for name in sorted(files) if (name in SALADS_TEST) == (split == FORK_SPLITS[1])]
    return tree.names or sorted(files)


def _is_written(folder: Path) -> bool:
    found = next(folder.glob("rgb-*"), None) if folder.is_dir() else None
    return found is not None and found.is_file() and is_written(found)


def _chat(
    name: str, segments: Sequence[Segment], folders: Sequence[Path], given: bool
) -> tuple[list[Row], tuple[str, ...]]:
    rows = make_chat(name, segments, ACTIVITY, background=(_START, _END))
    file = next(
        (file for folder in folders for end in ("", ".txt") if (file := folder / f"{name}{end}").is_file()), None
    )
    if file is None:
        return rows, (f"no questions about {name!r} in {', '.join(map(str, folders))}",) if given else ()
    written, warnings = read_written(file, segments)
    return [*rows, *written], warnings


def _segments(file: Path, classes: Mapping[str, int]) -> tuple[list[Segment], tuple[str, ...]]:
    if not file.stem.endswith(_ORIGINAL):
        return read_segments(file, classes)
    name = f"timestamps-{file.stem.removesuffix(_ORIGINAL)}.txt"
    ticks_file = file.parent.parent / "timestamps" / name
    if not ticks_file.is_file():
        raise BadCell(f"{file} is in ticks of a clock, and {ticks_file}, with the ticks of frames, is missing")
    try:
        return _from_ticks(file, ticks_file, classes)
    except UserError as error:
        raise BadCell(str(error)) from error


def _from_ticks(file: Path, ticks_file: Path, classes: Mapping[str, int]) -> tuple[list[Segment], tuple[str, ...]]:
    """Actions in the order in which they begin, each until the next begins, as in MS-TCN's labels."""
    ticks = _read_ticks(ticks_file)
    actions: list[tuple[int, int, str]] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        where, found = f"{file} row {number}", _ROW.fullmatch(line.strip())
        if found is None:
            raise BadCell(f"{where}: {line!r:.60} is not of the form `start end label`")
        name, _, phase = found[3].rpartition("_")
        if found[3] in _HIGH:
            continue
        if phase not in _PHASES or name not in classes:
            raise BadCell(f"{where}: {found[3]!r:.60} is no action of a phase {', '.join(_PHASES)}")
        start, end = bisect_left(ticks, int(found[1])), bisect_right(ticks, int(found[2]))
        if not start < end or not ticks[0] <= int(found[1]) <= int(found[2]) <= ticks[-1]:
            raise BadCell(f"{where}: no frame of the video is between ticks {found[1]} and {found[2]}")
        actions.append((start, end, name))
    if not actions:
        raise BadCell(f"{file}: has no action of a phase {', '.join(_PHASES)}")
    last = max(end for _, end, _ in actions)
    runs = [(0, _START), *((start, name) for start, _, name in sorted(actions)), (last, _END), (len(ticks), "")]
    segments: list[Segment] = []
    warnings: list[str] = []
    for (start, name), (end, following) in pairwise(runs):
        if segments and segments[-1]["name"] == name:
            segments[-1]["end"] = end
        elif start < end:
            segments.append(segment(start, end, name, classes))
        elif name not in (_START, _END):
            warnings.append(f"{file}: {name!r} and {following!r} begin at frame {start}, so the former is left out")
    return segments, tuple(warnings)


def _read_ticks(file: Path) -> list[int]:
    ticks: list[int] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        first = line.split()[0] if line.strip() else ""
        if _TICK.fullmatch(first) is None or (ticks and int(first) <= ticks[-1]):
            raise BadCell(f"{file} row {number}: {line!r:.60} does not begin with a tick later than the row before")
        ticks.append(int(first))
    return ticks
