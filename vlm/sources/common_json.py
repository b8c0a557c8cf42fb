"""JSON files of a million items, read item after item: in memory are a piece of the file and one item."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, TextIO

from vlm.sources.common_tables import not_utf8, open_text, read_json_lines
from vlm.types import Rejected, UserError

_CHUNK = 1 << 20  # letters read at a time; more while an item is longer
_CUT = 16  # an error so near to the end of what was read may be due to the cut: no literal or escape is longer
_BLANKS = re.compile(r"[ \t\r\n]*")


def read_items(file: Path, names: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]] | Rejected]:
    """(file and item, object) of each object of a JSON list, or of JSON lines (`.jsonl`), counted from 1.

    Args:
        names: the list may also be the value of one of these names of an object.

    Items that are no objects, or are not in UTF-8, are rejected. Raises UserError, naming line and column, for what is
    not JSON: what follows the damage cannot be told apart.
    """
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        yield from read_json_lines(file)
        return
    with open_text(file) as text:
        reader = _Reader(file, text)
        number = 0
        for number, (item, stray) in enumerate(_elements(reader, names), 1):
            where, key = f"{file} item {number}", f"{file.name}:{number}"
            if stray:
                yield Rejected(key, f"{where}: {stray}", str(file))
            elif not isinstance(item, dict):
                yield Rejected(key, f"{where}: {item!r:.60} is not an object", str(file))
            else:
                yield where, item
        if not number:
            raise UserError(f"{file} is a list without items: it was not written to the end")


def _elements(reader: _Reader, names: Collection[str]) -> Iterator[tuple[Any, str]]:
    """(element, what is wrong with its letters) of the list."""
    if reader.peek() == "{" and names:
        reader.take("{")
        found = False
        while reader.peek() != "}":
            name, _ = reader.value()
            reader.take(":")
            if name in names and reader.peek() == "[":
                if found:
                    raise UserError(f"{reader.file}: a second list {name!r}: it is not known which one counts")
                found = True
                yield from _list(reader)
            else:
                reader.value()
            reader.comma_before("}")
        reader.take("}")
        if not found:
            wanted = " or ".join(map(repr, names))
            raise UserError(f"{reader.file} is an object without the list {wanted}: is it the right file?")
    elif reader.peek() == "[":
        yield from _list(reader)
    else:
        also = f", or an object with the list {' or '.join(map(repr, names))}" if names else ""
        raise UserError(f"{reader.file} must be a JSON list{also}; it begins with {reader.peek()!r}")
    if reader.peek():
        raise reader.damage("nothing may follow the end", reader.place)


def _list(reader: _Reader) -> Iterator[tuple[Any, str]]:
    reader.take("[")
    while reader.peek() != "]":
        yield reader.value()
        reader.comma_before("]")
    reader.take("]")


class _Reader:
    """The letters of a file from `place` on, as many as are needed."""

    def __init__(self, file: Path, text: TextIO) -> None:
        self.file, self.text = file, text
        self.buffer, self.place, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the first letter of the buffer

    def peek(self) -> str:
        """The next letter that is no blank; empty at the end of the file."""
        while True:
            found = _BLANKS.match(self.buffer, self.place)
            self.place = found.end() if found else self.place
            if self.place < len(self.buffer):
                return self.buffer[self.place]
            if self.ended:
                return ""
            self._read(_CHUNK)

    def take(self, letter: str) -> None:
        if self.peek() != letter:
            raise self.damage(f"{letter!r} is expected", self.place)
        self.place += 1

    def comma_before(self, end: str) -> None:
        """The comma after an element; there is none before the end, and none that nothing follows."""
        if self.peek() == end:
            return
        self.take(",")
        if self.peek() == end:
            raise self.damage("nothing follows the comma", self.place)

    def value(self) -> tuple[Any, str]:
        """(the next value, what is wrong with its letters)."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.place)
            except JSONDecodeError as error:
                certain = error.pos + _CUT < len(self.buffer) and not error.msg.startswith("Unterminated string")
                if certain or self.ended:
                    raise self.damage(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.damage("values lie too deep in one another", self.place) from error
            except ValueError as error:
                raise self.damage("a number of thousands of digits", self.place) from error
            else:
                if end < len(self.buffer) or self.ended:  # else it may be a number that goes on
                    stray = not_utf8(self.buffer[self.place : end])
                    self.place = end
                    return value, stray
            self._read(size)
            size *= 2

    def damage(self, message: str, place: int) -> UserError:
        line, column = self._position(place)
        return UserError(
            f"{self.file} is not JSON (line {line}, column {column}: {message}): it is damaged or was cut short; "
            "download it again"
        )

    def _position(self, place: int) -> tuple[int, int]:
        lines = self.buffer.count("\n", 0, place)
        if not lines:
            return self.line, self.column + place
        return self.line + lines, place - self.buffer.rindex("\n", 0, place)

    def _read(self, size: int) -> None:
        """Drop what is done with and read on."""
        self.line, self.column = self._position(self.place)
        more = self.text.read(size)
        self.buffer, self.place, self.ended = self.buffer[self.place :] + more, 0, not more


_DECODER = JSONDecoder()
