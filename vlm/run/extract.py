"""Features of the frames of many videos, by an encoder of frames, in any number of processes.

Each process takes a share of the videos that have no features yet, decodes them ahead in processes of its own, encodes
batches of frames of several videos, and writes what is done in parts (vlm/data/feature_files.py); the first joins them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlm.data.feature_files import FeatureFiles
from vlm.data.frame_pool import End, Frames, Prepare, read_frames
from vlm.distributed import World, from_main, gather_objects
from vlm.types import Rejected, Sample, UserError

VIDEOS_A_PART = 256

Progress = Callable[[int, int, int], None]  # videos done, of how many, frames done: of this process


class Listing(NamedTuple):
    """What a source lists: videos by key, and what cannot have features."""

    videos: dict[str, Path]
    rejected: list[Rejected]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How features are computed; `encoder` lies on the device that is to compute."""

    encoder: nn.Module  # uint8 (n, h, w, 3) -> (n, D); may have `join`, from one video's features (n, D) to others
    prepare: Prepare
    fps: float
    batch_size: int  # frames
    workers: int  # decoding processes; 0: none
    save_every: float  # seconds between parts


def list_videos(items: Iterable[Sample | Rejected]) -> Listing:
    """The videos of a source's items; an item without one, or with the key of another, is rejected."""
    videos: dict[str, Path] = {}
    rejected: list[Rejected] = []
    for item in items:
        if isinstance(item, Rejected):
            rejected.append(item)
        elif item.video is None:
            rejected.append(Rejected(item.key, "no video file of it is found below --root", ""))
        elif item.key in videos:
            rejected.append(Rejected(item.key, f"the key is taken by {videos[item.key]}", str(item.video)))
        else:
            videos[item.key] = item.video
    return Listing(videos, rejected)


def extract(
    listing: Listing, files: FeatureFiles, work: Work, *, world: World, max_failed: float, progress: Progress
) -> dict[str, int]:
    """Compute what is missing of the features of a listing, and join all. Returns counts, in every process.

    Called by all processes of `world` alike. UserError: see FeatureFiles; features that float16 cannot hold.
    """
    with ExitStack() as stack:

        def begin() -> list[str]:
            stack.enter_context(files.held())
            done = files.done()
            return [key for key in listing.videos if key not in done]

        missing = from_main(world, begin)
        share = missing[world.rank :: world.size]
        rejected = _encode_share({key: listing.videos[key] for key in share}, files, work, progress)
        gathered = gather_objects(rejected)

        def finish() -> dict[str, int]:
            lost = [*listing.rejected, *(row for rows in gathered or () for row in rows)]
            return files.finish(listing.videos, lost, max_failed)

        return from_main(world, finish)


def sample_frames(paths: Sequence[Path], work_fps: float, prepare: Prepare, workers: int, most: int) -> Tensor:
    """uint8 (n, h, w, 3): at most `most` frames, evenly spread over up to 512 of the videos that can be read."""
    chosen = [paths[at] for at in np.unique(np.linspace(0, len(paths) - 1, min(512, len(paths))).astype(int))]
    found: dict[int, list[np.ndarray]] = {}
    failed = set()
    for event in read_frames(chosen, fps=work_fps, prepare=prepare, workers=workers):
        if isinstance(event, Frames):
            found[event.at] = [*([] if event.begins else found[event.at]), event.pixels]
        elif event.failure:
            failed.add(event.at)
    good = [chunk for at in sorted(found) if at not in failed for chunk in found[at]]
    if not good:
        raise UserError(f"none of {len(chosen)} videos can be read, such as {chosen[0] if chosen else 'none'}")
    frames = np.concatenate(good)
    return torch.from_numpy(frames[np.linspace(0, len(frames) - 1, min(most, len(frames))).astype(int)])


# One process's share --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Video:
    """A video between its first frame and its last feature."""

    key: str
    rows: list[Tensor] = field(default_factory=list)
    awaited: int = 0  # frames read and not yet encoded
    end: End | None = None

    @property
    def complete(self) -> bool:
        return self.end is not None and not self.awaited


def _encode_share(videos: dict[str, Path], files: FeatureFiles, work: Work, progress: Progress) -> list[Rejected]:
    """Features of these videos, written in parts. Returns those that have none."""
    keys = list(videos)
    rejected: list[Rejected] = []
    saver = _Saver(files, work.save_every, getattr(work.encoder, "join", lambda features: features))
    batcher = _Batcher(work)
    reading: dict[int, _Video] = {}
    frames = 0
    for event in read_frames(list(videos.values()), fps=work.fps, prepare=work.prepare, workers=work.workers):
        if isinstance(event, Frames):
            if event.begins:
                reading[event.at] = _Video(keys[event.at])
            frames += len(event.pixels)
            saver.take(batcher.add(reading[event.at], event.pixels))
        elif event.failure:
            reading.pop(event.at, None)
            key = keys[event.at]
            rejected.append(Rejected(key, f"{videos[key]}: {event.failure}", str(videos[key])))
        else:
            video = reading.pop(event.at)
            video.end = event
            saver.take([video])
        progress(saver.videos + len(rejected), len(keys), frames)
    saver.take(batcher.flush())
    saver.save()
    progress(saver.videos + len(rejected), len(keys), frames)
    return rejected


class _Batcher:
    """Fills batches with the frames of several videos and encodes them."""

    def __init__(self, work: Work) -> None:
        self.encoder, self.size = work.encoder, work.batch_size
        self.device = next((t.device for t in (*work.encoder.parameters(), *work.encoder.buffers())), "cpu")
        self.waiting: deque[tuple[_Video, np.ndarray]] = deque()
        self.count = 0

    def add(self, video: _Video, pixels: np.ndarray) -> list[_Video]:
        """Takes frames in; returns the videos whose frames were encoded meanwhile."""
        touched: list[_Video] = []
        video.awaited += len(pixels)
        while self.count + len(pixels) >= self.size:
            room = self.size - self.count
            self.waiting.append((video, pixels[:room]))
            touched += self.flush()
            pixels = pixels[room:]
        if len(pixels):
            self.waiting.append((video, pixels))
            self.count += len(pixels)
        return touched

    def flush(self) -> list[_Video]:
        if not self.waiting:
            return []
        pixels = torch.from_numpy(np.concatenate([part for _, part in self.waiting]))
        with torch.inference_mode():
            features = self.encoder(pixels.to(self.device)).half().cpu()
        for video, part in self.waiting:
            rows, features = features[: len(part)], features[len(part) :]
            if not rows.isfinite().all():
                raise UserError(f"features of {video.key!r} are beyond float16: is the encoder (or --dtype) right?")
            video.rows.append(rows)
            video.awaited -= len(part)
        touched = [video for video, _ in self.waiting]
        self.waiting.clear()
        self.count = 0
        return touched


class _Saver:
    """Collects complete videos and writes a part when there are many, or after a time."""

    def __init__(self, files: FeatureFiles, every: float, join: Callable[[Tensor], Tensor]) -> None:
        self.files, self.every, self.join = files, every, join
        self.features: dict[str, Tensor] = {}
        self.warnings: dict[str, tuple[str, ...]] = {}
        self.videos = 0  # taken so far
        self.saved = time.monotonic()

    def take(self, videos: Iterable[_Video]) -> None:
        """Keeps those that are complete and were not kept before."""
        for video in videos:
            if video.complete and video.rows:
                assert video.end is not None
                self.features[video.key] = self.join(torch.cat(video.rows))
                video.rows.clear()
                if video.end.warnings:
                    self.warnings[video.key] = video.end.warnings
                self.videos += 1
        if len(self.features) >= VIDEOS_A_PART or time.monotonic() - self.saved >= self.every:
            self.save()

    def save(self) -> None:
        if self.features:
            self.files.write_part(self.features, self.warnings)
        self.features, self.warnings, self.saved = {}, {}, time.monotonic()
