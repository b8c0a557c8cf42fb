"""The report's questions: a dozen with their frames, options and scores, and the accuracy of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from vlm.run.report_clips import MOST_WRONG, NUM_CLIPS, TestClips, frames_of
from vlm.types import Prediction


def choose(predictions: Sequence[Prediction]) -> list[Prediction]:
    """A dozen questions: up to MOST_WRONG wrong ones, the surest first, then right ones, one kind after the other."""
    wrong = sorted((p for p in predictions if p.truth != p.prediction), key=lambda p: -_margin(p))
    right: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.truth == prediction.prediction:
            right.setdefault(prediction.kind or "", []).append(prediction)
    shown = wrong[:MOST_WRONG]
    while any(right.values()) and len(shown) < NUM_CLIPS:
        for _, several in sorted(right.items()):
            if several and len(shown) < NUM_CLIPS:
                shown.append(several.pop(len(several) // 2))  # not neighbours, which ask about the same video
    return shown + wrong[MOST_WRONG : MOST_WRONG + NUM_CLIPS - len(shown)]


def _margin(prediction: Prediction) -> float:
    """How far the chosen option is ahead of the right one."""
    return prediction.scores[prediction.prediction] - prediction.scores[prediction.truth]


def questions(predictions: Sequence[Prediction], clips: TestClips) -> str:
    """HTML of a dozen questions: frames where the shards hold the video, options, scores, what the probes answer."""
    return "".join(_question(prediction, clips) for prediction in choose(predictions))


def _question(prediction: Prediction, clips: TestClips) -> str:
    right = prediction.truth == prediction.prediction
    kind = f" ({escape(prediction.kind)})" if prediction.kind else ""
    lines = [
        f'<b class="{"good" if right else "bad"}">{"✓ right" if right else "✗ wrong"}</b> '
        f"<code>{escape(prediction.key)}</code>{kind}",
        f"<b>{escape(prediction.question)}</b>",
    ]
    for option, score in enumerate(prediction.scores):
        text = prediction.options[option] if option < len(prediction.options) else f"option {option}"
        marks = ("truth " if option == prediction.truth else "") + ("chosen" if option == prediction.prediction else "")
        shown = f"<b>{escape(text)}</b>" if option == prediction.truth else escape(text)
        lines.append(f"({chr(65 + option)}) {shown} <span class=quiet>{score:.3f} {marks}</span>")
    for probe, scores in prediction.probes.items():
        letter = chr(65 + int(np.argmax(scores)))
        lines.append(f'<span class="quiet">{escape(probe.replace("_", " "))}: ({letter})</span>')
    frames = frames_of(prediction.video, clips)
    return f'<div class="clip"><div class="frames">{frames}</div><p>{"<br>".join(lines)}</p></div>'


def kind_rows(predictions: Sequence[Prediction], groups: Mapping[str, Sequence[str]]) -> list[tuple[str, int, int]]:
    """(name, right, questions) of each kind and each group of kinds."""
    kinds = {kind: (kind,) for kind in sorted({p.kind for p in predictions if p.kind})}
    rows = []
    for name, members in {**kinds, **groups}.items():
        chosen = [p for p in predictions if p.kind in members]
        if chosen:
            rows.append((name, sum(p.truth == p.prediction for p in chosen), len(chosen)))
    return rows
