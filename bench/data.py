"""The loader of clips against the limit and against other loaders: CPU seconds, bytes, memory.

    python bench/data.py [--quick] [--json FILE] [--real] [--rivals FOLDER]       (also in: make bench)

mp4 in tar -> batches of 16 x 3 x 224 x 224, by `vlm.data.loader` over `vlm.data.stream`. Those who are compared take
turns, a few clips each, in one process with one thread, on the same clips; figures are CPU seconds (and wall seconds),
their ratio the median over the turns with its 95 % bootstrap interval. Against

    limit        the bare loop: bytes from the tar, the same frames by the same decoder, the same resize, to uint8
    webdataset   plain webdataset and decord, the same pixels
    litdata, energon    the same, where they are installed (in FOLDER, say, by pip install --target)
    each_view    a loader built as VideoMAE's is (rival_loaders.py): training with full augmentation, six-view test

and what else a loader must be good at: `bytes_read` over bytes needed, what a clip that breaks off costs, the first
batch of a set of 10,000 shards, resident memory over many samples. Exits with 1 where a rival's pixels differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rival_loaders
import torch
from data_clips import Corpus, Drawn, draw, make_corpus, make_vast, poison, real_clips
from rival_loaders import EachViewItsFile
from torch import Tensor

from vlm.data import sampling
from vlm.data import transforms as tf
from vlm.data.clips import ClipConfig
from vlm.data.loader import Pipeline, TrainLoader, eval_loader
from vlm.data.rng import SampleRng, derive_seed
from vlm.data.shards import ShardSet
from vlm.data.stream import Source, Stream
from vlm.data.video import decode
from vlm.data.worker_process import own_memory
from vlm.types import Batch, Example, Record, Visit

SEED = 0
BATCH = 4  # clips
TOLERANCE = 1e-4
"""Normalised pixels of the rival that must show the same may differ by so much: the order of floating-point sums."""

TARGETS = {
    "limit_train": 0.95,
    "limit_test": 0.95,
    "webdataset": 1.0,
    "litdata": 1.0,
    "energon": 1.0,
    "each_view_train": 2.0,
    "each_view_test": 4.0,
}
"""What the ratios should reach: another's seconds by ours."""


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


def our_training(shards: ShardSet, config: ClipConfig, batch: int = BATCH, workers: int = 0) -> Iterator[Tensor]:
    for step in train_loader(shards, config, batch, workers):
        yield _video(step[0].batch)


def our_test(shards: ShardSet, config: ClipConfig, records: int) -> Iterator[Tensor]:
    """The views of `records` records at a time, stacked."""
    while True:
        waiting: list[Example] = []
        for count, item in enumerate(eval_loader(shards, config, (), SEED, range(len(shards)), 0), 1):
            waiting += item.views[""]
            if count % records == 0:
                yield _video(config.test_batch(waiting))
                waiting = []


def _video(batch: Batch) -> Tensor:
    assert batch.video is not None
    return batch.video


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
        batch[(count - 1) % BATCH] = tf.resize_video(tf.to_video(frames), config.size).round_().permute(1, 2, 3, 0)
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
            frames = tf.resize_bilinear(frames, *tf.short_side_size(*tf.frame_size(frames), config.short_side))
            box = tf.center_box(*tf.frame_size(frames), config.size)
            batch[count % BATCH] = torch.from_numpy(tf.crop(frames, box))
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
            yield _video(config.collate(waiting, SampleRng(derive_seed("batch", SEED, first, batch))))
            waiting, first = [], position + 1


def each_view_test(corpus: Corpus, config: ClipConfig) -> Iterator[Tensor]:
    """The six views of one file after the other."""
    rival = EachViewItsFile(config)
    while True:
        for file in corpus.files:
            yield torch.stack(rival.views(file))


# Turns ---------------------------------------------------------------------------------------------------------------


class Spent(NamedTuple):
    """CPU and wall seconds of a turn."""

    cpu: float
    wall: float


def take_turns(contestants: dict[str, Iterator[Any]], turns: int, batches: int) -> dict[str, list[Spent]]:
    """What each spent in each turn. Who comes first changes from turn to turn; one turn before does not count."""
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(batches):
                next(contestants[name])
            if turn:
                spent[name].append(Spent(time.process_time() - cpu, time.perf_counter() - wall))
    return spent


class Ratio(NamedTuple):
    """Another's CPU seconds by ours: median over turns, and where 95 % of resampled medians lie."""

    median: float
    low: float
    high: float


def ratio(others: Sequence[float], ours: Sequence[float]) -> Ratio:
    ratios = np.array(others) / np.array(ours)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def compare(
    kind: str, contestants: dict[str, Iterator[Any]], size: Size, videos: int, *, batches: int
) -> dict[str, Any]:
    """The figures of one comparison; the first contestant is ours. `videos`: of a turn."""
    spent = take_turns(contestants, size.turns, batches)
    ours, *others = contestants
    results: dict[str, Any] = {}
    for name in contestants:
        for unit in ("cpu", "wall"):
            value = float(np.median([getattr(turn, unit) for turn in spent[name]])) / videos
            results[f"{unit}_{kind}_{name}"] = round(value, 5)
    for name in others:
        found = ratio([turn.cpu for turn in spent[name]], [turn.cpu for turn in spent[ours]])
        walls = ratio([turn.wall for turn in spent[name]], [turn.wall for turn in spent[ours]])
        key = name if name in TARGETS else f"{name}_{kind}"
        results |= {key: round(found.median, 3), f"{key}_interval": [round(found.low, 3), round(found.high, 3)],
                    f"{key}_wall": round(walls.median, 3)}  # fmt: skip
        aim = f", aim {TARGETS[key]:g}" if key in TARGETS else ""
        print(
            f"{key:16} {found.median:6.2f} x [{found.low:.2f}, {found.high:.2f}]{aim}: "
            f"{1000 * results[f'cpu_{kind}_{name}']:.1f} ms of CPU a video, "
            f"ours {1000 * results[f'cpu_{kind}_{ours}']:.1f} ms; wall {walls.median:.2f} x",
            flush=True,
        )
    return results


def compare_loaders(corpus: Corpus, size: Size, scratch: Path) -> dict[str, Any]:
    """Against the limit and other loaders, without augmentation."""
    config, shards = size.plain(), corpus.shards
    tars = [Path(shards.path) / name for name in shards.shard_names]
    makers: dict[str, tuple[str, Callable[[], Iterator[Tensor]]]] = {
        "webdataset": ("webdataset", lambda: rival_loaders.webdataset_batches(tars, config, BATCH, 0)),
        "litdata": (
            "litdata",
            lambda: rival_loaders.litdata_batches(corpus.files, scratch / "litdata", config, BATCH, 0),
        ),
        "energon": (
            "megatron.energon",
            lambda: rival_loaders.energon_batches(tars, scratch / "energon", config, BATCH, 0),
        ),
    }
    contestants = {"ours": our_training(shards, config), "limit": limit_training(shards, config)}
    skipped: dict[str, str] = {}
    for name, (package, make) in makers.items():
        problem = rival_loaders.missing(package)
        if problem:
            skipped[name] = problem
            print(f"{name:16} skipped: {package} cannot be imported ({problem})", flush=True)
        else:
            contestants[name] = make()
    videos = BATCH * size.batches
    results = compare("train", contestants, size, videos, batches=size.batches) | {"skipped": skipped}
    test = {"ours": our_test(shards, config, BATCH), "limit": limit_test(shards, config)}
    return results | compare("test", test, size, videos, batches=size.batches)


def compare_each_view(corpus: Corpus, size: Size) -> dict[str, Any]:
    """Against the loader built as VideoMAE's is: the recipe's training and its six-view test."""
    config, shards = size.recipe(), corpus.shards
    training = {"recipe": our_training(shards, config, 2), "each_view": each_view_training(corpus, config, 2)}
    pairs = [(next(training["recipe"]), next(training["each_view"])) for _ in range(2)]
    results = compare("train", training, size, 2 * size.batches, batches=size.batches)
    test = {"recipe": our_test(shards, config, 1), "each_view": each_view_test(corpus, config)}
    pairs.append((next(test["recipe"]), next(test["each_view"])))
    results |= compare("test", test, size, 2 * size.batches, batches=2 * size.batches)
    results["max_pixel_diff"] = max(float((ours - rival).abs().max()) for ours, rival in pairs)
    if rival_loaders.missing("cv2"):
        results["max_pixel_diff"] = max(float((ours - rival).abs().max()) for ours, rival in pairs[:2])
        print("each_view_test resizes with Pillow: OpenCV cannot be imported, so its pixels are not compared")
    return results


def compare_processes(corpus: Corpus, size: Size) -> dict[str, Any]:
    """Videos a second by the clock with loader processes, ours and webdataset's by turns."""
    config = size.plain()
    tars = [Path(corpus.shards.path) / name for name in corpus.shards.shard_names]
    makers = {
        "ours": lambda: our_training(corpus.shards, config, BATCH, size.workers),
        "webdataset": lambda: rival_loaders.webdataset_batches(tars, config, BATCH, size.workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(3):
        for name, make in makers.items():
            batches = make()
            for _ in range(4 * size.workers):  # what was loaded ahead meanwhile is not to count
                next(batches)
            start, count = time.perf_counter(), 12 * size.workers
            for _ in range(count):
                next(batches)
            rates[name].append(count * BATCH / (time.perf_counter() - start))
            del batches
    results = {f"rate_{name}": round(float(np.median(found)), 1) for name, found in rates.items()}
    print(f"{size.workers} processes: videos a second by the clock {results}", flush=True)
    return results


# What else -----------------------------------------------------------------------------------------------------------


def bytes_over_needed(corpus: Corpus, config: ClipConfig) -> dict[str, Any]:
    """Bytes read from shards in an epoch of training, over those of the videos and annotations."""
    shards = ShardSet(corpus.shards.path)
    stream = Stream([Source(shards)], SEED)
    for position in range(len(shards)):
        shards.read(stream.samples(position)[0].sample, config.members)
    needed = sum(int(shards.index[name].sum()) for name in ("video_nbytes", "json_nbytes"))
    found = shards.bytes_read / needed
    print(f"{'bytes':16} {found:6.4f} of those needed, aim at most 1.05", flush=True)
    return {"bytes_read_over_needed": round(found, 4)}


def cost_of_poison(corpus: Corpus, size: Size, scratch: Path) -> dict[str, Any]:
    """What 1 % of clips that break off half way cost, in CPU seconds, and how they were told."""
    rows = range(0, len(corpus.shards), 100)
    bad = poison(corpus.shards, scratch / "poisoned", rows)
    config, records = size.plain(), len(corpus.shards)
    spent: dict[str, list[float]] = {"clean": [], "poisoned": []}
    told: set[str] = set()
    for _ in range(1 if size.workers == 0 else 3):
        loaders = {"clean": train_loader(corpus.shards, config, 1), "poisoned": train_loader(bad, config, 1)}
        for _ in range(records):
            for name, loader in loaders.items():
                before = time.process_time()
                batch = next(loader)[0].batch
                spent[name].append(time.process_time() - before)
                told |= {incident.key for incident in batch.incidents}
    # The median over the sound positions says what a position costs; what the others cost more is what poison costs.
    share = len(rows) / records
    pairs = np.array([spent["clean"], spent["poisoned"]])
    usual = float(np.median(pairs))
    extra = float(np.sort(pairs[1] - pairs[0])[-max(1, round(share * pairs.shape[1])) :].mean())
    cost = 0.01 * extra / usual
    print(f"{'poison':16} {cost:6.2%} for 1 % of clips that break off ({len(told)} named), aim at most 2 %", flush=True)
    return {"poison_1_percent_cost": round(cost, 4), "poison_named": len(told)}


def first_batch(corpus: Corpus, size: Size, scratch: Path) -> tuple[dict[str, Any], ShardSet]:
    """Wall seconds from nothing but a path to the first batch of a vast set, and that set."""
    folder = make_vast(scratch / "vast", corpus.files[0], size.vast_shards, size.vast_rows)
    results: dict[str, Any] = {}
    for workers in sorted({0, size.workers}):
        cpu, wall = time.process_time(), time.perf_counter()
        shards = ShardSet(folder)
        next(our_training(shards, size.plain(), BATCH, workers))
        took = Spent(time.process_time() - cpu, time.perf_counter() - wall)
        results |= {f"first_batch_{workers}": round(took.wall, 3), f"first_batch_{workers}_cpu": round(took.cpu, 3)}
        print(f"{'first batch':16} {took.wall:6.2f} s by the clock ({took.cpu:.2f} s of CPU) from {size.vast_shards:,} "
              f"shards with {workers} processes, aim at most 2 s", flush=True)  # fmt: skip
    return results, shards


class Undecoded:
    """A pipeline that reads a record and leaves it encoded."""

    task, members = "classes", ("video",)

    def parts(self, shards: ShardSet) -> None:
        return None

    def lengths(self, shards: ShardSet) -> None:
        return None

    def train(self, record: Record, rng: SampleRng, visit: Visit) -> list[Example]:
        assert record.video
        return [Example(key=record.key, label=len(record.video) % 2)]

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        return Batch(keys=tuple(example.key for example in examples))


def memory_slope(name: str, shards: ShardSet, pipeline: Any, samples: int, batch: int) -> dict[str, Any]:
    """Bytes of resident memory of its own that this process gains a sample, by a line through the last three quarters.

    What the first quarter takes is the caches filling: open files, buffers of the allocator.
    """
    loader = train_loader(shards, pipeline, batch)
    steps = math.ceil(samples / batch)
    every = max(1, steps // 100)
    seen = []
    start = time.process_time()
    for step in range(steps):
        next(loader)
        if step % every == 0:
            seen.append((step * batch, own_memory()))
    at, memory = np.array(seen[len(seen) // 4 :], dtype=float).T
    slope = float(np.polyfit(at, memory, 1)[0])
    cpu = (time.process_time() - start) / (steps * batch)
    grown = (memory[-1] - memory[0]) / 2**20
    print(
        f"{'memory ' + name:16} {slope:6.1f} bytes a sample over {steps * batch:,} ({grown:+.1f} MiB in the last three "
        f"quarters, now {memory[-1] / 2**20:.0f} MiB); {1e6 * cpu:.0f} us of CPU a sample",
        flush=True,
    )
    return {f"memory_slope_{name}": round(slope, 2), f"memory_samples_{name}": steps * batch,
            f"memory_grown_mib_{name}": round(grown, 2), f"cpu_{name}": round(cpu, 7)}  # fmt: skip


# All of it -----------------------------------------------------------------------------------------------------------


PARTS = ("loaders", "each_view", "processes", "bytes", "poison", "first_batch", "memory")


def measure(size: Size, clips: Sequence[bytes], scratch: Path, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Every figure by its key in the JSON file, printed as it comes.

    `NAME`: NAME's CPU seconds by ours, with `NAME_interval` (95 %) and `NAME_wall` (by the clock); `cpu_*`, `wall_*`:
    seconds a video.
    """
    corpus = make_corpus(scratch / "corpus", clips, size.records)
    results: dict[str, Any] = {
        "clips": len(clips),
        "records": size.records,
        "mean_bytes": round(sum(map(len, clips)) / len(clips)),
    }
    if "loaders" in parts:
        results |= compare_loaders(corpus, size, scratch)
    if "each_view" in parts:
        results |= compare_each_view(corpus, size)
    if "processes" in parts and size.workers:
        results |= compare_processes(corpus, size)
    if "bytes" in parts:
        results |= bytes_over_needed(corpus, size.plain())
    if "poison" in parts:
        results |= cost_of_poison(corpus, size, scratch)
    if "first_batch" in parts or "memory" in parts:
        found, vast = first_batch(corpus, size, scratch)
        results |= found
    if "memory" in parts:
        results |= memory_slope("undecoded", vast, Undecoded(), size.undecoded, 64)
        results |= memory_slope("decoded", corpus.shards, size.plain(), size.decoded, BATCH)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few clips and turns: a minute or two, rougher figures")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here, beside those that another benchmark left"
    )
    parser.add_argument("--real", action="store_true", help="the real clips of VLM_REALDATA in place of drawn ones")
    parser.add_argument(
        "--rivals", type=Path, metavar="FOLDER", help="also look here for litdata, megatron-energon and OpenCV"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    for name in ("undecoded", "decoded", "turns"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"(default {getattr(Size(), name):,})")
    chosen = parser.parse_args(arguments)
    if chosen.rivals:
        sys.path.append(str(chosen.rivals.resolve()))
    size = QUICK if chosen.quick else Size()
    given = {name: getattr(chosen, name) for name in ("undecoded", "decoded", "turns")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    torch.set_num_threads(1)
    clips = real_clips()[: size.clips] if chosen.real else [draw(seed, size.drawn) for seed in range(size.clips)]
    if not clips:
        parser.error("--real: no H.264 clip was found; set VLM_REALDATA to the folder that holds videos/")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        results = measure(size, clips, Path(scratch), chosen.only)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(chosen.json.read_text()) if chosen.json.exists() else {}
        chosen.json.write_text(json.dumps(before | results, indent=1) + "\n")
    print(json.dumps(results))
    if results.get("max_pixel_diff", 0.0) > TOLERANCE:
        print("the two do not show the same", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
