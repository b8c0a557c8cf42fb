"""How many samples the questions of records are, and how long their rows become, told from the index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm.data.dialogue_lengths import above
from vlm.data.measured import measured
from vlm.data.shards import ShardError, ShardSet
from vlm.data.stream import text_lengths
from vlm.types import Record, UserError


class Repeats(NamedTuple):
    """How often an epoch has each question."""

    first: int  # the first of a record
    others: int
    kinds: tuple[tuple[str, int], ...] = ()  # others of these kinds

    def of(self, kinds: Sequence[str]) -> list[int]:
        """Of each question of a record, by their kinds."""
        own = dict(self.kinds)
        return [own.get(kind, self.others) if number else self.first for number, kind in enumerate(kinds)]


class ChatRows(NamedTuple):
    """What there is to know of a recipe's rows."""

    measure: Callable[[Record], list[int]]  # tokens of each question's row, nothing cut; none where it is damaged
    repeats: Repeats
    most: int  # tokens of the longest row
    tokenizer: str | None  # its hash; None: bytes


def parts_of(shards: ShardSet, repeats: Repeats) -> np.ndarray | None:
    """(records,) samples of each record: its questions as often as they are repeated, a dialogue once; None: all are
    dialogues. UserError where nothing is left."""
    questions = np.asarray(shards.num_questions)
    if not questions.any():
        return None
    if repeats.kinds:
        parts = np.array([sum(repeats.of(kinds)) if kinds else 1 for kinds in _kinds(shards)])
    else:
        parts = np.where(questions > 0, repeats.first + repeats.others * (questions - 1), 1)
    if not parts.any():
        raise UserError(f"{shards.path}: inputs.repeats and inputs.repeats_of take none of its questions")
    return parts


def question_of(part: int, repeats: Repeats, kinds: Sequence[str]) -> int:
    """Which of a record's questions, of these kinds, a sample of it is."""
    for number, count in enumerate(repeats.of(kinds)):
        if part < count:
            return number
        part -= count
    raise IndexError(part)


_KINDS: dict[str, list[tuple[str, ...]]] = {}


def _kinds(shards: ShardSet) -> list[tuple[str, ...]]:
    """The kinds of the questions of all records, which the index does not know: read once in a process. Of a record
    that cannot be read, which is told when it is loaded, as many as the index counts."""
    if shards.fingerprint not in _KINDS:
        found = []
        for row in range(len(shards)):
            try:
                rows: Any = shards.read(row, ()).annotation.get("chat", ())
                found.append(tuple(str(one["kind"]) for one in rows))
            except (ShardError, KeyError, TypeError):
                found.append(("",) * int(shards.num_questions[row]))
        _KINDS[shards.fingerprint] = found
    return _KINDS[shards.fingerprint]


def chat_lengths(shards: ShardSet, rows: ChatRows) -> np.ndarray:
    """(samples,) tokens that each sample's row is expected to have.

    Rows of first questions, and of others, lie below a line over the tokens of question and answer as the index has
    them, if this tokenizer counted them (make_shards --tokenizer), else over the record's characters: in both cases the
    lowest line that no row of some measured records lies above.
    """
    counts = _counts(shards, rows)
    points: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for record in measured(shards):
        for number, length in enumerate(rows.measure(record)):
            points[number == 0].append((int(counts[record.row, min(number, counts.shape[1] - 1)]), length))
    owner, question = _samples(shards, rows.repeats)
    counted = counts[owner, np.minimum(question, counts.shape[1] - 1)]
    lengths = np.zeros(len(owner), np.int64)
    for first in (True, False):
        x, y = np.array(points[first], np.int64).reshape(-1, 2).T
        lengths = np.where((question == 0) == first, above(x, y, counted), lengths)
    return np.clip(lengths, 1, rows.most)


def _samples(shards: ShardSet, repeats: Repeats) -> tuple[np.ndarray, np.ndarray]:
    """(samples,) the record of each sample, and which of its questions it is."""
    parts = parts_of(shards, repeats)
    if parts is None:
        return np.arange(len(shards)), np.zeros(len(shards), np.int64)
    owner = np.repeat(np.arange(len(shards)), parts)
    if repeats.kinds:
        of = [np.repeat(np.arange(len(kinds)), repeats.of(kinds)) if kinds else np.zeros(1) for kinds in _kinds(shards)]
        return owner, np.concatenate(of).astype(np.int64)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    later = (part >= repeats.first) & (np.asarray(shards.num_questions)[owner] > 0)
    return owner, np.where(later, 1 + (part - repeats.first) // max(1, repeats.others), 0)


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
