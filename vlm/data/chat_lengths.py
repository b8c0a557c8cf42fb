"""How many samples the questions of records are, and how long their rows become, told from the index."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vlm.data.dialogue_lengths import above
from vlm.data.measured import measured
from vlm.data.shards import ShardSet
from vlm.data.stream import text_lengths
from vlm.types import Record, UserError


class ChatRows(NamedTuple):
    """What there is to know of a recipe's rows."""

    measure: Callable[[Record], list[int]]  # tokens of each question's row, nothing cut; none where it is damaged
    repeats: tuple[int, int]  # of the first question of a record, and of each other
    most: int  # tokens of the longest row
    tokenizer: str | None  # its hash; None: bytes


def parts_of(shards: ShardSet, repeats: tuple[int, int]) -> np.ndarray | None:
    """(records,) samples of each record: its questions as often as they are repeated, a dialogue once; None: all are
    dialogues. UserError where nothing is left."""
    questions = np.asarray(shards.num_questions)
    if not questions.any():
        return None
    parts = np.where(questions > 0, repeats[0] + repeats[1] * (questions - 1), 1)
    if not parts.any():
        raise UserError(
            f"{shards.path}: its records have one question each, of which inputs.repeats={repeats} takes none"
        )
    return parts


def question_of(part: int, repeats: tuple[int, int]) -> int:
    """Which of a record's questions a sample of it is."""
    return 0 if part < repeats[0] else 1 + (part - repeats[0]) // repeats[1]


def chat_lengths(shards: ShardSet, rows: ChatRows) -> np.ndarray:
    """(samples,) tokens that each sample's row is expected to have.

    Rows of first questions, and of others, lie below a line over the tokens of question and answer as the index has
    them, if this tokenizer counted them (make_shards --tokenizer), else over the record's characters: in both cases the
    lowest line that no row of some measured records lies above.
    """
    questions = np.asarray(shards.num_questions)
    counts = _counts(shards, rows)
    points: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for record in measured(shards):
        for number, length in enumerate(rows.measure(record)):
            points[number == 0].append((int(counts[record.row, min(number, counts.shape[1] - 1)]), length))
    parts = parts_of(shards, rows.repeats)
    parts = np.ones(len(shards), np.int64) if parts is None else parts
    owner = np.repeat(np.arange(len(shards)), parts)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    later = (part >= rows.repeats[0]) & (questions[owner] > 0)
    question = np.where(later, 1 + (part - rows.repeats[0]) // max(1, rows.repeats[1]), 0)
    counted = counts[owner, np.minimum(question, counts.shape[1] - 1)]
    lengths = np.zeros(len(owner), np.int64)
    for first in (True, False):
        x, y = np.array(points[first], np.int64).reshape(-1, 2).T
        lengths = np.where((question == 0) == first, above(x, y, counted), lengths)
    return np.clip(lengths, 1, rows.most)


def _counts(shards: ShardSet, rows: ChatRows) -> np.ndarray:
    """(records, questions) what the index has of the length of each question with its answer; one column where it has
    but that of the whole record. Of a dialogue it is all of it."""
    if rows.tokenizer is not None and shards.tokenizer_hash == rows.tokenizer:
        counted = [shards.counted(name) for name in ("chat", "conversations")]
        chat, spoken = (None if one is None else np.asarray(one, np.int64) for one in counted)
        known = chat if chat is not None else np.zeros((len(shards), 1), np.int64)
        if chat is not None or spoken is not None:
            known = known.copy()
            if spoken is not None:
                known[:, 0] += spoken.sum(1)
            return known
    return text_lengths(shards)[:, None].astype(np.int64)
