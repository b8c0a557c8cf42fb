"""Records of captions and dialogues, checked: what was damaged after its shard was made is told as unusable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlm.data.shard_reencode import is_still
from vlm.data.templates import PLACE, Media, TemplateName, Turn, dialogue
from vlm.data.video import DecodeError
from vlm.data.video_rows import has_video
from vlm.types import Example, Prompt, Record, Row


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


def caption_of(record: Record) -> str:
    """Its caption; DecodeError where that is none."""
    words: Any = record.annotation["caption"]
    if not isinstance(words, str):
        raise DecodeError(f"record {record.key!r} of {record.shard}: its caption is {words!r:.60}, not a text")
    return words


def is_image(record: Record) -> bool:
    """Whether a record is a picture; where pixels are not read, as the index has it: one frame that is on show for no
    time."""
    if record.video is not None:
        return is_still(record.video)
    return record.num_frames == 1 and record.fps == 0


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


def conversed(
    turns: Sequence[tuple[str, str | None]],
    example: Example,
    template: TemplateName,
    system: str,
    row_of: Callable[[Prompt, dict[str, int]], Row],
) -> Example:
    """The example with the prompt of a dialogue about its video, up to the answer to the last of these turns."""
    said: list[Turn] = []
    for question, answer in turns:
        lead = "" if said or not has_video(example) else f"{PLACE}\n"
        said.append({"from": "human", "value": f"{lead}{question.replace(PLACE, '')}"})
        said.append({"from": "gpt", "value": answer or ""})
    spoken = dialogue(said, template, system, Media(*example.told) if has_video(example) else None)
    counters: dict[str, int] = {}
    row = row_of(spoken.prompt[: spoken.answers[-1]], counters)
    return replace(example, prompts=(row,), counters=counters)
