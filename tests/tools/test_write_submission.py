"""tools/score.py --submission: from run folders to the zip."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from tools import score
from vlm.metrics.submission import NAMES
from vlm.types import Writing


def write_run(folder: Path, boundaries: list[str], references: bool, kinds: tuple[str, ...] = tuple(NAMES)) -> str:
    folder.mkdir()
    rows = [
        Writing(
            key=f"{b}/{kind}",
            text=f"{kind} of {b}",
            references=["a man"] if references else [],
            kind=kind,
            id=b,
            video=b[:2],
        )
        for b in boundaries
        for kind in kinds
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return str(folder)


def annotation(path: Path, boundaries: list[str]) -> str:
    content: dict[str, list[dict[str, str]]] = {}
    for boundary in boundaries:
        content.setdefault(boundary[:2], []).append({"boundary_id": boundary})
    path.write_text(json.dumps(content))
    return str(path)


def test_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "gebc.zip")
    test = write_run(tmp_path / "test", ["t1_0"], False, ("subject",))
    truth = annotation(tmp_path / "test.json", ["t1_0", "t2_0"])
    assert score.main([test, "--submission", out, "--boundaries", truth]) == 0
    said = capsys.readouterr()
    assert "submit_test.pkl written; submit_val.pkl is still to come" in said.out
    assert "submit_test.pkl: 2 boundaries, 1 texts, 5 empty" in said.out
    assert "empty: t1_0: Status_Before" in said.err
    val = write_run(tmp_path / "val", ["v1_0", "v1_1"], True)
    assert score.main([val, "--submission", out]) == 0
    said = capsys.readouterr()
    assert "submit_val.pkl written\n" in said.out
    assert "submit_val.pkl: 2 boundaries, 6 texts, 0 empty" in said.out
    with zipfile.ZipFile(out) as file:
        own, other = (pickle.loads(file.read(f"submit_{split}.pkl")) for split in ("val", "test"))
    assert own["v1_1"] == {name: f"{kind} of v1_1" for kind, name in NAMES.items()}
    assert other == {
        "t1_0": {"Subject": "subject of t1_0", "Status_Before": "", "Status_After": ""},
        "t2_0": {"Subject": "", "Status_Before": "", "Status_After": ""},
    }


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gebc.zip"
    run = write_run(tmp_path / "run", ["t1_0"], False)
    truth = annotation(tmp_path / "other.json", ["x_0"])
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"t1": {"boundary_id": 1}}')
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "predictions.jsonl").write_text('{"key": "a", "truth": 0, "prediction": 0, "scores": [1.0, 0.0]}\n')
    submit = ["--submission", str(out)]
    for arguments, message in (
        ([run, *submit, "--boundaries", truth], "boundary 't1_0' is not in the split's annotation"),
        ([run, *submit, "--boundaries", str(damaged)], "is not a list of boundaries"),
        ([run, *submit, "--check"], "--check only compares"),
        ([run, "--boundaries", truth], "--boundaries is what --submission is to hold"),
        ([str(scores), *submit], "its predictions are no texts"),
    ):
        assert score.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
