"""Breakfast's labels in both forms, its splits, and every way in which they come damaged."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlm.sources.breakfast import ACTIONS, ACTIVITIES, BACKGROUND, TEST_PERSONS, UNCLASSED, notes, read
from vlm.sources.common_chat import make_chat
from vlm.sources.common_fork import fork_split
from vlm.sources.common_segments import read_bundle, read_mapping, read_segments
from vlm.sources.common_tables import BadCell
from vlm.types import Rejected, Sample, UserError

NAME = "P03_cam01_P03_cereals"
SPANS = "1-30 SIL  \n31-150 take_bowl \n\n150-152 pour_cereals\n152-152 SIL \n"
SEGMENTS = [
    {"start": 0, "end": 30, "label": 0, "name": "SIL"},
    {"start": 30, "end": 150, "label": 4, "name": "take_bowl"},
    {"start": 150, "end": 152, "label": 1, "name": "pour_cereals"},
]
CLASSES = {name: number for number, name in enumerate(ACTIONS)}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, newline="")
    return root


def samples(root: Path, split: str = "all", *files: Path) -> dict[str, Sample]:
    items = list(read(root, split, files))
    assert all(isinstance(item, Sample) for item in items), items
    return {item.key: item for item in items if isinstance(item, Sample)}


def test_labels_beside_the_videos(tmp_path: Path) -> None:
    folder = "BreakfastII_15fps_qvga_sync/P03"
    root = write(tmp_path, {
        f"{folder}/cam01/P03_cereals.avi": "v", f"{folder}/cam01/P03_cereals.avi.labels": SPANS,
        f"{folder}/stereo/P03_tea_ch0.avi": "v", f"{folder}/stereo/P03_tea_ch1.avi": "v",
        f"{folder}/stereo/P03_tea_ch1.avi.labels": "1-9 SIL\n",
    })  # fmt: skip
    found = samples(root)
    assert list(found) == [NAME, "P03_stereo01_P03_tea"]
    assert found[NAME] == Sample(
        key=NAME,
        video=root / folder / "cam01" / "P03_cereals.avi",
        annotation={
            "label": 0,
            "name": "cereals",
            "segments": SEGMENTS,
            "chat": make_chat(NAME, SEGMENTS, "cereals", background=BACKGROUND),
        },
        warnings=(
            f"{root / folder / 'cam01' / 'P03_cereals.avi.labels'} row 5: its only frame 152 belongs to what stands "
            "before it, so 'SIL' is left out",
        ),
    )
    stereo = found["P03_stereo01_P03_tea"]
    assert stereo.video == root / folder / "stereo" / "P03_tea_ch1.avi"
    assert (stereo.annotation["label"], stereo.annotation["name"]) == (9, "tea")


def test_tree_of_mstcn_and_coarse_folders(tmp_path: Path) -> None:
    frames = "\n".join(["SIL"] * 30 + ["take_bowl"] * 120 + ["pour_cereals"] * 2) + "\n"
    videos = {"P03/cam01/P03_cereals.avi": "v", "P03/stereo/P03_milk_ch0.avi": "v", "P16/cam01/P16_tea.mp4": "v"}
    root = write(tmp_path, videos | {
        f"groundTruth/{NAME}.txt": frames,
        "segmentation_coarse/milk/P03_stereo01_P03_milk.txt": "1-9 SIL\r\n",
        "groundTruth/P16_cam01_P16_tea.txt": "add_teabag\nadd_teabag\n",
    })  # fmt: skip
    found = samples(root)
    assert found[NAME].annotation["segments"] == SEGMENTS
    assert found["P03_stereo01_P03_milk"].video == root / "P03" / "stereo" / "P03_milk_ch0.avi"
    assert found["P16_cam01_P16_tea"].video == root / "P16" / "cam01" / "P16_tea.mp4"
    assert list(samples(root, "test.split1")) == [NAME, "P03_stereo01_P03_milk"]
    assert list(samples(root, "train.split1")) == ["P16_cam01_P16_tea"]
    assert list(samples(root, "test.split2")) == ["P16_cam01_P16_tea"]
    write(root, {"splits/test.split1.bundle": f"#bundle.txt\n/data/groundTruth/{NAME}.txt\n"})
    assert list(samples(root, "test.split1")) == [NAME]
    assert len(samples(root)) == 3  # the split all is not the list's
    write(root, {"mapping.txt": "".join(f"{number + 1} {name}\n" for number, name in enumerate(ACTIONS)) + "49 SOS\n"})
    assert [part["label"] for part in samples(root)[NAME].annotation["segments"]] == [1, 5, 2]
    other = write(tmp_path / "other", {f"{NAME}.txt": "SIL\n"})
    (only,) = samples(root, "test.split1", other, root / "mapping.txt").values()
    assert only.annotation["segments"] == [{"start": 0, "end": 1, "label": 1, "name": "SIL"}]


def test_splits_by_persons_cover_everybody_once() -> None:
    persons = [person for some in TEST_PERSONS.values() for person in some]
    assert sorted(persons) == list(range(3, 55))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1-30 SIL\n31-150 take_bowls\n", "row 2: 'take_bowls' is no class"),
        ("1-30 SIL\n31 take_bowl\n", "row 2: '31 take_bowl' is not of the form `first-last label`"),
        ("1-30 SIL\n29-40 take_bowl\n", "row 2: begins at frame 29, but what stands before it goes on to frame 30"),
        ("0-30 SIL\n", "row 1: frames 0 to 30 are none, or end before they begin"),
        ("30-1 SIL\n", "row 1: frames 30 to 1 are none, or end before they begin"),
        ("SIL\ntake bowl\n", "row 2: 'take bowl' is no class"),
        ("SIL\n\n\nSIL\n", "row 2: is empty, but each row is the label of a frame"),
        ("Format 1:\nQ: What?\n", "row 1: 'Format 1:' is no class"),
        (f"1-{'9' * 5000} SIL\n", "goes beyond the end of any video"),
        ("1-99999999999999 SIL\n", "goes beyond the end of any video"),
        ("\ufeff", "holds no label"),
        ("\u00a0\n", "holds no label"),
        ("", "is empty"),
        ("SIL\n\udce9\n", "is not UTF-8 text"),
    ],
)
def test_damaged_labels_are_named_and_others_kept(text: str, reason: str, tmp_path: Path) -> None:
    videos = {"P03/cam01/P03_cereals.avi": "v", "P03/cam02/P03_cereals.avi": "v"}
    write(tmp_path, videos | {"groundTruth/P03_cam02_P03_cereals.txt": "SIL\n"})
    file = tmp_path / "groundTruth" / f"{NAME}.txt"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    rejected, kept = read(tmp_path, "all")
    assert isinstance(rejected, Rejected)
    assert isinstance(kept, Sample)
    assert rejected.key == NAME
    assert str(file) in rejected.reason
    assert reason in rejected.reason


def test_missing_things_are_named(tmp_path: Path) -> None:
    names = [NAME, "P03_cam01_P03_tea", "P03_cam01_P04_tea", "P03_cam01_P03_toast"]
    root = write(tmp_path, {
        "splits/train.split1.bundle": "".join(f"{name}.txt\n" for name in names),
        f"groundTruth/{NAME}.txt": "SIL\n",
    })  # fmt: skip
    reasons = [item.reason for item in read(root, "train.split1") if isinstance(item, Rejected)]
    assert f"no video of '{NAME}' ({root}/P03/cam01/P03_cereals.avi" in reasons[0]
    assert "train.split1.bundle: no labels of 'P03_cam01_P03_tea'" in reasons[1]
    assert "'P03_cam01_P04_tea' is not a name such as" in reasons[2]
    assert f"'toast' is none of {', '.join(ACTIVITIES)}" in reasons[3]


def test_files_that_are_damaged_as_a_whole(tmp_path: Path) -> None:
    for split, message in (("val", "has no list splits/val.bundle"), ("all", "has no labels")):
        with pytest.raises(UserError, match=message):
            list(read(tmp_path, split))
    with pytest.raises(UserError, match="no such folder; --root"):
        list(read(tmp_path / "gone", "all"))
    for text, message in (("0 a\nb 1\n", "row 2"), ("0 a\n0 b\n", "row 2"), ("0 a\n1 a\n", "row 2"), ("", "is empty"),
                          ("² a\n", "row 1"), (f"{'9' * 5000} a\n", "row 1")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_mapping(write(tmp_path, {"mapping.txt": text}) / "mapping.txt")
    with pytest.raises(UserError, match="lists no video"):
        read_bundle(write(tmp_path, {"a.bundle": "#bundle.txt\n"}) / "a.bundle")
    with pytest.raises(UserError, match="expected one list"):
        list(read(tmp_path, "all", [tmp_path / "a.bundle", tmp_path / "b.bundle"]))


def test_real_labels_of_frames(realdata: Path, tmp_path: Path) -> None:
    folder = realdata / "annotations" / "breakfast"
    files = sorted((folder / "groundTruth").iterdir())
    for file in files:
        person, camera, _, activity = file.stem.split("_")
        place = (
            f"{person}/stereo/{person}_{activity}_ch1"
            if camera == "stereo01"
            else f"{person}/{camera}/{person}_{activity}"
        )
        write(tmp_path, {f"{place}.avi": "v"})
    found = samples(tmp_path, "all", folder / "groundTruth", folder / "mapping.txt")
    assert list(found) == [file.stem for file in files]
    mapping = read_mapping(folder / "mapping.txt")
    assert {name: number - 1 for name, number in mapping.items() if name not in ("SOS", "EOS")} == CLASSES
    for file in files:
        names = file.read_text().split()
        segments = found[file.stem].annotation["segments"]
        assert [part["name"] for part in segments for _ in range(part["start"], part["end"])] == names
        assert all(part["label"] == mapping[part["name"]] for part in segments)
        assert all(before["name"] != after["name"] for before, after in pairwise(segments))


def test_real_spans_agree_with_labels_of_frames(realdata: Path, tmp_path: Path) -> None:
    rows = json.loads((realdata / "annotations" / "breakfast" / "segments_predictions_sample_dev.json").read_text())
    for row in rows:
        file = tmp_path / f"{row['name']}.avi.labels"
        file.write_text(row["truth"])
        segments, warnings = read_segments(file, CLASSES, UNCLASSED)
        assert segments[0]["start"] == 0
        gaps = [
            (before["end"], after["start"]) for before, after in pairwise(segments) if before["end"] != after["start"]
        ]
        assert gaps == ([(286, 446)] if row["name"] == "P24_coffee_cam02" else [])
        assert any("'walk_out' is no class, so frames 287 to 446 are in no" in text for text in warnings) == bool(gaps)
    tea, _ = read_segments(tmp_path / "P44_tea_cam02.avi.labels", CLASSES)
    same, _ = read_segments(realdata / "annotations" / "breakfast" / "groundTruth" / "P44_cam01_P44_tea.txt", CLASSES)
    assert tea[:-1] == same[:-1]  # another camera of the same tea, which ran 4 frames longer
    assert (tea[-1]["end"], same[-1]["end"]) == (1105, 1101)
    with pytest.raises(BadCell, match=r"row 1: '1-0 SIL' is not|frames 1 to 0 are none"):
        (tmp_path / "wrong.labels").write_text(rows[0]["pred"])
        read_segments(tmp_path / "wrong.labels", CLASSES)


WRITTEN = """Format 1:

Q: Can you describe the segments in the video?
A:
1 - 30 SIL
\tThe person performs SIL carefully.
30 - 150 take_bowl
\tHe uses 2 hands, or 2 to 3 fingers.

Format 2:
Q: What is happening between 30 and 150?
A: He performs take_bowl at frame 45 with 1 hand.
Q: Which sound?
"""


def test_questions_that_a_language_model_wrote(tmp_path: Path) -> None:
    videos = "LLM/Breakfast/Videos/BreakfastII_15fps_qvga_sync"
    files = {f"{videos}/P03/cam01/P03_cereals.avi": "v", f"{videos}/P03/cam01/P03_cereals.avi.labels": SPANS}
    files |= {f"{videos}/P03/stereo/P03_tea_ch1.avi": "v", f"{videos}/P03/stereo/P03_tea_ch1.avi.labels": "1-9 SIL\n"}
    files |= {"LLM/Breakfast/Breakfast/P03/cam01/P03_cereals.avi.labels": WRITTEN}
    write(tmp_path, files)
    root, folder = tmp_path / "LLM" / "Breakfast", tmp_path / "LLM" / "Breakfast" / "Breakfast"
    found = samples(root)
    rows = [row for row in found[NAME].annotation["chat"] if row["kind"] == "written"]
    assert rows == [
        {
            "kind": "written",
            "question": "Can you describe the segments in the video?",
            "answer": "<t:0>-<t:30> SIL\nThe person performs SIL carefully.\n<t:30>-<t:150> take bowl\n"
            "He uses 2 hands, or 2 to 3 fingers.",
        },
        {
            "kind": "written",
            "question": "What is happening between <t:30> and <t:150>?",
            "answer": "He performs take bowl at frame <t:44> with 1 hand.",
        },
    ]
    assert found[NAME].warnings[-1].endswith("row 13: 'Which sound?' has no answer")
    stereo = found["P03_stereo01_P03_tea"]
    assert "written" not in {row["kind"] for row in stereo.annotation["chat"]}
    assert stereo.warnings == ()
    given = samples(root, "all", folder)  # whoever names the folder hears of what is not in it
    assert given[NAME] == found[NAME]
    assert given[stereo.key].warnings == (f"no questions about 'P03_stereo01_P03_tea' in {folder}",)
    write(tmp_path, {"LLM/Breakfast/Breakfast/P03/stereo/P03_tea_ch0.avi.labels": "Q: What?\nA: Tea.\n"})
    assert samples(root)[stereo.key].annotation["chat"][-1]["answer"] == "Tea."  # of the other channel


def test_the_forks_split_says_how_much_it_leaks(tmp_path: Path) -> None:
    videos = [f"P03/{camera}/P03_tea.avi" for camera in ("cam01", "cam02", "webcam01")]
    videos += [f"P03/stereo/P03_{what}_ch{channel}.avi" for what in ("tea", "milk") for channel in (0, 1)]
    videos += ["P04/cam01/P04_milk.avi", "P04/cam01/P04_milk_flip.avi"]
    files = dict.fromkeys(videos, "v") | {f"{video}.labels": "1-9 SIL\n" for video in videos if "ch0" not in video}
    root = write(tmp_path, files)
    test = [
        "/P03/cam02/P03_tea.avi",
        "/P03/stereo/P03_milk_ch0.avi",
        "/P04/cam01/P04_milk.avi",
        "/P04/cam02/P04_tea.avi",
    ]
    listed = write(tmp_path, {"valid.txt": "\n".join(test) + "\n"}) / "valid.txt"
    items = list(read(root, "test.fork"))
    assert [item.key for item in items] == [
        "P03_cam02_P03_tea",
        "P03_stereo01_P03_milk_ch0",
        "P04_cam01_P04_milk",
        "P04_cam02_P04_tea",
    ]
    assert isinstance(items[3], Rejected)
    assert isinstance(items[1], Sample)
    assert items[1].video == root / "P03/stereo/P03_milk_ch0.avi"  # with the labels of the other channel
    train = samples(root, "train.fork", listed)
    assert list(train) == [
        "P03_cam01_P03_tea",
        "P03_stereo01_P03_milk_ch1",
        "P03_stereo01_P03_tea_ch0",
        "P03_stereo01_P03_tea_ch1",
        "P03_webcam01_P03_tea",
    ]
    assert [sample.video for sample in train.values()] == [
        root / video for video in (videos[0], videos[6], *videos[3:5], videos[2])
    ]
    (leak,) = notes(root, "test.fork").values()
    assert leak.pop("warning").startswith("the published fork's split leaks: 2 of 4 test videos show a performance")
    assert leak == {
        "test_videos": 4,
        "same_performance_in_training": 2,
        "stereo_videos": 1,
        "other_channel_in_training": 1,
    }
    assert notes(root, "test.split1") == {}
    (root / "valid.txt").write_text("/P03/cam02/P03_tea.avi\nP03_tea\n")
    with pytest.raises(UserError, match=r"valid\.txt row 2: 'P03_tea' is not a path"):
        list(read(root, "train.fork"))
    (root / "valid.txt").unlink()
    with pytest.raises(UserError, match="the fork's split is a list of test videos"):
        list(read(root, "train.fork"))


def test_the_forks_own_list(realdata: Path, tmp_path: Path) -> None:
    split = fork_split(tmp_path, [realdata / "annotations" / "breakfast" / "video_paths_valid.txt"], [])
    assert len(split.test) == 498
    assert len({take.person for take in split.test}) == 52  # everybody
    assert sum(bool(take.channel) for take in split.test) == 142


def test_features_stand_for_a_video(tmp_path: Path) -> None:
    root = write(tmp_path, {f"groundTruth/{name}.txt": "SIL\nSIL\n" for name in (NAME, "P03_cam02_P03_tea")})
    file = tmp_path / "pooled.safetensors"
    tensors = {f"clip_pooled/{NAME}": torch.ones(4, 3).half()}
    save_file(tensors, file, metadata={"settings": json.dumps({"tensors": {"clip_pooled": {}}})})
    sample, rejected = read(root, "all", [file])
    assert isinstance(sample, Sample)
    assert isinstance(rejected, Rejected)
    assert sample.video is None
    assert list(sample.members) == ["clip_pooled.safetensors"]
    assert sample.annotation["num_frames"] == 2
    assert len(sample.warnings) == 1
    assert f"no video of '{NAME}'" in sample.warnings[0]
    assert "no video of 'P03_cam02_P03_tea'" in rejected.reason
    assert "features in its place are given with --annotations" in rejected.reason
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / f"{NAME}.npy", np.zeros((4, 2, 3), np.float16))
    sample, rejected = read(root, "all", [Path(f"clip_states={tmp_path / 'arrays'}")])
    assert isinstance(sample, Sample)
    assert isinstance(rejected, Rejected)
    assert sample.members == {"clip_states.npy": tmp_path / "arrays" / f"{NAME}.npy"}
    with pytest.raises(UserError, match="there is no such folder"):
        list(read(root, "all", [Path("clip_states=nowhere")]))
