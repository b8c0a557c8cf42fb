"""Videos that are talked about: what was seen of each, worked out once, in memory that is bounded."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image

from vlm.data.glance import Glance
from vlm.types import Example, UserError

MEMORY = 1 << 30  # bytes of videos' features and pictures that are kept


class Picture(NamedTuple):
    """A frame to look at."""

    jpeg: bytes
    second: float  # of the video, at which it is on show


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A video that can be talked about."""

    key: str  # sha256 of its content
    example: Example  # what the model reads of it
    pictures: tuple[Picture, ...]  # (): its shard has features alone
    about: str  # one line: frames, seconds, size
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        read = (self.example.frames, self.example.frame_tokens, self.example.features, *self.example.extra.values())
        return sum(t.nbytes for t in read if t is not None) + sum(len(picture.jpeg) for picture in self.pictures)


class Library:
    """Videos by their content: each is worked out once, for as long as somebody holds it and there is room.

    Those used least recently leave when there are more bytes than `memory`, held or not; who still asks about one is
    told to choose it again. One too many users therefore costs time, never the program.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory
        self.made = 0  # videos that were worked out so far
        self._videos: OrderedDict[str, Seen] = OrderedDict()
        self._holders: dict[str, set[str]] = {}
        self._busy: WeakValueDictionary[str, Any] = WeakValueDictionary()  # locks of videos that are in the works
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], Seen], holder: str) -> Seen:
        """The video of this key, made if it is not there; `holder` then holds it. Two who ask at once wait for one."""
        with self._lock:
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:
            with self._lock:
                seen = self._videos.get(key)
            if seen is None:
                seen = make()
            with self._lock:
                self.made += key not in self._videos
                self._videos[key] = seen
                self._videos.move_to_end(key)
                self._holders.setdefault(key, set()).add(holder)
                self._shrink(key)
        return seen

    def find(self, key: str) -> Seen:
        """UserError: it is not there any more."""
        with self._lock:
            if key not in self._videos:
                raise UserError("This video was put away, since others needed the memory: please choose it again.")
            self._videos.move_to_end(key)
            return self._videos[key]

    def release(self, holder: str) -> None:
        """`holder` is gone; what nobody else holds goes too."""
        with self._lock:
            for key in [key for key, holders in self._holders.items() if holder in holders]:
                self._holders[key].discard(holder)
                if not self._holders[key]:
                    self._drop(key)

    def __len__(self) -> int:
        return len(self._videos)

    def _shrink(self, newest: str) -> None:
        while sum(seen.nbytes for seen in self._videos.values()) > self.memory and len(self._videos) > 1:
            oldest = next(key for key in self._videos if key != newest)
            self._drop(oldest)

    def _drop(self, key: str) -> None:
        self._videos.pop(key, None)
        self._holders.pop(key, None)


def hash_file(path: Path) -> str:
    """sha256 of a file's content. UserError: it cannot be read, or is none: a pipe or a device may have no end."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path.name}: cannot be read: it is no file but a pipe or a device")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path.name}: cannot be read: {why}") from error


def pictures_of(glance: Glance) -> tuple[Picture, ...]:
    """The frames of a first look."""
    return tuple(Picture(_jpeg(frame), second) for frame, second in zip(glance.pictures, glance.seconds, strict=True))


def about(glance: Glance) -> str:
    """One line on a video or an image."""
    info = glance.info
    size = f"{info.width} x {info.height}"
    if glance.is_image:
        return f"an image, {size}"
    length = f"{info.duration:.1f} s" if info.duration else "of unknown length"
    return f"{length}, {info.num_frames:,} frames, {size}"


def _jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=85)
    return file.getvalue()
