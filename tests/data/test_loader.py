"""What each rank loads is arithmetic; broken records are replaced the same way whoever loads them."""

import itertools
import os
import shutil
import signal

import pytest
import torch

from vlm.data.loader import TrainLoader, eval_loader, plan_step
from vlm.data.order import batch_digest
from vlm.data.shards import ShardSet
from vlm.data.stream import Source, Stream
from vlm.data.video import DecodeError
from vlm.types import Batch, Example, UserError

WORLDS = [1, 2, 3, 5, 7, 16]


@pytest.mark.parametrize(("global_batch", "micro"), [(8, 3), (13, 4), (5, 1), (64, 64)])
@pytest.mark.parametrize("world", WORLDS)
def test_shares_are_contiguous_even_and_complete(global_batch, micro, world):
    plans = [plan_step(7, global_batch, world, rank, micro) for rank in range(world)]
    assert len({len(p) for p in plans}) == 1, "every rank makes the same number of micro-steps"
    counted = [[p for m in rank if m.weight for p in m.positions] for rank in plans]
    assert list(itertools.chain(*counted)) == list(range(7 * global_batch, 8 * global_batch))
    sizes = [len(part) for part in counted]
    assert max(sizes) - min(sizes) <= 1
    assert all(0 < len(m.positions) <= micro for rank in plans for m in rank)
    ignored = [p for rank in plans for m in rank if not m.weight for p in m.positions]
    assert all(7 * global_batch <= p < 8 * global_batch for p in ignored)


class Fussy:
    """A pipeline that cannot read some records and otherwise draws one number a record."""

    repeats = 1

    def __init__(self, broken=()):
        self.broken = set(broken)

    members = ("video",)

    def parts(self, shards):
        return None

    def lengths(self, shards):
        return None

    def train(self, record, rng, visit):
        if record.key in self.broken:
            raise DecodeError("made to fail")
        return [Example(key=record.key, video=torch.rand(1, generator=rng.torch), label=0)]

    def collate(self, examples, rng):
        return Batch(keys=tuple(e.key for e in examples), video=torch.stack([e.video for e in examples]))


def load(shards, world, workers, pipeline, start=0, stop=6, batch=10):
    """Keys, values and incidents of each step's global batch, put together from all ranks."""
    steps = []
    loaders = [
        TrainLoader(
            Stream([Source(shards)], 3, pipeline), pipeline, views=["label"], global_batch_size=batch, world_size=world,
            rank=rank, micro_batch_size=2, start_step=start, stop_step=stop, workers=workers,
        )
        for rank in range(world)
    ]  # fmt: skip
    for parts in zip(*loaders, strict=True):
        micro = [m.batch for part in parts for m in part if m.weight]
        steps.append(
            (
                [key for batch in micro for key in batch.keys],
                [float(v) for batch in micro for v in batch.video],
                [incident for batch in micro for incident in batch.incidents],
            )
        )
    return steps


@pytest.fixture(scope="module")
def shards(shape_shards):
    return ShardSet(shape_shards / "train")


def test_batches_do_not_depend_on_processes_or_workers(shards):
    broken = {shards.key(3), shards.key(17)}
    expected = load(shards, 1, 0, Fussy(broken))
    assert load(shards, 3, 0, Fussy(broken)) == expected
    assert load(shards, 2, 2, Fussy(broken)) == expected


def test_resume_is_a_seek(shards):
    whole = load(shards, 1, 0, Fussy())
    assert load(shards, 2, 0, Fussy(), start=4) == whole[4:]


def test_an_epoch_holds_every_record_once_and_its_tail_carries_on(shards):
    steps = load(shards, 1, 0, Fussy(), stop=16)
    keys = [key for step, _, _ in steps for key in step]
    assert {len(step) for step, _, _ in steps} == {10}
    for epoch in range(5):
        assert len(set(keys[epoch * 32 : (epoch + 1) * 32])) == 32


def test_a_broken_record_is_replaced_and_reported(shards):
    broken = shards.key(5)
    clean, mended = load(shards, 1, 0, Fussy()), load(shards, 1, 0, Fussy({broken}))
    incidents = [incident for _, _, found in mended for incident in found]
    assert {incident.key for incident in incidents} == {broken}
    assert incidents[0].reason == "made to fail"
    for (before, _, _), (after, _, found) in zip(clean, mended):
        replaced = {incident.position: incident.replaced_by for incident in found}
        assert [new for old, new in zip(before, after) if old != new] == list(replaced.values())
        assert broken not in after


def test_nothing_but_broken_records_is_an_error_with_reasons(shards):
    everything = {shards.key(row) for row in range(len(shards))}
    with pytest.raises(UserError, match="made to fail"):
        load(shards, 1, 0, Fussy(everything))


def test_logged_digest_is_of_the_planned_keys(shards):
    loader = TrainLoader(
        Stream([Source(shards)], 3), Fussy(), views=["label"], global_batch_size=10, world_size=1, rank=0,
        micro_batch_size=10, start_step=0, stop_step=2, workers=0,
    )  # fmt: skip
    keys, _, _ = load(shards, 1, 0, Fussy())[1]
    assert batch_digest(loader.keys_of_step(1)) == batch_digest(keys)


class Refusing(Fussy):
    """A pipeline that a user has set up wrongly."""

    task = "classes"

    def train(self, record, rng, visit):
        raise UserError("set it otherwise")

    def asks(self, record):
        return ()

    def all_views(self, record, rng, probes):
        if probes:
            raise UserError("no such probe")
        return {"": []}


class Deadly(Fussy):
    """A pipeline that ends its process at one record, as the kernel does when memory runs out."""

    def train(self, record, rng, visit):
        if record.key in self.broken:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(record, rng, visit)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_users_come_as_they_are_from_any_process(shards, workers):
    with pytest.raises(UserError) as caught:
        load(shards, 1, workers, Refusing())
    assert str(caught.value) == "set it otherwise"
    with pytest.raises(UserError) as caught:
        next(eval_loader(shards, Refusing(), ["one_frme"], 3, range(8), workers))
    assert str(caught.value) == "no such probe"
    items = list(eval_loader(shards, Refusing(), [], 3, range(2, 6), workers))
    assert [item.key for item in items] == [shards.key(row) for row in range(2, 6)]


def test_a_record_that_ends_its_process_is_replaced_like_a_broken_one(shards):
    broken = {shards.key(row) for row in (3, 17)}
    expected, found = load(shards, 1, 0, Fussy(broken)), load(shards, 1, 1, Deadly(broken))
    assert [(keys, values) for keys, values, _ in found] == [(keys, values) for keys, values, _ in expected]
    reasons = {incident.key: incident.reason for _, _, met in found for incident in met}
    assert reasons == dict.fromkeys(broken, "the process that loaded it died: SIGKILL, twice")


class Crashing(Fussy):
    """A pipeline whose quicker decoder crashes on some records."""

    def train(self, record, rng, visit):
        if record.key in self.broken and record.decoders != ("pyav",):
            os.kill(os.getpid(), signal.SIGSEGV)
        return Fussy().train(record, rng, visit)


def test_a_decoder_that_crashes_costs_no_sample_where_pyav_can_read_it(shards):
    broken = {shards.key(row) for row in (3, 17)}
    assert "decord" in shards.read(3).decoders
    assert load(shards, 1, 1, Crashing(broken)) == load(shards, 1, 0, Fussy())


def test_the_ledger_says_how_often_a_sample_was_tried(shards):
    broken = {shards.key(3)}
    for pipeline, tries in ((Fussy(broken), 1), (Deadly(broken), 2)):
        incidents = [incident for _, _, found in load(shards, 1, 1, pipeline) for incident in found]
        assert {incident.attempts for incident in incidents} == {tries}


def test_a_shard_that_vanishes_is_named_at_once(shape_shards, tmp_path):
    copy = shutil.copytree(shape_shards / "train", tmp_path / "copy")
    shards = ShardSet(copy)
    (copy / "shard-000000.tar").rename(tmp_path / "elsewhere.tar")
    with pytest.raises(UserError, match=r"copy/shard-000000\.tar is gone: it was there.*storage") as caught:
        load(shards, 1, 0, Fussy())
    assert "records in a row" not in str(caught.value)
    with pytest.raises(UserError, match=r"shard-000000\.tar is gone"):
        next(eval_loader(shards, Refusing(), [], 3, range(8), 0))


def test_a_row_that_cannot_be_true_is_an_incident_like_any_other(shape_shards, tmp_path):
    shards = ShardSet(shape_shards / "train")
    expected = load(shards, 1, 0, Fussy({shards.key(5), shards.key(9)}))
    shards.index = shards.index.copy()
    shards.index["nbytes"][5] = 2**62
    shards.index["shard"][9] = 7
    found = load(shards, 1, 0, Fussy())
    assert [keys for keys, _, _ in found] == [keys for keys, _, _ in expected]
    reasons = {incident.key: (incident.shard, incident.reason) for _, _, met in found for incident in met}
    assert reasons.keys() == {shards.key(5), shards.key(9)}
    assert "4611686018427387904 bytes" in reasons[shards.key(5)][1]
    assert reasons[shards.key(9)][0] == "shard-000007.tar"
