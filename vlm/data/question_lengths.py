"""How long the rows of questions become, from the index of their shards: what packs are planned with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm.data.measured import measured
from vlm.data.packing import share_prefixes
from vlm.data.shards import ShardSet
from vlm.data.stream import text_lengths
from vlm.types import Record, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What there is to know of a recipe's rows."""

    read: Callable[[Record], list[Row]]  # each question's row of a record, nothing cut; none where it is damaged
    prompt: int  # tokens of a row that asks next to nothing
    most: int  # longest row
    shared: bool  # the questions of a record share the beginning of their rows, and are one sample
    caption: str | None  # name of the caption that rows read
    dialogue: bool  # rows read what is said
    tokenizer: str | None  # its hash; None: bytes


def question_lengths(shards: ShardSet, rows: Rows) -> np.ndarray:
    """(samples,) tokens of each sample.

    Where the recipe's tokenizer counted the tokens of each question (make_shards --tokenizer): these, those of its
    dialogue and caption, and as many for the prompt as rows of `measured` records have at most: right to a few tokens.
    Else an estimate on the safe side, which fills packs far worse: the record's text, of which each of its questions
    has an equal part, times the most tokens that a part of such length became in those records.
    """
    counted = shards.counted("questions")
    if counted is None or rows.tokenizer is None or shards.tokenizer_hash != rows.tokenizer:
        return _estimated(shards, rows)
    own = np.asarray(counted, np.int64)
    if rows.dialogue and (said := shards.counted("dialogues")) is not None:
        own = own + np.pad(said, ((0, 0), (0, own.shape[1] - said.shape[1])))  # no longer than questions, if shorter
    told = None if rows.caption is None else shards.counted(f"captions.{rows.caption}")
    caption = np.zeros(len(shards), np.int64) if told is None else np.asarray(told, np.int64)[:, 0]
    row, trunk, branch = _beyond(shards, rows, own, caption)
    present = np.arange(own.shape[1]) < np.asarray(shards.num_questions)[:, None]
    if not rows.shared:
        return np.minimum(own + caption[:, None] + row, rows.most)[present]
    return caption + trunk + np.where(present, own + branch, 0).sum(1)


def _beyond(shards: ShardSet, rows: Rows, own: np.ndarray, caption: np.ndarray) -> tuple[int, int, int]:
    """The most tokens beyond the counts `own` (records, questions) and `caption` (records,): of a row, and where rows
    share their beginning, of that beginning and of the rest of each."""
    whole: list[int] = []
    trunks: list[int] = []
    branches: list[int] = []
    for record in measured(shards):
        number, made = record.row, rows.read(record)
        whole += [len(row.ids) - int(own[number, at] + caption[number]) for at, row in enumerate(made)]
        if len(made) > 1:
            (trunk, *rest), _ = share_prefixes(made, learnt=False)
            trunks.append(len(trunk.ids) - int(caption[number]))
            branches += [len(row.ids) - int(own[number, at]) for at, row in enumerate(rest)]
    row = max(whole, default=rows.prompt)
    return (row, max(trunks), max(branches)) if trunks else (row, 0, row)


def _estimated(shards: ShardSet, rows: Rows) -> np.ndarray:
    text = text_lengths(shards).astype(np.float64)
    counts = np.asarray(shards.num_questions)
    if not rows.shared:
        text = text / np.maximum(counts, 1)
    rate = 0.0
    for record in measured(shards):
        made = rows.read(record)
        if made and rows.shared:
            made, _ = share_prefixes(made, learnt=False)
            longest = sum(len(row.ids) for row in made)
        else:
            longest = max((len(row.ids) for row in made), default=0)
        rate = max(rate, (longest - rows.prompt) / text[record.row])
    lengths = rows.prompt + np.ceil(rate * text).astype(np.int64)
    return lengths if rows.shared else np.repeat(np.minimum(lengths, rows.most), counts)
