"""Many GPUs on paper: what a recipe asks of disks, memory and time on any number of them, without running it.

Sizes come from the recipe's own model, built without memory for weights; reads from the code that plans training, for
all ranks of some steps; what neither knows is assumed (`Assumptions`). tools/scaling.py makes docs/scaling.md of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from vlm.data.loader import plan_step
from vlm.data.packing import pack
from vlm.data.shard_format import index_dtype
from vlm.data.shards import DEFAULT_SHARD_SIZE
from vlm.data.stream import Source, Stream
from vlm.models.trained import persistent_buffers
from vlm.recipe import Recipe, load
from vlm.run import failures
from vlm.types import IGNORE, Batch, Row

KEY_BYTES = 24  # longest key of a record
SIMULATED = 4096  # positions, at least
BASE = 8  # GPUs whose share of the recipe's batch each of more GPUs gets too


@dataclass(kw_only=True, slots=True)
class Assumptions:
    """What is not computed."""

    failures_per_gpu_hour: float = 419 / (16_384 * 54 * 24)
    """Unexpected interruptions of Llama 3 405B: 419 in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4)."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    peak_tflops: float = 989.0
    """bf16, dense, of an H100 (data sheet)."""
    utilisation: float = 0.4
    """Share of that which training reaches. More means more reads a second."""
    copy_gb_per_s: float = 10.0
    """From one GPU into its host's memory, while all GPUs of the node copy."""
    copy_factor: float = 1.3
    """A save blocks at most so many times as long as that copy (what bench/checkpoint.py allows)."""
    agree_seconds: float = 0.05
    """Until all ranks have met at a save."""
    node_gb_per_s: float = 2.0
    """What one node writes to the shared file system, or reads from it."""
    files_gb_per_s: float = 20.0
    """What that file system takes from all nodes together, or gives them."""
    sync_gb_per_s: float = 1.0
    """torch.save of everything by one process, while all others wait."""
    node_memory_gb: float = 1000.0
    """Memory of a node that can hold shards which were read."""
    restart_seconds: float = 300.0
    """From a failure until training goes on: notice, requeue, load."""


@dataclass(frozen=True)
class Files:
    """A set of a recipe's shards, as large as the published one; `parts` samples in all, if that is not its records."""

    name: str
    records: int
    nbytes: int  # of one record, as it is read in training
    frames: int  # that the model sees of it
    parts: int | None = None

    @property
    def path(self) -> str:
        return self.name

    def __len__(self) -> int:
        return self.records

    @property
    def per_shard(self) -> int:
        """Records of a shard of the size that tools/make_shards.py makes."""
        return max(1, DEFAULT_SHARD_SIZE // self.nbytes)


class Parted:
    """Samples of each record: as even as can be."""

    def parts(self, shards: Files) -> np.ndarray | None:
        if shards.parts is None:
            return None
        ends = np.arange(1, shards.records + 1, dtype=np.int64) * shards.parts // shards.records
        return np.diff(ends, prepend=0).astype(np.int32)

    def lengths(self, shards: Files) -> None:
        return None


@dataclass(frozen=True)
class Case:
    """A recipe with the data that it was published with."""

    recipe_name: str
    title: str
    sets: tuple[tuple[Files, float | None], ...]  # and their weights
    tokens: int  # of a row of text, the video's places left out
    decode_ms: float  # of a core, a read
    overrides: tuple[str, ...] = ()  # files that the published run begins with

    @cached_property
    def recipe(self) -> Recipe:
        return load(self.recipe_name, self.overrides)

    @cached_property
    def model(self) -> Any:
        with torch.device("meta"):
            return self.recipe.model.build()

    @cached_property
    def trained(self) -> int:
        """Numbers that train, and buffers that a checkpoint holds."""
        names = dict(self.model.named_parameters())
        buffers = persistent_buffers(self.model).values()
        return sum(p.numel() for name, p in names.items() if self.model.trainable(name)) + sum(
            b.numel() for b in buffers
        )

    @cached_property
    def whole_bytes(self) -> int:
        """Of all weights as they are kept, frozen ones too."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def checkpoint(self) -> int:
        """Bytes of weights and two moments, fp32."""
        return 12 * self.trained

    @property
    def row_bytes(self) -> int:
        """Of the index, for each record."""
        several = any(files.parts is not None for files, _ in self.sets)
        return index_dtype(KEY_BYTES, [*self.recipe.inputs.members, "json"], questions=several).itemsize

    @property
    def per_gpu(self) -> int:
        """Samples of a GPU in a step: what the recipe's batch gives 8 of them. More GPUs mean a larger batch."""
        return -(-self.recipe.global_batch_size // BASE)

    @cached_property
    def stream(self) -> Stream:
        sources: Any = [Source(cast(Any, files), weight) for files, weight in self.sets]
        return Stream(sources, self.recipe.seed, cast(Any, Parted()))

    @cached_property
    def flops(self) -> float:
        """Of training on one sample, by the model's own count: each set's by its share of the samples."""
        weights = [float(len(files)) if weight is None else weight for files, weight in self.sets]
        each = [self._flops_of(files) for files, _ in self.sets]
        return sum(w * f for w, f in zip(weights, each)) / sum(weights)

    def _flops_of(self, files: Files) -> float:
        inputs = self.recipe.inputs
        if inputs.task == "classes":
            shape = (inputs.repeats, 3, inputs.num_frames, inputs.size, inputs.size)
            batch = Batch(keys=("",), video=torch.empty(shape, device="meta"))
        else:
            places = getattr(inputs, "num_video_tokens", files.frames)
            learnt = self.tokens // 3
            ids, labels = (1,) * (places + self.tokens), (IGNORE,) * (places + self.tokens - learnt) + (1,) * learnt
            batch = Batch(
                keys=("",),
                views={next(iter(self.recipe.views)): pack([Row(ids, labels, (1, 1 + places))], places)},
                features=torch.empty(1, files.frames, 1, device="meta"),
                frames=torch.empty(files.frames, 1, device="meta"),
                frame_counts=(files.frames,),
            )
        cost = self.model.cost(batch)
        return 3 * cost.trained_flops + 2 * cost.frozen_flops + cost.unlearned_flops

    def step_seconds(self, about: Assumptions) -> float:
        """Of a step that waits for nothing: no data, no other GPU."""
        return self.per_gpu * self.flops / (about.peak_tflops * 1e12 * about.utilisation)


# What is simulated ----------------------------------------------------------------------------------------------------


class Reads(NamedTuple):
    """What the plan of some steps asks of the disks."""

    positions: int
    shards: float  # that a step touches
    of: int
    most: int  # reads of one shard in a step
    nbytes: float  # of a read
    held: int  # bytes of permutations in each process
    idle: int  # ranks without a sample where the batch is the recipe's own


def simulate(case: Case, gpus: int) -> Reads:
    """Plan steps for all ranks as training does, and look up every sample of them.

    Raises AssertionError where a position of the global batch is not on exactly one rank, or a sample comes twice.
    """
    batch, stream = case.per_gpu * gpus, case.stream
    steps = -(-SIMULATED // batch)
    touched, most, nbytes = 0, 0, 0
    seen: set[tuple[int, int, int]] = set()
    for step in range(steps):
        planned = [p for rank in range(gpus) for p in _positions(step, batch, gpus, rank, case.per_gpu)]
        assert planned == list(range(step * batch, (step + 1) * batch)), "a position is missing, or on two ranks"
        shards: Counter[tuple[int, int]] = Counter()
        for placed in (placed for position in planned for placed in stream.samples(position)):
            files: Any = stream.sets[placed.source].samples.shards
            row, _ = stream.sets[placed.source].samples.locate(placed.sample)
            shards[placed.source, row // files.per_shard] += 1
            nbytes += files.nbytes
            assert placed not in seen, "a sample comes twice in an epoch"
            seen.add(placed)
        touched += len(shards)
        most = max(most, *shards.values())
    count = sum(-(-len(files) // files.per_shard) for files, _ in case.sets)
    held = sum(one.order.held for one in stream.sets)
    own = case.recipe.global_batch_size
    idle = sum(not any(p.weight for p in plan_step(0, own, gpus, rank, case.per_gpu)) for rank in range(gpus))
    return Reads(steps * batch, touched / steps, count, most, nbytes / (steps * batch), held, idle)


def _positions(step: int, batch: int, gpus: int, rank: int, micro: int) -> Iterator[int]:
    for plan in plan_step(step, batch, gpus, rank, micro):
        assert plan.weight == 1
        yield from plan.positions


# What is computed -----------------------------------------------------------------------------------------------------


class Save(NamedTuple):
    """Seconds of one checkpoint."""

    stall: float  # training stands still
    written: float  # until it is on disk and read back
    waiting: float  # training stands still where one process writes everything


def save(case: Case, gpus: int, about: Assumptions) -> Save:
    """What a checkpoint of trained weights and moments costs, shared out by ZeRO (stage 1 to 3)."""
    copied = case.checkpoint / gpus / (about.copy_gb_per_s * 1e9)
    rate = min(about.files_gb_per_s, about.node_gb_per_s * -(-gpus // about.gpus_per_node)) * 1e9
    return Save(
        stall=about.agree_seconds + about.copy_factor * copied,
        written=2 * case.checkpoint / rate,
        waiting=case.checkpoint / (about.sync_gb_per_s * 1e9),
    )


class Run(NamedTuple):
    """How often to save, and what is left for training."""

    interval: float
    steps: int
    effective: float
    simulated: float
    stated: float  # at the recipe's checkpoint_every
    waiting: float  # saves by one process, at their own best interval
    tenfold: float  # ten times the failures, at their own best interval


def run(case: Case, gpus: int, about: Assumptions) -> Run:
    """A long run with failures."""
    cost, step = save(case, gpus, about), case.step_seconds(about)
    mean_time = failures.mean_time_between(gpus, about.failures_per_gpu_hour)

    def best(stall: float, mean: float, least: float) -> float:
        return max(failures.best_interval(stall, mean), least, step)

    def share(interval: float, stall: float, mean: float = mean_time) -> float:
        return failures.effective_share(interval, stall, mean, about.restart_seconds)

    interval = best(cost.stall, mean_time, cost.written)
    return Run(
        interval=interval,
        steps=round(interval / step),
        effective=share(interval, cost.stall),
        simulated=failures.simulated_share(interval, cost.stall, mean_time, about.restart_seconds, cost.written),
        stated=share(case.recipe.checkpoint_every * step, cost.stall),
        waiting=share(best(cost.waiting, mean_time, 0), cost.waiting),
        tenfold=share(best(cost.stall, mean_time / 10, cost.written), cost.stall, mean_time / 10),
    )
