"""Segmentations: figures against a slow re-telling of their definitions frame by frame, and rows that are refused."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from vlm.metrics.segments import BACKGROUND, chance, pooled, score, spans_of, stretches, video_figures
from vlm.types import Segmentation, Span, UserError

LABELS = ("background", "cut", "stir", "pour")


# The definitions, frame by frame --------------------------------------------------------------------------


def frames(spans: list[Span], length: int) -> list[str | None]:
    labels: list[str | None] = [None] * length
    for start, end, label in spans:
        for frame in range(start, end):
            labels[frame] = label
    return labels


def runs(labels: list[str | None], background: tuple[str, ...]) -> list[tuple[set[int], str]]:
    """(frames, label) of each maximal run of a label that is not of the background."""
    found: list[tuple[set[int], str | None]] = []
    for frame, label in enumerate(labels):
        if frame and labels[frame - 1] == label:
            found[-1][0].add(frame)
        else:
            found.append(({frame}, label))
    return [(own, label) for own, label in found if label is not None and label not in background]


def distance(a: list[str], b: list[str]) -> int:
    """Fewest insertions, deletions and replacements, by trying all."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


def gap_length(a: set[int], b: set[int]) -> int:
    """Frames from the first to the last of both, as overlap of segments is measured."""
    return max(*a, *b) - min(*a, *b) + 1


def counts(truth: list[tuple[set[int], str]], said: list[tuple[set[int], str]], overlap: float) -> tuple[int, int, int]:
    hits, taken = 0, set()
    for own, label in said:
        shares = [len(own & other) / gap_length(own, other) if label == name else 0.0 for other, name in truth]
        best = shares.index(max(shares)) if shares else None
        if best is not None and shares[best] >= overlap and best not in taken:
            taken.add(best)
            hits += 1
    return hits, len(said) - hits, len(truth) - hits


def random_spans(draw: random.Random, length: int, gaps: bool) -> list[Span]:
    borders = sorted(draw.sample(range(length + 1), draw.randint(2, 7)))
    if not gaps:
        borders[0], borders[-1] = 0, length
    spans = [(a, b, draw.choice(LABELS)) for a, b in pairwise(borders)]
    return [span for span in spans if not gaps or draw.random() < 0.8]


@pytest.mark.parametrize("background", [BACKGROUND, (), ("cut", "stir")])
def test_figures_are_their_definitions(background: tuple[str, ...]) -> None:
    draw = random.Random(len(background))
    several, right, total, edits = [], 0, 0, []
    sums = [[0, 0, 0] for _ in range(3)]
    for case in range(250):
        length = draw.randint(8, 40)
        truth, said = random_spans(draw, length, case % 2 == 1), random_spans(draw, length, case % 3 == 1)
        video = video_figures(truth, said, background)
        several.append(video)
        y, p = frames(truth, length), frames(said, length)
        labelled = [frame for frame in range(length) if y[frame] is not None]
        assert video.frames == len(labelled)
        assert video.right == sum(y[frame] == p[frame] for frame in labelled)
        true, predicted = runs(y, background), runs(p, background)
        a, b = [label for _, label in true], [label for _, label in predicted]
        edit = 1 - distance(a, b) / max(len(a), len(b)) if a or b else 1.0
        assert video.edit == pytest.approx(edit, abs=1e-12)
        for place, overlap in enumerate((0.10, 0.25, 0.50)):
            found = counts(true, predicted, overlap)
            assert video.matches[place] == found, (truth, said, overlap)
            sums[place] = [x + y for x, y in zip(sums[place], found)]
        right, total, edits = right + video.right, total + video.frames, [*edits, edit]
    figures = pooled(several)
    assert figures["mof"] == right / total
    assert figures["edit"] == pytest.approx(sum(edits) / len(edits))
    for name, (hits, wrong, missed) in zip(("f1_10", "f1_25", "f1_50"), sums):
        precision, recall = hits / (hits + wrong), hits / (hits + missed)
        assert figures[name] == pytest.approx(2 * precision * recall / (precision + recall))


def test_spans_that_touch_and_have_one_label_are_one_stretch() -> None:
    assert stretches([(0, 3, "cut"), (3, 5, "cut"), (6, 9, "cut"), (9, 12, "background")]) == [
        (0, 5, "cut"),
        (6, 9, "cut"),
    ]
    assert spans_of(["cut", "cut", "stir", "cut"]) == [(0, 2, "cut"), (2, 3, "stir"), (3, 4, "cut")]


def test_second_claim_of_a_stretch_is_wrong() -> None:
    """Though another stretch of the label is free: each prediction is held against the one that it overlaps most."""
    truth = [(0, 100, "cut"), (100, 110, "stir"), (110, 120, "cut")]
    said = [(0, 50, "cut"), (50, 52, "stir"), (52, 100, "cut")]
    assert video_figures(truth, said).matches == ((1, 2, 2),) * 3


def test_a_label_that_is_no_class_is_wrong() -> None:
    video = video_figures([(0, 10, "cut")], [(0, 5, "cut"), (5, 10, "dance")])
    assert (video.right, video.frames, video.edit) == (5, 10, 0.5)
    assert video.matches[2] == (1, 1, 0)


def test_no_stretch_on_one_side_or_both() -> None:
    assert video_figures([(0, 10, "cut")], []).matches == ((0, 0, 1),) * 3
    assert video_figures([(0, 10, "cut")], []).edit == 0
    empty = video_figures([(0, 10, "background")], [(0, 10, "cut")])
    assert (empty.edit, empty.matches[0]) == (0, (0, 1, 0))
    both = video_figures([(0, 10, "background")], [])
    assert (both.edit, both.right, both.matches[0]) == (1, 0, (0, 0, 0))


# All rows -------------------------------------------------------------------------------------------------


def row(key: str, **changes: object) -> Segmentation:
    settings: dict = {
        "key": key,
        "text": "0-6 cut\n6-10 stir",
        "truth": [(0, 6, "cut"), (6, 10, "stir")],
        "prediction": [(0, 6, "cut"), (6, 10, "stir")],
        "num_frames": 10,
        "kind": "salad",
        "probes": {"blind": {"text": "", "prediction": [], "problem": "the answer is empty"}},
    }
    return Segmentation(**settings | changes)


def test_all_figures() -> None:
    rows = [
        row("a"),
        row("b", prediction=[], problem="line 1: …"),
        row("c", kind="tea", truth=[(0, 30, "pour")], prediction=[(0, 15, "pour")], num_frames=30),
    ]
    figures = score(rows)
    expected = {"mof": 25 / 50, "edit": 2 / 3, "f1_50": 2 * 3 / 8, "f1_25": 0.75, "chance": 30 / 50, "mof_blind": 0}
    expected |= {"unparsable": 1 / 3, "unparsable_blind": 1, "num_videos": 3, "num_unparsable": 1, "fork_errors": 1}
    expected |= {
        "mof_salad": 0.5,
        "edit_salad": 0.5,
        "f1_10_salad": 2 / 3,
        "chance_salad": 0.6,
        "unparsable_salad": 0.5,
    }
    expected |= {"mof_tea": 0.5, "edit_tea": 1, "f1_10_tea": 1, "chance_tea": 1, "unparsable_tea": 0}
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value), name
    theirs = {"mean_f1", "f1_25", "mof", "action_accuracy", "edit", "errors"}  # one label alone has no rank correlation
    assert {name for name in figures if name.startswith("fork_")} == {f"fork_{name}" for name in theirs}
    assert all(
        0 <= value <= 1 for name, value in figures.items() if not name.startswith("num_") and name != "fork_edit"
    )


def test_an_answer_that_cannot_be_read_counts_like_an_empty_one() -> None:
    good, bad = row("a"), row("b", prediction=[], problem="line 1: …", text="I see a kitchen.")
    assert score([good, bad])["mof"] == 0.5
    assert score([good])["mof"] == 1
    assert score([bad])["f1_10"] == score([bad])["edit"] == score([bad])["mof"] == 0


def test_chance_is_the_commonest_label_said_of_everything() -> None:
    truths = [[(0, 5, "cut"), (5, 8, "stir")], [(0, 4, "stir"), (4, 6, "pour")]]
    assert chance(truths) == 7 / 14
    said = pooled([video_figures(truth, [(0, truth[-1][1], "stir")]) for truth in truths])
    assert said["mof"] == chance(truths)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no segmentations to score"),
        ([row("a"), row("b", probes={})], "video 'b' has the probes"),
        ([row("a", kind="blind")], "a kind of video and a probe"),
        ([row("a", prediction=[(0, 5, "cut"), (4, 6, "stir")])], "its prediction: 'stir' begins at frame 4"),
        ([row("a", truth=[(3, 3, "cut")])], "its truth: .* has no frame"),
        ([row("a", truth=[])], "none of 1 videos has a frame with a label"),
        ([row("a", probes={"blind": {"prediction": [(2, 1, "x")], "problem": ""}})], "its blind: "),
    ],
)
def test_refused(rows: list[Segmentation], says: str) -> None:
    with pytest.raises(UserError, match=says):
        score(rows)
