"""What a model that segments a video writes, read strictly.

    answer = line *( newline line )
    line   = border "-" border " " label *blank
    border = "0" / ( "1" … "9" ) *( "0" … "9" )
    label  = word *( " " word )

A word is anything without blanks that does not begin as a line does; blanks around the whole answer are not part of it.
Borders are those of the time axis, 0 … T; each line begins before it ends, and not before the line above ends. Nothing
else may stand in an answer: one line that is not of this form, and nothing of it counts.
"""

from __future__ import annotations

import re

from vlm.types import Span

_LINE = re.compile(r"(0|[1-9][0-9]*)-(0|[1-9][0-9]*) (\S+(?: \S+)*)\s*")
_SECOND = re.compile(r"(?:^| )[0-9]+-[0-9]")


def read_answer(text: str, places: int) -> tuple[list[Span], str]:
    """What an answer says, in borders of the time axis (0 … `places`), and "".

    Labels come as classes are called, "_" for each blank: "take cup" is `take_cup`. Where the answer is not of the
    grammar, nothing, and a sentence that names the line and says why.
    """
    spans: list[Span] = []
    if not text.strip():
        return [], "the answer is empty"
    before = 0
    for number, line in enumerate(text.strip().split("\n"), 1):
        found = _LINE.fullmatch(line)
        if found is None:
            return [], f"line {number}: {_shown(line)} is not of the form `start-end label`"
        if _SECOND.search(found[3]):
            return [], f"line {number}: {_shown(line)} has more than one segment"
        most = len(str(places))
        if max(len(found[1]), len(found[2])) > most or max(int(found[1]), int(found[2])) > places:
            return [], f"line {number}: {_shown(line)} goes beyond {places}, where the video ends"
        start, end = int(found[1]), int(found[2])
        if start >= end:
            return [], f"line {number}: {_shown(line)} does not begin before it ends"
        if start < before:
            return [], f"line {number}: {_shown(line)} begins before {before}, where the line above ends"
        spans.append((start, end, class_name(found[3])))
        before = end
    return spans, ""


def _shown(line: str) -> str:
    return repr(line) if len(line) <= 60 else f"{line[:60]!r}…"


def class_name(label: str) -> str:
    """A label as classes are called: "_" for each blank."""
    return label.replace(" ", "_")
