"""From the order of samples to micro-batches: what each rank loads at each step, and the processes that load it.

The plan of a step is pure arithmetic on positions (`plan_step`); `TrainLoader` turns it into batches with worker
processes. Resuming is starting at another step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from vlm.data.order import Order
from vlm.data.rng import SampleRng, derive_seed
from vlm.data.shard_format import ShardGoneError
from vlm.data.shards import ShardError, ShardSet
from vlm.data.video import DecodeError
from vlm.data.workers import Loaded
from vlm.distributed import share
from vlm.types import Ask, Batch, Example, Incident, Record, UserError, Visit


class Pipeline(Protocol):
    """What turns a record into training examples and test items (vlm.data.clips, vlm.data.questions)."""

    @property
    def task(self) -> str:
        """What a test asks: "classes" (all views of a record are one question) or "choice" (each row is one)."""

    def parts(self, shards: ShardSet) -> np.ndarray | None: ...

    def train(self, record: Record, rng: SampleRng, visit: Visit) -> list[Example]: ...

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch: ...

    def asks(self, record: Record) -> tuple[Ask, ...]: ...

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]: ...

    def test_batch(self, examples: Sequence[Example]) -> Batch: ...

    def blank(self) -> Example: ...


class Samples:
    """The training samples of a shard set: its records, or where a record holds several samples, those.

    Args:
        shards: the records.
        pipeline: says how many samples each record holds.
    """

    def __init__(self, shards: ShardSet, pipeline: Pipeline) -> None:
        parts = pipeline.parts(shards)
        self._keys = shards
        # (records + 1,): samples before each record; None: every record is one sample
        self._starts = None if parts is None else np.concatenate([[0], np.cumsum(parts, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._keys) if self._starts is None else int(self._starts[-1])

    def locate(self, sample: int) -> tuple[int, int | None]:
        """(row of the index, which part of the record or None: all of it)."""
        if self._starts is None:
            return sample, None
        row = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return row, sample - int(self._starts[row])

    def key(self, sample: int) -> str:
        """What identifies a sample in the order: the record's key, and "/part" where it holds several."""
        row, part = self.locate(sample)
        return self._keys.key(row) if part is None else f"{self._keys.key(row)}/{part}"


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

    def __init__(
        self,
        shards: ShardSet,
        samples: Samples,
        order: Order,
        pipeline: Pipeline,
        views: tuple[str, ...],
        seed: int,
        substitutes: int,
    ) -> None:
        self.shards, self.samples, self.order, self.pipeline, self.views = shards, samples, order, pipeline, views
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
        sample, epoch = self.order.row(position), self.order.epoch(position)
        met: list[tuple[str, str, str]] = []
        for attempt in range(self.substitutes + 1):
            row, part = self.samples.locate(sample)
            try:
                record = self.shards.read(row)
                rng = SampleRng(derive_seed("sample", self.seed, position))
                examples = self.pipeline.train(record, rng, Visit(part, epoch, self.views))
            except ShardGoneError as error:
                raise _gone(error) from error
            except (DecodeError, ShardError) as error:
                met.append((self.shards.key(row), self.shards.shard_name(row), str(error)))
                sample = self.order.substitute(position, attempt)
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
        views: names of the losses that the recipe weighs.
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
        views: Sequence[str],
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
        self.samples = Samples(shards, pipeline)
        self.order = Order(len(self.samples), seed)
        self.global_batch_size = global_batch_size
        self.shards = shards
        self._step = start_step
        self._stop = stop_step
        self._arguments = (global_batch_size, world_size, rank, micro_batch_size)
        dataset = TrainDataset(shards, self.samples, self.order, pipeline, tuple(views), seed, substitutes)
        self._batches = Loaded(dataset, _Plans(start_step, stop_step, self._arguments), workers, "data.workers")

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
        rows = self.order.rows(range(first, first + self.global_batch_size))
        return [self.samples.key(sample) for sample in rows]


def _gone(error: ShardGoneError) -> UserError:
    """A file that vanishes takes many records with it: no fault of theirs, and nothing to train or test around."""
    return UserError(f"{error}. See whether its storage is still mounted, put it back and give the same command again")


class TestItem(NamedTuple):
    """A test record with all that is asked about it, ready to be scored."""

    key: str
    asks: tuple[Ask, ...]
    views: dict[str, list[Example]]  # by probe; "" is the test itself
    reason: str = ""  # why it could not be read; "" where it could
    lost: int = 0  # where it could not be read: how much is asked about it


class EvalDataset(Dataset[TestItem]):
    """Loads all views of one test record from one decode. An unusable record is reported, never replaced."""

    def __init__(self, shards: ShardSet, pipeline: Pipeline, probes: Sequence[str], seed: int) -> None:
        self.shards, self.pipeline, self.probes, self.seed = shards, pipeline, tuple(probes), seed

    def __getitem__(self, row: int) -> TestItem:
        key = self.shards.key(row)
        try:
            record = self.shards.read(row)
            views = self.pipeline.all_views(record, SampleRng(derive_seed("test", self.seed, key)), self.probes)
            return TestItem(key, self.pipeline.asks(record), views)
        except ShardGoneError as error:
            raise _gone(error) from error
        except (DecodeError, ShardError) as error:
            return TestItem(key, (), {}, str(error), lost=max(1, int(self.shards.num_questions[row])))


def eval_loader(
    shards: ShardSet, pipeline: Pipeline, probes: Sequence[str], seed: int, rows: range, workers: int
) -> Iterator[TestItem]:
    """The test records of `rows`, in order; each record comes exactly once. UserError as `Loaded` raises it."""
    return Loaded(EvalDataset(shards, pipeline, probes, seed), rows, workers, "eval.workers")
