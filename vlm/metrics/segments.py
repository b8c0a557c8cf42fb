"""Segmentations: what statements on what happens when in a video are worth, as MS-TCN's evaluation defines it.

Abu Farha and Gall, MS-TCN (CVPR 2019), https://arxiv.org/abs/1903.01945: frames that have the right label (MoF), edit
score of the order of labels, F1 of segments by overlap. What each figure is, in words: docs/segments.md.

A stretch is a maximal run of frames of one label. Frames that no span covers have no label: they are no stretch; in the
truth they are not counted in MoF, in a prediction they are wrong there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from vlm.metrics import segments_fork
from vlm.metrics.probes import names_of_probes
from vlm.types import Segmentation, Span, UserError

OVERLAPS = (10, 25, 50)
"""Shares, in percent, of the union that truth and prediction must have in common."""
BACKGROUND = ("background",)
"""Labels whose stretches count in MoF alone, as MS-TCN's evaluation has it. Breakfast's SIL and 50 Salads' action_start
and action_end are no such labels there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFigures:
    """What the prediction on one video is worth: counts, to be added up over videos."""

    right: int  # frames of the truth that have the right label
    frames: int  # frames of the truth that have a label
    edit: float  # 0 … 1; 1 where truth and prediction have no stretch
    matches: tuple[tuple[int, int, int], ...]  # (true positives, false positives, false negatives) for each of OVERLAPS


# One video ------------------------------------------------------------------------------------------------


def spans_of(labels: Iterable[str]) -> list[Span]:
    """Labels of frames as spans."""
    spans, start = [], 0
    for label, run in groupby(labels):
        end = start + sum(1 for _ in run)
        spans.append((start, end, label))
        start = end
    return spans


def stretches(spans: Sequence[Span], background: Collection[str] = BACKGROUND) -> list[Span]:
    """Maximal runs of one label, without those of the background. Spans are in order and do not overlap."""
    runs: list[Span] = []
    for start, end, label in spans:
        if runs and runs[-1][1:] == (start, label):
            runs[-1] = (runs[-1][0], end, label)
        else:
            runs.append((start, end, label))
    return [run for run in runs if run[2] not in background]


def frames_right(truth: Sequence[Span], prediction: Sequence[Span]) -> int:
    """How many frames of the truth have their label in the prediction too."""
    right, place = 0, 0
    for start, end, label in truth:
        while place < len(prediction) and prediction[place][1] <= start:
            place += 1
        for other_start, other_end, other in prediction[place:]:
            if other_start >= end:
                break
            if other == label:
                right += min(end, other_end) - max(start, other_start)
    return right


def edit_score(truth: Sequence[str], prediction: Sequence[str]) -> float:
    """1 - (fewest insertions, deletions and replacements that make one list of the other) / (length of the longer).

    Two empty lists are equal: 1, where the published code divides by zero.
    """
    above = list(range(len(prediction) + 1))
    for row, label in enumerate(truth, 1):
        current = [row]
        for column, other in enumerate(prediction, 1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (label != other)))
        above = current
    return 1 - above[-1] / max(len(truth), len(prediction), 1)


def match(truth: Sequence[Span], prediction: Sequence[Span], overlap: float) -> tuple[int, int, int]:
    """(true positives, false positives, false negatives) of predicted stretches, taken in order.

    Each is held against that stretch of the truth, of the same label, with which it has the largest share of their
    union in common (of several the first). It is right if that share is `overlap` or more and nothing before it matched
    the same stretch. Without a stretch in the truth all of a prediction is wrong, where the published code stops.
    """
    matched = [False] * len(truth)
    for start, end, label in prediction:
        shares = [
            (min(end, e) - max(start, s)) / (max(end, e) - min(start, s)) if label == other else 0.0
            for s, e, other in truth
        ]
        best = max(range(len(shares)), key=shares.__getitem__, default=None)
        if best is not None and shares[best] >= overlap:
            matched[best] = True
    hits = sum(matched)
    return hits, len(prediction) - hits, len(truth) - hits


def video_figures(
    truth: Sequence[Span], prediction: Sequence[Span], background: Collection[str] = BACKGROUND
) -> VideoFigures:
    """What a prediction on one video is worth. Both are in order, without overlap."""
    true, said = stretches(truth, background), stretches(prediction, background)
    return VideoFigures(
        right=frames_right(truth, prediction),
        frames=sum(end - start for start, end, _ in truth),
        edit=edit_score([label for *_, label in true], [label for *_, label in said]),
        matches=tuple(match(true, said, overlap / 100) for overlap in OVERLAPS),
    )


# All videos -----------------------------------------------------------------------------------------------


def pooled(videos: Sequence[VideoFigures]) -> dict[str, float]:
    """`mof`, `edit`, `f1_10`, `f1_25`, `f1_50` over videos, 0 … 1: frames and matches are added up, edit scores
    averaged. A video without a label in its truth adds no frame."""
    frames = sum(video.frames for video in videos)
    figures = {
        "mof": sum(video.right for video in videos) / max(frames, 1),
        "edit": sum(video.edit for video in videos) / len(videos),
    }
    for number, overlap in enumerate(OVERLAPS):
        hits, wrong, missed = (sum(video.matches[number][which] for video in videos) for which in range(3))
        figures[f"f1_{overlap}"] = 2 * hits / max(2 * hits + wrong + missed, 1)
    return figures


def chance(truths: Iterable[Sequence[Span]]) -> float:
    """MoF of the label that most frames have, said of all frames of all videos."""
    frames: Counter[str] = Counter()
    for truth in truths:
        for start, end, label in truth:
            frames[label] += end - start
    return max(frames.values(), default=0) / max(frames.total(), 1)


def score(
    rows: Sequence[Segmentation],
    background: Collection[str] = BACKGROUND,
    texts: Sequence[segments_fork.Sample] | None = None,
) -> dict[str, float]:
    """What segmentations are worth. An answer that could not be read is an empty prediction like any other.

    Args:
        background: labels that count in MoF alone.
        texts: what the fork's figures are of; None: rows written in its form.
    Returns: fractions 0 … 1: those of `pooled`; `chance`; `mof_<probe>`; `unparsable`, the share of answers that could
        not be read, and `unparsable_<probe>`; all but the probes again with `_<kind>` where videos are of kinds
        (activities). Counts: `num_videos`, `num_unparsable`. The figures of vlm.metrics.segments_fork, which leave out
        what could not be read.
    Raises:
        UserError: no row; no frame that has a label; spans out of order, or that overlap; rows that do not agree on the
            probes; a kind that is named like a probe.
    """
    _check(rows)
    probes = list(rows[0].probes)
    figures = _figures(rows, background)
    for probe in probes:
        said = [video_figures(row.truth, row.probes[probe]["prediction"], background) for row in rows]
        figures[f"mof_{probe}"] = pooled(said)["mof"]
        figures[f"unparsable_{probe}"] = _share([row.probes[probe]["problem"] for row in rows])
    figures |= {"num_videos": len(rows), "num_unparsable": sum(bool(row.problem) for row in rows)}
    for kind in sorted({row.kind for row in rows if row.kind}):
        own = _figures([row for row in rows if row.kind == kind], background)
        figures |= {f"{name}_{kind}": value for name, value in own.items()}
    return figures | segments_fork.score([segments_fork.sample_of(row) for row in rows] if texts is None else texts)


def names_of_kinds(rows: Sequence[Segmentation]) -> set[str]:
    """What `score` calls the figures of one kind each, of which there are many."""
    names = ("mof", "edit", *(f"f1_{overlap}" for overlap in OVERLAPS), "chance", "unparsable")
    return {f"{name}_{kind}" for name in names for kind in {row.kind for row in rows} if kind}


def _figures(rows: Sequence[Segmentation], background: Collection[str]) -> dict[str, float]:
    figures = pooled([video_figures(row.truth, row.prediction, background) for row in rows])
    figures["chance"] = chance(row.truth for row in rows)
    figures["unparsable"] = _share([row.problem for row in rows])
    return figures


def _share(problems: Sequence[str]) -> float:
    return sum(map(bool, problems)) / len(problems)


def _check(rows: Sequence[Segmentation]) -> None:
    if not rows:
        raise UserError("there are no segmentations to score: the evaluation wrote no rows")
    probes = names_of_probes(rows, "video")
    for row in rows:
        if row.kind in probes:
            raise UserError(f"video {row.key!r}: {row.kind!r} is a kind of video and a probe; mof_{row.kind}: whose?")
        said = {name: probe["prediction"] for name, probe in row.probes.items()}
        for name, spans in {"truth": row.truth, "prediction": row.prediction, **said}.items():
            problem = what_is_wrong(spans)
            if problem:
                raise UserError(f"video {row.key!r}: its {name}: {problem}")
    if not any(row.truth for row in rows):
        raise UserError(f"none of {len(rows)} videos has a frame with a label: use a split whose labels are published")


def what_is_wrong(spans: Sequence[Span]) -> str:
    """Why spans are none of a video: one has no frame, or they are not in order, or overlap; "" where nothing is."""
    for start, end, label in spans:
        if not 0 <= start < end:
            return f"({start}, {end}, {label!r}) has no frame"
    for (_, end, label), (start, _, after) in pairwise(spans):
        if start < end:
            return f"{after!r} begins at frame {start}, before {label!r} ends at {end}"
    return ""
