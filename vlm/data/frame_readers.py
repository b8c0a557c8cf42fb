"""Which pictures of a video an encoder of frames is given, at a rate.

    reader = RateReader(fps=1.0, prepare=CentreCrop(short_side=224, crop=224))
    list(reader(Path("a.mp4"), warnings))

An image is a video of one frame. Items are files (`Listed`: with their keys), records or, with `shards`, rows of a
shard set. The frames that recipes about frames see: vlm/data/look_reader.py; so many of a video, whatever its length:
vlm/data/spread_reader.py. This file imports no torch, for processes that only decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm.data.video import DecodeError, frames_at

if TYPE_CHECKING:
    from vlm.data.shard_set import ShardSet
    from vlm.types import Record

Prepare = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) of any size -> a picture of one size; picklable


class Listed(NamedTuple):
    """A file as a source lists it."""

    key: str
    path: Path


class Opened(NamedTuple):
    """A video to be read."""

    key: str
    data: Path | bytes
    num_frames: int  # that decode; -1: nobody has looked yet


def open_item(item: Any, shards: ShardSet | None) -> Opened:
    """A file, a `Listed`, a record, or a row of `shards`. DecodeError, ShardError: the record cannot be read."""
    if shards is not None:
        item = shards.read(item, members=("video",))
    if isinstance(item, Listed):
        return Opened(item.key, item.path, -1)
    if isinstance(item, (str, Path)):
        return Opened(Path(item).stem, Path(item), -1)
    record: Record = item
    if record.video is None:
        raise DecodeError(f"record {record.key!r} of {record.shard} has no video")
    return Opened(record.key, record.video, record.num_frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateReader:
    """The pictures on show at seconds 0, 1 / fps, 2 / fps …"""

    fps: float
    prepare: Prepare
    shards: ShardSet | None = None

    def __call__(self, item: Any, warnings: list[str]) -> Iterator[np.ndarray]:
        """DecodeError, ShardError, OSError: it cannot be read."""
        return map(self.prepare, frames_at(open_item(item, self.shards).data, self.fps, warnings))

    def described(self) -> dict[str, Any]:
        """What decides over the pictures, JSON-able."""
        return {"fps": self.fps, "pictures": pictures_of(self.prepare)}


def pictures_of(prepare: Prepare) -> dict[str, Any]:
    """How pictures are made, JSON-able."""
    return {type(prepare).__name__: dataclasses.asdict(prepare)}  # type: ignore[call-overload]
