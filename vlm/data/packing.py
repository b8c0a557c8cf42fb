"""Rows of tokens laid end to end for one pass of a language model: no padding, and what rows share is there once.

A `Row` is one prompt as the encoder made it. `pack` joins rows as they are; `share_prefixes` cuts them into a tree
first (instruction, then video, then question, then option), which gives the same losses and scores as whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Union

import torch

from vlm.types import IGNORE, Row, TextRows, Tokens

Tree = tuple[list[Row], list[tuple[int, ...]]]


def row_of(tokens: Tokens, sample: int = 0, *, blind: bool = False) -> Row:
    """An encoded prompt as a row. `blind`: the video's places keep the id 0 instead of taking video tokens, as in
    Vamos' runs on captions alone."""
    return Row(tokens.ids, tokens.labels, (0, 0) if blind else tokens.video, sample)


def pack(rows: Sequence[Row], num_video_tokens: int, leaves: Sequence[tuple[int, ...]] = ()) -> TextRows:
    """Join rows. Trees stand depth first: a row, then all that hangs on it.

    Args:
        num_video_tokens: N, places that a video takes in its row.
        leaves: for each question, the rows that end its options (evaluation).
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sources: list[int] = []
    pick_slots: list[int] = []
    pick_sources: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    after: list[bool] = []
    ends: list[tuple[int, int, bool]] = []  # of each row: place of its last token, tokens so far, video seen
    target_counts = []
    for row in rows:
        assert row.ids, "an empty row"
        assert len(row.ids) == len(row.labels)
        assert row.parent < len(ends), f"row {len(ends)} stands before its parent {row.parent}"
        last, before, seen = ends[row.parent] if row.parent >= 0 else (-1, 0, False)
        start, learnt = len(tokens), len(targets)
        tokens += row.ids
        positions += range(before, before + len(row.ids))
        first_slot, video_end = row.video
        if video_end:
            assert video_end - first_slot == num_video_tokens, f"{row.video} is no place for {num_video_tokens} tokens"
            assert video_end <= len(row.ids), f"the video ends at {video_end} of {len(row.ids)} tokens"
            assert not seen, "a row has two videos"
            assert first_slot > 0, "a row begins with its video, so no place predicts it"
            slots += range(start + first_slot, start + video_end)
            sources += range(row.sample * num_video_tokens, (row.sample + 1) * num_video_tokens)
        first_pick, picks_end = row.picks
        assert picks_end <= len(row.ids), f"chosen tokens end at {picks_end} of {len(row.ids)}"
        pick_slots += range(start + first_pick, start + picks_end)
        pick_sources += range(row.first_pick, row.first_pick + picks_end - first_pick)
        for place, label in enumerate(row.labels):
            if label != IGNORE:
                assert place or row.parent >= 0, "the first token of a row cannot be predicted"
                predictors.append(start + place - 1 if place else last)
                targets.append(label)
        after_from = video_end if video_end else (0 if seen else len(row.ids))
        after += [place >= after_from for place in range(len(row.ids))]
        target_counts.append(len(targets) - learnt)
        ends.append((len(tokens) - 1, before + len(row.ids), seen or bool(video_end)))
    as_tensor = torch.tensor
    return TextRows(
        tokens=as_tensor(tokens, dtype=torch.int64),
        positions=as_tensor(positions, dtype=torch.int64),
        slots=as_tensor(slots, dtype=torch.int64),
        sources=as_tensor(sources, dtype=torch.int64),
        predictors=as_tensor(predictors, dtype=torch.int64),
        targets=as_tensor(targets, dtype=torch.int64),
        after_video=as_tensor(after, dtype=torch.bool),
        lengths=tuple(len(row.ids) for row in rows),
        parents=tuple(row.parent for row in rows),
        target_counts=tuple(target_counts),
        leaves=tuple(leaves),
        pick_slots=as_tensor(pick_slots, dtype=torch.int64),
        pick_sources=as_tensor(pick_sources, dtype=torch.int64),
    )


Nest = Union[Row, Sequence["Nest"]]  # noqa: UP007
"""A row, or a list of what shares more with one another than with the rest: [[[option, ...] of a question, ...] of a
video, ...]."""


def share_prefixes(nest: Nest, *, learnt: bool = True) -> Tree:
    """Whole rows as a tree: what all share, then what each part of the nest shares, then the rest of each row.

    Rows of different videos share what stands before the video at most.

    Args:
        learnt: also share tokens that are to be predicted. They are then predicted once, which leaves scores of options
            as they are; in training each row must predict its own.
    Returns:
        the rows of the tree with their parents, and for each innermost list the rows of the tree that end its rows.
    """
    tree: list[Row] = []
    leaves: list[tuple[int, ...]] = []

    def add(part: Nest, start: int, parent: int) -> None:
        if isinstance(part, Row):
            assert part.parent == -1, "a row that is cut already"
            _add(tree, part, start, len(part.ids), parent)
            return
        rows = list(_rows(part))
        stop = max(start, _common_length(rows, learnt))
        trunk = _add(tree, rows[0], start, stop, parent)
        ends = []
        for inner in part:
            add(inner, stop, trunk)
            ends.append(len(tree) - 1)
        if isinstance(part[0], Row):
            leaves.append(tuple(ends))

    add(nest, 0, -1)
    return tree, leaves


def _rows(nest: Nest) -> Iterator[Row]:
    if isinstance(nest, Row):
        yield nest
    else:
        for inner in nest:
            yield from _rows(inner)


def pack_trees(trees: Sequence[Tree], num_video_tokens: int) -> TextRows:
    """Join trees."""
    rows: list[Row] = []
    leaves: list[tuple[int, ...]] = []
    for tree, ends in trees:
        first = len(rows)
        rows += [row._replace(parent=row.parent + first if row.parent >= 0 else -1) for row in tree]
        leaves += [tuple(first + leaf for leaf in question) for question in ends]
    return pack(rows, num_video_tokens, leaves)


def _add(tree: list[Row], row: Row, start: int, stop: int, parent: int) -> int:
    """Add the part [start, stop) of a row to a tree; an empty part adds nothing and its parent stands for it."""
    if start == stop:
        return parent
    video, picks = (_within(places, start, stop) for places in (row.video, row.picks))
    cut = row._replace(ids=row.ids[start:stop], labels=row.labels[start:stop])
    tree.append(cut._replace(video=video, picks=picks, parent=parent))
    return len(tree) - 1


def _within(places: tuple[int, int], start: int, stop: int) -> tuple[int, int]:
    """Places of a row counted in its part [start, stop); (0, 0) where they are not in it."""
    first, end = places
    return (first - start, end - start) if end and start <= first and end <= stop else (0, 0)


def _common_length(rows: Sequence[Row], learnt: bool) -> int:
    """Tokens that all rows begin with, labels and slots included; the last token of a row is never among them, and
    neither a video nor what a selector chose is ever cut nor parted from the token before. One row alone shares
    nothing."""
    if len(rows) == 1:
        return 0
    head = rows[0]
    length = min(len(row.ids) for row in rows) - 1
    for row in rows[1:]:
        pairs = zip(head.ids[:length], row.ids[:length], head.labels[:length], row.labels[:length])
        length = next((i for i, (a, b, c, d) in enumerate(pairs) if (a, c) != (b, d)), length)
    if not learnt:
        length = next((i for i, label in enumerate(head.labels[:length]) if label != IGNORE), length)
    for filled in ({(row.video, row.sample) for row in rows}, {(row.picks, row.first_pick) for row in rows}):
        for (first, end), _ in filled:
            # where a video begins after the cut, or all rows have the same one before the cut, nothing is in the way
            if end and first <= length and (length < end or len(filled) > 1):
                length = first - 1
    return max(length, 0)
