"""Dialogues of LLaVA, VideoChat and their kin: one form out of all, and every way in which they come damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.sources.instruct import read
from vlm.types import Rejected, Sample, UserError

ASKED = {"from": "human", "value": "<video>\nWhat is it?"}
SAID = {"from": "gpt", "value": "A horse."}
MORE = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "White."}]
LLAVA = {"id": "7", "video": "a.mp4", "conversations": [ASKED, SAID]}
VIDEOCHAT = {"video": "000001_000050/b.mp4", "QA": [{"q": "What is it?", "a": "A horse."}]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    names = ("a.mp4", "videos/000001_000050/b.mp4", "images/1.jpg", "images/COCO_train2014_000000000009.jpg", "v_x.mkv")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"media")
    return root


def items(root: Path, *rows: Any, name: str = "chat.json") -> list[Sample | Rejected]:
    (root.parent / name).write_text(json.dumps(rows))
    return list(read(root, "train", [root.parent / name]))


def only(root: Path, row: Any) -> Sample:
    (sample,) = items(root, row)
    assert isinstance(sample, Sample), sample
    return sample


def test_llava(root: Path) -> None:
    sample = only(root, LLAVA | {"conversations": [ASKED, SAID, *MORE]})
    assert sample == Sample(
        key="chat/0000001",
        video=root / "a.mp4",
        annotation={"conversations": [ASKED, SAID, *MORE], "video": "a.mp4", "id": "7"},
    )


def test_videochat(root: Path) -> None:
    first, second = items(root, VIDEOCHAT, VIDEOCHAT | {"QA": VIDEOCHAT["QA"] * 2, "start": 0.5, "end": "6.9"})  # type: ignore[operator]
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert first == Sample(
        key="chat/0000001",
        video=root / "videos" / "000001_000050" / "b.mp4",
        annotation={"conversations": [ASKED, SAID], "video": "000001_000050/b.mp4"},
    )
    again = {"from": "human", "value": "What is it?"}  # the video stands before the first question only
    assert second.annotation["conversations"] == [ASKED, SAID, again, SAID]
    assert (second.key, second.annotation["span"]) == ("chat/0000002", [0.5, 6.9])


def test_instructions_of_videochat2(root: Path) -> None:
    both = only(root, VIDEOCHAT | {"QA": [{"i": "Be brief.", "q": "What is it?", "a": "A horse."}]})
    assert both.annotation["conversations"] == [{"from": "system", "value": "Be brief."}, ASKED, SAID]
    caption = only(root, VIDEOCHAT | {"QA": [{"i": "What is it?", "q": "", "a": "A horse."}]})
    assert caption.annotation["conversations"] == [ASKED, SAID]


@pytest.mark.parametrize(
    ("row", "file"),
    [
        ({"video_id": "v_x", "q": "What is it?", "a": "A horse."}, "v_x.mkv"),
        ({"video": "v_x.pkl", "conversations": [ASKED, SAID]}, "v_x.mkv"),
        ({"image": "1.jpg", "conversations": [ASKED | {"value": "<image>\nWhat is it?"}, SAID]}, "images/1.jpg"),
        ({"image": "images/1.jpg", "QA": VIDEOCHAT["QA"]}, "images/1.jpg"),
        ({"image": "000000000009.jpg", "conversations": [ASKED, SAID]}, "images/COCO_train2014_000000000009.jpg"),
        ({"image_id": "000000000009", "conversations": [ASKED, SAID]}, "images/COCO_train2014_000000000009.jpg"),
        ({"image": ["1.jpg"], "conversations": [ASKED, SAID]}, "images/1.jpg"),
        (
            {
                "videos": ["a.mp4"],
                "messages": [
                    {"role": "user", "content": "<video>\nWhat is it?"},
                    {"role": "assistant", "content": "A horse."},
                ],
            },
            "a.mp4",
        ),
    ],
)
def test_other_forms_become_the_same(row: dict[str, Any], file: str, root: Path) -> None:
    sample = only(root, row)
    assert sample.annotation["conversations"] == [ASKED, SAID]
    assert sample.video == root / file
    assert sample.warnings == ()


def test_place_of_the_video_is_kept(root: Path) -> None:
    behind = only(root, LLAVA | {"conversations": [ASKED | {"value": "What is it?\n<video>"}, SAID]})
    assert behind.annotation["conversations"][0]["value"] == "What is it?\n<video>"
    later = [*MORE, ASKED, SAID]
    assert only(root, LLAVA | {"conversations": later}).annotation["conversations"] == later
    nowhere = only(root, LLAVA | {"conversations": [MORE[0], SAID]})
    assert nowhere.annotation["conversations"][0]["value"] == "<video>\nWhich colour?"
    assert nowhere.warnings[0].endswith("item 1: no turn says where the video stands, so it comes first")


def test_text_alone(root: Path) -> None:
    alone = {"id": 7, "conversations": [MORE[0], SAID]}
    found = only(root, alone)
    assert (found.video, found.annotation["conversations"]) == (None, alone["conversations"])
    assert found.warnings[0].endswith("names no video or image, so it is a dialogue of text alone")


def turns(*speakers: str) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": "words"} for name in speakers]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"video": None}, "columns 'video' and 'image': are missing, so there is nothing to see"),
        ({"video": "gone.mp4"}, "column 'video': no file 'gone.mp4' in "),
        ({"video": 1.5}, "column 'video': 1.5 is not a text"),
        ({"video": ["a.mp4", "b.mp4"]}, "column 'video': 2 files, but a record has one video or image"),
        ({"image": "1.jpg"}, "columns 'video' and 'image': a record has one video or image"),
        ({"audios": ["a.mp3"]}, "column 'audios': sound is not read"),
        ({"conversations": None}, "column 'conversations': None is not a list of objects"),
        ({"conversations": ["words"]}, "column 'conversations': ['words'] is not a list of objects"),
        ({"conversations": []}, "column 'conversations': has no turns"),
        (turns("system"), "column 'conversations': has no turns"),
        (turns("human"), "the last of 1 turns is the human's: there is no answer to learn"),
        (turns("gpt", "human"), "column 'conversations', turn 1: is of 'gpt', but it is the human's turn"),
        (turns("human", "human"), "column 'conversations', turn 2: is of 'human', but it is the gpt's turn"),
        (turns("human", "system"), "column 'conversations', turn 2: is of 'system', but it is the gpt's turn"),
        (turns("human", "bot"), "column 'conversations', turn 2, column 'from': 'bot' is none of human, user"),
        (
            {"conversations": [ASKED, SAID | {"value": " "}]},
            "column 'conversations', turn 2, column 'value': is empty",
        ),
        ({"conversations": [ASKED, {"from": "gpt"}]}, "column 'conversations', turn 2, column 'value': is missing"),
        (
            {"conversations": [ASKED | {"value": "<video><video>What?"}, SAID]},
            "<video> and <video> stand in the turns, but there is one video",
        ),
        ({"conversations": [MORE[0], SAID | {"value": "<video>"}]}, "<video> stands in a turn of 'gpt'"),
        ({"QA": VIDEOCHAT["QA"]}, "columns 'conversations', 'QA': it is not known which one counts"),
        ({"start": 3, "end": 2}, "column 'end': 2 is not after column 'start' (3)"),
        ({"start": 3}, "column 'end': None is not a time in seconds"),
    ],
)
def test_a_damaged_row_is_named(changes: dict[str, Any], reason: str, root: Path) -> None:
    first, rejected, last = items(root, LLAVA, LLAVA | changes, LLAVA)
    assert isinstance(rejected, Rejected)
    assert f"{root.parent / 'chat.json'} item 2, " in rejected.reason
    assert reason in rejected.reason
    assert rejected.key == "chat/0000002"
    assert [item.key for item in (first, last) if isinstance(item, Sample)] == ["chat/0000001", "chat/0000003"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "a.mp4"}, "column 'conversations' (or 'messages', 'QA', 'q'): is missing; there are video"),
        (VIDEOCHAT | {"QA": [{"q": "", "a": "A horse."}]}, "column 'QA', part 1, column 'q': is empty"),
        (VIDEOCHAT | {"QA": [{"q": "What?"}]}, "column 'QA', part 1, column 'a': is missing"),
        ({"video_id": "v_y", "q": "a", "a": "b"}, "column 'video_id': no video file 'v_y'"),
    ],
)
def test_a_damaged_row_of_another_form_is_named(row: dict[str, Any], reason: str, root: Path) -> None:
    (rejected,) = items(root, row)
    assert isinstance(rejected, Rejected)
    assert reason in rejected.reason


def test_json_lines_and_files_by_name(root: Path) -> None:
    with pytest.raises(UserError, match=r"has no train.json or train.jsonl"):
        list(read(root, "train"))
    (root / "train.jsonl").write_text(json.dumps(LLAVA) + "\r\n\n{broken\n" + json.dumps(VIDEOCHAT) + "\n")
    first, broken, last = read(root, "train")
    assert isinstance(first, Sample)
    assert isinstance(last, Sample)
    assert isinstance(broken, Rejected)
    assert "train.jsonl row 3, column 2: not JSON" in broken.reason
    assert (first.key, last.key) == ("train/0000001", "train/0000004")
    (root / "other").mkdir()
    (root / "other" / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match="two files of dialogues are called 'train'"):
        list(read(root, "train", [root / "train.jsonl", root / "other" / "train.jsonl"]))


def test_real_dialogues(realdata: Path, root: Path) -> None:
    folder = realdata / "annotations" / "llava_style"
    (root / "mllm_demo_data").mkdir()
    for name, clip in (
        ("1.mp4", "llamafactory__1.mp4"),
        ("2.avi", "llamafactory__2.avi"),
        ("3.mp4", "llamafactory__3.mp4"),
    ):
        (root / "mllm_demo_data" / name).symlink_to(realdata / "videos" / clip)
    samples = list(read(root, "train", [folder / "llamafactory_mllm_video_demo.json"]))
    assert [item.annotation["conversations"][0] for item in samples if isinstance(item, Sample)] == [
        {"from": "human", "value": "<video>Why is this video funny?"},
        {"from": "human", "value": "<video>What is she doing?"},
        {"from": "human", "value": "<video>What's in the video?"},
    ]
    missing = list(read(root, "train", [folder / "qwenvl_demo_video_dev.json"]))
    assert ["no file 'v_7bUu05RIksU.mp4'" in item.reason for item in missing if isinstance(item, Rejected)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("name", ["llava_complex_reasoning_2k", "minigpt_caption_3k"])
def test_real_dialogues_of_videochat(name: str, realdata: Path, tmp_path: Path) -> None:
    file = realdata / "annotations" / "videochat" / f"{name}_sample_dev.json"
    rows = json.loads(file.read_text())
    for row in rows:
        path = tmp_path / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
    samples = [item for item in read(tmp_path, "train", [file]) if isinstance(item, Sample)]
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows):
        first, second = sample.annotation["conversations"]
        assert first == {"from": "human", "value": f"<video>\n{row['QA'][0]['q']}"}
        assert second == {"from": "gpt", "value": row["QA"][0]["a"]}
        assert sample.warnings == ()


def test_real_damage(realdata: Path, root: Path) -> None:
    (root / "v_7bUu05RIksU.mp4").write_bytes(b"media")
    no_video, no_mark, two_marks, no_answer, empty = read(
        root, "train", [realdata / "bad" / "annotations" / "llava_style_bad_turns.json"]
    )
    assert isinstance(no_mark, Sample)
    assert "no turn says where the video stands" in no_mark.warnings[0]
    assert no_mark.annotation["conversations"][0]["value"].startswith("<video>\nCan you give me")
    reasons = [item.reason for item in (no_video, two_marks, no_answer, empty) if isinstance(item, Rejected)]
    assert [reason.partition("json ")[2] for reason in reasons] == [
        "item 1, columns 'video' and 'image': are missing, so there is nothing to see",
        "item 3, <video> and <video> stand in the turns, but there is one video",
        "item 4, column 'conversations': the last of 1 turns is the human's: there is no answer to learn",
        "item 5, column 'conversations': has no turns",
    ]
