"""Records of questions and answers about one video, checked: what was damaged after its shard was made is told as
unusable.

A record has `chat`, questions that stand alone, each with its answer; their times are written `<t:F>`
(vlm.data.time_axis), and of a video that is cut up the first is of the kind "segments". Or it has `conversations`,
turns of one dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vlm.data.chat_templates import in_front, pairs
from vlm.data.dialogue_records import turns_of
from vlm.data.templates import PLACE
from vlm.data.time_axis import TimeAxis
from vlm.data.video import DecodeError
from vlm.types import Record, Span

Side = Literal["before", "after", "front", "given"]
SEGMENTS = "segments"

_COLUMNS = ("kind", "question", "answer")
_LISTS = (SEGMENTS, "anticipation")  # kinds whose texts list segments, a line each
_NO_PLACE = re.compile(r"(?:^|(?<=video: ))(\d+)-\1 .*(?:\n|$)", re.MULTILINE)  # one too short to have a place


class Asked(NamedTuple):
    """A question of a record, or one of its dialogue, with its answer."""

    kind: str
    question: str
    answer: str | None
    id: str = ""  # as its dataset calls the question


class Spoken(NamedTuple):
    """What is said of a record in one row."""

    system: str
    asked: list[Asked]

    @property
    def pairs(self) -> list[tuple[str, str | None]]:
        return [(one.question, one.answer) for one in self.asked]

    @property
    def shows(self) -> bool:
        """Whether a video has a place in it."""
        return any(PLACE in one.question for one in self.asked)


def has_chat(record: Record) -> bool:
    """Whether its questions stand alone."""
    return "chat" in record.annotation


def questions_of(record: Record, places: int) -> list[Asked]:
    """The questions of a record, their times as borders of so many places of its video; DecodeError where damaged."""
    rows: Any = record.annotation["chat"]
    good = isinstance(rows, list) and all(
        isinstance(row, Mapping) and all(isinstance(row.get(name), str) for name in _COLUMNS) for row in rows
    )
    if not good or not rows:
        raise DecodeError(f"record {record.key!r} of {record.shard}: its questions (chat) are damaged")
    told = any("<t:" in row[name] for row in rows for name in ("question", "answer"))
    axis = TimeAxis(num_frames_of(record) if told else 1, places)
    asked = []
    for row in rows:
        question, answer = axis.render(row["question"]), axis.render(row["answer"])
        if row["kind"] in _LISTS:
            question, answer = (_NO_PLACE.sub("", text).removesuffix("\n") for text in (question, answer))
        asked.append(Asked(row["kind"], question, answer, str(row.get("id", ""))))
    return asked


def dialogue_of(record: Record, system: str) -> Spoken:
    """The dialogue of a record; DecodeError where it is damaged, or its video has several places."""
    where = f"record {record.key!r} of {record.shard}"
    if "conversations" not in record.annotation:
        raise DecodeError(f"{where} has no questions (chat) and no dialogue (conversations)")
    try:
        system, found = pairs(turns_of(record), system)
    except ValueError as error:
        raise DecodeError(f"{where}: {error}") from error
    if sum(question.count(PLACE) for question, _ in found) > 1:
        raise DecodeError(f"{where}: its dialogue has several places for a video; one is understood")
    return Spoken(system, [Asked("", question, answer) for question, answer in found])


def num_frames_of(record: Record) -> int:
    """Frames of a record's video, as they were counted or are stated; DecodeError where neither is known."""
    if record.num_frames > 0:
        return record.num_frames
    stated = record.annotation.get("num_frames")
    if isinstance(stated, int) and stated > 0:
        return stated
    raise DecodeError(
        f"record {record.key!r} of {record.shard}: how many frames its video has is not known, so times of its "
        "questions have no place in it. Mend: make its shards with the videos, checked (without --no-check)"
    )


def segments_of(record: Record) -> tuple[Span, ...]:
    """What happens when in its video; DecodeError where that is missing or damaged."""
    rows: Any = record.annotation.get("segments")
    try:
        return tuple((int(row["start"]), int(row["end"]), str(row["name"])) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise DecodeError(f"record {record.key!r} of {record.shard}: its segments are missing or damaged") from error


def placed(question: str, side: Side) -> str:
    """A question with its video at a side of it, where it has none or has it at a side; "given": as it is, and where it
    has none, after the question."""
    before, place, after = question.partition(PLACE)
    if (side == "given" and place) or (before.strip() and after.strip()):
        return question
    bare = f"{before}{after}".strip("\n") if place else question
    if side == "front":
        return in_front(bare)
    return f"{PLACE}\n{bare}" if side == "before" else f"{bare}\n{PLACE}"


def with_video(asked: Sequence[Asked], side: Side) -> list[Asked]:
    """A dialogue whose video stands at a side of the question that has it."""
    return [one._replace(question=placed(one.question, side)) if PLACE in one.question else one for one in asked]
