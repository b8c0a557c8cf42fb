"""A file of features of many videos that is made piece by piece, and never seen half made.

    FILE.parts/settings.json    what the features are made of, written first: other settings are refused
    FILE.parts/part-*.safetensors   each with its videos, written atomically
    FILE.rejected.json          videos that have none, with the reason
    FILE                        written last; then the parts go

FILE is safetensors: video -> (frames, width) float16, as published files are, and in its metadata `settings` and
`warnings` (both JSON). Tensors that are not called `features` are NAME/video, of any shape and dtype, and `settings`
says in `tensors` what made each NAME. Videos that were rejected are tried again by the next run, with FILE there or
not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlm.config import differences
from vlm.types import Rejected, UserError
from vlm.weights import atomic_file, open_tensors, write_safetensors

FEATURES = ("features",)
_MOST_HEADER, _HEADER_ENTRY = (
    100_000_000,
    100,
)  # bytes: what safetensors reads at most, and a tensor takes beside its name
Warnings = dict[str, tuple[str, ...]]  # video -> what the user should know though it is kept


class FeatureFiles:
    """The files of one extraction.

    Args:
        settings: JSON-able; what decides over the features.
        names: of the tensors of each video.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], names: Collection[str] = FEATURES) -> None:
        if file.suffix != ".safetensors":
            raise UserError(f"{file}: features are written as .safetensors (and from it, on demand, as .pth)")
        self.file = file
        self.names = tuple(sorted(names))
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.parts = beside(file, "parts")
        self.rejections = beside(file, "rejected.json")

    @contextmanager
    def held(self) -> Iterator[None]:
        """This process's alone, until it ends in whatever way. UserError: another holds it, or other settings."""
        if self.file.exists():
            self._refuse_others(self.file, read_settings(self.file))
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            lock = (self.parts / "lock").open("w")
        except OSError as error:
            raise UserError(f"{self.parts} cannot be written: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is writing {self.file}: wait for it, or choose another --out"
                ) from error
            for left in self.file.parent.glob(f".{self.file.name}.*"):  # by one that was killed while it joined
                left.unlink()
            settings = self.parts / "settings.json"
            if settings.exists():
                self._refuse_others(self.parts, json.loads(settings.read_text()))
            else:
                with atomic_file(settings) as out:
                    out.write(json.dumps(self.settings, indent=1).encode())
            yield
            if self.file.exists() and not any(self.parts.glob("part-*")):
                shutil.rmtree(self.parts)

    def _refuse_others(self, place: Path, begun: Any) -> None:
        if begun != self.settings:
            found = "; ".join(differences(begun, self.settings))
            raise UserError(
                f"{place} was begun with other settings ({found}; there -> now): features of two kinds would be mixed. "
                "Choose another --out, or remove it"
            )

    def _sources(self) -> list[Path]:
        return [path for path in (self.file, *sorted(self.parts.glob("part-*.safetensors"))) if path.exists()]

    def done(self) -> set[str]:
        """Videos that have features already."""
        stored = {name for path in self._sources() for name in open_tensors(path)}
        if self.names == FEATURES:
            return stored
        first = f"{self.names[0]}/"  # a part has all of a video or nothing
        return {name.removeprefix(first) for name in stored if name.startswith(first)}

    def write_part(self, videos: Mapping[str, Mapping[str, Tensor]], warnings: Warnings) -> None:
        """Keep the tensors of some videos, by video and name, whatever happens next."""
        for video, tensors in videos.items():
            if tuple(sorted(tensors)) != self.names:
                raise UserError(f"the encoder gave {sorted(tensors)} of {video!r}, not {list(self.names)}")
        name = hashlib.sha256("\n".join(sorted(videos)).encode()).hexdigest()[:16]
        stored = {
            stored_name(name, video): tensor.contiguous()
            for video, tensors in videos.items()
            for name, tensor in tensors.items()
        }
        write_safetensors(self.parts / f"part-{name}.safetensors", stored, {"warnings": json.dumps(warnings)})

    def finish(self, videos: Iterable[str], rejected: Iterable[Rejected], max_rejected: float) -> dict[str, int]:
        """Join the parts: FILE of those of `videos` that have features, after the list of those that have none.

        Returns counts. UserError: more than the share `max_rejected` has none; FILE is not written then, parts stay.
        """
        wanted = list(videos)
        loaders: dict[str, Any] = {}
        warnings: dict[str, Any] = {}
        for path in self._sources():
            loaders |= open_tensors(path)
            warnings |= _read_json(path, "warnings")
        kept = {video for video in wanted if stored_name(self.names[0], video) in loaders}
        features = {  # mapped, not read
            stored: loaders[stored]() for video in wanted if video in kept for stored in map(_of(video), self.names)
        }
        warnings = {video: warnings[video] for video in sorted(kept) if video in warnings}
        lost = sorted(rejected)
        missing = set(wanted) - kept - {row.key for row in lost}
        assert not missing, f"neither features nor a reason: {sorted(missing)[:5]}"
        frames = sum(len(features[stored_name(self.names[0], video)]) for video in kept)
        counts = {"listed": len(kept) + len(lost), "kept": len(kept), "rejected": len(lost), "frames": frames,
                  "warnings": len(warnings)}  # fmt: skip
        report = {"counts": counts, "rejected": [row._asdict() for row in lost], "warnings": warnings}
        with atomic_file(self.rejections) as out:
            out.write(json.dumps(report, indent=1, ensure_ascii=False).encode())
        if len(lost) > max_rejected * counts["listed"] or not features:
            reasons = "; ".join(f"{row.key}: {row.reason}" for row in lost[:3])
            raise UserError(
                f"{len(lost)} of {counts['listed']} items have no features, more than the share of {max_rejected} that "
                f"--max-failed allows ({reasons}{'; …' if len(lost) > 3 else ''}): see {self.rejections}. {self.file} "
                "is not written; what is done stays, the same command tries the rest again"
            )
        if sum(map(len, features)) + _HEADER_ENTRY * len(features) > _MOST_HEADER:
            raise UserError(
                f"{self.file}: {len(features)} tensors are more than one file can name; make shards of the videos, "
                "then features of these (--shards)"
            )
        metadata = {"settings": json.dumps(self.settings), "warnings": json.dumps(warnings)}
        if set(self._sources()) != {self.file} or features.keys() != open_tensors(self.file).keys():
            write_safetensors(self.file, features, metadata)
        for part in self.parts.glob("part-*"):
            part.unlink()
        return counts


def stored_name(name: str, video: str) -> str:
    """What the tensor `name` of a video is called in a file."""
    return video if (name,) == FEATURES else f"{name}/{video}"


def _of(video: str) -> Callable[[str], str]:
    return lambda name: stored_name(name, video)


def beside(file: Path, ending: str) -> Path:
    """FILE.parts and its like: `a/train.safetensors` -> `a/train.parts`."""
    return file.with_name(f"{file.stem}.{ending}")


def read_settings(file: Path) -> dict[str, Any]:
    """What a features file says that it was made of; {} where it says nothing, as published ones."""
    return _read_json(file, "settings")


def _read_json(file: Path, name: str) -> Any:
    open_tensors(file)  # refuses a damaged one
    with safe_open(file, framework="pt") as content:
        return json.loads((content.metadata() or {}).get(name, "{}"))


def write_published(file: Path, published: Path) -> None:
    """The features of `file` in the layout of published ones: a torch file of a dictionary video -> tensor."""
    features = {video: read().clone() for video, read in open_tensors(file).items()}
    with atomic_file(published) as out:
        torch.save(features, out)
