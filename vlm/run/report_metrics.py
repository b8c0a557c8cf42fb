"""The report's first table: every metric with what it means, how sure it is, and what the demos should reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from vlm.metrics.own import meanings

MEANS = {
    "top1": "share of the test clips whose highest score is the true class",
    "top5": "share of the test clips whose true class is among the five highest scores",
    "chance": "what guessing would give: one over the number of classes or options",
    "top1_one_frame": "the same model on one frame of each clip, repeated: what can be guessed without motion",
    "top1_shuffled_frames": "the same model on the frames in random order: what can be guessed without direction",
    "accuracy": "share of the questions whose highest score is the right option",
    "accuracy_blind": "the same model with the video's features zeroed: what can be guessed from the text",
    "accuracy_mean_of_kinds": "mean over the kinds of questions",
    "exact_match": "share of the texts that are, word for word, one that people wrote",
    "exact_match_blind": "the same model with the video zeroed: what can be guessed from the prompt",
    "bleu4": "runs of up to four words that people wrote too, over all texts (BLEU-4)",
    "rouge_l": "longest sequence of words in common with what people wrote (ROUGE-L)",
    "cider": "words in common with what people wrote, rare ones weighing more (CIDEr)",
}
SEGMENTS = {
    "mof": "share of the frames that have the right label (mean over frames)",
    "edit": "how much of the order of the actions is right, mean over videos",
    "f1_10": "F1 of the actions, one being right if it and the truth have 10 % of their union in common",
    "f1_25": "the same at 25 %",
    "f1_50": "the same at 50 %",
    "chance": "what guessing would give as mof: the label that most frames of the test have, said of all frames",
    "mof_blind": "the same model with the video zeroed: what can be guessed from the question",
    "unparsable": "share of the answers that are not of the grammar: scored as empty predictions",
    "unparsable_blind": "the same with the video zeroed",
    "fork_mean_f1": 'as "Video Llama on Breakfast" computed it: F1 of frames by class, mean over videos',
    "fork_f1_25": "as that project: F1 at 25 % of each video, mean over videos",
    "fork_mof": "as that project: share of right frames of each video, mean over videos",
    "fork_action_accuracy": "as that project: share of a video's labels that are said of any of its frames",
    "fork_spearman": "as that project: correlation of ranks of labels by the alphabet",
    "fork_edit": "as that project: edit score, mean over videos",
    "fork_errors": "videos that these figures leave out, since nothing could be read",
}
"""What metrics of segmentations mean."""
DEMO_LIMITS = {
    "mof": (0.80, "at least"),
    "top1": (0.85, "at least"),
    "accuracy": (0.85, "at least"),
    "accuracy_blind": (0.40, "at most"),
    "top1_one_frame": (0.35, "at most"),
    "top1_shuffled_frames": (0.65, "at most"),
    "exact_match": (0.80, "at least"),
    "exact_match_blind": (0.20, "at most"),
}
"""What the demo corpus should give if the model has learned motion, and the loader keeps the order of frames."""
SHARES = ("top1", "accuracy", "exact_match")
"""Metrics that are shares of all rows, so that they have an interval."""


def metrics_table(metrics: Mapping[str, Any], count: int, *, is_demo: bool) -> str:
    """HTML of the metrics of `count` rows (0: not known); "" where there are none."""
    rows = []
    known = meanings() | MEANS | (SEGMENTS if "mof" in metrics else {})
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        means, wanted = escape(known.get(name, "")), ""
        if name in SHARES and count:
            low, high = wilson(value, count)
            means += f"; 95 % interval {low:.3f} to {high:.3f}"
        if is_demo and name in DEMO_LIMITS:
            limit, side = DEMO_LIMITS[name]
            kept = value >= limit if side == "at least" else value <= limit
            wanted = f'<span class="{"good" if kept else "bad"}">{"✓" if kept else "✗"} {side} {limit}</span>'
        figure = f"{value:.0f}" if name.startswith("num_") or name == "fork_errors" else f"{value:.3f}"
        rows.append(f"<tr><th>{escape(name)}</th><td class=figure>{figure}</td><td>{wanted}</td><td>{means}</td></tr>")
    return f"<table>{''.join(rows)}</table>" if rows else ""


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` trials (Wilson 1927), as two shares."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
