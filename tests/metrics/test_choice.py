"""Accuracy on multiple choice: kinds, groups, probes, and rows that cannot be."""

from dataclasses import replace

import pytest

from vlm.metrics.choice import choice_metrics
from vlm.types import Prediction, UserError


def row(key, truth, scores, kind="", **probes):
    best = max(range(len(scores)), key=lambda k: scores[k])
    return Prediction(key=key, truth=truth, prediction=best, scores=scores, kind=kind, probes=probes)


ROWS = [
    row("a", 0, [-0.1, -0.5], "CH", blind=[-1.0, 0.0]),
    row("b", 1, [-0.1, -0.5], "CW", blind=[-1.0, 0.0]),
    row("c", 2, [-3.0, -2.0, -1.0, -4.0], "TN", blind=[0.0, 0.0, 0.0, 0.0]),
]


def test_figures():
    metrics = choice_metrics(ROWS, {"C": ("CH", "CW"), "D": ("DO",)})
    assert metrics == pytest.approx(
        {
            "accuracy": 2 / 3,
            "chance": (0.5 + 0.5 + 0.25) / 3,
            "accuracy_blind": 1 / 3,
            "accuracy_CH": 1.0,
            "accuracy_CW": 0.0,
            "accuracy_TN": 1.0,
            "accuracy_C": 0.5,
            "accuracy_mean_of_kinds": 2 / 3,
        }
    )


def test_a_set_without_kinds():
    assert choice_metrics([row("a", 0, [0.0, -1.0])]) == {"accuracy": 1.0, "chance": 0.5}


@pytest.mark.parametrize(
    ("rows", "groups", "part"),
    [
        ([], {}, "no predictions"),
        ([replace(ROWS[0], prediction=1)], {}, "changed after it was written"),
        ([replace(ROWS[0], truth=2)], {}, "has 2 options"),
        ([replace(ROWS[0], scores=[float("nan"), 0.0])], {}, "NaN"),
        ([ROWS[0], replace(ROWS[1], probes={})], {}, "one set of probes"),
        ([ROWS[0], replace(ROWS[1], probes={"blind": [0.0]})], {}, "1 numbers for 2 options"),
        (ROWS, {"CH": ("CH", "CW")}, "name of a kind"),
    ],
)
def test_what_cannot_be(rows, groups, part):
    with pytest.raises(UserError, match=part):
        choice_metrics(rows, groups)
