"""vlm/metrics/own.py: figures of one's own beside the published ones, wherever those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vlm.metrics import own
from vlm.metrics.own import Own, with_own
from vlm.models.generation_config import GenerationConfig
from vlm.recipe import EvalConfig, _check_eval
from vlm.run.report_metrics import metrics_table
from vlm.run.run_folder import metrics_of
from vlm.types import Prediction, Segmentation, UserError, Writing


def how_many(rows: Sequence[Any]) -> Mapping[str, float]:
    return {"how_many": len(rows)}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in own.OWN:
        mine = Own(figures=how_many, means={"how_many": "rows that <there> are"}, chooses=("how_many",))
        monkeypatch.setitem(own.OWN, task, (mine,))


ROWS: dict[str, list[Any]] = {
    "classes": [Prediction(key="a", truth=0, prediction=0, scores=[1.0, 0.0])],
    "choice": [Prediction(key="a", truth=0, prediction=0, scores=[1.0, 0.0], kind="")],
    "caption": [Writing(key="a", text="x", references=["x"]), Writing(key="b", text="x", references=[])],
    "segments": [Segmentation(key="a", text="", truth=[(0, 2, "x")], prediction=[], num_frames=2)],
}


@pytest.mark.parametrize("task", ROWS)
def test_every_task_has_its_own(task: str, counted: None) -> None:
    figures = metrics_of(ROWS[task])
    assert figures["how_many"] == 1  # texts without references are not scored
    assert len(figures) > 1
    assert "rows that &lt;there&gt; are" in metrics_table(figures, 1, is_demo=False)
    writes = GenerationConfig() if task in ("caption", "segments") else None
    _check_eval(EvalConfig(shards="", metric="how_many", generation=writes), task)
    with pytest.raises(ValueError, match=r"it must be .*or how_many"):
        _check_eval(EvalConfig(shards="", metric="how_may", generation=writes), task)


def test_without_any_there_are_the_published_ones() -> None:
    assert set(own.OWN) == set(ROWS)
    with pytest.raises(ValueError, match="it must be top1 or top5"):
        _check_eval(EvalConfig(shards="", metric="how_many"), "classes")


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"other": 1.0}, "gives other, but vlm/metrics/own.py says what mine is"),
        ({}, "gives nothing, but"),
        ({"mine": float("nan")}, "mine is nan, not a finite number"),
        ({"mine": "high"}, "mine is 'high', not a finite number"),
    ],
)
def test_figures_that_are_none(made: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(own.OWN, "segments", (Own(figures=lambda rows: made, means={"mine": "mine"}),))
    with pytest.raises(UserError, match=says):
        with_own("segments", [], {})


def test_a_name_that_is_taken(counted: None) -> None:
    with pytest.raises(UserError, match="there is a figure 'how_many' already"):
        with_own("segments", [], {"how_many": 1.0})
