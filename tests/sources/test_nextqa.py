"""NExT-QA's published tree, whole and damaged; real annotation files where they are."""

from __future__ import annotations

import csv as csv_module
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from question_trees import NEXTQA, NEXTQA_ROWS, csv, questions, split, write_tree

from vlm.data.shards import ShardSet
from vlm.sources.nextqa import read
from vlm.types import StoredArray, UserError

SHAPES = {"4010069381": (4, 768), "4882821564": (7, 768)}
CAPTIONS = {
    "llava_v15_13b_n6.json": {"4010069381": "In the video we see these scenes: a drum.", "4882821564": "A present."},
    "llava_v15_7b_n6.json": {"4010069381": "A drum."},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "nextqa", {"val.csv": csv(NEXTQA, NEXTQA_ROWS)}, SHAPES, CAPTIONS)


def test_a_record_is_a_video_with_all_its_questions(root: Path) -> None:
    first, second = read(root, "val")
    assert not isinstance(first, tuple)
    assert first.key == "4010069381"
    assert first.annotation["questions"] == [
        {
            "id": "6",
            "question": "how do the two man play the instrument",
            "options": ["roll", "tap", "strum", "hit", "pat"],
            "answer": 0,
            "kind": "CH",
        },
        {
            "id": "7",
            "question": "what is this",
            "options": ["NA", "None", "null", "12", "drum"],
            "answer": 1,
            "kind": "DO",
        },
    ]
    assert first.annotation["captions"] == {
        "llava_v15_13b_n6": "In the video we see these scenes: a drum.",
        "llava_v15_7b_n6": "A drum.",
    }
    assert first.annotation["features"] == {"name": "clipvitl14", "fps": 1.0}
    assert first.members == {"features.npy": StoredArray(root / "clipvitl14.pth", "4010069381", 4 * 768 * 2)}
    assert (first.video, first.warnings) == (None, ())
    assert second.key == "4882821564"
    assert second.warnings == ("no caption of this video in llava_v15_7b_n6.json",)


def test_make_shards_reads_the_published_tree(root: Path, tmp_path: Path) -> None:
    from tools import make_shards

    out = tmp_path / "shards"
    assert make_shards.main(["nextqa", "--root", str(root), "--split", "val", "--out", str(out)]) == 0
    shards = ShardSet(out)
    assert shards.manifest["counts"]["questions"] == 3
    assert shards.num_questions.tolist() == [2, 1]
    record = shards.read(1)
    assert record.annotation["questions"][0]["answer"] == 2
    assert len(record.members["features.npy"]) > 7 * 768 * 2


def test_videos_are_found_by_name_in_any_folder(root: Path) -> None:
    (root / "videos" / "0101").mkdir(parents=True)
    (root / "videos" / "0101" / "4010069381.mp4").write_bytes(b"clip")
    samples, _ = split(list(read(root, "val")))
    assert [sample.video and sample.video.name for sample in samples] == ["4010069381.mp4", None]


def test_a_video_without_features_is_kept_for_its_caption_and_says_so(root: Path) -> None:
    torch.save({"4010069381": torch.ones(4, 768).half()}, root / "clipvitl14.pth")
    samples, rejected = split(list(read(root, "val")))
    assert (len(samples), rejected) == (2, [])
    assert samples[1].members == {}
    assert f"no features of this video in {root / 'clipvitl14.pth'}" in samples[1].warnings


def test_a_video_without_anything_is_rejected(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "bare", {"val.csv": csv(NEXTQA, NEXTQA_ROWS)}, {"4010069381": (4, 768)})
    samples, rejected = split(list(read(root, "val")))
    assert [sample.key for sample in samples] == ["4010069381"]
    assert [row.key for row in rejected] == ["4882821564"]
    assert f"{root / 'val.csv'} row 3, column 'video': of '4882821564' there are no features" in rejected[0].reason


def test_a_table_alone_makes_records_of_questions_alone(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "table", {"val.csv": csv(NEXTQA, NEXTQA_ROWS)}, {})
    (root / "clipvitl14.pth").unlink()
    samples, rejected = split(list(read(root, "val")))
    assert ([sample.key for sample in samples], rejected) == (["4010069381", "4882821564"], [])
    assert all(sample.members == {} and sample.video is None for sample in samples)
    assert samples[0].warnings == (f"{root} has no features, captions or videos: the record holds questions alone",)


def test_features_of_a_wrong_shape_are_named(root: Path) -> None:
    tensors = {"4010069381": torch.ones(4, 768).half(), "4882821564": torch.ones(0, 768).half()}
    torch.save(tensors, root / "clipvitl14.pth")
    samples, _ = split(list(read(root, "val")))
    assert samples[1].warnings[-1].startswith("features of shape [0, 768] in ")
    torch.save({"4010069381": torch.ones(4, 768).double()}, root / "clipvitl14.pth")
    samples, _ = split(list(read(root, "val")))
    assert "features of dtype torch.float64" in samples[0].warnings[-1]


DAMAGED = [  # (column to change, its new value, what the message says)
    ("answer", "5", "column 'answer': '5' is not an index from 0 to 4"),
    ("answer", "-1", "column 'answer': '-1' is not an index from 0 to 4"),
    ("answer", "x", "column 'answer': 'x' is not an index from 0 to 4"),
    ("answer", "", "column 'answer': is empty"),
    ("answer", "²", "column 'answer': '²' is not an index from 0 to 4"),
    ("type", "ZZ", "column 'type': 'ZZ' is none of CH, CW, TN, TC, TP, DL, DC, DO"),
    ("a3", "", "column 'a3': is empty"),
    ("question", " ", "column 'question': is empty"),
    ("frame_count", "0", "column 'frame_count': '0' is not the number of frames of a video"),
    ("video", "", "column 'video': is empty"),
    ("qid", "", "column 'qid': is empty"),
]


@pytest.mark.parametrize(("column", "value", "message"), DAMAGED)
def test_a_damaged_cell_is_named_and_the_rest_is_read(root: Path, column: str, value: str, message: str) -> None:
    cells = NEXTQA_ROWS[1].split(",")
    cells[NEXTQA.split(",").index(column)] = value
    (root / "val.csv").write_text(csv(NEXTQA, [NEXTQA_ROWS[0], ",".join(cells), NEXTQA_ROWS[2]]))
    samples, rejected = split(list(read(root, "val")))
    assert len(questions(samples)) == 2
    assert [row.reason for row in rejected] == [f"{root / 'val.csv'} row 3, {message}"]
    assert rejected[0].file == str(root / "val.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "4882821564,2697,640,480,why did",
            "row 3: 5 cells, but 13 columns: the row ends in column 'question' ('why did')",
        ),
        (NEXTQA_ROWS[1] + ",more", "row 3: 14 cells, but 13 columns: a comma inside of a text must be quoted"),
        (NEXTQA_ROWS[0], "row 3: question '6' of video '4010069381' stands already in"),
    ],
)
def test_a_damaged_row_is_named(root: Path, row: str, message: str) -> None:
    (root / "val.csv").write_text(csv(NEXTQA, [NEXTQA_ROWS[0], row, NEXTQA_ROWS[2]]))
    samples, rejected = split(list(read(root, "val")))
    assert len(questions(samples)) == 2
    assert len(rejected) == 1
    assert message in rejected[0].reason


def test_what_is_legal_is_read(root: Path) -> None:
    plain = [sample.annotation for sample in split(list(read(root, "val")))[0]]
    for text in (
        "\ufeff" + csv(NEXTQA, NEXTQA_ROWS, "\r\n"),
        csv(NEXTQA, NEXTQA_ROWS).rstrip("\n"),
        csv(NEXTQA, [NEXTQA_ROWS[0], "", *NEXTQA_ROWS[1:]]),
        csv(NEXTQA + ",extra", [f"{row},1" for row in NEXTQA_ROWS]),
    ):
        (root / "val.csv").write_bytes(text.encode())
        samples, rejected = split(list(read(root, "val")))
        assert rejected == []
        assert [sample.annotation for sample in samples] == plain


def test_line_ends_and_commas_inside_of_quotes(root: Path) -> None:
    cells = '4882821564,2697,640,480,"why, he said,\r\n""now""",2,1,CW,"a\nb",c,d,e,f'
    bad = NEXTQA_ROWS[2].replace(",1,7,", ",9,7,")
    (root / "val.csv").write_bytes(csv(NEXTQA, [NEXTQA_ROWS[0], cells, bad]).encode())
    samples, rejected = split(list(read(root, "val")))
    question = samples[1].annotation["questions"][0]
    assert (question["question"], question["options"][0]) == ('why, he said,\r\n"now"', "a\nb")
    assert f"{root / 'val.csv'} row 4 (line 6), column 'answer': '9'" in rejected[0].reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (csv(NEXTQA, []), "has a header and no rows"),
        (csv(NEXTQA.replace("answer", "anser"), NEXTQA_ROWS), r"row 1: no column 'answer' \(nearest: 'anser'\)"),
        (csv(NEXTQA.replace("video", "clip"), NEXTQA_ROWS), "row 1: no column 'video or video_id'"),
        (csv(NEXTQA.replace("a4", "a3"), NEXTQA_ROWS), "row 1: two columns have the name 'a3'"),
        (csv(NEXTQA, [NEXTQA_ROWS[0], '1,1,1,1,"open,0,1,CW,a,b,c,d,e', NEXTQA_ROWS[2]]), r"row 3 \(lines 3 to 4\)"),
        (csv(NEXTQA, NEXTQA_ROWS).encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_damaged_file_is_one_error(root: Path, content: str | bytes, message: str) -> None:
    (root / "val.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        list(read(root, "val"))
    assert str(root / "val.csv") in str(error.value)


def test_answers_may_be_texts(root: Path) -> None:
    rows = [row.replace("instrument,0,", "instrument,roll,").replace(",2,1,", ",unwrap,1,") for row in NEXTQA_ROWS]
    rows[2] = rows[2].replace(",1,7,", ",no option,7,")
    (root / "val.csv").write_text(csv(NEXTQA.replace("video", "video_id"), rows))
    samples, rejected = split(list(read(root, "val")))
    assert [question["answer"] for question in questions(samples)] == [0, 2]
    assert "row 4, column 'answer': 'no option' is none of the options" in rejected[0].reason


def test_files_may_be_given(root: Path, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "other", {"mine.csv": csv(NEXTQA, NEXTQA_ROWS[:1])}, {"4010069381": (2, 768)})
    (other / "mine.json").write_text('{"4010069381": "Mine."}')
    files = [other / "mine.json", other / "clipvitl14.pth", other / "mine.csv"]
    (sample,) = read(root, "val", files)
    assert not isinstance(sample, tuple)
    assert sample.annotation["captions"] == {"mine": "Mine."}
    assert sample.members["features.npy"] == StoredArray(other / "clipvitl14.pth", "4010069381", 2 * 768 * 2)
    for wrong, message in (
        ([other / "mine.csv", root / "val.csv"], "both hold questions: give one"),
        ([other / "clipvitl14.pth", root / "clipvitl14.pth"], "both hold features: give one"),
        ([root / "val.txt"], "expected questions, features"),
    ):
        with pytest.raises(UserError, match=message):
            list(read(root, "val", wrong))


def test_what_cannot_be_read_says_why(root: Path) -> None:
    with pytest.raises(UserError, match=r"has no train.csv: is --split right"):
        list(read(root, "train"))
    with pytest.raises(UserError, match="no such folder"):
        list(read(root / "gone", "val"))
    (root / "llava_v15_7b_n6.json").write_text('{"4010069381": 3}')
    with pytest.raises(UserError, match="the caption of video '4010069381' is 3, not a text"):
        list(read(root, "val"))
    (root / "llava_v15_7b_n6.json").write_text("[]")
    with pytest.raises(UserError, match="captions are a JSON object"):
        list(read(root, "val"))
    (root / "clipvitl14.pth").write_bytes((root / "clipvitl14.pth").read_bytes()[:300])
    (root / "llava_v15_7b_n6.json").unlink()
    with pytest.raises(UserError, match=r"clipvitl14.pth: truncated or damaged"):
        list(read(root, "val"))


# Real files --------------------------------------------------------------------------------------------------


def captions_of(file: Path, folder: Path) -> Path:
    """A caption for every video of a CSV, so that its questions can be listed without the features."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        videos = {row.get("video") or row.get("video_id") or "" for row in csv_module.DictReader(lines)}
    (folder / "captions.json").write_text(json.dumps({video: "A scene." for video in videos if video}))
    return folder / "captions.json"


def test_real_questions(realdata: Path, tmp_path: Path) -> None:
    file = realdata / "annotations" / "nextqa" / "val.csv"
    samples, rejected = split(list(read(tmp_path, "val", [file, captions_of(file, tmp_path)])))
    assert (len(samples), len(questions(samples)), rejected) == (570, 4996, [])
    assert Counter(question["kind"] for question in questions(samples)) == {
        "CW": 1924, "TN": 895, "CH": 683, "TC": 663, "DO": 305, "DL": 295, "DC": 177, "TP": 54
    }  # fmt: skip
    assert Counter(question["answer"] for question in questions(samples))[0] == 1013


@pytest.mark.parametrize("name", ["variant_textanswer_val_sample_dev.csv", "nextgqa_val_sample_dev.csv"])
def test_real_questions_with_answers_as_texts(name: str, realdata: Path, tmp_path: Path) -> None:
    file = realdata / "annotations" / "nextqa" / name
    samples, rejected = split(list(read(tmp_path, "val", [file, captions_of(file, tmp_path)])))
    assert (len(questions(samples)), rejected) == (150, [])


@pytest.mark.parametrize(
    ("name", "good", "reasons"),
    [
        ("nextqa_bom_crlf.csv", 20, []),
        ("nextqa_truncated_last_row.csv", 19, ["row 21: 9 cells, but 13 columns: the row ends in column 'a0'"]),
        (
            "nextqa_bad_values.csv",
            12,
            [
                "row 4, column 'answer': '5'", "row 7, column 'answer': '-1'", "row 9, column 'answer': 'x'",
                "row 11, column 'answer': is empty", "row 13, column 'type': 'ZZ'", "row 15, column 'a3': is empty",
                "row 17, column 'question': is empty", "row 19, column 'frame_count': '0'",
            ],
        ),
    ],
)  # fmt: skip
def test_real_damage(name: str, good: int, reasons: list[str], realdata: Path, tmp_path: Path) -> None:
    file = realdata / "bad" / "annotations" / name
    captions = captions_of(realdata / "annotations" / "nextqa" / "val.csv", tmp_path)
    samples, rejected = split(list(read(tmp_path, "val", [file, captions])))
    assert len(questions(samples)) == good
    assert len(rejected) == len(reasons)
    for row, reason in zip(rejected, reasons):
        assert f"{file} {reason}" in row.reason


def test_real_files_that_cannot_be_read(realdata: Path, tmp_path: Path) -> None:
    folder = realdata / "bad" / "annotations"
    with pytest.raises(UserError, match=r"nextqa_empty.csv is empty \(0 bytes\)"):
        list(read(tmp_path, "val", [folder / "nextqa_empty.csv"]))
    with pytest.raises(UserError, match=r"nextqa_missing_answer_column.csv row 1: no column 'answer'"):
        list(read(tmp_path, "val", [folder / "nextqa_missing_answer_column.csv"]))
