"""The report of a run that answered questions: options, scores, kinds, and text that is escaped."""

import json

import pytest
from question_shards import shards

from vlm.run.report import write_report
from vlm.run.report_questions import choose, kind_rows
from vlm.types import Prediction


def rows(count=20):
    kinds = ("CH", "CW", "DO")
    return [
        {
            "key": f"{4000 + number % 3}_{number}",
            "truth": number % 4,
            "prediction": (number + (number % 5 == 0)) % 4,
            "scores": [-0.5 if option == (number + (number % 5 == 0)) % 4 else -2.0 for option in range(4)],
            "probes": {"blind": [-1.0, -2.0, -3.0, -4.0]},
            "kind": kinds[number % 3],
            "video": str(4000 + number % 3),
            "question": f"why <does> it {number}",
            "options": ["a & b", "run", "sit", "eat"],
        }
        for number in range(count)
    ]


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shard = shards(tmp_path, videos=3, questions=1) / "test"
    (folder / "recipe.json").write_text(
        json.dumps({"recipe": "vamos.demo", "config": {"eval": {"shards": str(shard)}}})
    )
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "metrics.json").write_text(json.dumps({"accuracy": 0.8, "chance": 0.25, "accuracy_blind": 0.5}))
    about = {"shards": str(shard), "protocol": {"eval": {"kinds": {"C": ["CH", "CW"]}}}}
    (folder / "evaluation.json").write_text(json.dumps(about))
    return write_report(folder).read_text()


def test_questions_options_and_scores_are_shown(page):
    assert "20 questions, 4 wrong" in page
    assert "why &lt;does&gt; it 0" in page
    assert "a &amp; b" in page
    assert "<does>" not in page
    assert "truth chosen" in page
    assert "hold features of this video, not the video" in page
    assert "✗ at least 0.85" in page
    assert "✗ at most 0.4" in page
    assert "Confusion" not in page


def test_kinds_and_groups_are_counted():
    predictions = [Prediction(**row) for row in rows(6)]
    assert kind_rows(predictions, {"C": ("CH", "CW"), "T": ("TN",)}) == [
        ("CH", 1, 2),
        ("CW", 2, 2),
        ("DO", 1, 2),
        ("C", 3, 4),
    ]


def test_wrong_ones_come_first_then_every_kind():
    chosen = choose([Prediction(**row) for row in rows()])
    assert len(chosen) == 12
    assert [p.truth != p.prediction for p in chosen] == [True] * 4 + [False] * 8
    assert {p.kind for p in chosen[4:]} == {"CH", "CW", "DO"}
