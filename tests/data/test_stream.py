"""The stream: one chain of batches whatever the number of processes, the mix, the packs, and where a run was killed."""

from __future__ import annotations

import collections
import hashlib
import itertools
import pickle
import random
from typing import Any

import numpy as np
import pytest

from vlm.data.loader import keys_of_step, plan_step
from vlm.data.mix import is_elsewhere, parse_mix
from vlm.data.shards import ShardSet
from vlm.data.stream import Placed, Samples, Source, Stream
from vlm.types import UserError


class Made:
    """A shard set that nobody wrote: what the schedule reads of an index."""

    def __init__(self, rows: int, name: str = "s", questions: bool = False) -> None:
        self.rows, self.path = rows, name
        draw = np.random.default_rng(rows)
        self.text_length = draw.integers(8, 400, rows).astype(np.int32)
        self.num_questions = draw.integers(0, 9, rows).astype(np.int32)
        self.tokens = None
        self.fingerprint = f"{name}{rows}"

    def __len__(self) -> int:
        return self.rows

    def key(self, row: int) -> str:
        assert 0 <= row < self.rows
        return f"{self.path}{row}"


class Questions:
    """Each record holds several samples."""

    def parts(self, shards: Any) -> np.ndarray:
        return shards.num_questions

    def lengths(self, shards: Any) -> np.ndarray:
        return np.repeat(20 + shards.text_length // 8, shards.num_questions)


def stream(*sources: tuple[Any, float | None], seed: int = 0, parted: Any = None, pack: int | None = None) -> Stream:
    return Stream([Source(shards, weight) for shards, weight in sources], seed, parted, pack)


def batch(made: Stream, step: int, size: int, world: int) -> list[list[str]]:
    """The keys that each rank loads, from the plans that the loader follows."""
    found = []
    for rank in range(world):
        plans = plan_step(step, size, world, rank, micro_batch_size=3)
        found.append([key for plan in plans if plan.weight for p in plan.positions for key in made.keys(p)])
    return found


MILLION = Made(1_000_000)
SMALLER, SMALLEST = Made(70_003, "b"), Made(311, "c")
KINDS: dict[str, Stream] = {
    "one set": stream((MILLION, None), seed=1),
    "by size": stream((MILLION, None), (SMALLER, None), (SMALLEST, None), seed=2),
    "weighted": stream((MILLION, 100), (SMALLER, 24), seed=3),
    "three": stream((SMALLEST, 0.5), (MILLION, 3.25), (SMALLER, 1), seed=4),
    "packed": stream((MILLION, None), seed=5, pack=1024),
    "packed mix": stream((SMALLER, 1), (MILLION, 2), seed=6, pack=700),
    "questions": stream((SMALLER, None), seed=7, parted=Questions()),
    "packed questions": stream((SMALLER, 3), (SMALLEST, 1), seed=8, parted=Questions(), pack=512),
}
WORLDS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 97, 251, 512, 1021, 4093, 4096)


@pytest.mark.parametrize("part", range(5))
def test_500_random_schedules_give_the_chain_of_one_process(part: int) -> None:
    draw = random.Random(part)
    for _ in range(100):
        made = KINDS[draw.choice(list(KINDS))]
        size = draw.choice((1, 3, 8, 24, 64, 100))
        start = draw.choice((0, draw.randrange(10_000), 10_000_000 // size))
        stop = start + draw.randrange(2, 7)
        expected = [keys_of_step(made, step, size) for step in range(start, stop)]
        step = start
        while step < stop:  # killed and continued with other numbers of processes
            world = draw.choice(WORLDS)
            for _ in range(draw.randrange(1, 4)):
                if step < stop:
                    shares = batch(made, step, size, world)
                    assert list(itertools.chain(*shares)) == expected[step - start]
                    step += 1


def test_4096_ranks_have_contiguous_shares_that_differ_by_one() -> None:
    shares = batch(KINDS["weighted"], 17, 10_000, 4096)
    assert {len(share) for share in shares} == {2, 3}
    assert list(itertools.chain(*shares)) == keys_of_step(KINDS["weighted"], 17, 10_000)


@pytest.mark.parametrize("pack", [None, 300])
@pytest.mark.parametrize("parted", [None, Questions()])
def test_an_epoch_has_each_key_once(pack: int | None, parted: Any) -> None:
    sets = [(Made(4500, "a"), None), (Made(70, "b"), None), (Made(1, "c"), None)]
    for sources in (sets[:1], sets):
        made = stream(*sources, seed=3, parted=parted, pack=pack)
        for epoch in (0, 1, 5):
            positions = range(epoch * len(made), (epoch + 1) * len(made))
            keys = [key for position in positions for key in made.keys(position)]
            assert len(set(keys)) == len(keys) == sum(len(one.samples) for one in made.sets)
            assert {made.epoch(position) for position in positions} == {epoch}
            assert {placed.epoch for position in positions for placed in made.samples(position)} == {epoch}


def test_shares_of_a_weighted_mix() -> None:
    made = stream((Made(500, "a"), 100), (Made(9000, "b"), 24), (Made(40, "c"), 0.5), seed=1)
    span = 4 * len(made)
    counts = collections.Counter(made.samples(position)[0].source for position in range(span))
    for source, weight in enumerate((100, 24, 0.5)):
        assert abs(counts[source] - span * weight / 124.5) <= 2, counts
    rows = [made.samples(position)[0] for position in range(span)]
    seen = collections.Counter(placed.sample for placed in rows if placed.source == 0)
    assert max(seen.values()) - min(seen.values()) <= 1, "each of its passes has each sample once"
    runs = max(len(list(group)) for _, group in itertools.groupby(placed.source for placed in rows))
    assert runs > 12, "neighbours are shuffled, not a fixed pattern"


def test_seeking_ten_million_far_takes_no_replay() -> None:
    for made in KINDS.values():
        fresh = Stream([Source(one.samples.shards) for one in made.sets], made.seed, Questions())
        fresh.keys(10_000_000)
        assert sum(len(one.order._cache) for one in fresh.sets) == 2, "one permutation of blocks, one of a window"
        assert len(fresh._mix._blocks) <= 1


def test_a_substitute_is_of_the_same_set_and_fits_the_pack() -> None:
    made = KINDS["packed mix"]
    placed = made.samples(123)[0]
    drawn = [made.substitute(placed, 123, 0, attempt) for attempt in range(30)]
    assert drawn == [made.substitute(placed, 123, 0, attempt) for attempt in range(30)]
    assert {one.source for one in drawn} == {placed.source}
    lengths = made.sets[placed.source].lengths
    assert lengths is not None
    assert all(lengths[one.sample] <= lengths[placed.sample] for one in drawn)
    assert len({one.sample for one in drawn}) > 20
    plain = KINDS["one set"]
    assert plain.substitute(Placed(0, 5, 0), 9, 0, 0) != plain.substitute(Placed(0, 5, 0), 9, 0, 1)


def test_parts_are_found_anywhere() -> None:
    shards = Made(5000, "r")
    samples = Samples(shards, Questions())  # type: ignore[arg-type]
    expected = [(row, part) for row in range(5000) for part in range(shards.num_questions[row])]
    assert len(samples) == len(expected)
    some = [*range(30), *range(len(expected) - 30, len(expected)), *range(0, len(expected), 97)]
    assert [samples.locate(sample) for sample in some] == [expected[sample] for sample in some]
    again = pickle.loads(pickle.dumps(samples))
    assert [again.locate(sample) for sample in some] == [expected[sample] for sample in some]


def test_what_is_asked_decides_the_chain() -> None:
    def chain(made: Stream) -> str:
        keys = [key for step in range(4) for key in keys_of_step(made, step, 32)]
        return hashlib.sha256("\n".join(keys).encode()).hexdigest()

    sets = [(Made(900, "a"), None), (Made(300, "b"), None)]
    chains = [
        chain(stream(*sets, seed=1)),
        chain(stream(*sets, seed=2)),
        chain(stream(sets[0], seed=1)),
        chain(stream((sets[0][0], 1), (sets[1][0], 1), seed=1)),
        chain(stream(*sets, seed=1, pack=200)),
    ]
    assert len(set(chains)) == len(chains)
    assert chains[0] == chain(stream(*sets, seed=1))


def test_words_of_a_mix() -> None:
    assert parse_mix("data/a") == [("data/a", None)]
    assert parse_mix("data/a:100,data/b:24.5") == [("data/a", 100.0), ("data/b", 24.5)]
    assert parse_mix("a, b:3") == [("a", 1.0), ("b", 3.0)]
    assert parse_mix("https://host:8000/x/y,s3://b/c:2") == [("https://host:8000/x/y", 1.0), ("s3://b/c", 2.0)]
    assert parse_mix("a:2,pipe:tool --set=x,y {}:3") == [("a", 2.0), ("pipe:tool --set=x,y {}", 3.0)]
    assert parse_mix("pipe:cat x,y/{}") == [("pipe:cat x,y/{}", None)]
    with pytest.raises(UserError, match="names no shards"):
        parse_mix(" , ")
    assert is_elsewhere("pipe:cat x/{}")
    assert is_elsewhere("hf://datasets/a/b")
    assert is_elsewhere("simplecache::s3://b/c")
    assert not is_elsewhere("data/a:b")
    assert not is_elsewhere("file:///data/a")


def test_wrong_mixes_are_refused(shape_shards: Any) -> None:
    shards = ShardSet(shape_shards / "train")
    with pytest.raises(UserError, match="each must be a finite number above 0"):
        Stream([Source(shards, 0.0), Source(shards, 1.0)], 0)
    with pytest.raises(UserError, match="give each set one, or none"):
        Stream([Source(shards, 2.0), Source(shards)], 0)
