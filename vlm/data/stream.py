"""What stands at each position of training: of one shard set or a weighted mix, sample by sample or in packs.

A position holds one sample, or one pack of them (vlm.data.packs). Everything is arithmetic on (indices of the sets,
weights, seed, position): no process asks another, and resuming is starting at another position.

    stream = Stream([Source(ShardSet("data/webvid"), weight=100), Source(ShardSet("data/cc3m"), weight=24)], seed=0)
    stream.samples(12_345)  # [Placed(source=0, sample=77_012, epoch=0)]
    stream.keys(12_345)

**Mix.** A set's share of the positions is its weight over the sum of weights. The set of a position follows from
whole-number division, so after any number of blocks of `MIX_BLOCK` positions each set is within one or two of its
share; inside a block positions are shuffled. Each set goes through its own epochs, in each of which each of its samples
comes once. Sets without weights are one large set: in an epoch of the mix each sample comes once.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlm.data.order import Order, permutation
from vlm.data.packs import Packs, plan_packs
from vlm.data.rng import derive_seed
from vlm.data.shards import ShardSet
from vlm.types import UserError

MIX_BLOCK = 1024
_DRAWS = 64  # samples among which one is looked for that fits a pack
_STRIDE = 1024  # records between two of the sums that `Samples` keeps


class Parted(Protocol):
    """What says how many samples each record holds, and how long they are (a pipeline of vlm.data.loader)."""

    def parts(self, shards: ShardSet) -> np.ndarray | None: ...

    def lengths(self, shards: ShardSet) -> np.ndarray | None: ...


class Samples:
    """The training samples of a shard set: its records, or where a record holds several samples, those.

    Args:
        shards: the records.
        parted: says how many samples each record holds; None: one.
    """

    def __init__(self, shards: ShardSet, parted: Parted | None = None) -> None:
        self.shards, self._parted = shards, parted
        # (records,) mapped, or None: every record is one sample
        self._parts = None if parted is None else parted.parts(shards)
        if self._parts is not None:
            sums = np.add.reduceat(self._parts, np.arange(0, len(self._parts), _STRIDE), dtype=np.int64)
            self._before = np.concatenate([[0], np.cumsum(sums)])  # samples before each `_STRIDE`-th record

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_parts"}  # mapped anew, never sent

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._parts = None if self._parted is None else self._parted.parts(self.shards)

    def __len__(self) -> int:
        return len(self.shards) if self._parts is None else int(self._before[-1])

    def locate(self, sample: int) -> tuple[int, int | None]:
        """(row of the index, which part of the record or None: all of it)."""
        if self._parts is None:
            return sample, None
        block = int(np.searchsorted(self._before, sample, side="right")) - 1
        first = block * _STRIDE
        ends = np.cumsum(self._parts[first : first + _STRIDE], dtype=np.int64)
        place = sample - int(self._before[block])
        row = int(np.searchsorted(ends, place, side="right"))
        return first + row, place - (int(ends[row - 1]) if row else 0)

    def key(self, sample: int) -> str:
        """What identifies a sample in the order: the record's key, and "/part" where it holds several."""
        row, part = self.locate(sample)
        return self.shards.key(row) if part is None else f"{self.shards.key(row)}/{part}"


class Source(NamedTuple):
    """A shard set of a mix. `weight` None: as many positions as it has samples."""

    shards: ShardSet
    weight: float | None = None


class Placed(NamedTuple):
    """A sample at a position."""

    source: int  # which set of the mix
    sample: int  # of that set
    epoch: int  # of that set: how often each of its samples came before


@dataclass(frozen=True, slots=True)
class _Set:
    """One set of a mix, ready."""

    samples: Samples
    order: Order  # of samples, or of packs
    packs: Packs | None
    lengths: np.ndarray | None  # (samples,)


class Stream:
    """The endless sequence of training positions. Cheap to send to other processes.

    Args:
        sources: the sets of the mix; at least one. Weights: all or none.
        seed: the recipe's seed.
        parted: what a sample is; None: a record.
        pack_length: put samples together up to this length (tokens); None: a position holds one sample.
    Raises:
        UserError: weights, lengths or sets do not go together.
    """

    def __init__(
        self, sources: Sequence[Source], seed: int, parted: Parted | None = None, pack_length: int | None = None
    ) -> None:
        self.seed, self.pack_length = seed, pack_length
        self.sets = [
            _prepare(source.shards, seed if number == 0 else derive_seed("set", seed, number), parted, pack_length)
            for number, source in enumerate(sources)
        ]
        self._mix = _Mix([one.order.size for one in self.sets], [source.weight for source in sources], seed)

    @property
    def fingerprint(self) -> str:
        """What the content of the sets and their weights hash to; with packs, " packs " and what their plan hashes to:
        it follows from the lengths in the index, which other tokens counted there change and the content does not."""
        prints = [one.samples.shards.fingerprint for one in self.sets]
        content = prints[0]
        if len(prints) > 1:
            content = hashlib.sha256(f"{prints} {self._mix.weights}".encode()).hexdigest()
        plan = hashlib.sha256()
        for packs in (one.packs for one in self.sets):
            if packs is None:
                return content
            for array in (packs.starts, packs.members):
                plan.update(np.ascontiguousarray(array, "<i8").data)
        return f"{content} packs {plan.hexdigest()}"

    def describe(self) -> str:
        """Records, samples, shares and packs in words."""
        told = []
        for one, share in zip(self.sets, self._mix.shares()):
            shards, samples = one.samples.shards, one.samples
            held = "" if len(samples) == len(shards) else f"with {len(samples):,} questions "
            part = "" if len(self.sets) == 1 else f" ({share:.1%} of the positions)"
            told.append(f"{len(shards):,} records {held}in {shards.path}{part}")
            if one.packs is not None:
                longer = f", {one.packs.too_long:,} samples longer than that" if one.packs.too_long else ""
                packs = f"{len(one.packs):,} packs of up to {self.pack_length:,} tokens, filled to"
                told.append(f"{packs} {one.packs.fill:.1%} by the index{longer}")
        return "; ".join(told)

    def __len__(self) -> int:
        """Positions of an epoch: samples or packs of all sets together."""
        return self._mix.length

    def epoch(self, position: int) -> int:
        """The epoch (from 0) that a position belongs to."""
        return position // self._mix.length

    def samples(self, position: int) -> list[Placed]:
        """The samples at a position, in order; several only where they are packed."""
        source, place = self._mix.place(position)
        one = self.sets[source]
        element, epoch = one.order.row(place), one.order.epoch(place)
        found = [element] if one.packs is None else one.packs[element].tolist()
        return [Placed(source, sample, epoch) for sample in found]

    def key(self, placed: Placed) -> str:
        """What identifies a sample in the order (sets of a mix may have the same keys)."""
        return self.sets[placed.source].samples.key(placed.sample)

    def keys(self, position: int) -> list[str]:
        """The keys of the samples at a position."""
        return [self.key(placed) for placed in self.samples(position)]

    def substitute(self, placed: Placed, position: int, slot: int, attempt: int) -> Placed:
        """The sample that takes the place of an unusable one: a pure function of what is given, of the same set.

        In a pack it is not longer than the one it stands for, if one of `_DRAWS` is not; else it is their shortest.
        """
        one = self.sets[placed.source]
        size = len(one.samples)
        words = ("substitute", self.seed, position, *((slot,) if slot else ()), attempt)
        drawn = derive_seed(*words) % size
        if one.lengths is not None:
            candidates = np.array([drawn, *(derive_seed(*words, number) % size for number in range(1, _DRAWS))])
            lengths = one.lengths[candidates]
            fits = lengths <= one.lengths[placed.sample]
            drawn = int(candidates[fits.argmax() if fits.any() else lengths.argmin()])
        return placed._replace(sample=drawn)


def _prepare(shards: ShardSet, seed: int, parted: Parted | None, pack_length: int | None) -> _Set:
    samples = Samples(shards, parted)
    if pack_length is None:
        return _Set(samples, Order(len(samples), seed), None, None)
    lengths = text_lengths(shards) if parted is None else parted.lengths(shards)
    if lengths is None:
        raise UserError(
            f"{shards.path}: its samples cannot be packed, since this recipe's inputs have no length in tokens; "
            "set data.pack_length=none"
        )
    packs = plan_packs(lengths, pack_length)
    return _Set(samples, Order(len(packs), seed), packs, lengths)


def text_lengths(shards: ShardSet) -> np.ndarray:
    """(records,) tokens of all text of each record, whatever a recipe reads of it: as counted when the shards were made
    (--tokenizer), else a quarter of its characters, rounded up; at least 1."""
    return np.maximum(1, -(-shards.text_length // 4) if shards.tokens is None else shards.tokens)


class _Mix:
    """Which set each position belongs to, and which of that set's positions it is."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | None], seed: int) -> None:
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            raise UserError(f"weights of a mix are {list(weights)}: give each set one, or none")
        for weight in given:
            if not 0 < weight < math.inf:
                raise UserError(f"weights of a mix are {list(weights)}: each must be a finite number above 0")
        self.length, self.seed = sum(sizes), seed
        shares = [Fraction(str(weight)) for weight in given] or [Fraction(size) for size in sizes]
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        # (weight of a set, weight of it and all after it)
        self.weights = [(weight, sum(whole[number:])) for number, weight in enumerate(whole)]
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def shares(self) -> list[float]:
        """Each set's share of the positions."""
        return [weight / self.weights[0][1] for weight, _ in self.weights]

    def place(self, position: int) -> tuple[int, int]:
        """(set, position in that set's own order)."""
        if len(self.weights) == 1:
            return 0, position
        place = self._shuffled(position)
        for number, (weight, rest) in enumerate(self.weights):
            before = place * weight // rest
            if (place + 1) * weight // rest > before:
                return number, before
            place -= before
        raise AssertionError("the last set takes what is left")

    def _shuffled(self, position: int) -> int:
        """The position that stands here when each block of an epoch is shuffled; what an epoch holds stays."""
        epoch, offset = divmod(position, self.length)
        block, inside = divmod(offset, MIX_BLOCK)
        found = self._blocks.get((epoch, block))
        if found is None:
            size = min(MIX_BLOCK, self.length - block * MIX_BLOCK)
            found = self._blocks[epoch, block] = permutation(size, "mix", self.seed, epoch, block)
            if len(self._blocks) > 8:
                self._blocks.popitem(last=False)
        return position - inside + int(found[inside])
