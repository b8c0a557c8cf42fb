"""How long the rows of captions and dialogues become, told from the index: what packs are planned by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm.data.shards import ShardSet
from vlm.data.stream import text_lengths
from vlm.data.tokenizers import content_hash
from vlm.types import Record

_MEASURED = 32  # records whose rows are made to know how long rows become


def dialogue_lengths(
    shards: ShardSet, tokenizer: Path | None, measure: Callable[[Record], int | None], around: int
) -> np.ndarray:
    """(records,) tokens that the rows of each record are expected to have together.

    Where this tokenizer counted the tokens of captions and turns (make_shards --tokenizer): these, and as many more for
    each of its texts as `_MEASURED` records have at most. Else a record's text times the most tokens that text of such
    length became in those records.

    Args:
        measure: tokens of a record's rows; None: it cannot be used, which is told when it is loaded.
        around: tokens, at least, that stand around the words of a record.
    """
    found = _counted(shards) if _counts_by(shards, tokenizer) else None
    words, texts = found if found is not None else (text_lengths(shards).astype(np.float64), np.ones(len(shards)))
    rate = 0.0
    for number in np.unique(np.linspace(0, len(shards) - 1, _MEASURED).astype(int)):
        length = measure(shards.read(int(number), ()))
        if length is None:
            continue
        beyond = length - words[number] - around if found is not None else length - around
        rate = max(rate, beyond / (texts[number] if found is not None else words[number]))
    more = rate * texts if found is not None else rate * words - words
    return around + np.ceil(words + more).astype(np.int64)


def _counts_by(shards: ShardSet, tokenizer: Path | None) -> bool:
    return tokenizer is not None and shards.tokenizer_hash == content_hash(tokenizer)


def _counted(shards: ShardSet) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens of all captions and turns, how many texts these are) of each record; None: none were counted."""
    counts = [found for name in ("caption", "conversations") if (found := shards.counted(name)) is not None]
    if not counts:
        return None
    words = sum(np.asarray(found, np.float64).sum(1) for found in counts)
    texts = sum((np.asarray(found) > 0).sum(1) for found in counts)
    return np.asarray(words), np.maximum(texts, 1)
