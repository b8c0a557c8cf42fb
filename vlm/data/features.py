"""Features of frames, computed before: read from a record, cut to what a question is about, brought to F frames.

As Flipped-VQA, Vamos and ViCo use them: frames evenly spread, short videos filled up with zeros.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm.data.video import DecodeError
from vlm.types import Record

MEMBER = "features.npy"


def read_features(record: Record) -> np.ndarray:
    """(frames, D) float32 of a record's features; DecodeError where it has none or they are damaged."""
    data = record.members.get(MEMBER)
    if data is None:
        raise DecodeError(f"record {record.key!r} of {record.shard} has no {MEMBER}")
    try:
        features = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DecodeError(f"record {record.key!r} of {record.shard}: {MEMBER} is damaged ({error})") from error
    if features.ndim != 2:
        raise DecodeError(f"record {record.key!r} of {record.shard}: {MEMBER} has shape {features.shape}, not two axes")
    return features.astype(np.float32)


def cut_span(
    features: np.ndarray, annotation: Mapping[str, Any], span: Sequence[float] | None, *, whole: bool = False
) -> np.ndarray:
    """The frames of a question's span, (frames, D); none may be left. Frame i was seen at second i / fps.

    By the record's `span_rule`. rounded (STAR, TVQA, as published): from the rounded first second to the end of the
    rounded last one. inside (Perception Test): frames seen within the span alone, since the rest gives the answer away.

    Args:
        features: all frames of the video, (frames, D).
        annotation: the record's, with `features.fps` and `span_rule`.
        span: first and last second; None: no cut.
        whole: do not cut "inside" spans, as the published Vamos did (it reads what must not be seen).
    """
    if span is None:
        return features
    fps, rule = annotation["features"]["fps"], annotation["span_rule"]
    start, end = span
    if rule == "rounded":
        return features[int(fps * round(start)) : int(fps * (round(end) + 1))]
    assert rule == "inside", rule
    return features if whole else features[math.ceil(start * fps) : math.floor(end * fps) + 1]


def spread_frames(features: np.ndarray, count: int) -> np.ndarray:
    """`count` frames, (count, D): frame floor(j * n / count) for each j, or all n and zeros behind them."""
    available = len(features)
    if available <= count:
        return np.pad(features, ((0, count - available), (0, 0)))
    return features[np.arange(count) * available // count]
