"""Classification: merging the views of a clip, and what predictions are worth.

Ties are always broken towards the lower class index: among equal scores, the lower index counts as the higher one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlm.metrics.probes import names_of_probes
from vlm.types import Prediction, UserError


class View(NamedTuple):
    """What the model said about one view of one clip."""

    key: str
    clip: int  # place along time
    crop: int  # place along the longer side
    logits: Sequence[float] | np.ndarray  # (K,)


def mean_probabilities(logits: np.ndarray) -> np.ndarray:
    """Logits (V, K) of the views of one clip -> probabilities (K,): softmax of each view in float32, then the mean.

    Not the softmax of the mean logits, which gives other answers: a view that is sure must not outvote all others.
    """
    logits = np.asarray(logits, dtype=np.float32)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)


def merge_views(views: Iterable[View]) -> dict[str, np.ndarray]:
    """Probabilities (K,) of each key, in the order in which the keys first come; a view that comes again is dropped.

    Raises:
        ValueError: a logit is NaN.
    """
    logits: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for view in views:
        row = np.asarray(view.logits, dtype=np.float32)
        if np.isnan(row).any():
            raise ValueError(f"clip {view.key!r}, view {view.clip}/{view.crop}: a logit is NaN")
        logits.setdefault(view.key, {}).setdefault((view.clip, view.crop), row)
    return {key: mean_probabilities(np.stack(list(rows.values()))) for key, rows in logits.items()}


def classification_metrics(predictions: Sequence[Prediction]) -> dict[str, float]:
    """What a list of predictions is worth, as fractions 0 … 1.

    Returns: `top1`, `top5` (the truth is among the five highest scores, or among all where K < 5), `chance` (1 / K),
    and `top1_<probe>` for each probe.
    Raises:
        UserError: no predictions; a score is NaN; rows that do not agree on K or on the probes; a truth outside of
            0 … K - 1; a `prediction` that is not the highest score.
    """
    scores, truth = _scores_and_truth(predictions)
    stated = np.array([prediction.prediction for prediction in predictions])
    wrong = np.flatnonzero(stated != scores.argmax(axis=1))
    if wrong.size:
        row = predictions[wrong[0]]
        raise UserError(
            f"clip {row.key!r}: its prediction is class {row.prediction}, but its highest score is class "
            f"{int(scores[wrong[0]].argmax())}: the row was changed after it was written"
        )
    rank = _rank_of_truth(scores, truth)
    metrics = {
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "chance": 1 / scores.shape[1],
    }
    for probe, probed in _probe_scores(predictions, scores.shape[1]).items():
        metrics[f"top1_{probe}"] = float((_rank_of_truth(probed, truth) < 1).mean())
    return metrics


def confusion_matrix(predictions: Sequence[Prediction]) -> np.ndarray:
    """Counts (K, K) int64: row = truth, column = prediction."""
    scores, truth = _scores_and_truth(predictions)
    counts = np.zeros((scores.shape[1], scores.shape[1]), dtype=np.int64)
    np.add.at(counts, (truth, scores.argmax(axis=1)), 1)
    return counts


def class_accuracy(predictions: Sequence[Prediction]) -> list[float | None]:
    """Share of the clips of each class that were recognised, (K,); None for a class without clips."""
    counts = confusion_matrix(predictions)
    return [int(counts[k, k]) / int(row.sum()) if row.sum() else None for k, row in enumerate(counts)]


def _rank_of_truth(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many classes come before the true one: (B, K), (B,) -> (B,)."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def _scores_and_truth(predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    if not predictions:
        raise UserError("there are no predictions to score: the evaluation wrote no rows")
    num_classes = len(predictions[0].scores)
    scores = _matrix([(row.key, "its scores", row.scores) for row in predictions], num_classes)
    truth = np.array([row.truth for row in predictions], dtype=np.int64)
    outside = np.flatnonzero((truth < 0) | (truth >= num_classes))
    if outside.size:
        row = predictions[outside[0]]
        raise UserError(
            f"clip {row.key!r}: its truth is class {row.truth}, but it has scores for {num_classes} classes"
        )
    return scores, truth


def _probe_scores(predictions: Sequence[Prediction], num_classes: int) -> dict[str, np.ndarray]:
    return {
        name: _matrix(
            [(row.key, f"its scores for probe {name!r}", row.probes[name]) for row in predictions], num_classes
        )
        for name in names_of_probes(predictions, "clip")
    }


def _matrix(rows: list[tuple[str, str, list[float]]], num_classes: int) -> np.ndarray:
    """Rows of scores as (B, K) float64; every row must have K numbers."""
    for key, what, row in rows:
        if len(row) != num_classes or num_classes == 0:
            raise UserError(f"clip {key!r}: {what} are {len(row)} numbers, the first clip has {num_classes} classes")
    scores = np.array([row for _, _, row in rows], dtype=np.float64)
    broken = np.flatnonzero(np.isnan(scores).any(axis=1))
    if broken.size:
        key, what, _ = rows[broken[0]]
        raise UserError(f"clip {key!r}: {what} hold NaN: the model diverged, or the checkpoint is damaged")
    return scores
