"""tools/score.py --segments: figures of segmentations in files of others, and what is refused in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools import score
from vlm.data.chat_records import questions_of
from vlm.data.time_axis import TimeAxis
from vlm.metrics.segment_answers import read_answer
from vlm.metrics.segments import pooled, video_figures
from vlm.run.segment_files import activity_of, read_frames, read_texts
from vlm.sources.common_chat import make_chat
from vlm.sources.common_segments import read_mapping, read_segments
from vlm.types import Record, UserError

TRUTH = {"P03_cam01_P03_tea": ["SIL"] * 4 + ["add_teabag"] * 6, "P04_cam01_P04_milk": ["SIL"] * 5 + ["pour_milk"] * 5}
SAID = {"P03_cam01_P03_tea": ["SIL"] * 5 + ["add_teabag"] * 5, "P04_cam01_P04_milk": ["SIL"] * 10}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for folder, several in (("groundTruth", TRUTH), ("results", SAID)):
        (tmp_path / folder).mkdir()
        for name, labels in several.items():
            (tmp_path / folder / f"{name}.txt").write_text("\n".join(labels) + "\n")
    return tmp_path / "groundTruth", tmp_path / "results"


def figures(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, float]:
    assert score.main(["--segments", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_labels_of_frames(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, *folders)
    assert found["mof"] == 14 / 20
    assert found["edit"] == 0.75
    assert found["f1_50"] == pytest.approx(2 * 3 / 7)
    assert (found["mof_tea"], found["mof_milk"], found["chance"]) == (0.9, 0.5, 9 / 20)
    assert found["num_videos"] == 2
    assert figures(capsys, *folders, "--background", "SIL")["edit"] == 0.5
    assert not list(folders[0].parent.glob("*.json"))


def test_labels_as_ms_tcn_writes_them(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = figures(capsys, *folders)
    for name, labels in SAID.items():
        (folders[1] / f"{name}.txt").unlink()
        (folders[1] / name).write_text("### Frame level recognition: ###\n" + " ".join(labels))
    assert figures(capsys, *folders) == before


def test_a_video_without_prediction_is_all_wrong(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[1] / "P04_cam01_P04_milk.txt").unlink()
    assert score.main(["--segments", *map(str, folders)]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["num_videos"] == 1
    assert f"1 videos of {folders[0]} have no prediction" in output.err
    bundle = folders[0].parent / "test.bundle"
    bundle.write_text("P03_cam01_P03_tea.txt\nP04_cam01_P04_milk.txt\n")
    assert score.main(["--segments", *map(str, folders), "--list", str(bundle)]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert (found["mof"], found["num_unparsable"], found["fork_errors"]) == (9 / 20, 1, 1)
    assert "P04_cam01_P04_milk: there is no prediction: scored as an empty prediction" in output.err
    bundle.write_text("P03_cam01_P03_tea.txt\nP04_cam01_P04_milk.txt\nP03_cam01_P03_tea.txt\n")
    assert score.main(["--segments", *map(str, folders), "--list", str(bundle)]) == 2
    assert "test.bundle: 'P03_cam01_P03_tea' comes twice" in capsys.readouterr().err


def test_predictions_that_are_shorter_or_longer(folders: tuple[Path, Path]) -> None:
    name = "P03_cam01_P03_tea"
    for count in (3, 14):
        (folders[1] / f"{name}.txt").write_text("SIL\n" * count)
        rows, notes = read_frames(*folders)
        video = video_figures(rows[0].truth, rows[0].prediction)
        assert (video.right, video.frames) == (min(count, 4), 10)
        assert f"{name}: {count} frames of 10" in notes[0]
        assert ("count in edit and F1 alone" if count > 10 else "are wrong") in notes[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda truth, said: shutil.rmtree(said), "results: no such folder"),
        (lambda truth, said: (truth / "P03_cam01_P03_tea.txt").unlink(), "no truth of .*results"),
        (lambda truth, said: (truth / "P03_cam01_P03_tea.txt").write_text(""), "is empty|holds no label"),
        (lambda truth, said: (truth / "P03_cam01_P03_tea.txt").write_text("a\n\nb\n"), "row 2: is empty"),
        (lambda truth, said: (said / "P03_cam01_P03_tea.txt").write_text("a\nb c\n"), "row 2: 'b c' is not the label"),
        (lambda truth, said: (truth.parent / "mapping.txt").write_text("0 SIL\n"), "'add_teabag' is no class"),
        (lambda truth, said: [file.unlink() for file in said.iterdir()], "holds no prediction"),
        (
            lambda truth, said: (said / "P03_cam01_P03_tea").write_text("a\n"),
            "results: 'P03_cam01_P03_tea' comes twice",
        ),
    ],
)
def test_folders_that_are_refused(folders: tuple[Path, Path], change: Any, says: str) -> None:
    change(*folders)
    with pytest.raises(UserError, match=says):
        read_frames(*folders)


def test_truth_in_lines_of_spans(folders: tuple[Path, Path]) -> None:
    (folders[0] / "P03_cam01_P03_tea.txt").write_text("1-4 SIL \n4-10 add_teabag \n")
    rows, _ = read_frames(*folders)
    assert rows[0].truth == [(0, 4, "SIL"), (4, 10, "add_teabag")]


# Texts ----------------------------------------------------------------------------------------------------

ITEMS = [
    {"name": "P03_tea_cam01", "truth": "1-5 SIL \n\n5-11 add_teabag \n", "pred": "1-5 SIL\n5-8 add teabag"},
    {"name": "P04_milk_ch1_stereo", "truth": "1-5 SIL \n\n5-11 pour_milk \n", "pred": "I cannot see it."},
]


def test_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ITEMS))
    assert score.main(["--segments", str(tmp_path / "a.json")]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["mof"] == 7 / 20
    assert found["mof_tea"] == found["fork_mof"] == 0.7  # which leaves out what it cannot read
    assert (found["mof_milk"], found["num_unparsable"], found["fork_errors"]) == (0, 1, 1)
    assert "P04_milk_ch1_stereo: no line of it could be read" in output.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("{}", "expected a list"),
        ("[]", "expected a list"),
        ('[{"name": "a", "truth": "1-5 x"}]', "item 1 is not an object with the texts name, truth and pred"),
        (json.dumps([ITEMS[0], ITEMS[0]]), "item 2: 'P03_tea_cam01' comes twice"),
        (json.dumps([ITEMS[0] | {"truth": "x"}]), "item 1 .*: the last line of the truth"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_texts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give the folder of a run, or --segments"),
        (["run", "--background", "SIL"], "give --segments too"),
        (["run", "--list", "a.bundle"], "give --segments too"),
        (["--segments", "a", "b", "c"], "the folders of truth and predictions, or a JSON file"),
        (["--segments", "."], "give the folder of the truth, then that of the predictions"),
        (["--segments", "a.json", "--check"], "check is said of a run"),
        (["run", "--segments", "a.json"], "run is said of a run"),
        (["--segments", "a.json", "--list", "b"], "not of a JSON file"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_activity() -> None:
    assert activity_of("P16_pancake_cam01") == activity_of("P16_cam01_P16_pancake") == "pancake"
    assert activity_of("rgb-01-1") == activity_of("tea_milk") == ""


# Published files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["breakfast", "50salads"])
def test_published_labels_score_full_marks_against_themselves(
    realdata: Path, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = realdata / "annotations" / dataset / "groundTruth"
    found = figures(capsys, folder, folder)
    count = len(list(folder.glob("*.txt")))
    assert {found[name] for name in ("mof", "edit", "f1_10", "f1_25", "f1_50")} == {1.0}
    assert found["num_videos"] == count > 1
    assert 0 < found["chance"] < 1


@pytest.mark.parametrize("places", [356, 1000])
@pytest.mark.parametrize("dataset", ["breakfast", "50salads"])
def test_published_labels_as_a_model_is_to_write_them_are_read_back(realdata: Path, dataset: str, places: int) -> None:
    """What a time axis of few places costs a perfect answer: little, and none of them is refused."""
    folder, videos = realdata / "annotations" / dataset, []
    classes = read_mapping(folder / "mapping.txt")
    for file in sorted((folder / "groundTruth").glob("*.txt")):
        segments, _ = read_segments(file, classes)
        axis = TimeAxis(segments[-1]["end"], places)
        chat = make_chat(file.stem, segments, "")
        record = Record(key=file.stem, shard="", row=0, video=None, annotation={"chat": chat},
                        num_frames=axis.num_frames, fps=0.0, decoders=())  # fmt: skip
        answer, problem = read_answer(questions_of(record, places)[0].answer or "", places)
        assert problem == "", file.name
        said = [(axis.frame(start), axis.frame(end), label) for start, end, label in answer]
        videos.append(video_figures([(one["start"], one["end"], one["name"]) for one in segments], said))
    found = pooled(videos)
    assert found["mof"] > 0.98
    assert min(found.values()) > 0.95


def test_published_texts_score_as_in_the_tests_of_parity(realdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (realdata / "annotations" / "breakfast").glob("segments_predictions*.json")
    found = figures(capsys, file)
    assert found["num_videos"] == len(json.loads(file.read_text()))
    assert found["num_unparsable"] == found["fork_errors"] == 0
    assert 0.2 < found["f1_50"] < found["f1_25"] < found["f1_10"] < 0.9
