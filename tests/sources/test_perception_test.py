"""Perception Test's published tree: three options, and spans that hide what gives the answer away."""

from __future__ import annotations

from pathlib import Path

import pytest
from question_trees import csv, questions, split, write_tree

from vlm.recipe import load
from vlm.sources.perception_test import read

HEADER = "video,num_option,qid,a0,a1,a2,answer,question,start,end"
ROWS = (
    "video_1,3,PT_video_1_0,static or shaking,moving,I don't know,0,Is the camera moving or static?,,",
    "video_2,3,PT_video_2_5,left,right,middle,2,Where is the hidden object at the end?,0.0,18.48",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {"val.csv": csv(HEADER, ROWS), "train.csv": csv(HEADER[:-10], [row.rsplit(",", 2)[0] for row in ROWS])}
    captions = {"llava_13b_n6.json": {"video_1": "The video shows: a.", "video_2": "The video shows: b."}}
    return write_tree(tmp_path / "ptest", files, {"video_1": (4, 768), "video_2": (21, 768)}, captions)


def test_published_tree(root: Path) -> None:
    samples, rejected = split(list(read(root, "val")))
    assert rejected == []
    assert [sample.annotation["span_rule"] for sample in samples] == ["inside", "inside"]
    first, second = questions(samples)
    assert first == {
        "id": "PT_video_1_0",
        "question": "Is the camera moving or static?",
        "options": ["static or shaking", "moving", "I don't know"],
        "answer": 0,
    }
    assert second["span"] == [0.0, 18.48]
    assert samples[0].annotation["captions"] == dict.fromkeys(
        ("llava_13b_n6", load("vamos.ptest_cap").inputs.caption), "The video shows: a."
    )
    assert samples[0].warnings == ()
    assert [q.get("span") for q in questions(split(list(read(root, "train")))[0])] == [None, None]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",0.0,18.48", ",0.0,", "column 'end': '' is not a time in seconds"),
        (",0.0,18.48", ",18.5,18.48", "column 'end': '18.48' is not after column 'start' ('18.5')"),
        (",0.0,18.48", ",-1,18.48", "column 'start': '-1' is not a time in seconds"),
        (",0.0,18.48", ",nan,18.48", "column 'start': 'nan' is not a time in seconds"),
        ("video_2,3,", "video_2,4,", "column 'num_option': '4', but there are 3 options"),
        (",2,Where", ",3,Where", "column 'answer': '3' is not an index from 0 to 2"),
    ],
)
def test_a_damaged_cell_is_named(root: Path, old: str, new: str, message: str) -> None:
    (root / "val.csv").write_text(csv(HEADER, [ROWS[0], ROWS[1].replace(old, new)]))
    samples, rejected = split(list(read(root, "val")))
    assert [sample.key for sample in samples] == ["video_1"]
    assert [row.reason for row in rejected] == [f"{root / 'val.csv'} row 3, {message}"]


@pytest.mark.parametrize(("name", "count", "spans"), [("val", 238, 3), ("train", 232, 0)])
def test_real_questions(name: str, count: int, spans: int, realdata: Path, tmp_path: Path) -> None:
    file = realdata / "annotations" / "perception_test" / f"vamos_{name}_sample_dev.csv"
    videos = {line.split(",")[0] for line in file.read_text().splitlines()[1:]}
    write_tree(tmp_path, {}, None, {"captions.json": dict.fromkeys(videos, "A scene.")})
    samples, rejected = split(list(read(tmp_path, name, [file, tmp_path / "captions.json"])))
    assert rejected == []
    assert len(questions(samples)) == count
    assert sum("span" in question for question in questions(samples)) == spans
