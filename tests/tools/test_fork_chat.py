"""tools/fork_chat.py says what it cannot convert, and writes nothing then (what it writes: tests/parity)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import fork_chat


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in {
        "LLM/Breakfast/P03/cam01/P03_tea.avi.labels": "Q: When?\nA: between 10 and 300\n",
        "LLM/Videos/BreakfastII_15fps_qvga_sync/P03/cam01/P03_tea.avi.labels": "1-300 SIL\n",
        "frames.json": json.dumps({"P03_tea_cam01": 2001}),
        "instruct.json": json.dumps([{"video_id": "v", "q": "?", "a": "!"}]),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def breakfast(tree: Path, *options: str) -> int:
    words = ["breakfast", "--root", str(tree / "LLM"), "--frames", str(tree / "frames.json")]
    return fork_chat.main([*words, "--out", str(tree / "out.json"), *options])


def test_written(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert breakfast(tree, "--repeats", "2", "1") == 0
    assert "3 rows about 1 videos" in capsys.readouterr().out
    answers = [row["conversations"][1]["value"] for row in json.loads((tree / "out.json").read_text())]
    assert answers == ["1-300 SIL\n", "1-300 SIL\n", "between 5 and 150\n"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("LLM/Breakfast/P03/cam01/P03_tea.avi.labels", f"Q: When?\nA: at {'9' * 5000}\n", "is no frame of a video"),
        ("LLM/Breakfast/P03/cam01/.DS_Store", "x", "is no file of questions"),
        ("LLM/Breakfast/P03/cam01/P03_milk.avi.labels", "Q: ?\nA: !\n", "P03_milk.avi.labels"),
        ("LLM/Breakfast/P03/cam01/P03_tea.avi.labels", "A: first\n", "stands before the first question"),
        ("frames.json", "{}", "the frames of video 'P03_tea_cam01' are not in"),
        ("frames.json", '{"P03_tea_cam01": true}', "must be a JSON object of video: number"),
        ("frames.json", f'{{"P03_tea_cam01": {"9" * 5000}}}', "cannot be read as JSON"),
        ("frames.json", "[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_what_is_damaged(tree: Path, name: str, text: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / name).write_text(text)
    assert breakfast(tree) == 2
    assert says in capsys.readouterr().err
    assert not (tree / "out.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--repeats", "-1", "2"], "a number of copies is 0 or more"),
        (["--frames", "frames.json"], "--frames says nothing of the form instruct"),
    ],
)
def test_options_that_say_nothing(tree: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fork_chat.main(["instruct", "--root", str(tree / "instruct.json"), "--out", str(tree / "out.json"), *words])
    assert says in capsys.readouterr().err
