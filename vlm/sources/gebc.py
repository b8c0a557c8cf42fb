"""Kinetics-GEB+ (Wang et al. 2022, https://arxiv.org/abs/2204.00486): what changes at each boundary of an action.

Annotations are those of the LOVEU challenge, as LLMVA-GEBC reads them: an object of video id -> boundaries, in seconds
of the trimmed Kinetics clip. The test file has no captions. `video_info.json` (id -> seconds) may be there; boundaries
are told to a model as parts of that duration. Clips are found below the root by the first 11 letters of their name,
which are the id (`6q3q3SoZwSY.mp4`, `6q3q3SoZwSY_000010_000020.mp4`).

Features are folders of `{id}.npy` or `{id}.pkl`, one array a video. Each folder is a member: `q_former`,
`intern_video`, `omni` and `clip` where its name is a published one, else the folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.sources.common import VideoFinder, read_json
from vlm.sources.common_tables import BadCell, id_of, seconds_of, text_of
from vlm.types import Rejected, Sample, UserError

KINDS = ("Change of Action", "Change of Subject", "Change of Object Being Interacted", "Change of Color", "Multiple")
CAPTIONS = ("subject", "status_before", "status_after")
ID_LENGTH = 11  # of YouTube

_FILES = {
    "train": ("train_all_annotation.json", "trainset_highest_f1.json"),
    "val": ("valset_highest_f1.json",),
    "test": ("test_timestamp.json",),
}
_DURATIONS = "video_info.json"
_FEATURES = (("q_former", "q_former"), ("intern", "intern_video"), ("omni", "omni"), ("clip", "clip"))
"""What stands in the name of a published folder -> the member that it is."""
_ARRAYS = (".npy", ".pkl")


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `boundaries` and, where it is published, `duration`; the key is the id of the video.

    A boundary is {id, kind, timestamp, prev_timestamp, next_timestamp} in seconds and, where there are captions,
    {subject, status_before, status_after}. Several may have the same timestamp: annotators' variants.

    Args:
        root: the folder of the clips.
        split: only used to find the files where none are given.
        annotations: the boundaries, `video_info.json`, and folders of features; without folders of features, those in
            `{root}/features` and `{root}/data/features`.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    finder = VideoFinder(root, id_length=ID_LENGTH)
    files = [path for path in annotations if not path.is_dir()]
    features = _open_features([path for path in annotations if path.is_dir()] or _default_features(root))
    file, videos, durations = _open(files or _default_files(root, split))
    answered = any(name in part for parts in _parts(videos) for part in parts for name in CAPTIONS)
    for video, parts in videos.items():
        where = f"{file} video {video!r}"
        boundaries: list[dict[str, Any]] = []
        if not isinstance(parts, list):
            yield Rejected(video, f"{where}: {parts!r:.60} is not a list of boundaries", str(file))
            continue
        yield from _boundaries(file, where, parts, answered, boundaries)
        if not boundaries:
            yield Rejected(video, f"{where}: has no boundary that can be used", str(file))
            continue
        sample = Sample(key=video, annotation={"video": video, "boundaries": boundaries})
        warnings = _add_features(sample, features)
        path = finder.find(video[:ID_LENGTH])
        if isinstance(path, Path):
            sample.video = path
        elif not sample.members:
            yield Rejected(video, f"{where}: {path}", str(file))
            continue
        elif path[0].isdigit():  # several files have its name
            warnings.append(path)
        if video in durations:
            sample.annotation["duration"] = durations[video]
        elif durations:
            warnings.append(f"the duration of video {video!r} is not in {_DURATIONS}")
        sample.warnings = tuple(warnings)
        yield sample


def _parts(videos: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    return ([part for part in parts if isinstance(part, dict)] for parts in videos.values() if isinstance(parts, list))


def _boundaries(
    file: Path, where: str, parts: list[Any], answered: bool, good: list[dict[str, Any]]
) -> Iterator[Rejected]:
    """The damaged boundaries of a video; the others go into `good`."""
    for number, part in enumerate(parts, 1):
        place = f"{where} boundary {number}"
        try:
            if not isinstance(part, dict):
                raise BadCell(f"{part!r:.60} is not an object")
            boundary = _boundary(part, answered)
            if any(boundary["id"] == other["id"] for other in good):
                raise BadCell(f"column 'boundary_id': {boundary['id']!r} stands there twice")
            good.append(boundary)
        except BadCell as error:
            key = str(part.get("boundary_id") or "") if isinstance(part, dict) else ""
            yield Rejected(key or f"{file.name}:{number}", f"{place}, {error}", str(file))


def _boundary(part: dict[str, Any], answered: bool) -> dict[str, Any]:
    kind = text_of(part, "label")
    if kind not in KINDS:
        raise BadCell(f"column 'label': {kind!r:.60} is none of {', '.join(KINDS)}")
    times = {name: seconds_of(part, name) for name in ("prev_timestamp", "timestamp", "next_timestamp")}
    if not times["prev_timestamp"] < times["timestamp"] < times["next_timestamp"]:
        raise BadCell(f"columns {', '.join(times)}: {', '.join(map(str, times.values()))} do not follow one another")
    captions = {name: text_of(part, name) for name in CAPTIONS} if answered else {}
    return {"id": id_of(part, "boundary_id"), "kind": kind} | times | captions


def _open(files: Sequence[Path]) -> tuple[Path, dict[str, Any], dict[str, float]]:
    """(file of the boundaries, video -> its boundaries, video -> seconds)."""
    found: list[tuple[Path, dict[str, Any]]] = []
    durations: dict[str, float] = {}
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or not content:
            raise UserError(f"{file} must be a JSON object of video: boundaries, not {type(content).__name__}")
        if any(isinstance(value, list) for value in content.values()):
            found.append((file, content))
            continue
        try:
            durations |= {video: seconds_of(content, video) for video in content}
        except BadCell as error:
            raise UserError(f"{file}: {str(error).replace('column', 'video', 1)}, as in {_DURATIONS}") from error
    if len(found) != 1:
        raise UserError(
            f"{', '.join(map(str, files))}: {len(found) or 'none'} of them hold boundaries, but one is needed"
        )
    return (*found[0], durations)


def _default_features(root: Path) -> list[Path]:
    parents = (root / "features", root / "data" / "features")
    return [folder for parent in parents if parent.is_dir() for folder in sorted(parent.iterdir()) if folder.is_dir()]


def _open_features(folders: Sequence[Path]) -> dict[str, Path]:
    """Member -> the folder of its arrays. UserError: two folders are one member, or a folder holds no arrays."""
    found: dict[str, Path] = {}
    for folder in folders:
        known = [member for mark, member in _FEATURES if mark in folder.name.lower()]
        name = known[0] if known else re.sub(r"[^a-z0-9_]+", "_", folder.name.lower())
        if name in found:
            raise UserError(f"{found[name]} and {folder} both hold the features {name!r}: give one")
        if not any(file.suffix.lower() in _ARRAYS for file in folder.iterdir()):
            raise UserError(
                f"{folder} holds no {' or '.join(_ARRAYS)}: features are one array a video, named by its id"
            )
        found[name] = folder
    return found


def _add_features(sample: Sample, features: dict[str, Path]) -> list[str]:
    """Gives a sample its members. Returns what it lacks."""
    lacking = []
    for name, folder in features.items():
        files = [folder / f"{sample.key[:ID_LENGTH]}{suffix}" for suffix in _ARRAYS]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            lacking.append(f"no features of video {sample.key!r} in {folder}")
        else:
            sample.members[f"{name}.npy"] = file
    return lacking


def _default_files(root: Path, split: str) -> list[Path]:
    folders = (root, root / "annotations", root / "data" / "annotations")
    names = _FILES.get(split, (f"{split}.json",))
    found = [file for folder in folders for name in names if (file := folder / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{root}: {len(found) or 'no'} files of boundaries for split {split!r} "
            f"({', '.join(map(str, found)) or 'looked for ' + ', '.join(names)}): give one with --annotations"
        )
    also = found[0].with_name(_DURATIONS)
    return [*found, also] if also.is_file() else found
