"""So many pictures of a video, whatever its length, as Video-ChatGPT takes them (arXiv 2306.05424), and altered copies.

    reader = SpreadReader(num_frames=1000, fill=True, prepare=Nearest(width=224, height=224), augment=("flip",))
    list(reader(Path("P03_cereals.avi"), warnings))  # 1000 arrays (2, 224, 224, 3): as it is, and flipped

This file imports no torch, for processes that only decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.data.frame_pool import Again
from vlm.data.frame_readers import Opened, Prepare, open_item, pictures_of
from vlm.data.frame_variants import variant
from vlm.data.sampling import middle_frames
from vlm.data.video import MiscountedError, count_packets, ordered_frames

if TYPE_CHECKING:
    from vlm.data.shard_set import ShardSet


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadReader:
    """The middle of each of `num_frames` equal parts of a video (`middle_frames`).

    A frame that comes several times is the same array each time, so that it is encoded once. The number of frames is
    that of frames that decode; a container that says another one is noticed at its end, and read again.
    """

    num_frames: int
    fill: bool  # a shorter video gives frames several times, until there are so many; else as many as it has
    prepare: Prepare
    augment: tuple[str, ...] = ()  # altered copies of each picture (vlm.data.frame_variants): arrays (1 + V, …) then
    shards: ShardSet | None = None

    def __call__(self, item: Any, warnings: list[str]) -> Iterator[np.ndarray]:
        """DecodeError, ShardError, OSError: it cannot be read."""
        video = open_item(item, self.shards)
        return self._pictures(video, video.num_frames if video.num_frames > 0 else count_packets(video.data), warnings)

    def _pictures(self, video: Opened, num_frames: int, warnings: list[str]) -> Iterator[np.ndarray]:
        if num_frames < 1:  # its packets cannot be told: the count of frames comes at the end
            num_frames = 1
        count = self.num_frames if self.fill else min(self.num_frames, num_frames)
        altered = [variant(name, video.key) for name in self.augment]
        last, made = None, np.empty(0)
        try:
            for picture in ordered_frames(video.data, middle_frames(num_frames, count).tolist(), num_frames, warnings):
                if picture is not last:
                    last, made = picture, self.prepare(picture)
                    if altered:
                        made = np.stack([made, *(self.prepare(alter(picture)) for alter in altered)])
                yield made
        except MiscountedError as error:
            raise Again(self._pictures(video, error.count, warnings)) from error

    def described(self) -> dict[str, Any]:
        """What decides over the pictures, JSON-able; copies are named by who asks for them."""
        said = {"num_frames": self.num_frames, "fill": self.fill, "sampling": "middle"}
        return {**said, "pictures": pictures_of(self.prepare)}
