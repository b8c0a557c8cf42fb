"""Questions about a cut-up video, with answers that follow from its segments: what chat systems learn to cut with.

A row is {kind, question, answer}. Times are written `<t:F>`: the border F before frame F, 0 … number of frames, so that
whoever reads a row can put the video's own axis in. The first row asks for all segments; then:

    at            what happens at a time or between two, and when an action happens
    order         what comes after or before an action, first, last, and all of them in turn
    counts        how often an action happens, and how many there are
    anticipation  what follows the segments that were seen so far
    written       questions that a language model wrote about the video, where a dataset has them (`common_written`)

Which segments are asked about, and in which words, follows from the key alone. A label that says that nothing happens
is background: it stands in answers that list segments, but is neither counted nor part of an order.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, TypeVar

ALL_SEGMENTS = "List down all the segments. action is {activity}"
ANTICIPATION = (
    "Following are the segments in the video: {segments}\n"
    "List down the segments that will occur next. action is {activity}."
)
MOMENTS = (
    "What happens at {time}?",
    "What is being done at {time}?",
    "Which action is going on at {time}?",
    "Name the action at {time}.",
)
SPANS = (
    "What is done between {start} and {end}?",
    "What happens between {start} and {end}?",
    "Which actions are there from {start} to {end}?",
)
TIMES = (
    "When does {action} happen?",
    "From when to when does {action} happen?",
    "Give the start and the end of {action}.",
)
AFTER = ("What comes after {action}?", "Which action follows {action}?", "What is done next after {action}?")
BEFORE = ("What comes before {action}?", "Which action precedes {action}?", "What is done last before {action}?")
FIRST = ("What is the first action?", "Which action comes first?", "What is done first?")
LAST = ("What is the last action?", "Which action comes last?", "What is done last?")
IN_TURN = (
    "In which order are the actions done?",
    "Name the actions in their order.",
    "What is done, one after another?",
)
HOW_OFTEN = (
    "How many times does {action} happen?",
    "How often does {action} happen?",
    "Count how often {action} happens.",
)
DIFFERENT = ("How many different actions are there?", "How many kinds of actions does the video show?")

MOST = {"moments": 2, "spans": 2, "times": 2, "order": 2, "counts": 1}
"""Rows of a video at most, of each form that its segments allow more of; order and counts have one that asks about all
actions besides, and anticipation one for each third of the segments that can have been seen."""
SEEN = (1 / 3, 2 / 3)

Row = dict[str, str]
_Item = TypeVar("_Item")


def words_of(label: str) -> str:
    """How a label is written in a question or an answer."""
    return label.replace("_", " ")


def time_of(frame: int) -> str:
    """How a border of frames is written."""
    return f"<t:{frame}>"


def span_of(segment: Mapping[str, Any]) -> str:
    return f"{time_of(segment['start'])}-{time_of(segment['end'])}"


def lines_of(segments: Iterable[Mapping[str, Any]]) -> str:
    """An answer that lists segments: a line `start-end label` each."""
    return "\n".join(f"{span_of(segment)} {words_of(segment['name'])}" for segment in segments)


def make_chat(
    key: str, segments: Sequence[Mapping[str, Any]], activity: str, *, background: Collection[str] = ()
) -> list[Row]:
    """The rows of a video; none where it has no segment.

    Args:
        key: of the video; it alone decides what is drawn.
        segments: {start, end, name, …} in order, frames, end exclusive; some frames may be in none.
        activity: what the video is of, as questions for segments say it.
        background: labels that say that nothing happens.
    """
    if not segments:
        return []
    draw = random.Random(f"chat of {key}")
    actions = [name for name, _ in groupby(part["name"] for part in segments if part["name"] not in background)]
    return [
        {"kind": "segments", "question": ALL_SEGMENTS.format(activity=activity), "answer": lines_of(segments)},
        *_at(draw, segments, background),
        *_order(draw, actions),
        *_counts(draw, segments, background),
        *_anticipation(segments, activity),
    ]


def _some(draw: random.Random, items: Sequence[_Item], most: int) -> list[_Item]:
    """At most so many of the items, in their order."""
    return [items[at] for at in sorted(draw.sample(range(len(items)), min(most, len(items))))]


def _row(kind: str, draw: random.Random, wordings: Sequence[str], answer: str, **blanks: str) -> Row:
    return {"kind": kind, "question": draw.choice(wordings).format(**blanks), "answer": answer}


def _at(draw: random.Random, segments: Sequence[Mapping[str, Any]], background: Collection[str]) -> list[Row]:
    rows = []
    for part in _some(draw, segments, MOST["moments"]):
        middle = time_of((part["start"] + part["end"]) // 2)  # furthest from what a coarser axis could confuse
        rows.append(_row("at", draw, MOMENTS, words_of(part["name"]), time=middle))
    for first in _some(draw, range(len(segments)), MOST["spans"]):
        span = list(segments[first : first + draw.randint(1, 3)])
        for at, (before, after) in enumerate(pairwise(span), 1):
            if before["end"] != after["start"]:  # in between lie frames of which nothing is known
                del span[at:]
                break
        answer = ", then ".join(words_of(part["name"]) for part in span)
        blanks = {"start": time_of(span[0]["start"]), "end": time_of(span[-1]["end"])}
        rows.append(_row("at", draw, SPANS, answer, **blanks))
    names = list(dict.fromkeys(part["name"] for part in segments if part["name"] not in background))
    for name in _some(draw, names, MOST["times"]):
        answer = ", ".join(span_of(part) for part in segments if part["name"] == name)
        rows.append(_row("at", draw, TIMES, answer, action=words_of(name)))
    return rows


def _order(draw: random.Random, actions: Sequence[str]) -> list[Row]:
    """Rows about actions of which no two neighbours are the same."""
    if len(actions) < 2:
        return []
    once = [at for at, name in enumerate(actions) if actions.count(name) == 1]
    neighbours = [(AFTER, at, at + 1) for at in once if at + 1 < len(actions)]
    neighbours += [(BEFORE, at, at - 1) for at in once if at]
    rows = [
        _row("order", draw, wordings, words_of(actions[other]), action=words_of(actions[at]))
        for wordings, at, other in _some(draw, neighbours, MOST["order"])
    ]
    wordings, end = draw.choice(((FIRST, 0), (LAST, -1)))
    rows.append(_row("order", draw, wordings, words_of(actions[end])))
    return [*rows, _row("order", draw, IN_TURN, ", then ".join(map(words_of, actions)))]


def _counts(draw: random.Random, segments: Sequence[Mapping[str, Any]], background: Collection[str]) -> list[Row]:
    begun = [True] + [(one["name"], one["end"]) != (next_["name"], next_["start"]) for one, next_ in pairwise(segments)]
    runs = [part["name"] for part, new in zip(segments, begun) if new and part["name"] not in background]
    names = list(dict.fromkeys(runs))
    if not names:
        return []
    rows = [
        _row("counts", draw, HOW_OFTEN, str(runs.count(name)), action=words_of(name))
        for name in _some(draw, names, MOST["counts"])
    ]
    return [*rows, _row("counts", draw, DIFFERENT, str(len(names)))]


def _anticipation(segments: Sequence[Mapping[str, Any]], activity: str) -> list[Row]:
    cuts = sorted({max(1, round(part * len(segments))) for part in SEEN} - {len(segments)})
    return [
        {
            "kind": "anticipation",
            "question": ANTICIPATION.format(segments=lines_of(segments[:cut]), activity=activity),
            "answer": lines_of(segments[cut:]),
        }
        for cut in cuts
    ]
