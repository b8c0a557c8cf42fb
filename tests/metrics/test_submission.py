"""The challenge's file: which texts it holds, under which names, and what is refused."""

from __future__ import annotations

import io
import pickle
import zipfile

import pytest

from vlm.metrics.submission import archive, empty, submission
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


def test_zip_of_pickles() -> None:
    texts = submission(ROWS)
    data = archive({"test": texts, "val": {}})
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.namelist() == ["submit_val.pkl", "submit_test.pkl"]
        assert pickle.loads(file.read("submit_test.pkl")) == texts
    assert archive({"val": {}, "test": texts}) == data


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
