"""Questions for a judge, in each published form: their ids, and whose video they are about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.sources.video_chatgpt_benchmark import read
from vlm.types import Rejected, Sample, UserError

GENERAL = [
    {"video_name": "v_a", "Q": "What?", "A": "A boat."},
    {"video_name": "v_b", "Q": "Who?", "A": "A man."},
    {"video_name": "v_a", "Q": "Where?", "A": "At sea."},
]


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def asked(item: Sample | Rejected) -> list[tuple[str, str, str, str]]:
    assert isinstance(item, Sample), item
    return [(row["id"], row["kind"], row["question"], row["answer"]) for row in item.annotation["chat"]]


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mov", ".mkv"])
def test_general_and_temporal_questions(tmp_path: Path, suffix: str) -> None:
    videos = {f"Test_Videos/v_a{suffix}": "v", "Test_Videos/v_b.mp4": "v"}
    root = write(tmp_path, videos | {"generic_qa.json": GENERAL, "Benchmarking_QA/temporal_qa.json": GENERAL})
    first, second = read(root, "generic")
    assert isinstance(first, Sample)
    assert (first.key, first.video) == ("v_a", root / f"Test_Videos/v_a{suffix}")
    assert asked(first) == [("v_a/0", "general", "What?", "A boat."), ("v_a/1", "general", "Where?", "At sea.")]
    assert asked(second) == [("v_b/0", "general", "Who?", "A man.")]
    assert {row[1] for item in read(root, "temporal") for row in asked(item)} == {"temporal"}


def test_both_questions_of_a_pair_are_asked_alone(tmp_path: Path) -> None:
    rows = [
        {"video_name": "v_a", "Q1": "What?", "Q2": "Which thing?", "A": "A boat."},
        {"video_name": "v_a", "Q1": "?"},
    ]
    rows.append({"video_name": "v_a", "Q1": "Who?", "Q2": "Which man?", "A": "Me."})
    root = write(tmp_path, {"v_a.mp4": "v", "consistency_qa.json": rows})
    rejected, sample = read(root, "consistency")
    assert isinstance(rejected, Rejected)
    assert "consistency_qa.json item 2, column 'A': is missing" in rejected.reason
    assert asked(sample) == [
        ("v_a/0/1", "consistency", "What?", "A boat."),
        ("v_a/0/2", "consistency", "Which thing?", "A boat."),
        ("v_a/2/1", "consistency", "Who?", "Me."),  # the damaged one keeps its number
        ("v_a/2/2", "consistency", "Which man?", "Me."),
    ]


def test_a_missing_video_is_rejected_and_no_other_taken(tmp_path: Path) -> None:
    root = write(tmp_path, {"v_b.mp4": "v", "x/v_aa.mp4": "v", "generic_qa.json": GENERAL})
    second, first = sorted(read(root, "generic"), key=lambda item: isinstance(item, Rejected))
    assert isinstance(second, Sample)
    assert second.video == root / "v_b.mp4"
    assert isinstance(first, Rejected)
    assert first.key == "v_a"
    assert "no video file 'v_a'" in first.reason
    assert "(2 questions are about it)" in first.reason
    write(root, {"v_a.mp4": "v", "x/v_a.avi": "v"})  # two of one name are none
    assert "2 files have the name 'v_a'" in next(
        item.reason for item in read(root, "generic") if isinstance(item, Rejected)
    )


def test_activitynet_questions_and_answers(tmp_path: Path) -> None:
    questions = [{"video_name": "abc", "question": "is it?", "question_id": f"v_abc_{at}"} for at in range(3)]
    answers = [
        {"answer": answer, "type": 3, "question_id": f"v_abc_{at}"} for at, answer in ((2, "no"), (0, "yes"), (1, 5))
    ]
    root = write(tmp_path, {"v_abc.mp4": "v", "test_q.json": questions, "test_a.json": answers})
    (sample,) = read(root, "test")
    assert [row[::3] for row in asked(sample)] == [("abc/0", "yes"), ("abc/1", "5"), ("abc/2", "no")]  # by their ids
    bare = [{"answer": row["answer"]} for row in answers]
    write(root, {"test_a.json": bare})
    (sample,) = read(root, "any", [root / "test_a.json", root / "test_q.json"])
    assert [row[3] for row in asked(sample)] == ["no", "yes", "5"]  # row by row
    write(root, {"test_a.json": bare[:2]})
    with pytest.raises(UserError, match=r"has 3 rows, but .* has 2"):
        list(read(root, "test"))
    write(root, {"test_a.json": [*answers[:2], {"answer": "no", "question_id": "other"}]})
    rejected, sample = read(root, "test")
    assert isinstance(rejected, Rejected)
    assert "column 'question_id': 'v_abc_1' is not in" in rejected.reason
    assert [row[0] for row in asked(sample)] == ["abc/0", "abc/1"]
    with pytest.raises(UserError, match="one of two files must hold questions and the other answers"):
        list(read(root, "x", [root / "test_a.json", root / "test_a.json"]))
    with pytest.raises(UserError, match=r"has no val_qa\.json, and no val_q\.json"):
        list(read(root, "val"))


def test_other_sets_of_zero_shot_questions(tmp_path: Path) -> None:
    rows = [{"video_id": 12, "question": "who?", "answer": "man", "id": 7}]
    root = write(tmp_path / "msvd", {"vid12.avi": "v", "vid1.avi": "v", "val_qa.json": rows})
    (sample,) = read(root, "val")
    assert asked(sample) == [("12/0", "qa", "who?", "man")]
    assert isinstance(sample, Sample)
    assert sample.video == root / "vid12.avi"
    table = "gif_name\tquestion\tanswer\ntumblr_x\twhat is it ?\tcat\n"
    root = write(tmp_path / "tgif", {"gifs/tumblr_x.gif": "v", "Test_frameqa_question.tsv": table})
    (sample,) = read(root, "test", [root / "Test_frameqa_question.tsv"])
    assert asked(sample) == [("tumblr_x/0", "qa", "what is it ?", "cat")]


def test_features_stand_for_videos(tmp_path: Path) -> None:
    root = write(tmp_path, {"generic_qa.json": GENERAL})
    (tmp_path / "pooled").mkdir()
    np.save(tmp_path / "pooled" / "v_a.npy", np.ones((2, 3), np.float16))
    first, second = read(root, "generic", [root / "generic_qa.json", tmp_path / "pooled"])
    assert isinstance(first, Sample)
    assert first.members == {"clip_pooled.npy": tmp_path / "pooled" / "v_a.npy"}
    assert isinstance(second, Rejected)


@pytest.mark.parametrize(
    ("damaged", "what"), [(7, "is not in"), ({"answer": "x"}, "is not in"), ("copy", "stands in several rows of")]
)
def test_one_damaged_answer_costs_one_question(tmp_path: Path, damaged: Any, what: str) -> None:
    questions = [{"video_name": "abc", "question": f"{at}?", "question_id": f"abc_{at}"} for at in range(4)]
    answers: list[Any] = [{"answer": f"so {at}", "question_id": f"abc_{at}"} for at in range(4)]
    answers[1] = answers[2] if damaged == "copy" else damaged
    root = write(tmp_path, {"abc.mp4": "v", "test_q.json": questions, "test_a.json": answers})
    *rejected, sample = read(root, "test")
    assert isinstance(sample, Sample)
    kept = [0, 3] if damaged == "copy" else [0, 2, 3]  # of two answers under one id neither is taken
    assert [row[2:] for row in asked(sample)] == [(f"{at}?", f"so {at}") for at in kept]
    reasons = [item.reason for item in rejected if isinstance(item, Rejected)]
    assert len(reasons) == 4 - len(kept)
    assert any(what in reason for reason in reasons)


def test_yes_is_no_number(tmp_path: Path) -> None:
    rows = [{"video_name": "abc", "question": "?", "answer": answer} for answer in (True, 3)]
    root = write(tmp_path, {"abc.mp4": "v", "test.json": rows})
    rejected, sample = read(root, "test")
    assert isinstance(rejected, Rejected)
    assert "column 'answer': True is not a text" in rejected.reason
    assert [row[3] for row in asked(sample)] == ["3"]
