"""STAR's published tree: answers that are texts, choices in the order of their ids, spans."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from question_trees import questions, split, write_tree

from vlm.sources.star import read
from vlm.types import UserError


def row(**changes: Any) -> dict[str, Any]:
    choices = [{"choice_id": n, "choice": f"The {name}."} for n, name in enumerate(("bag", "book", "cup", "towel"))]
    whole = {
        "question_id": "Interaction_T1_13",
        "question": "Which object was tidied up by the person?",
        "video_id": "6H78U",
        "start": 11.1,
        "end": 19.6,
        "answer": "The cup.",
        "choices": list(reversed(choices)),
        "situations": {"000012": {"actions": ["a"]}},
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def tree(folder: Path, rows: list[Any], split: str = "val") -> Path:
    files: dict[str, str | bytes] = {f"STAR_{split}.json": json.dumps(rows)}
    captions = {"star_caption_7B.json": {"6H78U": "The video shows: a."}}
    return write_tree(folder / "star", files, {"6H78U": (30, 768)}, captions)


def test_published_tree(tmp_path: Path) -> None:
    root = tree(tmp_path, [row(), row(question_id="Sequence_T2_1", answer="The bag.")])
    (sample,), rejected = split(list(read(root, "val")))
    assert rejected == []
    assert sample.annotation == {
        "video": "6H78U",
        "questions": [
            {
                "id": name,
                "question": "Which object was tidied up by the person?",
                "options": ["The bag.", "The book.", "The cup.", "The towel."],
                "answer": answer,
                "kind": name.split("_")[0],
                "span": [11.1, 19.6],
            }
            for name, answer in (("Interaction_T1_13", 2), ("Sequence_T2_1", 0))
        ],
        "span_rule": "rounded",
        "captions": {"star_caption_7B": "The video shows: a."},
        "features": {"name": "clipvitl14", "fps": 1.0},
    }


def test_the_test_split_has_no_answers(tmp_path: Path) -> None:
    (sample,), _ = split(list(read(tree(tmp_path, [row(answer=None)], "test"), "test")))
    assert sample.annotation["questions"][0]["answer"] is None
    with pytest.raises(UserError, match=r"STAR_val.json: none of its 1 questions has an answer"):
        list(read(tree(tmp_path, [row(answer=None)]), "val"))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (row(answer="A cup."), "column 'answer': 'A cup.' is none of the choices"),
        (row(answer=None), "column 'answer': is missing"),
        (row(question_id="Other_T1_1"), "column 'question_id': 'Other_T1_1' does not begin with one of Interaction"),
        (row(video_id=None), "column 'video_id': is missing"),
        (row(question=" "), "column 'question': is empty"),
        (row(start="soon"), "column 'start': 'soon' is not a time in seconds"),
        (row(end=3.0), "column 'end': 3.0 is before column 'start' (11.1)"),
        (row(choices=[{"choice_id": 0, "choice": "a"}]), "column 'choices': their ids are [0], not 0 to 3"),
        (row(choices="abcd"), "column 'choices': 'abcd' is not a list of choices"),
        (row(choices=[{"choice_id": n, "choice": ""} for n in range(4)]), "column 'choice': is empty"),
        ("text", "'text' is not an object"),
    ],
)
def test_a_damaged_item_is_named(damaged: Any, message: str, tmp_path: Path) -> None:
    root = tree(tmp_path, [row(question_id="Prediction_T1_1"), damaged])
    (sample,), (rejected,) = split(list(read(root, "val")))
    assert len(sample.annotation["questions"]) == 1
    assert f"{root / 'STAR_val.json'} item 2" in rejected.reason
    assert message in rejected.reason


def test_captions_and_questions_are_told_apart(tmp_path: Path) -> None:
    root = tree(tmp_path, [row()])
    files = [root / "star_caption_7B.json", root / "STAR_val.json"]
    (sample,), _ = split(list(read(root, "anything", files)))
    assert sample.annotation["captions"] == {"star_caption_7B": "The video shows: a."}
    for content, message in (("{}", "must be a JSON list of questions"), ("[]", "must be a JSON list of questions")):
        (root / "STAR_val.json").write_text(content)
        with pytest.raises(UserError, match=message):
            list(read(root, "val"))


def test_real_questions(realdata: Path, tmp_path: Path) -> None:
    file = realdata / "annotations" / "star" / "STAR_test_sample_dev.json"
    videos = {item["video_id"] for item in json.loads(file.read_text())}
    write_tree(tmp_path, {}, None, {"captions.json": dict.fromkeys(videos, "A scene.")})
    samples, rejected = split(list(read(tmp_path, "test", [file, tmp_path / "captions.json"])))
    assert (len(samples), rejected) == (170, [])
    kinds = Counter(question["kind"] for question in questions(samples))
    assert kinds == {"Sequence": 105, "Interaction": 94, "Feasibility": 24, "Prediction": 19}
    with pytest.raises(UserError, match=r"star_truncated.json is not JSON \(line 1, column \d+: "):
        list(read(tmp_path, "val", [realdata / "bad" / "annotations" / "star_truncated.json"]))
