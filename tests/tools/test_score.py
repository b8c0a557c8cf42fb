"""tools/score.py: metrics.json is what predictions.jsonl gives, and a damaged line is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import report, score

ROWS = [
    {"key": "a", "truth": 0, "prediction": 0, "scores": [0.7, 0.2, 0.1], "probes": {"one_frame": [0.1, 0.7, 0.2]}},
    {"key": "b", "truth": 1, "prediction": 2, "scores": [0.1, 0.4, 0.5], "probes": {"one_frame": [0.1, 0.7, 0.2]}},
]
METRICS = {"top1": 0.5, "top5": 1.0, "chance": 1 / 3, "top1_one_frame": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path, [json.dumps(row) for row in ROWS])
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    return tmp_path


def write(run: Path, lines: list[str]) -> None:
    (run / "predictions.jsonl").write_text("\n".join(lines) + "\n")


def test_equal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "equal to what its predictions give" in said
    assert json.loads(said[: said.index("}") + 1]) == METRICS


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({**METRICS, "top1": 0.75}, "top1: 0.75 -> 0.5"),
        ({**METRICS, "top3": 1.0}, "top3: 1.0 -> None"),
        ({k: v for k, v in METRICS.items() if k != "top5"}, "top5: None -> 1.0"),
    ],
)
def test_different_then_written(run: Path, capsys: pytest.CaptureFixture[str], changed: dict, says: str) -> None:
    (run / "metrics.json").write_text(json.dumps(changed))
    assert score.main([str(run), "--check"]) == 1
    assert says in capsys.readouterr().err
    assert json.loads((run / "metrics.json").read_text()) == changed
    assert score.main([str(run)]) == 0
    assert says in capsys.readouterr().out
    assert json.loads((run / "metrics.json").read_text()) == METRICS
    assert score.main([str(run), "--check"]) == 0


def test_no_metrics_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.json").unlink()
    assert score.main([str(run), "--check"]) == 1
    assert "missing" in capsys.readouterr().err
    assert not (run / "metrics.json").exists()
    assert score.main([str(run)]) == 0
    assert json.loads((run / "metrics.json").read_text()) == METRICS
    (run / "metrics.json").write_text("{")
    assert score.main([str(run), "--check"]) == 1
    assert "metrics.json: line 1 is not JSON" in capsys.readouterr().err
    assert score.main([str(run)]) == 0
    assert json.loads((run / "metrics.json").read_text()) == METRICS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scores": [0.7, 0.3]}, "line 2: scores has 2 entries, expected 3"),
        ({"scores": [0.1, None, 0.5]}, "line 2: scores holds something that is not a finite number"),
        ({"scores": [0.1, float("nan"), 0.5]}, "line 2: scores holds something that is not a finite number"),
        ({"scores": "0.1"}, "line 2: scores is '0.1', expected list"),
        ({"scores": [0.1, 10**400, 0.5]}, "line 2: scores holds something that is not a finite number"),
        ({"scores": [0.1, float("-inf"), 0.5]}, "line 2: scores holds something that is not a finite number"),
        ({"options": 5}, "line 2: options is 5, expected a list"),
        ({"truth": 3}, "line 2: truth is 3, but there are 3 classes"),
        ({"truth": -1}, "line 2: truth is -1, but there are 3 classes"),
        ({"truth": 1.0}, "line 2: truth is 1.0, expected int"),
        ({"truth": True}, "line 2: truth is True, expected int"),
        ({"prediction": 1}, "line 2: prediction is 1, but another class has a higher score"),
        ({"key": "a"}, "line 2: key 'a' came in line 1 already"),
        ({"probes": {"one_frame": [1.0]}}, "line 2: one_frame has 1 entries, expected 3"),
        ({"probes": {}}, "one set of probes"),
    ],
)
def test_damaged_rows(run: Path, capsys: pytest.CaptureFixture[str], change: dict, says: str) -> None:
    write(run, [json.dumps(ROWS[0]), json.dumps({**ROWS[1], **change})])
    assert score.main([str(run)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([json.dumps(ROWS[0]), json.dumps(ROWS[1])[:-9]], "line 2 is not JSON"),
        ([json.dumps(ROWS[0]), "", json.dumps(ROWS[1])], "line 2 is not JSON"),
        ([json.dumps(ROWS[0]), "[]"], "line 2 holds list"),
        ([json.dumps({k: v for k, v in ROWS[0].items() if k != "truth"})], "line 1: has no 'truth'"),
        (
            [json.dumps(ROWS[0]), json.dumps(ROWS[1])[:-1] + ', "x": ' + "9" * 5000 + "}"],
            "line 2 has a number with",
        ),
        ([json.dumps(ROWS[0]), '{"x": ' + "[" * 100_000], "line 2 has lists or objects nested too deep"),
        ([], "is not JSON"),
    ],
)
def test_damaged_lines(run: Path, capsys: pytest.CaptureFixture[str], lines: list[str], says: str) -> None:
    write(run, lines)
    assert score.main([str(run)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [("[" * 100_000, "nested too deep"), ('{"top1": ' + "9" * 5000 + "}", "a number with too many digits")],
)
def test_metrics_beyond_reading(run: Path, capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    (run / "metrics.json").write_text(text)
    assert score.main([str(run), "--check"]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("value", [[], {"protocol": []}, {"protocol": {"eval": 3}}])
def test_an_evaluation_that_names_no_kinds(run: Path, value: object) -> None:
    (run / "evaluation.json").write_text(json.dumps(value))
    assert score.main([str(run)]) == (2 if value == [] else 0)


def test_a_disk_that_refuses(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    (run / "metrics.json").unlink()
    for main, name in ((score.main, "metrics.json"), (report.main, "report.html")):
        assert main([str(run)]) == 2
        assert capsys.readouterr().err.strip() == f"error: {run / name}: cannot be written (Read-only file system)"


def test_no_predictions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "predictions.jsonl").write_text("")
    assert score.main([str(run)]) == 2
    assert "holds no prediction" in capsys.readouterr().err
    (run / "predictions.jsonl").unlink()
    assert score.main([str(run)]) == 2
    assert "cannot be read" in capsys.readouterr().err
