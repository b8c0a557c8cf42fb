"""Who takes part in bench/data.py beside the rivals of rival_loaders.py: our loader and the limit, and how much is
measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from data_clips import Corpus, Drawn
from rival_loaders import EachViewItsFile
from torch import Tensor

from vlm.data import sampling
from vlm.data import transforms as tf
from vlm.data.clips import ClipConfig
from vlm.data.loader import Pipeline, TrainLoader, eval_loader
from vlm.data.mixup import apply_mixing
from vlm.data.pixels import finished
from vlm.data.rng import SampleRng, derive_seed
from vlm.data.shards import ShardSet
from vlm.data.stream import Source, Stream
from vlm.data.video import decode
from vlm.types import Batch, Example

SEED = 0
BATCH = 4  # clips


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    clips: int = 24
    """Different clips that are drawn."""
    records: int = 100
    drawn: Drawn = field(default_factory=Drawn)
    side: int = 224
    turns: int = 16
    """Turns of each contestant; one more comes before."""
    batches: int = 2
    """Batches a turn, of `BATCH` clips."""
    vast_shards: int = 10_000
    vast_rows: int = 100
    """Rows a shard of the vast set."""
    undecoded: int = 1_000_000
    """Samples that are read and not decoded while memory is watched."""
    decoded: int = 5_000
    workers: int = 2
    """Loader processes of the comparison by the clock; 0: there is none."""

    def plain(self) -> ClipConfig:
        """No augmentation, no mixing: the whole frame."""
        return ClipConfig(
            size=self.side, short_side=self.side, repeats=1, randaugment=None, crop_scale=(1.0, 1.0),
            erase_probability=0, mixup=0, cutmix=0, label_smoothing=0, test_clips=1, test_crops=1,
        )  # fmt: skip

    def recipe(self) -> ClipConfig:
        """As the recipe of Something-Something trains and tests."""
        return ClipConfig(size=self.side, short_side=self.side)


QUICK = Size(clips=6, records=20, turns=4, batches=1, vast_shards=10_000, undecoded=20_000, decoded=100, workers=0)


# Ours ----------------------------------------------------------------------------------------------------------------


def train_loader(shards: ShardSet, pipeline: Pipeline, batch: int = BATCH, workers: int = 0) -> TrainLoader:
    """Endless training batches of one process; each step is one of `batch` records."""
    return TrainLoader(
        Stream([Source(shards)], SEED), pipeline, views=("classes",), global_batch_size=batch, world_size=1, rank=0,
        micro_batch_size=batch, start_step=0, stop_step=1 << 40, workers=workers,
    )  # fmt: skip


def our_training(shards: ShardSet, config: ClipConfig, batch: int = BATCH, workers: int = 0) -> Iterator[Batch]:
    """As they leave the loader: whole numbers, for the model to finish."""
    for step in train_loader(shards, config, batch, workers):
        yield step[0].batch


def our_test(shards: ShardSet, config: ClipConfig, records: int) -> Iterator[Batch]:
    """The views of `records` records at a time, stacked."""
    while True:
        waiting: list[Example] = []
        for count, item in enumerate(eval_loader(shards, config, (), SEED, range(len(shards)), 0), 1):
            waiting += item.views[""]
            if count % records == 0:
                yield config.test_batch(waiting)
                waiting = []


def finished_too(batches: Iterator[Batch]) -> Iterator[Tensor]:
    """With what the model does to pixels on its device done here: normalised float32, erased, mixed."""
    for batch in batches:
        yield pixels(batch)


def pixels(batch: Batch) -> Tensor:
    """What the model sees, (B, 3, T, H, W)."""
    video = finished(batch).video
    assert video is not None
    return video


# The limit, and the rival that shows the same ------------------------------------------------------------------------


def positions(shards: ShardSet) -> Iterator[tuple[int, SampleRng]]:
    """(row, generator) of each training position, as the loader has them."""
    stream = Stream([Source(shards)], SEED)
    position = 0
    while True:
        yield stream.samples(position)[0].sample, SampleRng(derive_seed("sample", SEED, position))
        position += 1


def limit_training(shards: ShardSet, config: ClipConfig) -> Iterator[Tensor]:
    """Frames decoded and resized, (B, T, size, size, 3) uint8, and nothing else."""
    batch = torch.empty((BATCH, config.num_frames, config.size, config.size, 3), dtype=torch.uint8)
    for count, (row, rng) in enumerate(positions(shards), 1):
        data, num_frames = _bytes_of(shards, row)
        indices = sampling.segment_frames(num_frames, config.num_frames, rng.numpy)
        frames = decode(data, indices.tolist(), decoders=("decord", "pyav"))
        size = tf.frame_size(frames)
        frames = tf.crop(frames, tf.draw_resized_crop(*size, config.crop_scale, config.crop_ratio, rng.python))
        batch[(count - 1) % BATCH] = torch.from_numpy(tf.resize_frames(frames, config.size))
        if count % BATCH == 0:
            yield batch


def limit_test(shards: ShardSet, config: ClipConfig) -> Iterator[Tensor]:
    """As `limit_training`, of the test's single view."""
    batch = torch.empty((BATCH, config.num_frames, config.size, config.size, 3), dtype=torch.uint8)
    count = 0
    while True:
        for row in range(len(shards)):
            data, num_frames = _bytes_of(shards, row)
            indices = sampling.segment_frames(num_frames, config.num_frames, None)
            frames = decode(data, indices.tolist(), decoders=("decord", "pyav"))
            height, width = tf.short_side_size(*tf.frame_size(frames), config.short_side)
            box = tf.center_box(height, width, config.size)
            batch[count % BATCH] = torch.from_numpy(tf.resize_bilinear(frames, height, width, box))
            count += 1
            if count % BATCH == 0:
                yield batch


def _bytes_of(shards: ShardSet, row: int) -> tuple[bytes, int]:
    """The video of a row, read from its tar with nothing checked, and its frames."""
    entry = shards.index[row]
    with (Path(shards.path) / shards.shard_name(row)).open("rb") as file:
        return os.pread(file.fileno(), int(entry["video_nbytes"]), int(entry["video_offset"])), int(entry["num_frames"])


def each_view_training(corpus: Corpus, config: ClipConfig, batch: int = BATCH) -> Iterator[Tensor]:
    """Training batches of `batch` records of the loader built as VideoMAE's is, mixed as ours are."""
    rival, waiting, first = EachViewItsFile(config), list[Example](), 0
    for position, (row, rng) in enumerate(positions(corpus.shards)):
        waiting += [Example(key="", video=clip, label=0) for clip in rival.train(corpus.files[row], rng)]
        if len(waiting) == batch * config.repeats:
            made = config.collate(waiting, SampleRng(derive_seed("batch", SEED, first, batch)))
            assert made.video is not None
            yield made.video if made.mixing is None else apply_mixing(made.video, made.mixing)
            waiting, first = [], position + 1


def each_view_test(corpus: Corpus, config: ClipConfig) -> Iterator[Tensor]:
    """The six views of one file after the other."""
    rival = EachViewItsFile(config)
    while True:
        for file in corpus.files:
            yield torch.stack(rival.views(file))
