"""tools/submission.py: from run folders to the zip."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from tools import submission
from vlm.metrics.submission import NAMES
from vlm.types import Writing


def write_run(folder: Path, boundaries: list[str], kinds: tuple[str, ...] = tuple(NAMES)) -> Path:
    folder.mkdir()
    rows = [
        Writing(key=f"{b}/{kind}", text=f"{kind} of {b}", references=[], kind=kind, id=b, video=b[:2])
        for b in boundaries
        for kind in kinds
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return folder


def annotation(path: Path, boundaries: list[str]) -> Path:
    content: dict[str, list[dict[str, str]]] = {}
    for boundary in boundaries:
        content.setdefault(boundary[:2], []).append({"boundary_id": boundary})
    path.write_text(json.dumps(content))
    return path


def test_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val, test = write_run(tmp_path / "val", ["v1_0", "v1_1"]), write_run(tmp_path / "test", ["t1_0"], ("subject",))
    truth = annotation(tmp_path / "test.json", ["t1_0", "t2_0"])
    out = tmp_path / "submission.zip"
    arguments = ["--val", val, "--test", test, "--test-annotation", truth, "--out", out]
    assert submission.main([str(one) for one in arguments]) == 0
    with zipfile.ZipFile(out) as file:
        own, other = (pickle.loads(file.read(f"submit_{split}.pkl")) for split in ("val", "test"))
    assert own["v1_1"] == {name: f"{kind} of v1_1" for kind, name in NAMES.items()}
    assert other == {
        "t1_0": {"Subject": "subject of t1_0", "Status_Before": "", "Status_After": ""},
        "t2_0": {"Subject": "", "Status_Before": "", "Status_After": ""},
    }
    said = capsys.readouterr()
    assert "val: 2 boundaries, 6 texts, 0 empty" in said.out
    assert "test: 2 boundaries, 1 texts, 5 empty" in said.out
    assert "empty: t1_0: Status_Before" in said.err


def test_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "submission.zip"
    assert submission.main(["--test", str(write_run(tmp_path / "run", ["t1_0"])), "--out", str(out)]) == 0
    assert zipfile.ZipFile(out).namelist() == ["submit_test.pkl"]
    assert "without submit_val.pkl (no --val)" in capsys.readouterr().out


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "submission.zip")
    run = str(write_run(tmp_path / "run", ["t1_0"]))
    truth = str(annotation(tmp_path / "other.json", ["x_0"]))
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"t1": {"boundary_id": 1}}')
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "predictions.jsonl").write_text('{"key": "a", "truth": 0, "prediction": 0, "scores": [1.0, 0.0]}\n')
    for arguments, message in (
        ([], "give --val RUN, --test RUN or both"),
        (["--val", run, "--val-annotation", truth], "boundary 't1_0' is not in the split's annotation"),
        (["--val", run, "--val-annotation", str(damaged)], "is not a list of boundaries"),
        (["--val", run, "--test-annotation", truth], "--test-annotation without --test"),
        (["--val", str(scores)], "holds no texts, but scores"),
    ):
        assert submission.main([*arguments, "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()
