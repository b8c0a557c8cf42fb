"""IntentQA's published tree, and its real file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from question_trees import NEXTQA, NEXTQA_ROWS, csv, questions, split, write_tree

from vlm.sources.intentqa import read

HEADER = NEXTQA.replace("video", "video_id") + ",action,lemma,lemma_id"


def test_published_tree(tmp_path: Path) -> None:
    rows = [f"{row},left,leave,130" for row in NEXTQA_ROWS]
    root = write_tree(
        tmp_path / "intentqa",
        {"test.csv": csv(HEADER, rows, "\r\n")},
        {"4010069381": (4, 768)},
        {"blip2_n6.json": {"4010069381": "In the video we see these scenes: a; b."}},
    )
    samples, rejected = split(list(read(root, "test")))
    assert [sample.key for sample in samples] == ["4010069381"]
    question = {"id": "6", "question": "how do the two man play the instrument", "answer": 0, "kind": "CH"}
    assert samples[0].annotation["questions"][0].items() >= question.items()
    assert samples[0].annotation["captions"] == {"blip2_n6": "In the video we see these scenes: a; b."}
    assert len(rejected) == 2  # the kind DO is none of IntentQA's; the other video has neither features nor caption
    assert f"{root / 'test.csv'} row 4, column 'type': 'DO' is none of CW, CH, TN, TP" in rejected[0].reason
    assert "row 3, column 'video': of '4882821564' there are no features" in rejected[1].reason


def test_real_questions(realdata: Path, tmp_path: Path) -> None:
    file = realdata / "annotations" / "intentqa" / "val.csv"
    videos = {line.split(",")[0] for line in file.read_text().splitlines()[1:]}
    write_tree(tmp_path, {}, None, {"captions.json": dict.fromkeys(videos, "A scene.")})
    samples, rejected = split(list(read(tmp_path, "val", [file, tmp_path / "captions.json"])))
    assert (len(samples), rejected) == (524, [])
    kinds = Counter(question["kind"] for question in questions(samples))
    assert kinds == {"CW": 1185, "TN": 505, "CH": 334, "TP": 20}
