"""The challenge's file: which texts it holds, under which names, and what is refused."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest

from vlm.metrics.submission import TEST, VALIDATION, add, empty, submission
from vlm.types import UserError, Writing


def row(boundary: str, kind: str, text: str) -> Writing:
    return Writing(key=f"{boundary}/{kind}", text=text, references=[], kind=kind, id=boundary, video=boundary[:11])


ROWS = [
    row("6q3q3SoZwSY_0", "subject", "a man"),
    row("6q3q3SoZwSY_0", "status_after", "sitting"),
    row("6q3q3SoZwSY_0", "status_before", "standing"),
    row("6q3q3SoZwSY_1", "subject", "café ☕"),
]


def test_texts_under_the_challenge_s_names() -> None:
    assert submission(ROWS) == {
        "6q3q3SoZwSY_0": {"Subject": "a man", "Status_Before": "standing", "Status_After": "sitting"},
        "6q3q3SoZwSY_1": {"Subject": "café ☕", "Status_Before": "", "Status_After": ""},
    }


def test_every_expected_boundary_is_there() -> None:
    texts = submission(ROWS, ["x_5", "6q3q3SoZwSY_1", "6q3q3SoZwSY_0"])
    assert list(texts) == ["x_5", "6q3q3SoZwSY_1", "6q3q3SoZwSY_0"]
    assert texts["x_5"] == {"Subject": "", "Status_Before": "", "Status_After": ""}
    assert len(empty(texts)) == 5
    assert empty(texts)[0] == "x_5: Subject"


def test_zip_of_pickles(tmp_path: Path) -> None:
    file, texts = tmp_path / "gebc.zip", submission(ROWS)
    assert add({}, TEST, file) == [TEST]
    assert add({}, VALIDATION, file) == [TEST, VALIDATION]
    assert add(texts, TEST, file) == [TEST, VALIDATION]
    with zipfile.ZipFile(file) as opened:
        assert opened.namelist() == ["submit_test.pkl", "submit_val.pkl"]
        assert pickle.loads(opened.read("submit_test.pkl")) == texts
        assert pickle.loads(opened.read("submit_val.pkl")) == {}
    again = tmp_path / "again.zip"
    add(texts, TEST, again)
    add({}, VALIDATION, again)
    assert again.read_bytes() == file.read_bytes()


def test_what_is_there_already_is_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "notes.zip"
    file.write_text("notes")
    with pytest.raises(UserError, match="is no zip"):
        add({}, TEST, file)
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("thesis.tex", "x")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        add({}, TEST, file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(TEST, bytes((64 << 20) + 1))
    with pytest.raises(UserError, match=r"submit_test\.pkl is 67,108,865 bytes"):
        add({}, VALIDATION, file)
    with pytest.raises(UserError, match="cannot be written"):
        add({}, TEST, tmp_path / "no" / "folder.zip")


@pytest.mark.parametrize(
    ("rows", "expected", "message"),
    [
        ([], None, "no texts"),
        ([*ROWS, ROWS[0]], None, "two texts of the kind 'subject'"),
        ([row("a_0", "", "x")], None, "none of subject, status_before, status_after"),
        ([row("", "subject", "x")], None, "none of subject"),
        (ROWS, ["6q3q3SoZwSY_0"], "'6q3q3SoZwSY_1' is not in the split's annotation"),
    ],
)
def test_what_is_refused(rows: list[Writing], expected: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        submission(rows, expected)
