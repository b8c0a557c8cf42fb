"""Videos -> what a frozen encoder makes of their frames, video after video.

An encoder is a module on the device that is to compute. It is called with pictures (n, …), as a reader gives them
(vlm/data/frame_readers.py), and returns a tensor (n, …), called `features`, or several by name. If it has `join`, that
makes of all rows of one video, (frames, …) or a dictionary of them, what is stored of it: tensors of any names and
shapes. If it has `pool`, the rows of a video are not kept: what `pool()` returns takes them in as they come, by `add`
of a dictionary of them on the encoder's device, and `finish` returns what is stored (vlm/models/frame_pools.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlm.data.frame_pool import End, Frames, Reader, read_frames
from vlm.types import UserError

FEATURES = "features"  # name of the only tensor of an encoder that gives none


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How features are computed."""

    encoder: nn.Module
    reader: Reader
    dtype: torch.dtype  # of what is stored, where it is made of floating-point numbers
    batch_size: int  # frames, of several videos
    workers: int  # decoding processes; 0: none


class Encoded(NamedTuple):
    """What came of the video items[at]."""

    at: int
    tensors: dict[str, Tensor]  # empty where it failed
    frames: int
    failure: str = ""  # one sentence; "": none
    warnings: tuple[str, ...] = ()


def encode(
    items: Sequence[Any], work: Work, name: Callable[[int], str], ends: Collection[int] = ()
) -> Iterator[Encoded]:
    """One of each item, in order. The same items and batch size fill the same batches, however many processes decode.

    Args:
        name: what to call items[at] in a message.
        ends: items after which a batch ends, full or not.

    Raises UserError for numbers that the dtype cannot hold.
    """
    batcher = _Batcher(work, name)
    videos: deque[_Video] = deque()
    pool = getattr(work.encoder, "pool", _Rows)
    for event in read_frames(items, work.reader, workers=work.workers):
        if not videos or videos[-1].at != event.at:
            videos.append(_Video(event.at, pool()))
        elif isinstance(event, Frames) and event.begins:  # again, after a process was lost
            videos[-1] = _Video(event.at, pool())
        if isinstance(event, Frames):
            batcher.add(videos[-1], event.pixels, event.times)
        else:
            videos[-1].end = event
            if event.at in ends:
                batcher.flush()
        while videos and videos[0].complete:
            yield videos.popleft().encoded(work.encoder)
    batcher.flush()
    for video in videos:
        yield video.encoded(work.encoder)


@dataclass(slots=True)
class _Video:
    """A video between its first frame and its last feature."""

    at: int
    pool: Any  # what takes its rows in
    frames: int = 0
    awaited: int = 0  # pictures read and not yet encoded
    end: End | None = None

    @property
    def complete(self) -> bool:
        return self.end is not None and (not self.awaited or bool(self.end.failure))

    def encoded(self, encoder: nn.Module) -> Encoded:
        assert self.end is not None
        if self.end.failure:
            return Encoded(self.at, {}, self.frames, self.end.failure)
        tensors = self.pool.finish()
        if isinstance(self.pool, _Rows):
            tensors = _joined(encoder, tensors)
        return Encoded(self.at, tensors, self.frames, warnings=self.end.warnings)


class _Rows:
    """Keeps all rows of a video."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, rows: dict[str, Tensor]) -> None:
        for name, these in rows.items():
            self.rows.setdefault(name, []).append(these.cpu())

    def finish(self) -> dict[str, Tensor]:
        return {name: torch.cat(rows) for name, rows in self.rows.items()}


def _joined(encoder: nn.Module, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    join = getattr(encoder, "join", None)
    if join is None:
        return rows
    made = join(rows[FEATURES] if rows.keys() == {FEATURES} else rows)
    return dict(made) if isinstance(made, Mapping) else {FEATURES: made}


class _Batcher:
    """Fills batches with the frames of several videos and encodes them."""

    def __init__(self, work: Work, name: Callable[[int], str]) -> None:
        self.encoder, self.size, self.dtype, self.name = work.encoder, work.batch_size, work.dtype, name
        self.device = next((t.device for t in (*work.encoder.parameters(), *work.encoder.buffers())), "cpu")
        self.waiting: list[tuple[_Video, np.ndarray, np.ndarray]] = []  # pictures and how many times each comes
        self.count = 0

    def add(self, video: _Video, pixels: np.ndarray, times: np.ndarray) -> None:
        video.awaited += len(pixels)
        video.frames += int(times.sum())
        while self.count + len(pixels) >= self.size:
            room = self.size - self.count
            self.waiting.append((video, pixels[:room], times[:room]))
            self.flush()
            pixels, times = pixels[room:], times[room:]
        if len(pixels):
            self.waiting.append((video, pixels, times))
            self.count += len(pixels)

    @torch.inference_mode()
    def flush(self) -> None:
        if not self.waiting:
            return
        pixels = torch.from_numpy(np.concatenate([part for _, part, _ in self.waiting]))
        made = self.encoder(pixels.to(self.device))
        outputs = {name: self._stored(rows) for name, rows in _named(made).items()}
        begin = 0
        for video, part, times in self.waiting:
            mine = {name: rows[begin : begin + len(part)] for name, rows in outputs.items()}
            for name, rows in mine.items():
                if rows.is_floating_point() and not rows.isfinite().all():
                    raise UserError(
                        f"{name} of {self.name(video.at)!r} are beyond {str(self.dtype).removeprefix('torch.')}, or no "
                        "numbers: is the encoder (or --dtype, --precision) right?"
                    )
            if (times > 1).any():
                counts = torch.from_numpy(times).to(self.device)
                mine = {name: rows.repeat_interleave(counts, dim=0) for name, rows in mine.items()}
            video.pool.add(mine)
            begin += len(part)
            video.awaited -= len(part)
        self.waiting.clear()
        self.count = 0

    def _stored(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype) if rows.is_floating_point() else rows


def _named(made: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {FEATURES: made} if isinstance(made, Tensor) else dict(made)
