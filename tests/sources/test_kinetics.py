"""Kinetics: VideoMAE's list, and folders of clips by class."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.sources.kinetics import read
from vlm.types import Rejected, Sample, UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "train/zumba/b.mp4",
        "train/zumba/a.webm",
        "train/playing guitar/-x_000001_000011.mp4",
        "train/playing guitar/notes.txt",
        "train/playing guitar/.hidden.mp4",
        "val/abseiling/a.mp4",
        "val/zumba/a.mp4",
    ):
        path = tmp_path / "k400" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"clip")
    return tmp_path / "k400"


def test_folders_are_numbered_alike_in_every_split(root: Path) -> None:
    rows = list(read(root, "train"))
    assert [(row.key, row.annotation["label"], row.annotation["name"]) for row in rows if isinstance(row, Sample)] == [
        ("playing guitar/-x_000001_000011", 1, "playing guitar"),
        ("zumba/a", 2, "zumba"),
        ("zumba/b", 2, "zumba"),
    ]
    (rejected,) = (row for row in rows if isinstance(row, Rejected))
    assert "notes.txt: '.txt' is not the suffix of a video" in rejected.reason
    assert [(row.key, row.annotation["label"]) for row in read(root, "val")] == [("abseiling/a", 0), ("zumba/a", 2)]


def test_class_folders_may_lie_in_the_root(root: Path) -> None:
    rows = list(read(root / "val", "val"))
    assert [(row.key, row.annotation["label"]) for row in rows] == [("abseiling/a", 0), ("zumba/a", 1)]


def test_file_of_names_decides_the_numbers(root: Path) -> None:
    names = root.parent / "classes.txt"
    names.write_text("zumba\nabseiling\n")
    rows = list(read(root, "train", [names]))
    assert {row.annotation["label"] for row in rows if isinstance(row, Sample)} == {0}
    assert sum("is not in the file of class names" in row.reason for row in rows if isinstance(row, Rejected)) == 2
    names.write_text("zumba\nzumba\n")
    with pytest.raises(UserError, match="class 'zumba' stands there twice"):
        list(read(root, "train", [names]))


@pytest.mark.parametrize("separator", [" ", ",", "  ", "\t"])
def test_list(root: Path, separator: str) -> None:
    listing = root / "train.csv"
    paths = ["train/zumba/b.mp4", f"{root}/val/zumba/a.mp4", "train/playing guitar/-x_000001_000011.mp4", "no.mp4"]
    listing.write_text("".join(f"{path}{separator}{label}\n" for label, path in enumerate(paths)) + "train/zumba/b\n")
    rows = list(read(root, "train"))
    assert [(row.key, row.annotation) for row in rows if isinstance(row, Sample)] == [
        ("train/zumba/b", {"label": 0}),
        ("val/zumba/a", {"label": 1}),
        ("train/playing guitar/-x_000001_000011", {"label": 2}),
    ]
    missing, cut = (row for row in rows if isinstance(row, Rejected))
    assert (missing.key, "train.csv row 4: no file" in missing.reason) == ("no", True)
    assert "train.csv row 5: 'train/zumba/b' does not end in a label" in cut.reason


def test_list_with_names(root: Path) -> None:
    listing, names = root.parent / "list.csv", root.parent / "names.json"
    listing.write_text("train/zumba/b.mp4 1\nval/zumba/a.mp4 7\n")
    names.write_text('{"abseiling": 0, "zumba": 1}')
    first, second = read(root, "train", [listing, names])
    assert isinstance(first, Sample)
    assert first.annotation == {"label": 1, "name": "zumba"}
    assert isinstance(second, Rejected)
    assert "label 7 has no class name" in second.reason


def test_what_cannot_be_read_says_why(root: Path) -> None:
    with pytest.raises(UserError, match="no folder 'test', but train, val"):
        list(read(root, "test"))
    with pytest.raises(UserError, match="no such folder"):
        list(read(root / "nothing", "train"))
    (root / "empty").mkdir()
    with pytest.raises(UserError, match=r"no list train.csv and no folders of classes"):
        list(read(root / "empty", "train"))
    table = root.parent / "k400_train.csv"
    table.write_text("label,youtube_id,time_start,time_end,split\nzumba,abc,1,11,train\n")
    with pytest.raises(UserError, match="published table of YouTube ids"):
        list(read(root, "train", [table]))
    with pytest.raises(UserError, match=r"expected one list \(.csv\)"):
        list(read(root, "train", [table, table]))
