"""Merging views and scoring predictions (the recorded values are in tests/parity)."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.metrics.classify import (
    View,
    class_accuracy,
    classification_metrics,
    confusion_matrix,
    mean_probabilities,
    merge_views,
)
from vlm.types import Prediction, UserError


def row(key: str, truth: int, scores: list[float], **probes: list[float]) -> Prediction:
    return Prediction(key=key, truth=truth, prediction=int(np.argmax(scores)), scores=scores, probes=probes)


def test_probabilities_are_averaged_not_logits() -> None:
    logits = np.array([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    merged = mean_probabilities(logits)
    assert merged.dtype == np.float32
    assert merged.sum() == pytest.approx(1.0, abs=1e-6)
    sure, unsure = 1 / (1 + np.exp(-10.0)), 1 / (1 + np.exp(1.0))
    assert merged[0] == pytest.approx((sure + 2 * unsure) / 3, abs=1e-6)
    assert np.isfinite(mean_probabilities(np.array([[1e4, -1e4]]))).all()


def test_repeated_views_count_once() -> None:
    views = [View("a", 0, 0, [2.0, 0.0]), View("b", 0, 0, [0.0, 1.0]), View("a", 1, 0, [0.0, 3.0])]
    merged = merge_views(views)
    assert list(merged) == ["a", "b"]
    again = merge_views([*views, View("a", 0, 0, [-9.0, 9.0]), View("b", 0, 0, [5.0, 0.0])])
    for key in merged:
        np.testing.assert_array_equal(merged[key], again[key])
    with pytest.raises(ValueError, match="clip 'c', view 1/2"):
        merge_views([View("c", 1, 2, [0.0, float("nan")])])


def test_metrics() -> None:
    rows = [
        row("a", 0, [0.9, 0.1, 0.0, 0.0, 0.0, 0.0], one_frame=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        row("b", 1, [0.9, 0.1, 0.0, 0.0, 0.0, 0.0], one_frame=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        row("c", 5, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], one_frame=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        row("d", 4, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], one_frame=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
    ]
    assert classification_metrics(rows) == {
        "top1": 0.25,
        "top5": 0.75,
        "chance": pytest.approx(1 / 6),
        "top1_one_frame": 0.25,
    }


def test_ties_go_to_the_lower_class() -> None:
    """A model that says the same of every class is right about class 0 alone."""
    flat = [row(str(k), k, [0.125] * 8) for k in range(8)]
    metrics = classification_metrics(flat)
    assert metrics["top1"] == 1 / 8
    assert metrics["top5"] == 5 / 8


def test_fewer_than_five_classes() -> None:
    assert classification_metrics([row("a", 2, [0.6, 0.3, 0.1])])["top5"] == 1.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no predictions"),
        ([row("ok", 0, [1.0, 0.0]), row("bad", 0, [float("nan"), 0.0])], "clip 'bad': its scores hold NaN"),
        ([row("ok", 0, [1.0, 0.0], x=[float("nan"), 1.0])], "clip 'ok': its scores for probe 'x' hold NaN"),
        ([row("ok", 0, [1.0, 0.0]), row("bad", 0, [1.0])], "clip 'bad': its scores are 1 numbers"),
        ([row("ok", 0, [1.0, 0.0], x=[1.0])], "clip 'ok': its scores for probe 'x' are 1 numbers"),
        ([row("bad", 2, [1.0, 0.0])], "clip 'bad': its truth is class 2"),
        ([row("bad", -1, [1.0, 0.0])], "clip 'bad': its truth is class -1"),
        ([row("ok", 0, [1.0, 0.0], x=[1.0, 0.0]), row("bad", 0, [1.0, 0.0])], "clip 'bad' has the probes"),
        ([Prediction(key="bad", truth=0, prediction=1, scores=[1.0, 0.0])], "clip 'bad': its prediction is class 1"),
    ],
)
def test_rows_that_cannot_be_scored(rows: list[Prediction], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classification_metrics(rows)


def test_confusion_and_accuracy_by_class() -> None:
    rows = [row("a", 0, [1, 0, 0]), row("b", 0, [0, 1, 0]), row("c", 0, [1, 0, 0]), row("d", 2, [0, 1, 0])]
    assert confusion_matrix(rows).tolist() == [[2, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert class_accuracy(rows) == [pytest.approx(2 / 3), None, 0.0]
