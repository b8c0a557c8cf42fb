"""Captions are cut into segments, rows keep places for what is chosen of them, and what rows share stays shared."""

from __future__ import annotations

import pytest
import torch
from question_shards import DIM, shards

from vlm.data.passages import Picks, gather_passages, segments
from vlm.data.questions import QuestionConfig
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.data.tokenizers import ByteTokenizer
from vlm.types import IGNORE, Passage, Visit

CAPTION = "llava_v15_13b_n6"
SMALL = {"num_frames": 4, "feature_dim": DIM, "max_length": 600, "caption": CAPTION}
TEXT = ByteTokenizer()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return ShardSet(shards(tmp_path_factory.mktemp("passages")) / "train")


def train(config, record, part=0):
    return config.train(record, SampleRng(0), Visit(part, 0, ("answer",)))[0]


@pytest.mark.parametrize(("length", "keep"), [(10, 3), (40, 40), (644, 40), (7, 1), (5, 9)])
def test_segments_are_equal_and_miss_nothing(length, keep):
    parts = segments(length, keep)
    assert [place for part in parts for place in part] == list(range(length))
    assert len(parts) == min(length, keep)
    assert {len(part) for part in parts} <= {length // len(parts), -(-length // len(parts))}


def test_the_same_passage_is_chosen_from_once():
    picks = Picks(2)
    first, other = Passage((5, 6, 7)), Passage((5, 6, 7), (9,))
    assert [picks.add(passage) for passage in (first, other, first, Passage((8,)))] == [(0, 2), (2, 2), (0, 2), (4, 1)]
    assert picks.passages == (first, other, Passage((8,)))


def test_a_batch_of_passages():
    found = gather_passages([Passage((11, 12, 13), (7, 8)), Passage((14,))], keep=2)
    assert found.tokens.tolist() == [11, 12, 13, 7, 8, 14]
    assert found.segments.tolist() == [[0, -1], [1, 2], [5, -1]]
    assert found.tasks.tolist() == [[3, 4], [3, 4], [-1, -1]]
    assert gather_passages([], keep=2).segments.tolist() == [[0]]  # the selector has something to run on


def test_places_stand_where_the_caption_stood(records):
    """All that is not the caption is as in the row that reads it whole, labels and video included."""
    record = records.read(0)
    whole, short = (train(QuestionConfig(**SMALL, keep_tokens=keep), record) for keep in (None, 8))
    (before,), (after,) = whole.rows["answer"], short.rows["answer"]
    start, end = after.picks
    assert end - start == 8
    passage = short.passages[0]
    assert TEXT.decode(passage.ids).startswith("a dog 0 runs. It stops")
    assert TEXT.decode(passage.task) == "Question: What does dog 0 do at place 0?"
    lost = len(passage.ids) - 8
    assert before.ids == (*after.ids[:start], *passage.ids, *after.ids[end:])
    assert before.labels == (*after.labels[:start], *[IGNORE] * len(passage.ids), *after.labels[end:])
    assert (before.video, len(before.ids) - len(after.ids)) == (after.video, lost)
    assert whole.passages == ()
    assert QuestionConfig(**SMALL).collate([whole], SampleRng(0)).passages is None


def test_nothing_to_choose_leaves_the_row_as_it_is(records):
    record = records.read(0)
    config = QuestionConfig(**SMALL, keep_tokens=500)
    (row,) = train(config, record).rows["answer"]
    (whole,) = train(QuestionConfig(**SMALL), record).rows["answer"]
    assert len(row.ids) == len(whole.ids)
    assert all(len(part) == 1 for part in segments(row.picks[1] - row.picks[0], 500))


@pytest.mark.parametrize(("chosen_for", "passages"), [("question", 3), ("question_options", 3), ("caption", 1)])
def test_what_is_shared_in_tests(records, chosen_for, passages):
    """Options share the tokens chosen for their question; questions do only where they are chosen by the caption."""
    config = QuestionConfig(**SMALL, keep_tokens=8, select_for=chosen_for)
    example = config.all_views(records.read(1), SampleRng(0), ())[""][0]
    assert len(example.passages) == passages
    batch = config.test_batch([example])
    rows = batch.options
    assert len(rows.pick_slots) == 8 * passages
    assert rows.pick_sources.tolist() == list(range(8 * passages))
    assert len(rows.leaves) == 3
    # every option goes back to one row that holds chosen tokens, the same for all options of its question
    owner = torch.arange(len(rows.lengths)).repeat_interleave(torch.tensor(rows.lengths))[rows.pick_slots]
    for question in rows.leaves:
        roots = set()
        for leaf in question:
            path = set()
            while leaf >= 0:
                path.add(leaf)
                leaf = rows.parents[leaf]
            roots.add(frozenset(path & set(owner.tolist())))
        assert len(roots) == 1
        assert len(next(iter(roots))) == 1


@pytest.mark.parametrize("share", [False, True])
def test_numbers_of_chosen_tokens_go_on_over_a_batch(records, share):
    config = QuestionConfig(**SMALL, keep_tokens=5, share_questions=share)
    examples = [train(config, records.read(number), part=None if share else 0) for number in (0, 3)]
    batch = config.collate(examples, SampleRng(0))
    expected = 2 * 5 * (3 if share else 1)
    assert len(batch.passages.segments) == expected
    assert batch.views["answer"].pick_sources.tolist() == list(range(expected))
    moved = batch.to("meta")
    assert moved.passages.tokens.is_meta


def test_a_process_without_work_runs_the_selector_too():
    """Under ZeRO-3 all processes must."""
    config = QuestionConfig(**SMALL, keep_tokens=5)
    batch = config.test_batch([config.blank()])
    assert batch.passages.segments.tolist() == [[0]]
    assert not len(batch.options.pick_slots)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"inputs\.keep_tokens is 0"):
        QuestionConfig(caption="c", keep_tokens=0)
    with pytest.raises(ValueError, match="no caption to choose tokens from"):
        QuestionConfig(keep_tokens=3)
