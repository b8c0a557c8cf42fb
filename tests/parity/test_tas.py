"""Segmentations against numbers recorded from the originals: MS-TCN's evaluation on frames, and the figures that "Video
Llama on Breakfast" computed of its texts; then the published texts of that project themselves.

Measured: largest difference 1.4e-14 percent points for MS-TCN's figures, 0 for those of the other project.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.metrics import segments_fork as fork
from vlm.metrics.segments import edit_score, match, pooled, spans_of, stretches, video_figures
from vlm.types import Span

Load = Callable[[str], Any]
GOLDEN = "tas_metrics.json"
MS_TCN = {"MoF": "mof", "Edit": "edit", "F1_10": "f1_10", "F1_25": "f1_25", "F1_50": "f1_50"}
FORK = {
    "mean f1": "fork_mean_f1",
    "mean f1@25": "fork_f1_25",
    "mean MOF": "fork_mof",
    "mean action acc": "fork_action_accuracy",
    "mean spearman correlation": "fork_spearman",
    "Edit Distance": "fork_edit",
}
PERCENT = ("fork_edit",)  # in the recording; here everything is 0 … 1


def spans(runs: list[tuple[str, int]]) -> list[Span]:
    """Spans of a recorded run-length encoding."""
    return spans_of([label for label, count in runs for _ in range(count)])


@pytest.mark.parametrize(
    ("name", "background"), [("with_background_excluded", ("background",)), ("no_background_class", ())]
)
def test_ms_tcn(load_golden: Load, name: str, background: tuple[str, ...]) -> None:
    recorded = load_golden(GOLDEN)
    pairs = [(spans(pair["gt"]), spans(pair["pred"])) for pair in recorded["pairs"]]
    videos = [video_figures(truth, said, background) for truth, said in pairs]
    assert len(videos) == len(recorded[name]["per_video"])
    for video, expected in zip(videos, recorded[name]["per_video"]):
        assert 100 * video.right / video.frames == pytest.approx(expected["acc"], abs=1e-9)
        assert 100 * video.edit == pytest.approx(expected["edit"], abs=1e-9)
        assert [list(counts) for counts in video.matches] == [expected[f"tp_fp_fn@{k}"] for k in (10, 25, 50)]
    figures = pooled(videos)
    for theirs, ours in MS_TCN.items():
        assert 100 * figures[ours] == pytest.approx(recorded[name][theirs], abs=1e-9), theirs


def test_degenerate(load_golden: Load) -> None:
    """Where the original raises or gives NaN there is a number here; where it gives a number it is the same."""
    recorded = load_golden(GOLDEN)["degenerate"]
    missed = int(recorded["pred_all_background"]["f10"][2])  # as many stretches as the recording's truth had
    truth = [
        span for n in range(missed) for span in ((10 * n, 10 * n + 5, "background"), (10 * n + 5, 10 * n + 9, "stir"))
    ]
    blank = [(0, 9, "background")]
    cases = {
        "gt_all_background": (blank, [(0, 4, "stir"), (4, 9, "background")]),
        "both_background": (blank, blank),
        "pred_all_background": (truth, blank),
    }
    defined = {"gt_all_background": (0.0, (0, 1, 0)), "both_background": (1.0, (0, 0, 0))}
    assert set(recorded) == set(cases)
    for name, (real, said) in cases.items():
        video = video_figures(real, said)
        theirs = recorded[name]
        if isinstance(theirs["edit"], float) and not math.isnan(theirs["edit"]):
            assert 100 * video.edit == theirs["edit"], name
        else:
            assert video.edit == defined[name][0]
        if isinstance(theirs["f10"], list):
            assert list(video.matches[0]) == theirs["f10"], name
        else:
            assert "argmax of an empty sequence" in theirs["f10"]
            assert video.matches[0] == defined[name][1]


def test_fork(load_golden: Load) -> None:
    recorded = load_golden(GOLDEN)["fork"]
    samples = [fork.Sample(**sample) for sample in recorded["samples"]]
    for sample, expected in zip(samples, recorded["per_sample"], strict=True):
        figures = fork.figures_of(sample)
        assert (figures is None) == (expected["Total Errors"] == 1), sample.name
        for theirs, ours in FORK.items() if figures is not None else ():
            assert _as_recorded(figures, ours) == pytest.approx(expected[theirs], abs=1e-12), (sample.name, theirs)
    means = fork.score(samples)
    assert means["fork_errors"] == recorded["aggregate"]["Total Errors"]
    for theirs, ours in FORK.items():
        if recorded["aggregate"][theirs] is None:
            assert ours not in means
        else:
            assert _as_recorded(means, ours) == pytest.approx(recorded["aggregate"][theirs], abs=1e-12), theirs


def _as_recorded(figures: dict[str, float], name: str) -> float:
    return figures[name] * (100 if name in PERCENT else 1)


# The published texts --------------------------------------------------------------------------------------

PUBLISHED = {"mof": 0.5216, "edit": 0.6256, "f1_10": 0.5712, "f1_25": 0.5035, "f1_50": 0.3696}
"""Of all 498 texts of the project's first branch, read by `fork.read`. They were recomputed from the whole file, to
these digits; what is shared of it is a sample."""
PUBLISHED_FORK = {"fork_mean_f1": 0.4813, "fork_f1_25": 0.4983, "fork_mof": 0.4704, "fork_edit": 0.6281}


def test_the_published_texts(realdata: Path) -> None:
    """A sample cannot give the figures of all videos: they lie where resampling it says that they may."""
    (file,) = (realdata / "annotations" / "breakfast").glob("segments_predictions*.json")
    samples = [fork.Sample(**row) for row in json.loads(file.read_text())]
    assert len(samples) >= 20
    read = [fork.read(sample) for sample in samples]
    videos = [video_figures(fork.spans_of(truth), fork.spans_of(said)) for truth, said in read]
    theirs = [fork.figures_of(sample) for sample in samples]
    assert None not in theirs
    draw = random.Random(0)
    picks = [draw.choices(range(len(samples)), k=len(samples)) for _ in range(2000)]
    several = [pooled([videos[place] for place in pick]) for pick in picks]
    for name, published in PUBLISHED.items():
        _is_within([figures[name] for figures in several], published, name)
    for name, published in PUBLISHED_FORK.items():
        values = [figures[name] for figures in theirs if figures is not None]
        _is_within([sum(values[place] for place in pick) / len(pick) for pick in picks], published, name)


def _is_within(values: list[float], published: float, name: str) -> None:
    """The published figure is among the middle 99 % of those of resampled videos."""
    values = sorted(values)
    low, high = values[len(values) // 200], values[-1 - len(values) // 200]
    assert low <= published <= high, f"{name}: {published} is not within {low:.4f} … {high:.4f}"
    assert high - low < 0.6, f"{name}: {low:.4f} … {high:.4f} would allow for anything"


def test_a_prediction_equal_to_the_truth(load_golden: Load) -> None:
    for pair in load_golden(GOLDEN)["pairs"]:
        truth = spans(pair["gt"])
        labels = [label for *_, label in stretches(truth)]
        assert edit_score(labels, labels) == 1
        assert match(stretches(truth), stretches(truth), 1.0) == (len(labels), 0, 0)
