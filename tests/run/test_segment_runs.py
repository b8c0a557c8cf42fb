"""Evaluation of systems that say what happens when: answers read strictly and scored, those that cannot be read listed;
rows that come back from their file; the report's timelines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import writing_worker as w

from tools import score
from vlm.data.time_axis import TimeAxis
from vlm.metrics.segments import video_figures
from vlm.run import evaluate
from vlm.run.checkpoint import Progress
from vlm.run.report import write_report
from vlm.run.report_segments import choose, colours_of
from vlm.run.run_folder import read_predictions
from vlm.run.standalone import Replica
from vlm.types import Ask, Record, Segmentation, UserError

ANSWERS = (
    "0-5 red <b>\n5-10 blue",
    "0-10 blue",
    "5-0 blue",
    "I see nothing.",
    "0-1 red <b>\n1-2 blue\n2-10 green",
)
PLACES = 10


@dataclass(slots=True, kw_only=True)
class Timed(w.Ending):
    """Stands in for inputs of segmentations: whatever the model writes, a few answers one after the other."""

    said: ClassVar[Iterator[str]]
    task: ClassVar[str] = "segments"  # type: ignore[misc]

    def asks(self, record: Record) -> tuple[Ask, ...]:
        half = record.num_frames // 2
        segments = ((0, half, "red <b>"), (half, record.num_frames + 3, "blue"))
        return (Ask(record.key, None, kind=f"kind {record.row % 2}", question="when?", segments=segments,
                    num_frames=record.num_frames),)  # fmt: skip

    def axis(self, num_frames: int) -> TimeAxis:
        return TimeAxis(num_frames, PLACES)

    def decode(self, ids: Sequence[int]) -> str:
        return next(Timed.said)


class Nothing(Timed):
    """Nobody published when things happen."""

    def asks(self, record: Record) -> tuple[Ask, ...]:
        return tuple(ask._replace(segments=()) for ask in super().asks(record))


class Unknown(Timed):
    """Shards that were made without looking at the videos."""

    def asks(self, record: Record) -> tuple[Ask, ...]:
        return tuple(ask._replace(num_frames=-1) for ask in super().asks(record))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return w.shards(tmp_path_factory.mktemp("segments") / "clips")


@pytest.fixture(autouse=True, scope="module")
def answers() -> None:
    Timed.said = cycle(ANSWERS)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], list[str]]:
    Timed.said = cycle(ANSWERS)
    folder, told = tmp_path_factory.mktemp("run"), []
    metrics = w.alone(w.recipe(shards, folder, inputs=Timed, metric="mof"), told)
    return folder, metrics, told


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_rows_are_in_frames(run: tuple[Path, dict[str, float], list[str]]) -> None:
    rows = lines(run[0])
    assert [row["key"] for row in rows] == [row["video"] for row in rows] == [f"clip{n}" for n in range(w.CLIPS)]
    texts = [ANSWERS[place] for place in (0, 1, 2, 1, 2, 3, 2)]  # three together, then these three blind, and so on
    assert [row["text"] for row in rows] == texts
    for number, row in enumerate(rows):
        frames = 6 + number
        axis = TimeAxis(frames, PLACES)
        assert row["num_frames"] == frames
        assert row["truth"] == [[0, frames // 2, "red_<b>"], [frames // 2, frames, "blue"]]
        assert (row["question"], row["kind"]) == ("when?", f"kind {number % 2}")
        expected = {
            ANSWERS[0]: [[0, axis.frame(5), "red_<b>"], [axis.frame(5), frames, "blue"]],
            ANSWERS[1]: [[0, frames, "blue"]],
        }
        for answer in (row, *row["probes"].values()):
            assert bool(answer["problem"]) == (answer["text"] in ANSWERS[2:4])
            if answer["problem"]:
                assert answer["prediction"] == []
            if answer["text"] in expected:
                assert answer["prediction"] == expected[answer["text"]]
    blind = rows[1]["probes"]["blind"]  # of seven frames and ten places
    assert blind == {
        "text": ANSWERS[4],
        "prediction": [[0, 1, "red_<b>"], [1, 7, "green"]],  # "blue" has no frame of its own: places 1 and 2 are 1
        "problem": "",
    }


def test_metrics_and_the_list_of_what_cannot_be_read(run: tuple[Path, dict[str, float], list[str]]) -> None:
    folder, metrics, told = run
    rows = read_predictions(folder / "predictions.jsonl")
    assert all(isinstance(row, Segmentation) for row in rows)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    names = (
        "mof",
        "edit",
        "f1_10",
        "f1_25",
        "f1_50",
        "chance",
        "mof_blind",
        "unparsable",
        "mof_kind 0",
        "f1_50_kind 1",
    )
    assert all(0 <= metrics[name] <= 1 for name in names)
    videos = [video_figures(row.truth, row.prediction) for row in rows]  # type: ignore[union-attr]
    assert metrics["mof"] == sum(video.right for video in videos) / sum(video.frames for video in videos)
    assert metrics["num_videos"] == w.CLIPS
    unread = [row.key for row in rows if row.problem]  # type: ignore[union-attr]
    about = json.loads((folder / "evaluation.json").read_text())
    assert [one["key"] for one in about["unparsable"]] == unread
    assert metrics["num_unparsable"] == len(unread) == round(metrics["unparsable"] * w.CLIPS) == 4
    assert all("line 1: " in one["problem"] for one in about["unparsable"])
    assert sum(line.startswith("cannot be read, so scored as an empty prediction: clip") for line in told) == len(
        unread
    )
    assert (about["records"], about["scored"], about["unscored"]) == (w.CLIPS, w.CLIPS, 0)


def test_score_makes_the_same_of_the_rows(
    run: tuple[Path, dict[str, float], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score.main([str(run[0]), "--check"]) == 0
    rows = lines(run[0])
    rows[0]["prediction"] = [[0, 6, "green"]]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.json").write_text(json.dumps(run[1]))
    assert score.main([str(tmp_path), "--check"]) == 1
    assert "mof" in capsys.readouterr().err
    assert score.main([str(tmp_path)]) == score.main([str(tmp_path), "--check"]) == 0
    assert score.main([str(tmp_path), "--spice", str(tmp_path)]) == 2
    assert "SPICE is a score of captions" in capsys.readouterr().err
    assert score.main([str(tmp_path), "--submission", str(tmp_path / "a.zip")]) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_frames": 0}, "line 2: num_frames is 0"),
        ({"num_frames": True}, "line 2: num_frames is True"),
        ({"problem": None}, "line 2: problem is None, expected a text"),
        ({"truth": "0-5 red"}, "line 2: truth is '0-5 red', expected a list"),
        ({"prediction": [[0, 2.5, "red"]]}, r"line 2: prediction holds \[0, 2.5, 'red'\]"),
        ({"prediction": [[0, True, "red"]]}, "line 2: prediction holds"),
        ({"prediction": [[0, 5, "a"], [4, 6, "b"]]}, "line 2: prediction: 'b' begins at frame 4, before 'a' ends at 5"),
        ({"prediction": [[3, 3, "a"]]}, "line 2: prediction: .* has no frame"),
        ({"prediction": [[0, 900, "a"]]}, "line 2: prediction: 'a' ends at 900, but the video has 7 frames"),
        ({"probes": {}}, "line 2: has the probes"),
        ({"probes": {"blind": "x"}}, "line 2: probes is"),
        ({"probes": {"blind": {"text": "", "problem": 3, "prediction": []}}}, "line 2: problem of the probe 'blind'"),
        ({"probes": {"blind": {"text": "", "problem": ""}}}, "line 2: prediction of 'blind' is None"),
        ({"key": "clip0"}, "line 2: key 'clip0' came in line 1 already"),
    ],
)
def test_damaged_rows(
    run: tuple[Path, dict[str, float], list[str]], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    rows = lines(run[0])
    rows[1] |= change
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=says):
        read_predictions(tmp_path / "predictions.jsonl")


def test_rows_of_several_tasks_do_not_go_together(
    run: tuple[Path, dict[str, float], list[str]], tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [lines(run[0])[0], {"key": "a", "text": "x", "references": []}]
    for order in (rows, rows[::-1]):
        (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        with pytest.raises(UserError, match="rows of texts and rows of segments do not go together"):
            read_predictions(tmp_path / "predictions.jsonl")


class Elsewhere(Timed):
    """Labels of another, longer video."""

    def asks(self, record: Record) -> tuple[Ask, ...]:
        return tuple(ask._replace(segments=((record.num_frames, 99, "red"),)) for ask in super().asks(record))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (Nothing, "clip0 has no segments"),
        (Unknown, "clip0: it is not known"),
        (Elsewhere, "clip0: its segments begin at frame .* labels of another video"),
    ],
)
def test_what_cannot_be_scored_stops_the_evaluation(
    shards: Path, tmp_path: Path, inputs: type[Timed], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        w.alone(w.recipe(shards, tmp_path, inputs=inputs, metric="mof"), [])
    assert not (tmp_path / "metrics.json").exists()


def test_the_best_checkpoint(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = w.recipe(shards, tmp_path, inputs=Timed, metric="f1_10")
    world = w.World(0, 1, 0, w.torch.device("cpu"), "single")
    replica = Replica(w.model_of(settings), world, w.torch.float32)
    progress, told = Progress(), []
    Timed.said = cycle(ANSWERS)
    assert evaluate.is_best(settings, replica, world, progress, told.append)
    assert 0 < progress.best_metric <= 1  # type: ignore[operator]
    Timed.said = cycle(ANSWERS)
    assert not evaluate.is_best(settings, replica, world, progress, told.append)
    monkeypatch.setattr(evaluate, "metrics_of", lambda rows, kinds: {"f1_10": float("nan")})
    assert not evaluate.is_best(settings, replica, world, Progress(), told.append), "nan is never the best"
    with pytest.raises(ValueError, match="it must be mof or edit or f1_10 or f1_25 or f1_50"):
        w.recipe(shards, tmp_path, inputs=Timed, metric="cider")


# The report -----------------------------------------------------------------------------------------------


def test_report(run: tuple[Path, dict[str, float], list[str]], tmp_path: Path) -> None:
    for name in ("metrics.json", "evaluation.json"):
        (tmp_path / name).write_text((run[0] / name).read_text())
    rows = lines(run[0])
    rows[0]["prediction"][1][2] = "green"
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "<h2>Timelines</h2>" in page
    assert page.count('<svg class="timeline"') == w.CLIPS
    assert f"Shown: {w.CLIPS} of {w.CLIPS} videos." in page
    for name in ("truth", "prediction", "blind"):
        assert page.count(f">{name}</text>") == w.CLIPS
    assert "red_<b>" not in page
    assert "red_&lt;b&gt;, frames 0 to 3" in page
    assert page.index("truth: red_") < page.index("prediction: ")  # the truth stands above
    assert "I see nothing." in page
    assert "line 1: &#x27;I see nothing.&#x27; is not of the form `start-end label`" in page
    assert "<td>kind 0</td><td class=figure>4</td>" in page
    assert "mof_kind 0" not in page  # these stand in the table of activities
    assert "unparsable_blind" in page
    assert "labels that are in no truth of this test (green)" in page
    assert 'class="unknown"' in page
    assert '<img src="data:image/jpeg' in page


def segmentation(number: int, right: int = 10, **changes: Any) -> Segmentation:
    settings = {"truth": [(0, 10, f"label {number}")], "prediction": [(0, right, f"label {number}")], "num_frames": 10}
    return Segmentation(key=str(number), text="", **settings | {"kind": f"kind {number % 3}"} | changes)


def test_a_dozen_is_shown_and_the_rest_is_said(tmp_path: Path) -> None:
    rows = [segmentation(number, 10 - number % 4) for number in range(40)]
    rows[20] = segmentation(20, prediction=[], problem="the answer is empty")
    figures = [video_figures(row.truth, row.prediction) for row in rows]
    shown = choose(rows, figures)
    assert len(shown) == len(set(shown)) == 12
    assert shown[:4] == [20, 3, 7, 11]
    assert {rows[place].kind for place in shown[4:]} == {"kind 0", "kind 1", "kind 2"}
    written = [evaluate.line_of(row) for row in rows]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    page = write_report(tmp_path).read_text()
    assert "Shown: 12 of 40 videos, the least right ones first, then some of each kind. The other 28 are in" in page
    assert page.count('<svg class="timeline"') == 12


def test_colours_are_those_of_the_truth_alone() -> None:
    rows = [segmentation(number) for number in range(48)]
    colours = colours_of(rows)
    assert len(set(colours.values())) == 48
    rows[3].prediction = [(0, 5, "no class")]
    assert colours_of(rows[::-1]) == colours
