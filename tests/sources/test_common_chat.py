"""Rows made of segments are true of them, whatever was drawn."""

from __future__ import annotations

import re
from itertools import groupby, pairwise
from typing import Any

import pytest

from vlm.sources import common_chat
from vlm.sources.common_chat import lines_of, make_chat

LABELS = ("SIL", "take_bowl", "pour_milk", "stir", "take_bowl2")
_LINE = re.compile(r"<t:(\d+)>-<t:(\d+)> (.+)")


def segments_of(case: int) -> list[dict[str, Any]]:
    """Of every number from 1 to 12, labels in another order each, one in five with a gap before it."""
    found: list[dict[str, Any]] = []
    for at in range(1 + case % 12):
        name = LABELS[(case * 7 + at * (1 + case % 3)) % len(LABELS)]
        start = (found[-1]["end"] if found else 0) + (9 if (case + at) % 5 == 0 and found else 0)
        found.append({"start": start, "end": start + 1 + (case * 31 + at * 17) % 90, "label": 0, "name": name})
    return found


def matches(wordings: tuple[str, ...], question: str) -> dict[str, str] | None:
    for wording in wordings:
        found = re.fullmatch(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(wording)), question)
        if found is not None:
            return found.groupdict()
    return None


def frame(time: str) -> int:
    found = re.fullmatch(r"<t:(\d+)>", time)
    assert found is not None, time
    return int(found[1])


def painted(segments: list[dict[str, Any]]) -> list[str]:
    """What happens in each frame; empty where it is not known."""
    labels = [""] * segments[-1]["end"]
    for part in segments:
        labels[part["start"] : part["end"]] = [part["name"].replace("_", " ")] * (part["end"] - part["start"])
    return labels


@pytest.mark.parametrize("case", range(60))
def test_every_row_is_true(case: int) -> None:
    segments = segments_of(case)
    frames = painted(segments)
    actions = [name for name, _ in groupby(p["name"].replace("_", " ") for p in segments if p["name"] != "SIL")]
    runs = [name for name, _ in groupby(frames) if name not in ("", "SIL")]  # what is unknown in between parts them
    rows = make_chat(f"video{case}", segments, "tea", background=("SIL",))
    assert rows[0] == {
        "kind": "segments",
        "question": "List down all the segments. action is tea",
        "answer": lines_of(segments),
    }
    for row in rows[1:]:
        assert set(row) == {"kind", "question", "answer"}
        question, answer = row["question"], row["answer"]
        if row["kind"] == "anticipation":
            seen = question.removeprefix("Following are the segments in the video: ").split("\nList down the segments ")
            assert seen[1] == "that will occur next. action is tea."
            assert f"{seen[0]}\n{answer}" == lines_of(segments)
        elif (blanks := matches(common_chat.SPANS, question)) is not None:
            between = frames[frame(blanks["start"]) : frame(blanks["end"])]
            assert answer.split(", then ")[0] == between[0]
            assert [name for name, _ in groupby(answer.split(", then "))] == [name for name, _ in groupby(between)]
        elif (blanks := matches(common_chat.MOMENTS, question)) is not None:
            assert frames[frame(blanks["time"])] == answer
        elif (blanks := matches(common_chat.TIMES, question)) is not None:
            spans = [tuple(map(frame, span.split("-"))) for span in answer.split(", ")]
            inside = {at for start, end in spans for at in range(start, end)}
            assert inside == {at for at, name in enumerate(frames) if name == blanks["action"]}
        elif (blanks := matches(common_chat.HOW_OFTEN, question)) is not None:
            assert int(answer) == runs.count(blanks["action"])
        elif question in common_chat.DIFFERENT:
            assert int(answer) == len(set(runs))
        elif question in common_chat.FIRST:
            assert answer == actions[0]
        elif question in common_chat.LAST:
            assert answer == actions[-1]
        elif question in common_chat.IN_TURN:
            assert answer.split(", then ") == actions
        elif (blanks := matches(common_chat.AFTER, question)) is not None:
            assert [pair for pair in pairwise(actions) if pair[0] == blanks["action"]] == [(blanks["action"], answer)]
        else:
            blanks = matches(common_chat.BEFORE, question)
            assert blanks is not None, question
            assert [pair for pair in pairwise(actions) if pair[1] == blanks["action"]] == [(answer, blanks["action"])]


def test_all_kinds_and_wordings_come_up() -> None:
    rows = [row for case in range(300) for row in make_chat(f"{case}", segments_of(case), "tea", background=("SIL",))]
    assert {row["kind"] for row in rows} == {"segments", "at", "order", "counts", "anticipation"}
    forms = ("MOMENTS", "SPANS", "TIMES", "AFTER", "BEFORE", "FIRST", "LAST", "IN_TURN", "HOW_OFTEN", "DIFFERENT")
    for form in forms:
        for wording in getattr(common_chat, form):
            assert any(matches((wording,), row["question"]) is not None for row in rows), wording


def test_the_key_alone_decides_what_is_drawn() -> None:
    segments = segments_of(11)
    one, two = (make_chat("a", segments, "tea") for _ in range(2))
    assert one == two
    assert make_chat("b", segments, "tea") != one


def test_short_videos_and_none() -> None:
    assert make_chat("a", [], "tea") == []
    only = [{"start": 0, "end": 9, "label": 0, "name": "SIL"}]
    assert [row["kind"] for row in make_chat("a", only, "tea", background=("SIL",))] == ["segments", "at", "at"]
    assert all(_LINE.fullmatch(line) for line in lines_of(segments_of(9)).splitlines())
