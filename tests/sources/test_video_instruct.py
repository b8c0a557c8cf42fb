"""Rows of one question each become a record a video; the fork's, on one axis of time where that can be known."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.sources import instruct
from vlm.sources.common_chat import ALL_SEGMENTS
from vlm.sources.common_fork_chat import Exchange, chat_json, instruct_exchanges
from vlm.sources.video_instruct import read
from vlm.types import Rejected, Sample, UserError

INSTRUCT = [
    {"q": "What?", "a": "A boat.", "video_id": "v_a"},
    {"q": "Who?", "a": "2 men.", "video_id": "v_b"},
    {"q": "Where?", "a": "At sea.", "video_id": "v_a"},
]
FORK = [
    Exchange("P03_tea_ch0_stereo_all", "List down all the segments. action is tea",
             "1-483 SIL \n483-2633 add teabag \n2633-4453 pour water \n", 12),
    Exchange("P03_tea_ch0_stereo_all", "What happens between 121 and 658?", "He takes 2 bags.\n", 2),
    Exchange("P03_tea_ch0_stereo_all", "Which segments are there?", "0 - 121 SIL\n121 - 658 add teabag\n", 2),
]  # fmt: skip


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def only(root: Path, *files: Path) -> Sample:
    (item,) = read(root, "train", files)
    assert isinstance(item, Sample), item
    return item


def test_videoinstruct_rows_in_both_forms(tmp_path: Path) -> None:
    rows = list(chat_json(instruct_exchanges(INSTRUCT)))
    root = write(tmp_path, {"videos/v_a.mp4": "v", "videos/v_b.mkv": "v", "train.json": INSTRUCT, "chat.json": rows})
    first, second = (item for item in read(root, "train") if isinstance(item, Sample))
    assert (first.key, first.video) == ("v_a", root / "videos" / "v_a.mp4")
    assert first.annotation == {
        "video": "v_a",
        "chat": [
            {"kind": "written", "question": "What?", "answer": "A boat."},
            {"kind": "written", "question": "Where?", "answer": "At sea."},
        ],
    }
    assert (second.key, second.warnings) == ("v_b", ())
    assert list(read(root, "train", [root / "chat.json"])) == [first, second]


def test_the_source_of_dialogues_reads_them_too(tmp_path: Path) -> None:
    """One record a row there."""
    rows = list(chat_json(instruct_exchanges(INSTRUCT)))
    root = write(tmp_path, {"v_a.mp4": "v", "v_b.mkv": "v", "chat.json": rows, "rows.json": INSTRUCT})
    found = [item for item in instruct.read(root, "", [root / "chat.json"]) if isinstance(item, Sample)]
    assert [item.video for item in found] == [root / "v_a.mp4", root / "v_b.mkv", root / "v_a.mp4"]
    assert [item.annotation["conversations"][0]["value"] for item in found] == [
        "What?\n<video>",
        "<video>\nWho?",
        "Where?\n<video>",
    ]
    assert all(item.warnings == () for item in found)
    same = [item for item in instruct.read(root, "", [root / "rows.json"]) if isinstance(item, Sample)]
    assert [item.video for item in same] == [item.video for item in found]


def test_the_forks_rows_on_one_axis(tmp_path: Path) -> None:
    root = write(tmp_path, {"P03/stereo/P03_tea_ch0.avi": "v", "P03/cam01/P03_tea.avi": "v"})
    write(root, {"chat.json": list(chat_json(FORK)), "vid_frames.json": {"P03_tea_ch0_stereo": 4453}})
    sample = only(root, root / "chat.json", root / "vid_frames.json")
    assert (sample.key, sample.video) == ("P03_tea_ch0_stereo_all", root / "P03/stereo/P03_tea_ch0.avi")
    assert sample.annotation["name"] == "tea"
    assert sample.annotation["num_frames"] == 4453
    assert [(part["start"], part["end"], part["name"]) for part in sample.annotation["segments"]] == [
        (0, 483, "SIL"),
        (483, 2633, "add_teabag"),
        (2633, 4453, "pour_water"),
    ]
    assert sample.annotation["chat"] == [  # without copies
        {
            "kind": "segments",
            "question": "List down all the segments. action is tea",
            "answer": "<t:0>-<t:483> SIL\n<t:483>-<t:2633> add teabag\n<t:2633>-<t:4453> pour water",
        },
        {"kind": "written", "question": "What happens between <t:483> and <t:2633>?", "answer": "He takes 2 bags."},
        {
            "kind": "written",
            "question": "Which segments are there?",
            "answer": "<t:0>-<t:483> SIL\n<t:483>-<t:2633> add teabag",
        },
    ]
    assert sample.warnings == ()
    without = only(root, root / "chat.json")
    assert without.annotation["chat"][0] == sample.annotation["chat"][0]
    assert without.annotation["chat"][1]["question"] == "What happens between 121 and 658?"
    assert "stay as they are: give vid_frames_breakfast.json" in without.warnings[0]


def test_published_folders_of_features(tmp_path: Path) -> None:
    root = write(tmp_path, {"chat.json": list(chat_json(FORK))})
    (tmp_path / "features").mkdir()
    file = tmp_path / "features" / "P03_tea_ch0_stereo_all.pkl"
    file.write_bytes(pickle.dumps(np.ones((4, 25, 8), np.float16)))
    sample = only(root, root / "chat.json", tmp_path / "features")
    assert (sample.video, sample.members) == (None, {"clip_states.npy": file})
    assert "no video file" in sample.warnings[-1]
    rows = [{"video_id": "../secret", "q": "?", "a": "!"}]  # a name of a stranger's leads nowhere else
    (tmp_path / "secret.pkl").write_bytes(file.read_bytes())
    for features in (tmp_path / "features", Path(f"clip_states={tmp_path / 'features'}")):
        (rejected,) = read(write(tmp_path, {"chat.json": rows}), "train", [tmp_path / "chat.json", features])
        assert isinstance(rejected, Rejected)
        assert "no video file '../secret'" in rejected.reason


def test_damaged_rows_are_named_and_others_kept(tmp_path: Path) -> None:
    human, gpt = {"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "A boat."}
    rows = [
        {"id": "v_a", "video": "v_a.pkl", "conversations": [human, gpt]},
        {"id": "v_a", "video": "v_a.pkl", "conversations": [human, gpt, human, gpt]},
        {"id": "v_a", "video": "v_a.pkl", "conversations": [human | {"value": "<video>\n"}, gpt]},
        {"id": "v_a", "video": "v_a.pkl", "conversations": [human, gpt | {"value": "<video>"}]},
        {"video_id": "v_a", "q": "What?"},
        {"video_id": "v_c", "q": "What?", "a": "This."},
    ]
    root = write(tmp_path, {"v_a.mp4": "v", "train.json": rows})
    items = list(read(root, "train"))
    assert len(items) == 6
    reasons = [item.reason for item in items if isinstance(item, Rejected)]
    for reason, (row, wanted) in zip(
        reasons,
        [(2, "is not one question and its answer"), (3, "there is no question beside"), (4, "stands twice"),
         (5, "column 'a': is missing"), (6, "no video file 'v_c'")],
        strict=True,
    ):  # fmt: skip
        assert f"train.json item {row}" in reason
        assert wanted in reason
    assert [item.annotation["chat"] for item in items if isinstance(item, Sample)] == [
        [{"kind": "written", "question": "What?", "answer": "A boat."}]
    ]
    with pytest.raises(UserError, match=r"val\.json: no such file"):
        list(read(root, "val"))


def test_rows_of_strangers_are_no_end(tmp_path: Path) -> None:
    huge = "9" * 5000
    rows = [
        {"id": "v_a", "video": "v_a.pkl", "conversations": [3, 4]},
        {"video_id": "v_a", "q": ALL_SEGMENTS.format(activity="tea"), "a": f"1-{huge} SIL"},
        {"video_id": "v_a", "q": f"What is between {huge} and 3, at {huge}, in frame {huge}?", "a": f"1-{huge} SIL"},
    ]
    root = write(tmp_path, {"v_a.mp4": "v", "train.json": rows, "frames.json": {"v_a": 100}})
    rejected, sample = read(root, "train", [root / "train.json", root / "frames.json"])
    assert isinstance(rejected, Rejected)
    assert "is not one question and its answer" in rejected.reason
    assert isinstance(sample, Sample)
    assert "segments" not in sample.annotation
    assert [(row["question"], row["answer"]) for row in sample.annotation["chat"]] == [
        (row["q"], row["a"]) for row in rows[1:]
    ]
    (root / "train.json").write_text(f'[{{"video_id": {huge}, "q": "?", "a": "!"}}]')
    with pytest.raises(UserError, match="a number of thousands of digits"):
        list(read(root, "train"))


def test_answers_that_list_no_segments_keep_their_frames(tmp_path: Path) -> None:
    """They are in frames as those that do, so nothing of them is multiplied."""
    name, asks = "P03_tea_cam01", ALL_SEGMENTS.format(activity="tea")
    answers = ["1-30 SIL\n30-x take_cup", "1-400 SIL\n400-900 take_cup", "1-500 SIL"]
    rows = [{"video_id": name, "q": asks, "a": answer} for answer in answers]
    rows.append({"video_id": name, "q": "What is between 100 and 200?", "a": "A cup."})
    root = write(tmp_path, {"P03/cam01/P03_tea.avi": "v", "train.json": rows, "frames.json": {name: 2001}})
    sample = only(root, root / "train.json", root / "frames.json")
    assert [(row["kind"], row["answer"]) for row in sample.annotation["chat"]] == [
        ("segments", "<t:0>-<t:400> SIL\n<t:400>-<t:900> take cup"),
        ("written", answers[0]),
        ("written", answers[2]),
        ("written", "A cup."),
    ]
    assert sample.annotation["chat"][-1]["question"] == "What is between <t:199> and <t:400>?"
    first, second = sample.warnings
    assert "not all of its lines are segments" in first
    assert "there is another such answer" in second
