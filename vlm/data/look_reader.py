"""The frames that recipes about frames see, for an encoder that is to compute their features once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.frame_readers import Listed
from vlm.data.frames import Look, see
from vlm.data.rng import SampleRng
from vlm.data.shard_set import ShardSet
from vlm.types import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class LookReader:
    """uint8 (3, size, size) each: evenly spread, without a crop, as `vlm.data.frames.see` gives them to tests.

    Items are files (`Listed`: with keys), records or, with `shards`, rows of a shard set.
    """

    num_frames: int
    size: int
    shards: ShardSet | None = None

    def __call__(self, item: Any, warnings: list[str]) -> Iterator[np.ndarray]:
        """DecodeError, ShardError, OSError: it cannot be read."""
        look = Look(num_frames=self.num_frames, size=self.size, sampling="uniform")
        return iter(see(self._record(item), look, SampleRng(0)).frames.numpy())  # nothing is drawn

    def _record(self, item: Any) -> Record:
        if self.shards is not None:
            return self.shards.read(item, members=("video",))
        if isinstance(item, Record):
            return item
        data = (item.path if isinstance(item, Listed) else Path(item)).read_bytes()
        return Record(key=str(item), shard="", row=0, video=data, annotation={}, num_frames=-1, fps=0, decoders=())

    def described(self) -> dict[str, Any]:
        """What decides over the frames, JSON-able."""
        return {"num_frames": self.num_frames, "size": self.size, "sampling": "uniform"}
