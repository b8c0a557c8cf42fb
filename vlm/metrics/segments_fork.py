"""The figures that "Video Llama on Breakfast" reported of itself (Muhammad4hmed/VideoLlama, metrics.py), under names of
their own: they compare with that project's figures, and with no others.

They are means over videos of texts that are read as far as they can be read, and they are told as they were computed:

- Lines `start-end label` count frames from 1; the end is left out, so the last frame of each span is no part of it, and
  what is said later replaces what was said before. A line that cannot be read is passed over.
- A number below 1 counts from the video's end, as a Python slice does: `1-0 SIL` is all frames but the last.
- The video ends where the last line of the truth says, less one frame. The last stretch of each is a frame short again.
- MoF is the mean of each video's own share, so that a short video counts as much as a long one.
- Truth and prediction changed places in F1@25, which matters where several stretches claim one.
- A video of whose prediction nothing remains is left out of all means: `fork_errors` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vlm.types import Segmentation, Span

UNSAID = "background" * 7
"""What frames are called of which nothing is said. It is ranked among the labels in the correlation of ranks."""
_TINY = 1e-10
_LONGEST = len(UNSAID)  # labels are cut to it
_MOST = 10_000_000  # frames of a video, of more of which nobody has labels


class Sample(NamedTuple):
    """A video as such a file has it: two texts."""

    name: str
    truth: str  # lines, an empty one between two
    pred: str  # lines


def sample_of(row: Segmentation) -> Sample:
    """A row as those texts: frames from 1, each span beginning with the frame that ends the one before."""
    truth = [f"{max(start, 1)}-{end} {label} \n" for start, end, label in row.truth]
    said = [f"{max(start, 1)}-{end} {label.replace('_', ' ')}" for start, end, label in row.prediction]
    return Sample(row.key, "\n".join(truth), "\n".join(said))


def read(sample: Sample, slices: bool = False) -> tuple[list[str], list[str]]:
    """The label of each frame in the truth and in the prediction, UNSAID where there is none.

    Args:
        slices: a number below 1 counts from the end, as in that project; else it is the beginning of the video.
    Raises:
        ValueError: the last line of the truth does not say where the video ends.
    """
    try:
        frames = int(sample.truth.split("\n\n")[-1].split("-")[1].split(" ")[0]) - 1
    except IndexError as error:
        raise ValueError("the last line of the truth does not say where the video ends") from error
    if not 0 < frames <= _MOST:
        raise ValueError(f"the truth ends at frame {frames + 1}; a video has 1 frame to {_MOST:,}")
    truth, said = sample.truth.split("\n\n"), sample.pred.split("\n")
    return _painted(truth, frames, slices), _painted(said, frames, slices)


def _painted(lines: Sequence[str], frames: int, slices: bool) -> list[str]:
    labels = np.full(frames, UNSAID, dtype=object)
    for line in lines:
        parts = line.split("-")
        if len(parts) != 2:
            continue
        try:
            first, last = int(parts[0]), int(parts[1].split(" ")[0])
        except ValueError:
            continue
        start, end = (first - 1, last - 1) if slices else (max(first - 1, 0), max(last - 1, 0))
        labels[start:end] = "_".join(parts[1].strip().split(" ")[1:]).replace("\n", "")[:_LONGEST]
    return [str(label) for label in labels]


def spans_of(labels: Sequence[str]) -> list[Span]:
    """Stretches of frames of which something is said."""
    borders = [0, *(place for place in range(1, len(labels)) if labels[place] != labels[place - 1]), len(labels)]
    return [(a, b, labels[a]) for a, b in pairwise(borders) if a < b and labels[a] != UNSAID]


def figures_of(sample: Sample) -> dict[str, float] | None:
    """The figures of one video, 0 … 1 (the correlation from -1, NaN where one side has one label alone); None where it
    was left out."""
    try:
        truth, said = read(sample, slices=True)
    except ValueError:
        return None
    true, predicted = _short(spans_of(truth), len(truth)), _short(spans_of(said), len(said))
    if not predicted and true:
        return None
    names = sorted({*truth, *said})
    numbers = {name: number for number, name in enumerate(names)}
    y, p = np.array([numbers[label] for label in truth]), np.array([numbers[label] for label in said])
    classes = set(truth)
    return {
        "fork_mean_f1": _weighted_f1(y, p, len(names)),
        "fork_f1_25": _f1(predicted, true, 0.25),
        "fork_mof": float(np.mean(y == p)),
        "fork_action_accuracy": len(classes & set(said)) / len(classes),
        "fork_spearman": _rank_correlation(y, p),
        "fork_edit": _edit([label for *_, label in true], [label for *_, label in predicted]),
    }


def score(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over the videos that were not left out, and how many were (`fork_errors`); a mean that is no number, or of
    no video, is not there."""
    videos = [figures_of(sample) for sample in samples]
    kept = [video for video in videos if video is not None]
    means = {name: float(np.mean([video[name] for video in kept])) for name in (kept[0] if kept else ())}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)} | {
        "fork_errors": len(videos) - len(kept)
    }


def _short(spans: list[Span], frames: int) -> list[Span]:
    """The stretch that goes on to the last frame ends before it."""
    return [(start, end - (end == frames), label) for start, end, label in spans]


def _f1(truth: Sequence[Span], prediction: Sequence[Span], overlap: float) -> float:
    matched = [False] * len(truth)
    for start, end, label in prediction:
        shares = []
        for s, e, other in truth:
            union = max(end, e) - min(start, s)
            shares.append((min(end, e) - max(start, s)) / union * (label == other) if union else math.nan)
        best = int(np.argmax(shares))
        if shares[best] >= overlap:
            matched[best] = True
    hits = sum(matched)
    precision, recall = hits / (len(prediction) + _TINY), hits / (len(truth) + _TINY)
    return 2 * precision * recall / (precision + recall + _TINY)


def _edit(truth: Sequence[str], prediction: Sequence[str]) -> float:
    distances = np.arange(len(prediction) + 1.0)
    for label in truth:
        before, distances = distances, distances + 1
        for column, other in enumerate(prediction, 1):
            distances[column] = min(
                before[column] + 1, distances[column - 1] + 1, before[column - 1] + (label != other)
            )
    return float(1 - distances[-1] / max(len(truth), len(prediction)))


def _weighted_f1(truth: np.ndarray, prediction: np.ndarray, classes: int) -> float:
    """F1 of the frames of each class, weighted by how many frames it really has."""
    really, said = np.bincount(truth, minlength=classes), np.bincount(prediction, minlength=classes)
    both = np.bincount(truth[truth == prediction], minlength=classes)
    return float((really * 2 * both / np.maximum(really + said, 1)).sum() / len(truth))


def _rank_correlation(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Spearman's correlation of labels by the alphabet."""
    x, y = _ranks(truth), _ranks(prediction)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
