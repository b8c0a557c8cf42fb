"""Records of captions and dialogues, checked: what was damaged after its shard was made is told as unusable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm.data.templates import PLACE, Turn
from vlm.data.video import DecodeError
from vlm.types import Example, Record


def turns_of(record: Record) -> Sequence[Turn]:
    """Its turns; DecodeError where there is nothing to learn of them."""
    turns: Any = record.annotation["conversations"]
    good = isinstance(turns, list) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("value"), str)
        and turn.get("from") in ("human", "gpt", "system")
        for turn in turns
    )
    if not good or not any(turn["from"] == "gpt" for turn in turns):
        raise DecodeError(f"record {record.key!r} of {record.shard}: its conversations are damaged, or nobody answers")
    return turns


def text_alone(record: Record) -> tuple[Example, None]:
    """(an example without video, nothing that is to be written of one); DecodeError where a text has a place for it."""
    if not is_text(record):
        raise DecodeError(f"record {record.key!r} of {record.shard} has no video, but its text has a place for one")
    return Example(key=record.key), None


def is_text(record: Record) -> bool:
    """Whether a record is a dialogue that no video belongs to."""
    spoken = record.annotation.get("conversations")
    return (
        "caption" not in record.annotation
        and isinstance(spoken, list)
        and not any(PLACE in str(turn.get("value")) for turn in spoken if isinstance(turn, Mapping))
    )
