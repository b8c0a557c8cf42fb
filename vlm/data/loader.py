"""From the order of samples to micro-batches: what each rank loads at each step, and the processes that load it.

The plan of a step is pure arithmetic on positions (`plan_step`); `TrainLoader` turns it into batches with worker
processes. Resuming is starting at another step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, Sampler

from vlm.data.order import Order
from vlm.data.rng import SampleRng, derive_seed
from vlm.data.shards import ShardError, ShardSet
from vlm.data.video import DecodeError
from vlm.distributed import share
from vlm.types import Batch, Example, Incident, Record, UserError


class Pipeline(Protocol):
    """What turns a record into training examples (see vlm.data.clips)."""

    repeats: int

    def train(self, record: Record, rng: SampleRng) -> list[Example]: ...

    def collate(self, examples: list[Example], rng: SampleRng) -> Batch: ...


@dataclass(frozen=True, slots=True)
class MicroPlan:
    """What one rank loads for one micro-batch. `weight` 0: the rank has nothing left, yet must run the same modules
    as the others, so it repeats a sample that counts for nothing."""

    step: int
    index: int  # which micro-batch of the step, from 0
    positions: tuple[int, ...]
    weight: int = 1


def micro_steps(global_batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-batches a step, the same on every rank: enough for the largest share."""
    largest = -(-global_batch_size // world_size)
    return -(-largest // micro_batch_size)


def plan_step(step: int, global_batch_size: int, world_size: int, rank: int, micro_batch_size: int) -> list[MicroPlan]:
    """Rank `rank`'s micro-batches of `step`: its contiguous share of the positions [step*G, (step+1)*G), cut evenly."""
    first = step * global_batch_size
    start, stop = share(global_batch_size, world_size, rank)
    count = micro_steps(global_batch_size, world_size, micro_batch_size)
    plans = []
    for index in range(count):
        low, high = share(stop - start, count, index)
        positions = tuple(range(first + start + low, first + start + high))
        plans.append(
            MicroPlan(step, index, positions or (first + min(start, global_batch_size - 1),), int(bool(positions)))
        )
    return plans


class TrainDataset(Dataset[Batch]):
    """Loads one micro-batch: reads the records of a plan, replaces unusable ones, transforms, collates."""

    def __init__(self, shards: ShardSet, order: Order, pipeline: Pipeline, seed: int, substitutes: int) -> None:
        self.shards, self.order, self.pipeline = shards, order, pipeline
        self.seed, self.substitutes = seed, substitutes

    def __getitem__(self, plan: MicroPlan) -> Batch:
        examples: list[Example] = []
        incidents: list[Incident] = []
        for position in plan.positions:
            examples += self._load(position, incidents)
        rng = SampleRng(derive_seed("batch", self.seed, plan.positions[0], len(plan.positions)))
        return replace(self.pipeline.collate(examples, rng), incidents=tuple(incidents))

    def _load(self, position: int, incidents: list[Incident]) -> list[Example]:
        """The examples of one position. The substitute for an unusable record depends on (seed, position) alone."""
        row = self.order.row(position)
        met: list[tuple[str, str, str]] = []
        for attempt in range(self.substitutes + 1):
            try:
                record = self.shards.read(row)
                examples = self.pipeline.train(record, SampleRng(derive_seed("sample", self.seed, position)))
            except (DecodeError, ShardError) as error:
                met.append((self.shards.key(row), self.shards.shard_name(row), str(error)))
                row = self.order.substitute(position, attempt)
                continue
            incidents += [Incident(*failure, replaced_by=record.key, position=position) for failure in met]
            return examples
        listed = "; ".join(f"{key} in {shard}: {reason}" for key, shard, reason in met[:3])
        raise UserError(
            f"{self.shards.path}: {len(met)} records in a row could not be used at position {position} ({listed}, …). "
            "Check the files with tools/make_shards.py without --no-check, or look at the storage"
        )


class _Plans(Sampler[MicroPlan]):
    """The micro-batches of one rank from `start_step` to `stop_step`, in order."""

    def __init__(self, start_step: int, stop_step: int, arguments: tuple[int, int, int, int]) -> None:
        self.start_step, self.stop_step, self.arguments = start_step, stop_step, arguments

    def __iter__(self) -> Iterator[MicroPlan]:
        for step in range(self.start_step, self.stop_step):
            yield from plan_step(step, *self.arguments)

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * micro_steps(self.arguments[0], self.arguments[1], self.arguments[3])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A loaded micro-batch and whether it counts."""

    batch: Batch
    weight: int


class TrainLoader:
    """Iterates over steps: each item is the list of this rank's micro-batches of one step.

    Args:
        shards: the training records.
        pipeline: record -> examples -> batch.
        seed: the recipe's seed.
        global_batch_size: records a step over all ranks.
        world_size, rank: this process's place.
        micro_batch_size: most records in one forward pass.
        start_step, stop_step: which steps to load.
        workers: loader processes; the batches do not depend on it.
        substitutes: how many other records to try for an unusable one.
    """

    def __init__(
        self,
        shards: ShardSet,
        pipeline: Pipeline,
        *,
        seed: int,
        global_batch_size: int,
        world_size: int,
        rank: int,
        micro_batch_size: int,
        start_step: int,
        stop_step: int,
        workers: int,
        substitutes: int = 16,
    ) -> None:
        self.order = Order(len(shards), seed)
        self.global_batch_size = global_batch_size
        self.shards = shards
        self._step = start_step
        self._stop = stop_step
        self._arguments = (global_batch_size, world_size, rank, micro_batch_size)
        dataset = TrainDataset(shards, self.order, pipeline, seed, substitutes)
        self._batches: Any = iter(
            DataLoader(dataset, sampler=_Plans(start_step, stop_step, self._arguments), **worker_arguments(workers))
        )

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._step >= self._stop:
            raise StopIteration
        plans = plan_step(self._step, *self._arguments)
        self._step += 1
        return [MicroBatch(next(self._batches), plan.weight) for plan in plans]

    def keys_of_step(self, step: int) -> list[str]:
        """The keys of a step's whole global batch, in order, as planned (before any substitution)."""
        first = step * self.global_batch_size
        return [self.shards.key(row) for row in self.order.rows(range(first, first + self.global_batch_size))]


def worker_arguments(workers: int) -> dict[str, Any]:
    """DataLoader arguments: batches come whole from the dataset; workers start from a clean server process, since a
    process that runs collective threads must not be forked."""
    if workers == 0:
        return {"batch_size": None, "num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm.data.loader", "vlm.data.clips"])
    return {
        "batch_size": None,
        "num_workers": workers,
        "prefetch_factor": 4,
        "persistent_workers": False,
        "multiprocessing_context": context,
    }


class EvalDataset(Dataset[tuple[str, int | None, dict[str, list[Example]], str]]):
    """Loads all views of one test record from one decode. An unusable record is reported, never replaced."""

    def __init__(self, shards: ShardSet, pipeline: Any, probes: Sequence[str], seed: int) -> None:
        self.shards, self.pipeline, self.probes, self.seed = shards, pipeline, tuple(probes), seed

    def __getitem__(self, row: int) -> tuple[str, int | None, dict[str, list[Example]], str]:
        """(key, label, views by probe name ("" = the test itself), why it could not be read or "")."""
        key = self.shards.key(row)
        try:
            record = self.shards.read(row)
            views = self.pipeline.all_views(record, SampleRng(derive_seed("test", self.seed, key)), self.probes)
        except (DecodeError, ShardError) as error:
            return key, None, {}, str(error)
        return key, record.annotation.get("label"), views, ""


def eval_loader(shards: ShardSet, pipeline: Any, probes: Sequence[str], seed: int, rows: range, workers: int) -> Any:
    """Iterates over the test records of `rows`, in order; each record comes exactly once."""
    return DataLoader(EvalDataset(shards, pipeline, probes, seed), sampler=rows, **worker_arguments(workers))  # type: ignore[arg-type]
