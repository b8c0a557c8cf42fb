"""Features of the frames of many videos, by an encoder of frames, in any number of processes: into one file.

Each process takes a share of the videos that have no features yet, encodes it (vlm/run/encode.py), and writes what is
done in parts (vlm/data/feature_files.py); the first joins them. Shard sets: vlm/run/extract_shards.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm.data.feature_files import FeatureFiles
from vlm.data.frame_pool import Frames, Reader, read_frames
from vlm.data.frame_readers import Listed
from vlm.distributed import World, from_main, gather_objects
from vlm.run.encode import Encoded, Work, encode
from vlm.sources.common_loading import load_source
from vlm.sources.common_segments import ALL
from vlm.types import Rejected, Sample, UserError

VIDEOS_A_PART = 256
PART_BYTES = 256 << 20  # of features that wait to be written, more or less

Progress = Callable[[int, int, int], None]  # videos done, of how many, frames done: of this process


class Listing(NamedTuple):
    """What a source lists: videos by key, and what cannot have features."""

    videos: dict[str, Path]
    rejected: list[Rejected]


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


def list_source(name: str, root: Path, split: str, annotations: Sequence[Path]) -> Listing:
    """The videos of a split of a source. UserError: there is none."""
    source = load_source(name)
    bare = split == ALL and not annotations and hasattr(source, "unlabelled")
    listing = list_videos(source.unlabelled(root) if bare else ())  # features need no labels
    if not listing.videos:
        listing = list_videos(source.read(root, split, annotations))
    if not listing.videos:
        reasons = "; ".join(row.reason for row in listing.rejected[:3])
        raise UserError(f"{name}, split {split}: no video is found ({reasons or 'nothing is listed'})")
    return listing


def extract(
    listing: Listing,
    files: FeatureFiles,
    work: Work,
    *,
    save_every: float,
    world: World,
    max_failed: float,
    progress: Progress,
) -> dict[str, int]:
    """Compute what is missing of the features of a listing, and join all. Returns counts, in every process.

    Called by all processes of `world` alike. UserError: see FeatureFiles; features that the dtype cannot hold.

    Args:
        save_every: seconds between parts.
        max_failed: share of the items without features beyond which the file is not written.
    """
    with ExitStack() as stack:

        def begin() -> list[str]:
            stack.enter_context(files.held())
            done = files.done()
            return [key for key in listing.videos if key not in done]

        missing = from_main(world, begin)
        share = missing[world.rank :: world.size]
        rejected = _encode_share({key: listing.videos[key] for key in share}, files, work, save_every, progress)
        gathered = gather_objects(rejected)

        def finish() -> dict[str, int]:
            lost = [*listing.rejected, *(row for rows in gathered or () for row in rows)]
            return files.finish(listing.videos, lost, max_failed)

        return from_main(world, finish)


def sample_frames(paths: Sequence[Path], reader: Reader, workers: int, most: int) -> Tensor:
    """uint8 (n, h, w, 3): at most `most` frames, evenly spread over up to 512 of the videos that can be read."""
    chosen = [paths[at] for at in np.unique(np.linspace(0, len(paths) - 1, min(512, len(paths))).astype(int))]
    found: dict[int, list[np.ndarray]] = {}
    failed = set()
    for event in read_frames(chosen, reader, workers=workers):
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


def _encode_share(
    videos: dict[str, Path], files: FeatureFiles, work: Work, save_every: float, progress: Progress
) -> list[Rejected]:
    """Features of these videos, written in parts. Returns those that have none."""
    keys = list(videos)
    rejected: list[Rejected] = []
    saver = _Saver(files, save_every)
    frames = 0
    listed = [Listed(key, path) for key, path in videos.items()]
    for done in encode(listed, work, keys.__getitem__):
        key = keys[done.at]
        frames += done.frames
        if done.failure:
            rejected.append(Rejected(key, f"{videos[key]}: {done.failure}", str(videos[key])))
        else:
            saver.take(key, done)
        progress(saver.videos + len(rejected), len(keys), frames)
    saver.save()
    progress(saver.videos + len(rejected), len(keys), frames)
    return rejected


class _Saver:
    """Collects videos and writes a part when there are many, or after a time."""

    def __init__(self, files: FeatureFiles, every: float) -> None:
        self.files, self.every = files, every
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.warnings: dict[str, tuple[str, ...]] = {}
        self.videos = 0  # taken so far
        self.nbytes = 0  # waiting
        self.saved = time.monotonic()

    def take(self, key: str, done: Encoded) -> None:
        self.tensors[key] = done.tensors
        if done.warnings:
            self.warnings[key] = done.warnings
        self.videos += 1
        self.nbytes += sum(tensor.numel() * tensor.element_size() for tensor in done.tensors.values())
        full = len(self.tensors) >= VIDEOS_A_PART or self.nbytes >= PART_BYTES
        if full or time.monotonic() - self.saved >= self.every:
            self.save()

    def save(self) -> None:
        if self.tensors:
            self.files.write_part(self.tensors, self.warnings)
        self.tensors, self.warnings, self.nbytes, self.saved = {}, {}, 0, time.monotonic()
