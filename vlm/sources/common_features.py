"""Files of features, published or from `tools/extract_features.py`, as members of samples.

`open_features` is about features of frames as questions about videos are published with (member `features.npy`).
Tensors of any shape and name go beside any source's samples: `open_tensor_files`, `with_tensors` (member
`NAME.safetensors`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlm.types import Rejected, Sample, StoredArray, UserError
from vlm.weights import open_tensors

FEATURE_SUFFIXES = (".pth", ".pt", ".safetensors")
MEMBER = "features.npy"


@dataclass(slots=True, kw_only=True)
class FeatureFile:
    """The features of many videos. Nothing is copied."""

    file: Path
    fps: float | None = None  # features a second, where the file says it: published ones do not
    videos: dict[str, StoredArray | str] = field(default_factory=dict)  # where they lie, or why they cannot be used

    def add_to(self, sample: Sample, fps: float) -> str:
        """Gives a sample its member and annotation. Returns "", or why it has none. `fps`: where the file has none."""
        found = self.videos.get(sample.key)
        if not isinstance(found, StoredArray):
            return found or f"no features of this video in {self.file}"
        sample.members[MEMBER] = found
        sample.annotation["features"] = {"name": self.file.stem, "fps": self.fps or fps}
        return ""


def is_features(file: Path) -> bool:
    return file.suffix.lower() in FEATURE_SUFFIXES


def open_features(files: Sequence[Path]) -> FeatureFile | None:
    """The features of the one file, if there is one. UserError: several files, or one that cannot be read."""
    if not files:
        return None
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1]} both hold features: give one")
    found = FeatureFile(file=files[0])
    width: int | None = None
    for video, load in open_tensors(found.file).items():
        tensor = load()
        if tensor.ndim == 2 and width is None:
            width = tensor.shape[1]
        if tensor.ndim != 2 or not len(tensor) or tensor.shape[1] != width:
            shape = list(tensor.shape)
            found.videos[video] = f"features of shape {shape} in {found.file}, not (frames, {width or 768})"
        elif tensor.dtype not in (torch.float16, torch.float32):
            found.videos[video] = f"features of dtype {tensor.dtype} in {found.file}, not float16 or float32"
        else:
            found.videos[video] = StoredArray(found.file, video, tensor.numel() * tensor.element_size())
    found.fps = _fps(read_settings(found.file))
    return found


def read_settings(file: Path) -> dict[str, Any]:
    """What a file of `tools/extract_features.py` says that it was made of; {}: it is another's."""
    if file.suffix.lower() != ".safetensors":
        return {}
    with safe_open(file, framework="pt") as content:
        return json.loads((content.metadata() or {}).get("settings", "{}"))


def _fps(settings: dict[str, Any]) -> float | None:
    frames = settings.get("tensors", {}).get("features", {}).get("frames", {})
    return frames.get("fps", settings.get("fps"))  # where files had it first


# Tensors of any name -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """Tensors by video, in one file of NAME/video or in a folder of a file a video. Nothing is copied."""

    place: Path
    tensors: dict[str, dict[str, Any]]  # name -> what made it, as far as is known
    stored: dict[str, int] | None  # name in the file -> bytes; None: a folder

    def members_of(self, video: str) -> dict[str, Path | StoredArray]:
        """The members of one video that are there."""
        if self.stored is None:
            (name,) = self.tensors
            if not is_bare(video):
                return {}
            files = (self.place / f"{video}{ending}" for ending in _FOLDER_ENDINGS)
            return next(({f"{name}.npy": file} for file in files if file.is_file()), {})
        return {
            f"{name}.safetensors": StoredArray(self.place, f"{name}/{video}", self.stored[f"{name}/{video}"])
            for name in self.tensors
            if f"{name}/{video}" in self.stored
        }


_FOLDER_ENDINGS = (".npy", ".pkl")  # of one array each


def is_bare(video: str) -> bool:
    """Whether a name of a stranger's can be that of a file in a folder, and of none elsewhere."""
    return video not in ("", ".", "..") and not set(video) & {"/", "\\", "\0"}


def open_tensor_files(given: Sequence[str]) -> list[TensorFile]:
    """Each of FILE.safetensors (of tools/extract_features.py) or NAME=FOLDER (of VIDEO.npy or VIDEO.pkl, as published).

    UserError: it cannot be read, is of another kind, or two hold tensors of one name.
    """
    found: list[TensorFile] = []
    for text in given:
        name, equals, folder = text.rpartition("=")
        opened = _open_folder(name, Path(folder)) if equals else _open_file(Path(text))
        for other in found:
            twice = opened.tensors.keys() & other.tensors.keys()
            if twice:
                raise UserError(f"{other.place} and {opened.place} both hold {min(twice)}: give one")
        found.append(opened)
    return found


def _open_file(file: Path) -> TensorFile:
    loaders = open_tensors(file)
    tensors = read_settings(file).get("tensors", {})
    if not tensors or "features" in tensors:
        raise UserError(
            f"{file} does not say which tensors it holds, as files of tools/extract_features.py do; features of frames "
            "go among --annotations, and a folder is given as NAME=FOLDER"
        )
    sizes = {name: _nbytes(load()) for name, load in loaders.items()}  # mapped, not read
    return TensorFile(place=file, tensors=tensors, stored=sizes)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _open_folder(name: str, folder: Path) -> TensorFile:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(f"{name}={folder}: a name is made of a to z, 0 to 9 and _")
    if not folder.is_dir():
        raise UserError(f"{name}={folder}: there is no such folder")
    return TensorFile(place=folder, tensors={name: {"files": str(folder)}}, stored=None)


def with_tensors(items: Iterable[Sample | Rejected], files: Sequence[TensorFile]) -> Iterator[Sample | Rejected]:
    """The items, with the tensors of each as members; one that lacks some is kept, with a warning."""
    for item in items:
        if isinstance(item, Sample):
            for file in files:
                members = file.members_of(item.key)
                item.members |= members
                lost = file.tensors.keys() - {name.partition(".")[0] for name in members}
                item.warnings += tuple(f"no {name} of this video in {file.place}" for name in sorted(lost))
        yield item


# Files of either kind among a source's annotations ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenFeatures:
    """The features among the annotations of a source whose records need no video where they have features."""

    frames: FeatureFile | None
    tensors: tuple[TensorFile, ...]

    def add_to(self, sample: Sample, fps: float) -> None:
        """Gives a sample its members, and warnings for those that it has not. `fps`: of features of frames, where their
        file does not say it."""
        if self.frames is not None and (lacking := self.frames.add_to(sample, fps)):
            sample.warnings += (lacking,)
        for _ in with_tensors((sample,), self.tensors):
            pass


def take_features(annotations: Sequence[Path]) -> tuple[list[Path], GivenFeatures]:
    """(the other annotations, the features: files, or NAME=FOLDER).

    UserError: a file cannot be read, or two hold features of one name.
    """
    folders = [path for path in annotations if re.match(r"[a-z0-9_]+=", str(path)) and not path.exists()]
    others = [path for path in annotations if path not in folders and (not is_features(path) or path.is_dir())]
    files = [path for path in annotations if path not in (*others, *folders)]
    named = [file for file in files if read_settings(file).get("tensors", {}).keys() - {"features"}] + folders
    frames = open_features([file for file in files if file not in named])
    return others, GivenFeatures(frames=frames, tensors=tuple(open_tensor_files([str(file) for file in named])))
