"""The words every floor speaks: what a source yields, what a shard record holds, what a model eats and answers.

Letters, everywhere in the project: B batch, C channels, T frames, H height, W width, N visual tokens, D width of a
vector, L text length, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, device


@dataclass(slots=True, kw_only=True)
class Sample:
    """One item of a published dataset, as its annotation file states it, before it is sharded.

    `annotation` becomes the `.json` member of the record and must be JSON-able. Names used in it:
    `label` (int class index), `name` (class name), `caption` (str), `questions` (list of {question, options, answer,
    kind}), `segments` (list of {start, end, label}, frames, end exclusive).
    """

    key: str  # unique in its shard set; "." is not allowed in a key (webdataset cuts member names at the first dot)
    video: Path | None = None
    annotation: dict[str, Any] = field(default_factory=dict)


class Rejected(NamedTuple):
    """A row of an annotation file, or a media file, that cannot become a record: goes into the manifest by reason."""

    key: str
    reason: str  # one sentence naming file, row or column, and the value
    file: str = ""


@dataclass(slots=True, kw_only=True)
class Record:
    """One record read back from a shard: the bytes of its media and its annotation, plus what the index knows."""

    key: str
    shard: str
    row: int  # row of the index
    video: bytes | None
    annotation: dict[str, Any]
    num_frames: int  # -1: unknown (sharded with --no-check), counted when decoded
    fps: float  # 0: unknown
    decoders: tuple[str, ...]  # decoders that were checked to return the reference frames, best first


class Incident(NamedTuple):
    """A record that could not be used at run time: a row of the quarantine ledger."""

    key: str
    shard: str
    reason: str
    replaced_by: str  # key of the record that took its place
    position: int  # position in the endless training order at which it was met


@dataclass(slots=True, kw_only=True)
class Example:
    """One training or test item after decoding and transforms, before collation."""

    key: str
    video: Tensor | None = None  # (C, T, H, W) float32, normalised
    label: int | None = None


@dataclass(slots=True, kw_only=True)
class Batch:
    """One micro-batch of one rank."""

    keys: tuple[str, ...]
    video: Tensor | None = None  # (B, C, T, H, W) float, normalised
    label: Tensor | None = None  # (B,) int64
    target: Tensor | None = None  # (B, K) float: soft labels, where mixup or smoothing made them
    mask: Tensor | None = None  # (B, N) bool, True = hidden (masked pretraining)
    incidents: tuple[Incident, ...] = ()

    def to(self, where: device | str) -> Batch:
        """The same batch on a device. Precision is not touched: a model casts what it multiplies, targets stay fp32."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(where, non_blocking=True)
        return replace(self, **moved)


class LossTerm(NamedTuple):
    """One named loss of one micro-batch, not yet averaged: the engine divides by the count of the *global* batch."""

    total: Tensor  # scalar: sum over elements, with a graph
    count: int  # type: ignore[assignment]  # elements summed (clips, tokens, pixels); tuple has a method of this name


Losses = dict[str, LossTerm]  # loss name (= view name = weight key = log key) -> term


@dataclass(slots=True, kw_only=True)
class Prediction:
    """One row of predictions.jsonl. `probes` holds the scores under conditions that should break the model."""

    key: str
    truth: int
    prediction: int
    scores: list[float]
    probes: dict[str, list[float]] = field(default_factory=dict)


class UserError(ValueError):
    """An error a user can cause and mend. Its message names the file, the value, why it matters and the mend."""
