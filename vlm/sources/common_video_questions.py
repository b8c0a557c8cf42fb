"""What sources of free questions about whole videos share: rows put together by video, and the files of videos.

A record is one video with all that is asked about it, so that it is stored, and its features are computed, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.sources.common import VideoFinder
from vlm.sources.common_features import GivenFeatures, is_bare
from vlm.types import Rejected, Sample

ARRAYS = (".npy", ".pkl")


@dataclass(slots=True, kw_only=True)
class AskedVideo:
    """A video and its questions."""

    name: str
    where: str  # file and row of the first
    file: str
    rows: list[dict[str, str]] = field(default_factory=list)  # {kind, question, answer, …}
    annotation: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class ArrayFolder:
    """A folder of arrays as they are published, VIDEO.pkl or VIDEO.npy: the member `name` of records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        every = any(True for _ in folder.glob("*_all.pkl"))  # the fork's name for all states of the tower
        self.name = folder.name if folder.name.startswith("clip_") else "clip_states" if every else "clip_pooled"

    def add_to(self, sample: Sample, names: Sequence[str]) -> None:
        files = (self.folder / f"{name}{suffix}" for name in names if is_bare(name) for suffix in ARRAYS)
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            sample.warnings += (f"no features of video {sample.key!r} in {self.folder}",)
        else:
            sample.members[f"{self.name}.npy"] = file


def is_array_folder(path: Path) -> bool:
    return path.is_dir() and any(file.suffix.lower() in ARRAYS for file in path.iterdir())


def samples(
    videos: Iterable[AskedVideo],
    finder: VideoFinder,
    names_of: Callable[[str], Sequence[str | Path]],
    features: GivenFeatures,
    folders: Sequence[ArrayFolder],
    fps: float = 1.0,
) -> Iterator[Sample | Rejected]:
    """A sample for each video with `chat`; Rejected is one that is found neither as a file nor among the features.

    Args:
        names_of: name of a video -> what its file may be called, without suffix, best first, or a Path below the root.
    """
    for video in videos:
        names = names_of(video.name)
        found = _find(finder, names)
        sample = Sample(
            key=video.name,
            video=found if isinstance(found, Path) else None,
            annotation={"video": video.name, **video.annotation, "chat": video.rows},
            warnings=tuple(video.warnings),
        )
        features.add_to(sample, fps)
        for folder in folders:
            folder.add_to(sample, [video.name, *(name for name in names if isinstance(name, str))])
        if sample.video is None and not sample.members:
            yield Rejected(video.name, f"{video.where}: {found} ({len(video.rows)} questions are about it)", video.file)
            continue
        if sample.video is None:
            sample.warnings += (str(found),)
        yield sample


def _find(finder: VideoFinder, names: Sequence[str | Path]) -> Path | str:
    """The first that there is, or why there is none; of several files of one name none is taken."""
    reason = ""
    for name in names:
        if isinstance(name, Path):
            if (finder.root / name).is_file():
                return finder.root / name
            continue
        found = finder.find(name)
        if isinstance(found, Path):
            return found
        if found[0].isdigit():
            return found
        reason = reason or found
    return reason
