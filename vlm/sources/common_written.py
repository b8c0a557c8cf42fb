"""Questions and answers about a video that a language model wrote, as plain text (`Format 1:`, `Q:`, `A:`).

    Format 1:
    Q: Can you describe the segments in the video?
    A:
    1 - 30 SIL
        The person waits.
    Format 2:
    Q: What is happening between 30 and 150?
    A: He takes a bowl with 2 hands.

Frames are counted from 1 there, and two segments share the frame in which they meet, as in the labels. What is told as
a time becomes `<t:F>` (`vlm/sources/common_chat.py`), other numbers stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.sources.common import read_text
from vlm.sources.common_chat import Row, time_of
from vlm.types import UserError

_FORMAT = re.compile(r"\s*Format\s*\d+\s*:?\s*", re.IGNORECASE)
_QUESTION = re.compile(r"\s*(?:\d+\s*[.)]\s*)?Q(?:\s*\d+)?\s*[:.]\s*(.*)")
_ANSWER = re.compile(r"\s*A(?:\s*\d+)?\s*:\s*(.*)")
# a number of ten digits or more is no frame of a video
_RANGE = re.compile(r"(\b(?:frames?|between|from|segments?)\s+(?:frames?\s+)?)?(?<![\d.])(\d{1,9})"
                    r"(\s*(?:-|–|to|and)\s*)(?:frames?\s+)?(\d{1,9})(?![\d.]*\d)", re.IGNORECASE)  # fmt: skip
_FRAME = re.compile(r"(\bframes?\s+(?:number\s+)?)(\d{1,9})\b", re.IGNORECASE)
_MOMENT = re.compile(r"(\b(?:at|around|until|after|before|from|since)\s+)(\d{1,9})\b(?![\d.]*\d)", re.IGNORECASE)
_LABEL = re.compile(r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])")


def is_written(file: Path) -> bool:
    """Whether a file holds questions, and not labels."""
    try:
        return any(_QUESTION.fullmatch(line) for line in read_text(file).splitlines())
    except UserError:
        return False


def read_written(file: Path, segments: Sequence[Mapping[str, Any]]) -> tuple[list[Row], tuple[str, ...]]:
    """(rows of kind "written", warnings) of a file about the video of these segments."""
    try:
        text = read_text(file)
    except UserError as error:
        return [], (str(error),)
    pairs, warnings = _parse(file, text)
    ends = {part["end"]: part["end"] for part in segments}
    rows = [
        {"kind": "written", "question": with_times(question, ends), "answer": with_times(answer, ends)}
        for question, answer in pairs
    ]
    return rows, tuple(warnings)


def _parse(file: Path, text: str) -> tuple[list[tuple[str, str]], list[str]]:
    pairs: list[tuple[str, str]] = []
    warnings: list[str] = []
    asked: tuple[int, str] | None = None
    lines: list[str] = []

    def close() -> None:
        answer = "\n".join(line for line in lines if line)
        if asked is None:
            warnings.extend([f"{file}: {answer!r:.60} stands before the first question"] if answer else [])
        elif not asked[1] or not answer:
            warnings.append(f"{file} row {asked[0]}: {asked[1]!r:.60} has no {'answer' if asked[1] else 'question'}")
        else:
            pairs.append((asked[1], answer))

    for number, line in enumerate(text.splitlines(), 1):
        question, answer = _QUESTION.fullmatch(line), _ANSWER.fullmatch(line)
        if question is not None:
            close()
            asked, lines = (number, question[1].strip()), []
        elif not _FORMAT.fullmatch(line):
            lines.append((answer[1] if answer else line).strip())
    close()
    if not pairs:
        warnings.append(f"{file}: has no questions (lines `Q: …` and `A: …`)")
    return pairs, warnings


def with_times(text: str, ends: Mapping[int, int], scale: int = 1) -> str:
    """A text with `<t:F>` for what it tells of frames, and blanks for what joins the words of labels.

    A range is of frames where a line begins with it, where a word such as "between" stands before it, or where it names
    an end of a segment; a single number where "frame" stands before it, or "at" and the like before such an end.

    Args:
        ends: how the end of a segment is told -> that end. A frame that two segments share is the former's.
        scale: frames that a step of other numbers is.
    """

    def border(told: int, first: bool) -> str:
        return time_of(ends.get(told, max(0, told * scale - first)))

    def of_range(found: re.Match[str]) -> str:
        lead, first, between, last = found[1] or "", int(found[2]), found[3], int(found[4])
        begins_line = not found.string[: found.start()].rpartition("\n")[2].strip()
        if not 0 <= first <= last or not (lead or begins_line or last in ends):
            return found[0]
        if "-" in between or "–" in between:
            between = "-"
        return f"{lead}{border(first, True)}{between}{border(last, False)}"

    def of_frame(found: re.Match[str]) -> str:
        return f"{found[1]}{time_of(max(0, int(found[2]) * scale - 1))}"

    def of_moment(found: re.Match[str]) -> str:
        return f"{found[1]}{border(int(found[2]), True)}" if int(found[2]) in ends else found[0]

    text = _MOMENT.sub(of_moment, _FRAME.sub(of_frame, _RANGE.sub(of_range, text)))
    return _LABEL.sub(" ", text)
