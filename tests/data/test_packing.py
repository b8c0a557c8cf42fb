"""Packed rows say where everything stands; trees hold the same rows as before, each common token once."""

from __future__ import annotations

import random

import pytest
import torch

from vlm.data.packing import Row, pack, pack_trees, row_of, share_prefixes
from vlm.types import IGNORE, Batch, TextRows, Tokens

X = IGNORE


def test_rows_end_to_end() -> None:
    rows = [Row((1, 5, 0, 0, 7, 2), (X, X, X, X, 7, 2), (2, 4), sample=1), Row((1, 9, 2), (X, X, 2))]
    packed = pack(rows, 2)
    assert packed.tokens.tolist() == [1, 5, 0, 0, 7, 2, 1, 9, 2]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert packed.slots.tolist() == [2, 3]
    assert packed.sources.tolist() == [2, 3]  # the second video's two tokens
    assert packed.predictors.tolist() == [3, 4, 7]
    assert packed.targets.tolist() == [7, 2, 2]
    assert packed.after_video.tolist() == [False] * 4 + [True] * 2 + [False] * 3
    assert packed.lengths == (6, 3)
    assert packed.target_counts == (2, 1)


def test_id_zero_can_be_learnt() -> None:
    """0 is "!" in LLaMA-3's vocabulary; the originals never learn it."""
    packed = pack([Row((1, 0, 2), (X, 0, 2))], 2)
    assert packed.targets.tolist() == [0, 2]


def test_a_child_goes_on_from_its_parent() -> None:
    rows = [
        Row((1, 0, 5), (X, X, X), (1, 2)),
        Row((6, 7), (6, X), parent=0),
        Row((8,), (8,), parent=0),
        Row((9,), (9,), parent=1),
    ]
    packed = pack(rows, 1)
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 5]
    assert packed.predictors.tolist() == [2, 2, 4]  # the parent's last token predicts the child's first
    assert packed.targets.tolist() == [6, 8, 9]
    assert packed.after_video.tolist() == [False, False, True, True, True, True, True]
    assert packed.parents == (-1, 0, 0, 1)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([Row((), ())], "empty"),
        ([Row((1, 2), (X, 2), (0, 2))], "no place"),
        ([Row((0, 2), (X, 2), (0, 1))], "begins with its video"),
        ([Row((1, 0, 2), (X, X, X), (1, 2)), Row((5, 0), (X, X), (1, 2), parent=0)], "two videos"),
        ([Row((1, 2), (1, X))], "cannot be predicted"),
        ([Row((1, 2), (X, X), parent=0)], "before its parent"),
    ],
)
def test_rows_that_only_we_can_make_wrong(rows: list[Row], part: str) -> None:
    with pytest.raises(AssertionError, match=part):
        pack(rows, 1)


def whole(tree: list[Row], leaf: int) -> Row:
    """The row that ends at `leaf`, put together again."""
    ids, labels, video, at = (), (), (0, 0), leaf
    parts = []
    while at >= 0:
        parts.append(tree[at])
        at = tree[at].parent
    for part in reversed(parts):
        if part.video[1]:
            video = (len(ids) + part.video[0], len(ids) + part.video[1])
        ids, labels = ids + part.ids, labels + part.labels
    return Row(ids, labels, video, tree[leaf].sample)


def random_questions(seed: int) -> list[list[Row]]:
    draw = random.Random(seed)
    prefix = [draw.randint(1, 3) for _ in range(draw.randint(2, 6))]
    start, count = len(prefix), draw.choice([0, 2])
    caption = [draw.randint(1, 3) for _ in range(draw.randint(0, 6))]
    questions = []
    for _ in range(draw.randint(1, 4)):
        text = [draw.randint(1, 2) for _ in range(draw.randint(1, 5))]
        rows = []
        for letter in range(draw.randint(1, 5)):
            ids = (*prefix, *[0] * count, *caption, *text, 7, 10 + letter, 8, 9)
            labels = (*[X] * (len(ids) - 4), *ids[-4:])
            rows.append(Row(ids, labels, (start, start + count) if count else (0, 0), sample=2))
        questions.append(rows)
    return questions


@pytest.mark.parametrize("seed", range(30))
def test_trees_hold_the_same_rows(seed: int) -> None:
    questions = random_questions(seed)
    tree, leaves = share_prefixes(questions)
    assert [[whole(tree, leaf) for leaf in question] for question in leaves] == questions
    packed = pack_trees([(tree, leaves), (tree, leaves)], 2)
    assert sum(packed.lengths) == 2 * sum(len(row.ids) for row in tree)
    assert packed.leaves[len(leaves)][0] == leaves[0][0] + len(tree)


def test_what_is_common_is_there_once() -> None:
    """One video, two questions with three options each: prefix 1, questions 2, letters and ends 6."""
    head, ask = (1, 2, 3, 0, 0, 4), ((11, 12), (13, 14, 15))
    questions = [
        [Row((*head, *q, 30 + o, 9), (*[X] * (len(head) + len(q)), 30 + o, 9), (3, 5)) for o in range(3)] for q in ask
    ]
    tree, leaves = share_prefixes(questions)
    assert [len(row.ids) for row in tree] == [6, 2, 2, 2, 2, 3, 2, 2, 2]
    assert leaves == [(2, 3, 4), (6, 7, 8)]
    assert sum(len(row.video) and row.video[1] > 0 for row in tree) == 1


def test_different_labels_are_not_shared() -> None:
    a, b = Row((1, 5, 6, 7), (X, X, 6, 7)), Row((1, 5, 6, 8), (X, X, X, 8))
    tree, _ = share_prefixes([[a], [b]])
    assert [row.ids for row in tree] == [(1, 5), (6, 7), (6, 8)]


def test_a_video_is_never_cut() -> None:
    """Rows that differ only after their videos' first slot, or whose videos stand elsewhere, part before the video."""
    a, b = Row((1, 5, 0, 0, 7), (X, X, X, X, 7), (2, 4)), Row((1, 5, 0, 0, 0, 7), (X, X, X, X, X, 7), (3, 5))
    tree, _ = share_prefixes([[a], [b]])
    assert [row.ids for row in tree] == [(1,), (5, 0, 0, 7), (5, 0, 0, 0, 7)]
    assert [row.video for row in tree] == [(0, 0), (1, 3), (2, 4)]


def test_rows_of_two_videos_share_the_instruction_alone() -> None:
    """The same tokens, the same places for video, but other videos: what comes after is not the same."""
    rows = [[[Row((1, 5, 0, 0, 7, 8), (X, X, X, X, 7, 8), (2, 4), sample)]] for sample in (0, 1)]
    tree, leaves = share_prefixes(rows)
    assert [row.ids for row in tree] == [(1,), (5, 0, 0, 7, 8), (5, 0, 0, 7, 8)]
    assert leaves == [(1,), (2,)]
    packed = pack_trees([(tree, leaves)], 2)
    assert packed.sources.tolist() == [0, 1, 2, 3]
    assert [whole(tree, leaf) for (leaf,) in leaves] == [row for ((row,),) in rows]


def test_encoded_prompts_become_rows() -> None:
    tokens = Tokens((1, 0, 0, 5), (X, X, X, 5), (1, 3))
    assert row_of(tokens, 4) == Row((1, 0, 0, 5), (X, X, X, 5), (1, 3), sample=4)
    assert row_of(tokens, blind=True) == Row((1, 0, 0, 5), (X, X, X, 5))


def test_batches_move_whole() -> None:
    rows = pack([Row((1, 2), (X, 2))], 1)
    moved = Batch(keys=("a",), features=torch.ones(1, 1, 2), views={"answer": rows}, options=rows).to("meta")
    assert moved.features.is_meta
    for part in (moved.views["answer"], moved.options):
        assert isinstance(part, TextRows)
        assert part.tokens.is_meta
        assert part.lengths == (2,)
