"""Two runs beside each other, and what came between the steps of one: marks, tables, how far they agree."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import end, run, start, train_arguments

from tools import report as report_tool
from vlm.run.charts import Line, Mark, line_chart
from vlm.run.report import RunFiles, write_report
from vlm.run.report_beside import agreement
from vlm.run.report_events import events

Rows = list[dict[str, Any]]


def step_row(step: int, loss: float | None = None, batch: str = "") -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "loss": 2.0 / step if loss is None else loss,
        "losses": {},
        "lr": 1e-3,
        "grad_norm": 1.0,
        "step_time": 0.5,
        "data_wait": 0.0,
        "samples_per_s": 8.0,
        "batch_digest": batch or f"{step:016x}",
    }


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, rows: Rows, about: dict[str, Any] | None = None, skipped: Rows | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        record = {"recipe": "vit_llama.debug", "config": {"eval": None}, "world_size": 2, **(about or {})}
        (folder / "recipe.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if skipped is not None:
            (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skipped))
        return folder

    return make


RESUMED = [{"step": 8, "world_size": 2, "changed": []}, {"step": 8, "world_size": 3}, {"step": 12, "world_size": 3}]
SKIPPED = [
    {"step": 5, "reason": "loss", "value": "nan", "limit": None, "ranks": {"1": {"loss": None, "keys": ["<clip>"]}}},
    {"step": 9, "reason": "spike", "value": 40.0, "limit": 12.5, "ranks": {}},
    {"step": 9, "reason": "rolled_back", "value": None, "limit": None, "ranks": {}, "to": 6, "passed_over": [7, 9]},
]


def test_why_it_went_on_and_what_was_skipped() -> None:
    """A stop explains the first continuation from its step; the second one followed a failure."""
    about = {"world_size": 2, "resumed": RESUMED, "stopped": [{"step": 8, "why": "SIGUSR1"}]}
    marks = events(about, SKIPPED)
    assert [mark.what for mark in marks] == [
        "went on from step 8 after SIGUSR1",
        "went on from step 8, on 3 processes instead of 2",
        "went on from step 12",
        "step 5 skipped: the loss was not finite (nan)",
        "step 9 skipped: the gradient's norm was far above those before (40, limit 12.5)",
        "after step 9 back to what was learnt up to step 6; nothing is kept of steps 7 to 9",
    ]
    assert [mark.style for mark in marks] == ["stopped"] * 3 + ["skipped"] * 2 + ["back"]


@pytest.mark.parametrize("damaged", [None, 7, "x", ["x", {"step": "3"}, {}], {"step": 1}])
def test_damaged_records_are_no_events(damaged: Any) -> None:
    assert events({"resumed": damaged, "stopped": damaged}, damaged if isinstance(damaged, list) else ()) == []


def test_marks_stand_where_they_belong() -> None:
    marks = [Mark(2, "a <mark>", "stopped"), Mark(99, "beyond", "skipped")]
    chart = line_chart([Line("y", [1, 2, 3], [1.0, 2.0, 3.0])], y_label="y", marks=marks)
    found = re.findall(r'class="mark (\w+)" x1="([\d.]+)" x2="([\d.]+)"', chart)
    assert [style for style, *_ in found] == ["stopped", "skipped"]
    (_, middle, _), (_, edge, _) = found
    points = [float(one.split(",")[0]) for one in re.findall(r'points="([^"]*)"', chart)[0].split()]
    assert (float(middle), float(edge)) == (points[1], points[2])
    assert "a &lt;mark&gt;" in chart


def test_the_report_of_a_run_that_was_interrupted(make: Callable[..., Path]) -> None:
    about = {"resumed": RESUMED, "stopped": [{"step": 8, "why": "SIGUSR1"}]}
    rows = [step_row(step) | ({"loss": None, "skipped": "loss"} if step == 5 else {}) for step in range(1, 21)]
    folder = make("run", rows, about, SKIPPED)
    (folder / "hang").mkdir()
    for name in ("20261121-191205-step-12-rank-1.txt", "20261121-191205-step-12-rank-0.txt", "note.txt"):
        (folder / "hang" / name).touch()
    page = write_report(folder).read_text()
    both = "hang/20261121-191205-step-12-rank-0.txt, hang/20261121-191205-step-12-rank-1.txt"
    assert page.count(f"<li>hung at step 12 ({both})</li>") == 1
    assert page.count('class="mark hung"') == page.count('class="mark back"') >= 1
    charts = page.count('<polyline class="pale"') // 2
    assert charts >= 1
    assert page.count('class="mark stopped"') >= 3
    assert page.count('class="mark skipped"') >= 2
    assert "<h2>Interruptions</h2>" in page
    assert "<li>went on from step 8 after SIGUSR1</li>" in page
    assert "Skipped steps: 2 (1: the loss was not finite; 1: " in page
    assert "1: &lt;clip&gt;" in page
    assert "<li>after step 9 back to what was learnt up to step 6" in page
    quiet = write_report(make("quiet", rows)).read_text()
    assert "Interruptions" not in quiet
    assert 'class="mark' not in quiet


def test_runs_that_agree_and_runs_that_do_not(make: Callable[..., Path]) -> None:
    first = RunFiles(make("first", [step_row(step) for step in range(1, 11)])).told()
    same = RunFiles(make("same", [step_row(step) for step in range(1, 11)])).told()
    assert agreement(first, same) == [
        "10 steps are told by both",
        "10 of 10 batches are the same",
        "losses differ in no digit",
    ]
    changed = [
        step_row(step, 1.1 * 2 / step if step == 4 else None, "other" if step > 6 else "") for step in range(2, 9)
    ]
    changed[0]["loss"] = None
    other = RunFiles(make("other", changed)).told()
    assert agreement(first, other) == [
        "7 steps are told by both",
        "5 of 7 batches are the same; the first other one is that of step 7",
        "losses differ by at most 0.09091 of the loss, at step 4",
        "steps without a loss in one of them: 1",
    ]
    apart = RunFiles(make("apart", [step_row(30)])).told()
    assert agreement(first, apart) == ["no step is told by both"]


def test_the_tool_puts_them_beside_each_other(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [step_row(step) for step in range(1, 11)]
    run, other = make("run", rows, {"resumed": RESUMED[:1]}), make("other & more", rows)
    (run / "metrics.json").write_text(json.dumps({"top1": 0.5}))
    assert report_tool.main([str(run), "--beside", str(other)]) == 0
    page = (run / "report.html").read_text()
    assert f"<h2>Beside {tmp_path / 'other &amp; more'}</h2>" in page
    assert '<polyline class="other"' in page
    assert '<polyline class="line"' in page
    assert "<li>losses differ in no digit</li>" in page
    assert "difference of the losses" in page
    assert f"{run}: went on from step 8" in page
    assert re.search(r"<td>continuations</td><td>1</td><td>0</td>", page)
    assert re.search(r"<td>top1</td><td>0.5</td><td>–</td>", page)
    assert not (other / "report.html").exists()
    assert report_tool.main([str(run)]) == 0
    assert "Beside" not in (run / "report.html").read_text()
    assert report_tool.main([str(run), "--beside", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_nothing_to_stand_beside_is_said(make: Callable[..., Path]) -> None:
    run, empty = make("run", [step_row(1), step_row(2)]), make("empty", [])
    assert (
        "empty: no run to stand beside this one (metrics.jsonl holds no step)" in write_report(run, empty).read_text()
    )


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_beside_one_that_was_not(shape_shards: Path, tmp_path: Path) -> None:
    """Status 85, a note of it, and in the end the same losses to the last digit."""
    settings = ["steps=200", "checkpoint_every=0", "eval.at_end=false", "seed=5"]
    run(train_arguments(shape_shards, tmp_path / "whole", *settings))
    stopped = train_arguments(shape_shards, tmp_path / "stopped", *settings)
    process, limit = start(stopped), time.monotonic() + 600
    try:
        told = tmp_path / "stopped" / "metrics.jsonl"
        while not (told.exists() and told.read_text().count("\n") >= 5):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.terminate()
        printed, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            end(process)
    assert process.returncode == 85, printed
    record = json.loads((tmp_path / "stopped" / "recipe.json").read_text())
    ((step, why),) = [(stop["step"], stop["why"]) for stop in record["stopped"]]
    assert why == "SIGTERM"
    assert 5 <= step < 200
    run(stopped)
    assert report_tool.main([str(tmp_path / "stopped"), "--beside", str(tmp_path / "whole")]) == 0
    page = (tmp_path / "stopped" / "report.html").read_text()
    assert f"<li>went on from step {step} after SIGTERM</li>" in page
    assert "<li>200 of 200 batches are the same</li>" in page
    assert "<li>losses differ in no digit</li>" in page
