"""How long the rows of captions and dialogues become, told from the index: what packs are planned by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm.data.frames import seconds_of
from vlm.data.measured import measured
from vlm.data.sampling import uniform_frames
from vlm.data.shards import ShardSet
from vlm.data.stream import text_lengths
from vlm.data.tokenizers import content_hash
from vlm.types import Record


class Length(NamedTuple):
    """A row of a record, nothing cut."""

    lead: int  # tokens before what may be cut
    rest: int  # the other tokens


def dialogue_lengths(
    shards: ShardSet,
    tokenizer: Path | None,
    measure: Callable[[Record], Mapping[str, Length]],
    most: Mapping[str, int],
) -> np.ndarray:
    """(records,) tokens that the rows of each record are expected to have together, in all views that it has: which of
    them a recipe weighs is not known here, so of records with caption and dialogue those of one view alone are shorter.

    Where this tokenizer counted the tokens of captions and turns (make_shards --tokenizer): these and what stands
    around them in `measured` records, videos and images apart. Of captions it is the median: cleaning takes a token or
    two of some, and the sums of many in a pack come out right; of dialogues, the line above all that follows from their
    number of turns. Else an estimate on the safe side: the line above all that follows from a record's characters.

    Args:
        measure: name of the text in the annotation -> the row that a record has of it; none where it cannot be used,
            which is told when it is loaded.
        most: name of the text -> most tokens of `Length.rest`, as rows are cut.
    """
    images = _are_images(shards)
    found = [(record.row, bool(images[record.row]), measure(record)) for record in measured(shards)]
    counted = {name: shards.counted(name) for name in most} if _counts_by(shards, tokenizer) else {}
    if any(counted.get(name) is None for _, _, rows in found for name in rows):
        return _estimated(text_lengths(shards), [(row, rows) for row, _, rows in found], most)
    lengths = np.zeros(len(shards), np.int64)
    for name, counts in counted.items():
        if counts is None:
            continue
        words, parts = np.asarray(counts, np.int64).sum(1), (np.asarray(counts) > 0).sum(1)
        for image in (False, True):
            of = [(row, rows[name]) for row, still, rows in found if name in rows and still == image]
            of = of or [(row, rows[name]) for row, _, rows in found if name in rows]
            beyond = np.array([length.rest - words[row] for row, length in of], np.int64)
            if name == "conversations":
                more = above(np.array([parts[row] for row, _ in of]), beyond, parts)
            else:
                more = np.full(len(shards), np.sort(beyond)[len(beyond) // 2] if of else 0)
            lead = max((length.lead for _, length in of), default=0)
            lengths += np.where((parts > 0) & (images == image), lead + np.minimum(words + more, most[name]), 0)
    return np.maximum(lengths, 1)


def times(record: Record, num_frames: int) -> tuple[Sequence[float], int]:
    """(times in seconds of a video's frames that are seen, how many these are) as the index knows it, to plan with."""
    if record.num_frames < 1:
        return (), num_frames
    chosen = uniform_frames(record.num_frames, num_frames)
    return seconds_of(chosen, record.fps), len(chosen)


def _are_images(shards: ShardSet) -> np.ndarray:
    return (shards.index["num_frames"] == 1) & (shards.index["fps"] == 0)


def _estimated(
    characters: np.ndarray, found: Sequence[tuple[int, Mapping[str, Length]]], most: Mapping[str, int]
) -> np.ndarray:
    known = [(row, sum(part.lead + part.rest for part in rows.values())) for row, rows in found if rows]
    cuts = [sum(part.lead + most[name] for name, part in rows.items()) for _, rows in found if rows]
    at, of = (np.array(values, np.int64) for values in zip(*known)) if known else (np.zeros(0, np.int64),) * 2
    return np.clip(above(characters[at], of, characters), 1, max(cuts, default=None))


def above(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Whole numbers at `at` on the line of least squares through (x, y), raised until no point is above it; where all
    points have one x, on the line through the origin."""
    if not len(x):
        return np.asarray(at, np.int64)
    x, y = x.astype(np.float64), y.astype(np.float64)
    steepest = max(0.0, float((y / np.maximum(x, 1)).max()))
    apart = x - x.mean()
    slope = float((apart * y).sum() / (apart**2).sum()) if apart.any() else steepest
    slope = min(max(slope, 0.0), steepest)
    return np.ceil(float((y - slope * x).max()) + slope * at - 1e-6).astype(np.int64)


def _counts_by(shards: ShardSet, tokenizer: Path | None) -> bool:
    return tokenizer is not None and shards.tokenizer_hash == content_hash(tokenizer)
