"""Files of features of frames, published or from `tools/extract_features.py`, as members of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlm.types import Sample, StoredArray, UserError
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
    if found.file.suffix.lower() == ".safetensors":
        with safe_open(found.file, framework="pt") as content:
            settings: dict[str, Any] = json.loads((content.metadata() or {}).get("settings", "{}"))
        found.fps = settings.get("fps")
    return found
