"""Something-Something v2: official JSON and VideoMAE's list, and every way in which they come damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.sources.common import parse_list_row
from vlm.sources.ssv2 import read
from vlm.types import Rejected, Sample, UserError

LABELS = {"Moving something up": "1", "Stuffing something into something": "0", "Pouring number of things": "2"}
ITEM = {
    "id": "210678",
    "label": "stuffing tape into wallet",
    "template": "Stuffing [something] into [something]",
    "placeholders": ["tape", "wallet"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for name in ("210678.webm", "2982.mp4", "more/77.webm", "two words.mp4"):
        (folder / name).write_bytes(b"clip")
    return folder


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def official(root: Path, items: Any, labels: Any = LABELS) -> list[Sample | Rejected]:
    files = [write(root.parent / "labels.json", labels), write(root.parent / "train.json", items)]
    return list(read(root, "train", files))


def test_official_items_get_class_caption_and_file(root: Path) -> None:
    items = [
        ITEM,
        {"id": "2982", "template": "Pouring [number of] things", "placeholders": ["3"], "label": "pouring 3 things"},
        {"id": 77, "template": "Moving [something in it] up".replace("[something in it]", "[something]")},
    ]
    first, second, third = official(root, items)
    assert first == Sample(
        key="210678",
        video=root / "210678.webm",
        annotation={
            "label": 0,
            "name": "Stuffing something into something",
            "template": "Stuffing [something] into [something]",
            "placeholders": ["tape", "wallet"],
            "caption": "stuffing tape into wallet",
        },
    )
    assert isinstance(second, Sample)
    assert isinstance(third, Sample)
    assert (second.annotation["label"], second.video) == (2, root / "2982.mp4")
    assert (third.key, third.annotation["label"], third.video) == ("77", 1, root / "more" / "77.webm")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "item 1: 'text' is not an object"),
        ({**ITEM, "id": None}, "id None is not an id"),
        ({**ITEM, "template": 3}, "template 3 is not a text"),
        ({**ITEM, "template": "Stufing [something] into [something]"}, "nearest: 'Stuffing something into something'"),
        ({**ITEM, "placeholders": "tape"}, "placeholders 'tape' are not a list of texts"),
        ({**ITEM, "id": "999"}, "item 1: no video file '999'"),
    ],
)
def test_damaged_item_is_rejected_by_file_and_row(root: Path, item: Any, reason: str) -> None:
    rejected, kept = official(root, [item, {**ITEM, "id": "2982"}])
    assert isinstance(rejected, Rejected)
    assert isinstance(kept, Sample)
    assert "train.json item 1" in rejected.reason
    assert reason in rejected.reason


def test_id_with_two_files_is_rejected(root: Path) -> None:
    (root / "more" / "210678.mp4").write_bytes(b"clip")
    (rejected,) = official(root, [ITEM])
    assert isinstance(rejected, Rejected)
    assert "2 files have the name '210678'" in rejected.reason


def test_official_test_split_without_labels_says_so(root: Path) -> None:
    with pytest.raises(UserError, match=r"1 items have no template, as in the official test split.*test-answers.csv"):
        official(root, [{"id": "210678"}])


def test_official_test_split_with_its_answers(root: Path) -> None:
    items = write(root.parent / "test.json", [{"id": "210678"}, {"id": "2982"}])
    answers = write(root.parent / "test-answers.csv", "210678;Moving something up\n")
    first, second = read(root, "test", [items, answers, write(root.parent / "labels.json", LABELS)])
    assert isinstance(first, Sample)
    assert first.annotation == {"label": 1, "name": "Moving something up"}
    assert isinstance(second, Rejected)
    assert "class is not known" in second.reason


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.json", '[{"id": "1", "templ', "train.json is not JSON .line 1, column"),
        ("train.json", "", r"train.json is empty \(0 bytes\)"),
        ("train.json", "[]", "neither a list of items nor an object"),
        ("train.json", "3", "neither a list of items nor an object"),
        ("train.json", [ITEM], "labels JSON"),
        ("labels.json", {"a": "x"}, "class 'a' has the number 'x'"),
        ("labels.json", {"a": 1, "b": "1"}, "two classes have the same number"),
        ("labels.json", {"a": 1}, "one list of clips is needed"),
    ],
)
def test_damaged_file_is_an_error_that_names_it(root: Path, name: str, content: Any, reason: str) -> None:
    files = [write(root.parent / name, content)]
    if name == "labels.json" and "one list" not in reason:
        files.append(write(root.parent / "list.csv", "2982.mp4 0\n"))
    with pytest.raises(UserError, match=reason):
        list(read(root, "train", files))


def test_not_text_and_not_there(root: Path) -> None:
    (root.parent / "train.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"train.csv is not UTF-8 text \(byte 0\)"):
        list(read(root, "train", [root.parent / "train.csv"]))
    with pytest.raises(UserError, match=r"gone.csv cannot be read: No such file"):
        list(read(root, "train", [root.parent / "gone.csv"]))
    with pytest.raises(UserError, match="no such folder; --root"):
        list(read(root / "nothing", "train", [root.parent / "train.csv"]))


def test_list_of_videomae(root: Path) -> None:
    lines = ["210678.webm 0", f"{root}/2982.mp4 1", "", "old/place/77.mp4 2", "two words.mp4 0", "gone.mp4 1", "210"]
    listing = root.parent / "train.csv"
    listing.write_text("\ufeff" + "\r\n".join(lines), newline="")
    rows = list(read(root, "train", [listing]))
    samples = [row for row in rows if isinstance(row, Sample)]
    assert [(row.key, row.video, row.annotation) for row in samples] == [
        ("210678", root / "210678.webm", {"label": 0}),
        ("2982", root / "2982.mp4", {"label": 1}),
        ("77", root / "more" / "77.webm", {"label": 2}),  # by its id: webm as published, although the list says mp4
        ("two words", root / "two words.mp4", {"label": 0}),
    ]
    missing, cut = (row for row in rows if isinstance(row, Rejected))
    assert (missing.key, missing.file) == ("gone", "gone.mp4")
    assert "train.csv row 6: 'gone.mp4' is missing" in missing.reason
    assert "train.csv row 7: '210' does not end in a label" in cut.reason


def test_list_with_the_labels_has_names(root: Path) -> None:
    listing = write(root.parent / "train.csv", "2982.mp4 1\n77.webm 5\n")
    first, second = read(root, "train", [listing, write(root.parent / "labels.json", LABELS)])
    assert isinstance(first, Sample)
    assert first.annotation == {"label": 1, "name": "Moving something up"}
    assert isinstance(second, Rejected)
    assert "label 5 is not in the labels JSON" in second.reason


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.mp4 3", ("a.mp4", 3)),
        ("a.mp4  3", ("a.mp4", 3)),
        ("a.mp4\t3", ("a.mp4", 3)),
        ("a.mp4,3", ("a.mp4", 3)),
        ("a.mp4, 3", ("a.mp4", 3)),
        ("dir one/a b.mp4 3 ", ("dir one/a b.mp4", 3)),
        ("a,b c.mp4,3", ("a,b c.mp4", 3)),
        ('"a b.mp4",3', ("a b.mp4", 3)),
        ("a.mp4 1,234", "can be read in two ways"),
        ("a.mp4 -1", "is negative"),
        ("a.mp4", "does not end in a label"),
        ("a.mp4 3.5", "does not end in a label"),
        ("7", "does not end in a label"),
    ],
)
def test_one_row_of_a_list(line: str, expected: tuple[str, int] | str) -> None:
    row = parse_list_row(line)
    assert expected in row if isinstance(expected, str) else row == expected


def test_files_are_found_by_their_published_names(root: Path) -> None:
    write(root / "something-something-v2-validation.json", [ITEM])
    (root / "labels").mkdir()
    write(root / "labels" / "something-something-v2-labels.json", LABELS)
    assert [sample.key for sample in read(root, "val")] == ["210678"]
    write(root / "val.csv", "2982.mp4 0\n")
    with pytest.raises(UserError, match="2 annotation files for split 'val'"):
        list(read(root, "val"))
    with pytest.raises(UserError, match="no annotation files for split 'train'"):
        list(read(root, "train"))


def test_real_rows(realdata: Path, tmp_path: Path) -> None:
    folder = realdata / "annotations" / "ssv2"
    rows = json.loads((folder / "base_validation_set_sample_dev.json").read_text())
    for row in rows[:50]:
        (tmp_path / f"{row['id']}.webm").write_bytes(b"clip")
    files = [folder / "base_validation_set_sample_dev.json", folder / "labels_compositional_174.json"]
    read_rows = list(read(tmp_path, "val", files))
    samples = [row for row in read_rows if isinstance(row, Sample)]
    assert [sample.key for sample in samples] == [row["id"] for row in rows[:50]]
    labels = json.loads(files[1].read_text())
    assert all(labels[sample.annotation["name"]] == sample.annotation["label"] for sample in samples)
    assert all("no video file" in row.reason for row in read_rows if isinstance(row, Rejected))
    assert len(read_rows) == len(rows)
