"""The frames of a record's video."""

from __future__ import annotations

import numpy as np

from vlm.data.video import DecodeError, count_frames, decode
from vlm.types import Record


def count(record: Record) -> int:
    """From the index, or, where the shard was made without looking, by decoding the whole video."""
    if record.num_frames == -1:
        return count_frames(_bytes(record))
    return record.num_frames


def read(record: Record, indices: np.ndarray) -> np.ndarray:
    """Frames (len(indices), H, W, 3) uint8."""
    return decode(_bytes(record), indices.tolist(), decoders=record.decoders or ("pyav",))


def _bytes(record: Record) -> bytes:
    if record.video is None:
        raise DecodeError(f"record {record.key!r} of {record.shard} has no video member")
    return record.video
