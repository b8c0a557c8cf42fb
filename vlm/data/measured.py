"""Some records of a shard set, evenly spread, whose rows are made to know what stands around the words of all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm.data.shard_files import ShardChangedError
from vlm.data.shard_format import ShardError, ShardGoneError
from vlm.data.shards import ShardSet
from vlm.types import Record

MEASURED = 32
_TRIES = 64  # records after a damaged one, or shards after one that is gone


def measured(shards: ShardSet, count: int = MEASURED) -> Iterator[Record]:
    """Up to `count` records without their videos, the same wherever the same bytes lie.

    Where one is damaged, which is told when it is loaded, the next that can be read stands for it; after a shard that
    is gone or changed, the first of the next shard.
    """
    for first in np.unique(np.linspace(0, len(shards) - 1, count).astype(int)).tolist():
        row = first
        for _ in range(_TRIES):
            try:
                record = shards.read(row, ())
            except (ShardGoneError, ShardChangedError):
                later = np.flatnonzero(shards.index["shard"][row:] != shards.index["shard"][row])
                row = row + int(later[0]) if len(later) else 0
            except ShardError:
                row = (row + 1) % len(shards)
            else:
                yield record
                break
