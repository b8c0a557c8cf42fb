"""Which pictures of a video an encoder of frames is given, at a rate.

    reader = RateReader(fps=1.0, prepare=CentreCrop(short_side=224, crop=224))
    list(reader(Path("a.mp4"), warnings))

An image is a video of one frame. Items are files or, with `shards`, rows of a shard set. The frames that recipes about
frames see: vlm/data/look_reader.py. This file imports no torch, for processes that only decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.data.video import DecodeError, frames_at

if TYPE_CHECKING:
    from vlm.data.shard_set import ShardSet

Prepare = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) of any size -> a picture of one size; picklable


@dataclass(frozen=True, slots=True, kw_only=True)
class RateReader:
    """The pictures on show at seconds 0, 1 / fps, 2 / fps …"""

    fps: float
    prepare: Prepare
    shards: ShardSet | None = None

    def __call__(self, item: Any, warnings: list[str]) -> Iterator[np.ndarray]:
        """DecodeError, ShardError, OSError: it cannot be read."""
        return map(self.prepare, frames_at(self._video(item), self.fps, warnings))

    def _video(self, item: Any) -> Path | bytes:
        if self.shards is None:
            return Path(item)
        record = self.shards.read(item, members=("video",))
        if record.video is None:
            raise DecodeError(f"record {record.key!r} of {record.shard} has no video")
        return record.video

    def described(self) -> dict[str, Any]:
        """What decides over the pictures, JSON-able."""
        return {"fps": self.fps, "pictures": {type(self.prepare).__name__: dataclasses.asdict(self.prepare)}}  # type: ignore[call-overload]
