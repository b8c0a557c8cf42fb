"""TVQA's published tree: JSON lines, spans that may be unknown, subtitles of the span."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from question_trees import questions, split, write_tree

from vlm.recipe import load
from vlm.sources.tvqa import Line, parse_srt, read
from vlm.types import UserError

SRT = """1
00:00:01,000 --> 00:00:03,500
ANN: I have the book
you wanted.

2
00:00:04,200 --> 00:00:07,900
BOB: Thank you, Ann.

3
00:00:09,000 --> 00:00:15,000
ANN: Who is at the door?
"""


def row(**changes: Any) -> dict[str, Any]:
    whole = {f"a{n}": f"option {n}" for n in range(5)}
    whole |= {"qid": 7, "q": "What is it?", "vid_name": "met_clip", "ts": "1.21-8.49", "answer_idx": 4}
    return {name: value for name, value in (whole | changes).items() if value is not None}


def tree(folder: Path, rows: list[dict[str, Any] | str], name: str = "tvqa_val.jsonl") -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    files: dict[str, str | bytes] = {name: "\n".join(lines) + "\n", "tvqa_subtitles/met_clip.srt": SRT}
    return write_tree(folder / "tvqa", files, {"met_clip": (48, 768), "s03_clip": (30, 768)})


def test_published_tree(tmp_path: Path) -> None:
    root = tree(tmp_path, [row(), row(qid=8, ts="nan-nan"), row(qid=9, vid_name="s03_clip", ts="19.18-19.18")])
    samples, rejected = split(list(read(root, "val")))
    assert rejected == []
    first, second = samples[0].annotation["questions"]
    assert first == {
        "id": "7",
        "question": "What is it?",
        "options": [f"option {n}" for n in range(5)],
        "answer": 4,
        "span": [1.21, 8.49],
        "dialogue": " ANN: I have the book you wanted. BOB: Thank you, Ann.",
    }
    assert "span" not in second
    assert second["dialogue"] == first["dialogue"] + " ANN: Who is at the door?"
    assert samples[0].annotation["features"] == {"name": "clipvitl14", "fps": 3.0}
    assert samples[0].warnings == ()
    assert samples[1].annotation["questions"][0]["span"] == [19.18, 19.18]
    assert samples[1].warnings == (f"no subtitles {root / 'tvqa_subtitles' / 's03_clip.srt'}",)


def test_captions_beside_the_questions_are_found(tmp_path: Path) -> None:
    """Under the name that the recipe `vico.tvqa` teaches."""
    root = tree(tmp_path, [row()])
    write_tree(root, {}, captions={"blip2_n6.json": {"met_clip": "A woman holds a book."}})
    samples, _ = split(list(read(root, "val")))
    name = load("vico.tvqa").inputs.caption_target
    assert samples[0].annotation["captions"] == {name: "A woman holds a book."}


@pytest.mark.parametrize(
    ("span", "said"),
    [
        ("3-8", "12"),
        ("3.6-8", "2"),
        ("4-7", "2"),
        ("5-7", "2"),
        ("5-6.9", ""),
        ("8-9", ""),
        ("9-15", "3"),
        ("0-60", "123"),
    ],
)
def test_subtitles_of_a_span(span: str, said: str, tmp_path: Path) -> None:
    (sample,), _ = split(list(read(tree(tmp_path, [row(ts=span)]), "val")))
    dialogue = sample.annotation["questions"][0].get("dialogue", "")
    assert said == "".join(n for n, word in (("1", "book"), ("2", "Thank"), ("3", "door")) if word in dialogue)


def test_subtitle_files_as_they_come() -> None:
    lines = [Line(1, 3, "ANN: I have the book you wanted."), Line(4, 7, "BOB: Thank you, Ann.")]
    assert parse_srt(SRT)[0][:2] == lines
    assert parse_srt(SRT.replace("\n", "\r\n"))[0][:2] == lines
    assert parse_srt("\n\n" + SRT.replace("00:00:01,000", "01:02:03,000"))[0][0].start == 3723
    assert parse_srt("1\nno times\ntext\n\n" + SRT) == (parse_srt(SRT)[0], [1])
    assert parse_srt("") == ([], [])


def test_damaged_subtitles_are_a_warning(tmp_path: Path) -> None:
    root = tree(tmp_path, [row()])
    (root / "tvqa_subtitles" / "met_clip.srt").write_text("1\nnothing\n\n" + SRT)
    (sample,), _ = split(list(read(root, "val")))
    assert sample.annotation["questions"][0]["dialogue"].startswith(" ANN: I have")
    assert "met_clip.srt: no times in the subtitle of line 1" in sample.warnings[0]
    (root / "tvqa_subtitles" / "met_clip.srt").write_bytes(b"\xff\xfe")
    (sample,), _ = split(list(read(root, "val")))
    assert "dialogue" not in sample.annotation["questions"][0]
    assert "met_clip.srt is not UTF-8 text" in sample.warnings[0]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (row(a4=None), "column 'a4': is missing"),
        (row(answer_idx=5), "column 'answer_idx': 5 is not an index from 0 to 4"),
        (row(answer_idx=None), "column 'answer_idx': is empty"),
        (row(answer_idx=True), "column 'answer_idx': True is no index"),
        (row(q=3), "column 'q': 3 is not a text"),
        (row(ts="soon"), "column 'ts': 'soon' is not of the form 'seconds-seconds'"),
        (row(ts="9-3"), "column 'ts': '9-3' ends before it begins"),
        (row(ts=[1.0, "x"]), "column 'ts': 'x' is not a time in seconds"),
        (row(vid_name=None), "column 'vid_name': is missing"),
        ('{"a0": "cut', "row 2, column 8: not JSON"),
        ("[1]", "'[1]' is not an object"),
    ],
)
def test_a_damaged_line_is_named(damaged: Any, message: str, tmp_path: Path) -> None:
    root = tree(tmp_path, [row(qid=1), damaged, "", row(qid=2)])
    (sample,), (rejected,) = split(list(read(root, "val")))
    assert [question["id"] for question in sample.annotation["questions"]] == ["1", "2"]
    assert f"{root / 'tvqa_val.jsonl'} row 2" in rejected.reason
    assert message in rejected.reason


def test_the_test_split_has_no_answers(tmp_path: Path) -> None:
    root = tree(tmp_path, [row(answer_idx=None)], "tvqa_test_public.jsonl")
    (sample,), _ = split(list(read(root, "test")))
    assert sample.annotation["questions"][0]["answer"] is None
    with pytest.raises(UserError, match="none of its 1 questions has an answer"):
        list(read(root, "val", [root / "tvqa_test_public.jsonl"]))


def test_tvqa_plus(tmp_path: Path) -> None:
    root = tree(tmp_path, [row()])
    (root / "plus.json").write_text(json.dumps([row(answer_idx="0", ts=[7.67, 16.23], bbox={}), 3]))
    (sample,), (rejected,) = split(list(read(root, "val", [root / "plus.json"])))
    assert sample.annotation["questions"][0]["answer"] == 0
    assert sample.annotation["questions"][0]["span"] == [7.67, 16.23]
    assert "plus.json item 2: 3 is not an object" in rejected.reason


def test_real_questions(realdata: Path, tmp_path: Path) -> None:
    folder = realdata / "annotations" / "tvqa"
    plus = folder / "tvqa_plus_val_sample_dev.json"
    public = folder / "tvqa_test_public_sample_dev.jsonl"
    bad = realdata / "bad" / "annotations" / "tvqa_bad_lines.jsonl"
    videos = {item["vid_name"] for item in json.loads(plus.read_text())}
    videos |= {json.loads(line)["vid_name"] for line in public.read_text().splitlines()}
    write_tree(tmp_path, {}, None, {"captions.json": dict.fromkeys(videos, "A scene.")})

    def listed(name: str, file: Path) -> tuple[int, int, list[str]]:
        samples, rejected = split(list(read(tmp_path, name, [file, tmp_path / "captions.json"])))
        return len(samples), len(questions(samples)), [item.reason for item in rejected]

    assert listed("val", plus) == (97, 126, [])
    assert listed("test", public) == (214, 262, [])
    _, good, reasons = listed("test", bad)
    assert good == 8  # one of them with "nan-nan"
    assert len(reasons) == 2
    assert f"{bad} row 4, column 'a4': is missing" in reasons[0]
    assert f"{bad} row 6, column 8: not JSON (Unterminated string" in reasons[1]
