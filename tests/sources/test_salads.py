"""50 Salads' labels in both forms, its splits, and every way in which they come damaged."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path

import pytest

from vlm.sources.common_segments import read_mapping
from vlm.sources.salads import ACTIONS, notes, read
from vlm.types import Rejected, Sample, UserError

NAME = "rgb-01-1"
ORIGINAL = "activityAnnotation/01-1-activityAnnotation.txt"
TICKS = "timestamps/timestamps-01-1.txt"
ROWS = (
    "100 900 cut_and_mix_ingredients",
    "300 399 cut_tomato_core",
    "200 299 cut_tomato_prep",
    "500 599 cut_cheese_prep",
    "600 699 add_oil_core",
)  # ticks; a frame each 100, the first at 0


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def original(root: Path, rows: tuple[str, ...] = ROWS, ticks: str | None = None) -> Path:
    every = "".join(f"{100 * frame} rgb-01-1/{frame:06d}.png\n" for frame in range(10))
    return write(root, {"rgb/rgb-01-1.avi": "v", ORIGINAL: "\n".join(rows) + "\n", TICKS: ticks or every})


def only(root: Path, split: str = "all", *files: Path) -> Sample:
    (item,) = read(root, split, files)
    assert isinstance(item, Sample), item
    return item


def told(sample: Sample) -> list[tuple[int, int, str]]:
    return [(part["start"], part["end"], part["name"]) for part in sample.annotation["segments"]]


def test_original_labels_become_those_of_frames(tmp_path: Path) -> None:
    sample = only(original(tmp_path))
    assert (sample.key, sample.video) == (NAME, tmp_path / "rgb" / "rgb-01-1.avi")
    assert told(sample) == [
        (0, 2, "action_start"),
        (2, 5, "cut_tomato"),  # its phases are one action, which lasts until the next begins
        (5, 6, "cut_cheese"),
        (6, 7, "add_oil"),
        (7, 10, "action_end"),
    ]
    assert [part["label"] for part in sample.annotation["segments"]] == [17, 0, 2, 8, 18]


def test_overlapping_actions(tmp_path: Path) -> None:
    sample = only(original(tmp_path, ("100 650 add_oil_core", "400 500 add_salt_core", "400 600 add_pepper_core")))
    assert told(sample) == [
        (0, 1, "action_start"),
        (1, 4, "add_oil"),
        (4, 7, "add_pepper"),
        (7, 10, "action_end"),
    ]
    assert sample.warnings == (
        f"{tmp_path / ORIGINAL}: 'add_salt' and 'add_pepper' begin at frame 4, so the former is left out",
    )


def test_labels_of_frames_go_before_the_original(tmp_path: Path) -> None:
    original(tmp_path)
    write(tmp_path, {f"groundTruth/{NAME}.txt": "action_start\ncut_tomato\ncut_tomato\n"})
    write(tmp_path, {"splits/train.split1.bundle": f"{NAME}.txt\n", "splits/test.split1.bundle": "rgb-02-1.txt\n"})
    assert told(only(tmp_path)) == [(0, 1, "action_start"), (1, 3, "cut_tomato")]
    assert told(only(tmp_path, "train.split1")) == told(only(tmp_path))
    assert len(told(only(tmp_path, "all", tmp_path / "activityAnnotation"))) == 5
    (missing,) = read(tmp_path, "test.split1")
    assert isinstance(missing, Rejected)
    assert "test.split1.bundle: no labels of 'rgb-02-1' in " in missing.reason


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (("300 399 cut_tomato",), "row 1: 'cut_tomato' is no action of a phase prep, core, post"),
        (("300 399 cut_tomatoes_core",), "row 1: 'cut_tomatoes_core' is no action"),
        (("300 cut_tomato_core",), "row 1: '300 cut_tomato_core' is not of the form `start end label`"),
        (("399 300 cut_tomato_core",), "row 1: no frame of the video is between ticks 399 and 300"),
        (("310 320 cut_tomato_core",), "row 1: no frame of the video is between ticks 310 and 320"),
        (("800 5000 cut_tomato_core",), "row 1: no frame of the video is between ticks 800 and 5000"),
        ((f"1 {'9' * 5000} cut_tomato_core",), "is not of the form `start end label`"),
        (("1 2 serve_salad",), "has no action of a phase prep, core, post"),
    ],
)
def test_damaged_rows_are_named(rows: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    (rejected,) = read(original(tmp_path, rows), "all")
    assert isinstance(rejected, Rejected)
    assert str(tmp_path / ORIGINAL) in rejected.reason
    assert reason in rejected.reason


def test_damaged_ticks_and_missing_files_are_named(tmp_path: Path) -> None:
    def reason() -> str:
        (rejected,) = read(tmp_path, "all")
        assert isinstance(rejected, Rejected)
        return rejected.reason

    original(tmp_path, ticks="0 a\n100 b\n100 c\n")
    assert f"{tmp_path / TICKS} row 3: '100 c' does not begin with a tick later than the row before" in reason()
    original(tmp_path, ticks="0 a\nb\n")
    assert "row 2: 'b' does not begin with a tick" in reason()
    for odd in ("²", "9" * 5000):
        original(tmp_path, ticks=f"0 a\n{odd} b\n")
        assert f"row 2: '{odd[:9]}" in reason()
    (tmp_path / TICKS).write_text("")
    assert f"{tmp_path / TICKS} is empty" in reason()
    (tmp_path / TICKS).unlink()
    assert f"{tmp_path / ORIGINAL} is in ticks of a clock, and {tmp_path / TICKS}, with the ticks" in reason()
    original(tmp_path)
    (tmp_path / "rgb" / "rgb-01-1.avi").unlink()
    assert "no video file 'rgb-01-1'" in reason()


def test_what_is_missing_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no list splits/train\.split1\.bundle"):
        list(read(tmp_path, "train.split1"))
    with pytest.raises(UserError, match="has no labels"):
        list(read(tmp_path, "all"))


def test_real_labels_of_frames(realdata: Path, tmp_path: Path) -> None:
    folder = realdata / "annotations" / "50salads"
    files = sorted((folder / "groundTruth").iterdir())
    for file in files:
        write(tmp_path, {f"{file.stem}.avi": "v"})
    items = list(read(tmp_path, "all", [folder / "groundTruth", folder / "mapping.txt"]))
    mapping = read_mapping(folder / "mapping.txt")
    assert [name for name in mapping if name not in ("SOS", "EOS")] == list(ACTIONS)
    assert len(items) == len(files) > 0
    for item, file in zip(items, files):
        assert isinstance(item, Sample)
        names = file.read_text().split()
        assert [
            part["name"] for part in item.annotation["segments"] for _ in range(part["start"], part["end"])
        ] == names
        assert all(part["label"] == mapping[part["name"]] for part in item.annotation["segments"])
    for split, count in (("train.split1", 40), ("test.split1", 10), ("test.split1.abs", 10)):
        bundle = folder / "splits" / f"{split}.bundle"
        assert len(list(read(tmp_path, split, [folder / "groundTruth", bundle]))) == count


@pytest.mark.parametrize("name", ["01-1", "11-2", "20-2"])
def test_real_original_labels_agree_with_those_of_frames(name: str, realdata: Path, tmp_path: Path) -> None:
    """The ticks of frames are not among the real files; a frame each 1/30 s from its first action is near them."""
    folder = realdata / "annotations" / "50salads"
    truth = [
        (run, len(list(some))) for run, some in groupby((folder / f"groundTruth/rgb-{name}.txt").read_text().split())
    ]
    rows = (folder / f"activityAnnotation/{name}-activityAnnotation.txt").read_text()
    start = min(int(row.split()[0]) for row in rows.splitlines())
    frames = sum(length for _, length in truth)
    ticks = [round(start + (frame - truth[0][1]) * 1e6 / 30) for frame in range(frames + 60)]
    write(tmp_path, {f"rgb-{name}.avi": "v", f"a/activityAnnotation/{name}-activityAnnotation.txt": rows,
                     f"a/timestamps/timestamps-{name}.txt": "".join(f"{tick} x\n" for tick in ticks)})  # fmt: skip
    found = told(only(tmp_path, "all", tmp_path / "a" / "activityAnnotation"))
    assert [part for _, _, part in found] == [part for part, _ in truth]
    begin = 0
    for (start, _, _), (_, length) in zip(found, truth):
        assert math.isclose(start, begin, abs_tol=30), (start, begin)  # a second of dropped frames at most
        begin += length


def test_questions_about_the_salad(tmp_path: Path) -> None:
    sample = only(original(tmp_path))
    chat = sample.annotation["chat"]
    assert sample.annotation["name"] == "making salads"
    assert chat[0]["question"] == "List down all the segments. action is making salads"
    assert chat[0]["answer"].splitlines()[:2] == ["<t:0>-<t:2> action start", "<t:2>-<t:5> cut tomato"]
    assert not any("action start" in row["answer"] for row in chat if row["kind"] in ("order", "counts"))
    written = write(tmp_path / "s50", {NAME: "Q: Which segments?\nA:\n1 - 2 x\n3-5 cut_tomato\n"})
    row = only(tmp_path, "all", written).annotation["chat"][-1]
    assert row == {"kind": "written", "question": "Which segments?", "answer": "<t:0>-<t:2> x\n<t:2>-<t:5> cut tomato"}


def test_the_forks_split(tmp_path: Path) -> None:
    for name in ("rgb-01-1", "rgb-01-2", "rgb-02-2", "rgb-03-2"):
        write(tmp_path, {f"{name}.avi": "v", f"groundTruth/{name}.txt": "cut_tomato\n"})
    assert [item.key for item in read(tmp_path, "test.fork")] == ["rgb-01-2", "rgb-03-2"]
    assert [item.key for item in read(tmp_path, "train.fork")] == ["rgb-01-1", "rgb-02-2"]
    leak = notes(tmp_path, "train.fork")["leak"]
    assert (leak["test_videos"], leak["same_person_in_training"]) == (2, 1)
    assert notes(tmp_path, "all") == {}
