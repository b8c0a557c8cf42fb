"""From the order of samples to micro-batches: what each rank loads at each step, and the processes that load it.

The plan of a step is pure arithmetic on positions (`plan_step`); `TrainLoader` turns it into batches with worker
processes. Resuming is starting at another step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from vlm.data.rng import SampleRng, derive_seed
from vlm.data.shard_files import ShardChangedError
from vlm.data.shard_format import DECODER_BITS, ShardGoneError
from vlm.data.shards import ShardError, ShardSet
from vlm.data.stream import Placed, Stream
from vlm.data.video import DecodeError
from vlm.data.watch import Watch
from vlm.data.workers import Loaded
from vlm.distributed import share
from vlm.types import Ask, Batch, Example, Incident, Record, UserError, Visit

Gone = Literal["stop", "quarantine"]


class Pipeline(Protocol):
    """What turns a record into training examples and test items (vlm.data.clips, vlm.data.questions)."""

    @property
    def task(self) -> str:
        """What a test asks: "classes" (all views of a record are one question) or "choice" (each row is one)."""

    @property
    def members(self) -> tuple[str, ...]:
        """What is read of a record, beside its annotation. Where `drawn_members(rng)` is there too, that says what is
        read in training, and `train` gets a generator of the same seed."""

    def parts(self, shards: ShardSet) -> np.ndarray | None: ...

    def lengths(self, shards: ShardSet) -> np.ndarray | None: ...

    def train(self, record: Record, rng: SampleRng, visit: Visit) -> list[Example]: ...

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch: ...

    def asks(self, record: Record) -> tuple[Ask, ...]: ...

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]: ...

    def test_batch(self, examples: Sequence[Example]) -> Batch: ...

    def blank(self) -> Example: ...


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


class TrainDataset:
    """Loads one micro-batch: reads the records of a plan, replaces unusable ones, transforms, collates."""

    def __init__(
        self,
        stream: Stream,
        pipeline: Pipeline,
        views: tuple[str, ...],
        substitutes: int,
        gone: Gone,
    ) -> None:
        self.stream, self.pipeline, self.views = stream, pipeline, views
        self.substitutes, self.gone = substitutes, gone

    def load(self, plan: MicroPlan, watch: Watch) -> Batch:
        """The batch of a plan."""
        examples: list[Example] = []
        incidents: list[Incident] = []
        for position in plan.positions:
            for slot, placed in enumerate(self.stream.samples(position)):
                examples += self._load(placed, position, slot, incidents, watch)
        rng = SampleRng(derive_seed("batch", self.stream.seed, plan.positions[0], len(plan.positions)))
        batch = replace(self.pipeline.collate(examples, rng), incidents=tuple(incidents))
        if self.stream.pack_length is not None:
            tokens = max((len(rows.tokens) for rows in batch.views.values()), default=0)
            if tokens > self.stream.pack_length * len(plan.positions):
                batch.counters["packs_too_long"] = 1
        return batch

    def _load(self, placed: Placed, position: int, slot: int, incidents: list[Incident], watch: Watch) -> list[Example]:
        """The examples of one place. The substitute for an unusable record depends on (seed, position) alone."""
        met: list[Incident] = []
        for attempt in range(self.substitutes + 1):
            samples = self.stream.sets[placed.source].samples
            row, part = samples.locate(placed.sample)
            tries = _Tries(watch)
            seed = derive_seed("sample", self.stream.seed, position, *((slot,) if slot else ()))
            try:
                members = self._members(seed)
                record = read_watched(samples.shards, row, members, tries, f"{position}.{slot}.{attempt}")
                examples = self.pipeline.train(record, SampleRng(seed), Visit(part, placed.epoch, self.views))
            except (DecodeError, ShardError) as error:
                if isinstance(error, (ShardGoneError, ShardChangedError)) and self.gone == "stop":
                    raise _gone(error) from error
                met.append(_incident(samples.shards, row, str(error), tries.count, position))
                placed = self.stream.substitute(placed, position, slot, attempt)
                continue
            finally:
                watch.end()
            incidents += [incident._replace(replaced_by=record.key) for incident in met]
            return examples
        kinds = {one.reason.replace(one.key, ""): one for one in met}  # one of each sort is enough
        listed = "; ".join(f"{one.key} in {one.shard}: {one.reason}" for one in list(kinds.values())[:3])
        raise UserError(
            f"{met[0].shards}: {len(met)} records in a row could not be used at position {position} ({listed}). If the "
            "reasons are the recipe's, set it otherwise; if they are the files', look at the storage, or make the "
            "shards with tools/make_shards.py without --no-check, which leaves such records out"
        )

    def _members(self, seed: int) -> Sequence[str]:
        draw = getattr(self.pipeline, "drawn_members", None)
        return self.pipeline.members if draw is None else draw(SampleRng(seed))


class _Tries:
    """A watch that counts how often work on a sample began: once for all decoders, once for PyAV alone."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self.count = watch, 0

    def begin(self, label: str, about: str) -> str | None:
        self.count += 1
        return self._watch.begin(label, about)

    def end(self) -> None:
        self._watch.end()


def _incident(shards: ShardSet, row: int, reason: str, attempts: int, position: int) -> Incident:
    entry = shards.index[row]
    return Incident(
        key=shards.key(row),
        shards=str(shards.path),
        shard=shards.shard_name(row),
        offset=int(entry["offset"]),
        nbytes=int(entry["nbytes"]),
        reason=reason,
        attempts=attempts,
        replaced_by="",
        position=position,
    )


def read_watched(shards: ShardSet, row: int, members: Sequence[str], watch: Watch, label: str) -> Record:
    """A record, once `watch` knows that it is at it.

    One that has cost a process its life or its time is read again for PyAV alone, where another decoder may have been
    to blame.

    Raises DecodeError for one that is not to be tried (again), and what `ShardSet.read` raises.
    """
    about = f"{shards.key(row)!r} in {shards.path}/{shards.shard_name(row)}"
    spoilt = watch.begin(label, about)
    careful = bool(spoilt) and "video" in members and int(shards.index[row]["decoders"]) & ~DECODER_BITS["pyav"] != 0
    if careful:
        spoilt = watch.begin(f"{label}.pyav", about)
    if spoilt:
        raise DecodeError(spoilt)
    record = shards.read(row, members)
    return replace(record, decoders=("pyav",)) if careful else record


class Plans:
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
        stream: which samples stand where.
        pipeline: record -> examples -> batch.
        views: names of the losses that the recipe weighs.
        global_batch_size: positions (samples, or packs of them) a step over all ranks.
        world_size, rank: this process's place.
        micro_batch_size: most positions in one forward pass.
        start_step, stop_step: which steps to load.
        workers: loader processes; the batches do not depend on it.
        substitutes: how many other records to try for an unusable one.
        gone: what a shard is that vanished or was replaced: the end of the run, or unusable records.
        sample_seconds, worker_memory: limits of a loader process (vlm.data.workers.Loaded).
    """

    def __init__(
        self,
        stream: Stream,
        pipeline: Pipeline,
        *,
        views: Sequence[str],
        global_batch_size: int,
        world_size: int,
        rank: int,
        micro_batch_size: int,
        start_step: int,
        stop_step: int,
        workers: int,
        substitutes: int = 16,
        gone: Gone = "stop",
        sample_seconds: float = 60.0,
        worker_memory: int = 0,
    ) -> None:
        self.stream = stream
        self.global_batch_size = global_batch_size
        self._step = start_step
        self._stop = stop_step
        self._arguments = (global_batch_size, world_size, rank, micro_batch_size)
        dataset = TrainDataset(stream, pipeline, tuple(views), substitutes, gone)
        plans = Plans(start_step, stop_step, self._arguments)
        self._batches = Loaded(
            dataset, plans, workers, "data.workers", sample_seconds=sample_seconds, worker_memory=worker_memory
        )

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._step >= self._stop:
            raise StopIteration
        plans = plan_step(self._step, *self._arguments)
        self._step += 1
        return [MicroBatch(next(self._batches), plan.weight) for plan in plans]

    def at_work(self) -> list[tuple[str, str, float]]:
        """(label, about, seconds until now) of each sample that is being loaded; for any thread of this process."""
        return self._batches.at_work()

    def keys_of_step(self, step: int) -> list[str]:
        """The keys of a step's whole global batch, in order, as planned (before any substitution)."""
        return keys_of_step(self.stream, step, self.global_batch_size)


def keys_of_step(stream: Stream, step: int, global_batch_size: int) -> list[str]:
    """The keys of a step's global batch, in order, as planned."""
    first = step * global_batch_size
    return [key for position in range(first, first + global_batch_size) for key in stream.keys(position)]


def _gone(error: ShardError) -> UserError:
    """A file that vanishes takes many records with it: no fault of theirs, and nothing to train or test around."""
    return UserError(
        f"{error}. See whether its storage is still mounted, put it back and give the same command again "
        "(data.gone=quarantine goes on without it)"
    )


class TestItem(NamedTuple):
    """A test record with all that is asked about it, ready to be scored."""

    key: str
    asks: tuple[Ask, ...]
    views: dict[str, list[Example]]  # by probe; "" is the test itself
    reason: str = ""  # why it could not be read; "" where it could
    lost: int = 0  # where it could not be read: how much is asked about it


class EvalDataset:
    """Loads all views of one test record from one decode. An unusable record is reported, never replaced."""

    def __init__(self, shards: ShardSet, pipeline: Pipeline, probes: Sequence[str], seed: int) -> None:
        self.shards, self.pipeline, self.probes, self.seed = shards, pipeline, tuple(probes), seed

    def load(self, row: int, watch: Watch) -> TestItem:
        """The record of a row."""
        key = self.shards.key(row)
        try:
            record = read_watched(self.shards, row, self.pipeline.members, watch, str(row))
            views = self.pipeline.all_views(record, SampleRng(derive_seed("test", self.seed, key)), self.probes)
            return TestItem(key, self.pipeline.asks(record), views)
        except (ShardGoneError, ShardChangedError) as error:
            raise _gone(error) from error
        except (DecodeError, ShardError) as error:
            return TestItem(key, (), {}, str(error), lost=max(1, int(self.shards.num_questions[row])))
        finally:
            watch.end()


def eval_loader(
    shards: ShardSet,
    pipeline: Pipeline,
    probes: Sequence[str],
    seed: int,
    rows: range,
    workers: int,
    sample_seconds: float = 60.0,
    worker_memory: int = 0,
) -> Loaded:
    """The test records of `rows`, in order; each record comes exactly once. UserError as `Loaded` raises it."""
    dataset = EvalDataset(shards, pipeline, probes, seed)
    return Loaded(dataset, rows, workers, "eval.workers", sample_seconds=sample_seconds, worker_memory=worker_memory)
