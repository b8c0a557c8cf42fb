"""What else a loader of clips must be good at (bench/data.py): bytes read, damage, the first batch, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_clips import Corpus, make_vast, poison
from data_loaders import BATCH, SEED, Size, our_training, train_loader
from turns import Spent

from vlm.data.clips import ClipConfig
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.data.stream import Source, Stream
from vlm.data.worker_process import keep_memory, own_memory
from vlm.types import Batch, Example, Record, Visit


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
    """Wall seconds from nothing but a path to the first batch of a vast set, and that set.

    Each by a process of its own, in which nothing was loaded before: this one may have a nursery of workers already.
    Its imports do not count.
    """
    folder = make_vast(scratch / "vast", corpus.files[0], size.vast_shards, size.vast_rows)
    results: dict[str, Any] = {}
    for workers in sorted({0, size.workers}):
        command = [sys.executable, __file__, str(folder), str(size.side), str(workers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        took = Spent(*json.loads(done.stdout))
        results |= {f"first_batch_{workers}": round(took.wall, 3), f"first_batch_{workers}_cpu": round(took.cpu, 3)}
        print(f"{'first batch':16} {took.wall:6.2f} s by the clock ({took.cpu:.2f} s of CPU) from {size.vast_shards:,} "
              f"shards with {workers} processes, aim at most 2 s", flush=True)  # fmt: skip
    return results, ShardSet(folder)


def first_batch_here(folder: Path, side: int, workers: int) -> Spent:
    """What the first batch of a set costs in this process."""
    config = Size(side=side).plain()
    cpu, wall = time.process_time(), time.perf_counter()
    next(our_training(ShardSet(folder), config, BATCH, workers))
    return Spent(time.process_time() - cpu, time.perf_counter() - wall)


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


if __name__ == "__main__":  # python bench/data_more.py FOLDER SIDE WORKERS: `first_batch` calls it
    torch.set_num_threads(1)
    keep_memory()
    print(json.dumps(first_batch_here(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
