"""Tables of questions and captions: CSV, TSV and JSON lines, read with errors that name file, row and column.

Rows are read one after another: a table of millions is never in memory. They are counted as an editor shows them: the
header is row 1. A byte order mark, CRLF and line ends inside quotes are legal; cells stay text ("NA" and "None" are
words, ids with eleven digits stay as they are).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vlm.types import Rejected, UserError

_STRAY = re.compile("[\udc80-\udcff]")  # how bytes that are no UTF-8 come out of `open_text`
_MOST_LINES = 64  # of one cell of a TSV


class BadCell(Exception):
    """A cell that no record can be made of. The message names the column."""


class TableRow(NamedTuple):
    """One row of a table."""

    where: str  # file and row
    cells: dict[str, str]  # by column


# Files ------------------------------------------------------------------------------------------


@contextmanager
def open_text(file: Path, newline: str = "") -> Iterator[TextIO]:
    """An annotation file to be read bit by bit; bytes that are no UTF-8 come as surrogates (`not_utf8` finds them).

    Raises UserError for a file that cannot be read or is empty.
    """
    try:
        binary = file.open("rb")
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if not size:
        binary.close()
        raise UserError(f"{file} is empty (0 bytes): it was not downloaded or not written to the end")
    with io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline) as text:
        yield text


def not_utf8(text: str) -> str:
    """What is wrong with a text from `open_text` that holds bytes which are no UTF-8, else an empty text."""
    found = _STRAY.search(text)
    if found is None:
        return ""
    around = text[max(0, found.start() - 20) : found.start() + 20].encode("utf-8", "surrogateescape")
    as_latin = around.decode("latin-1")
    return f"{str(around)[1:]} is not UTF-8 (as Latin-1 it would be {as_latin!r}): convert the file"


def read_csv(file: Path, columns: Sequence[str], either: Sequence[str] = ()) -> Iterator[TableRow | Rejected]:
    """The rows of a CSV file with a header; a row with too few or too many cells, or not in UTF-8, is rejected.

    Args:
        columns: which must be there; others may be.
        either: one of these must be there too (two names of one column); it is given under the first name.

    Raises UserError for a file without one of the columns, or with quotes that do not close.
    """
    with open_text(file) as text:
        yield from _rows(file, "comma", _csv_rows(file, text), columns, either)


def read_tsv(file: Path, columns: Sequence[str], either: Sequence[str] = ()) -> Iterator[TableRow | Rejected]:
    """The rows of a file with tabs between cells, as `read_csv`. Cells may be quoted as in CSV, or hold plain quotes:
    one that does not close is a letter like others, and the row ends with its line."""
    with open_text(file) as text:
        yield from _rows(file, "tab", _tsv_rows(text), columns, either)


def _csv_rows(file: Path, text: TextIO) -> Iterator[tuple[int, int, list[str]]]:
    """(row, its first line, cells) of every row, blank ones too."""
    reader = csv.reader(text, strict=True)
    number, line = 0, 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{file} row {number + 1} (lines {line} to {reader.line_num}): {error}: most often a quote that does "
                "not close there, so that the rows behind it cannot be told apart; mend or download the file"
            ) from error
        if cells is None:
            return
        number, first, line = number + 1, line, reader.line_num + 1
        yield number, first, cells


def _tsv_rows(text: TextIO) -> Iterator[tuple[int, int, list[str]]]:
    """(row, its first line, cells) of every row, blank ones too."""
    ahead: deque[str] = deque()  # lines that were looked at to see whether a quote closes there
    number, line = 0, 1
    while first := ahead.popleft() if ahead else text.readline():
        lines = [first]
        cells = _quoted_cells(first) if '"' in first else first.rstrip("\r\n").split("\t")
        while cells is None and len(lines) < _MOST_LINES and (more := ahead.popleft() if ahead else text.readline()):
            lines.append(more)
            cells = _quoted_cells("".join(lines)) if '"' in more else None
        if cells is None:
            ahead.extendleft(reversed(lines[1:]))
            lines, cells = [first], first.rstrip("\r\n").split("\t")
        number += 1
        yield number, line, cells
        line += len(lines)


def _quoted_cells(row: str) -> list[str] | None:
    """The cells of one row with quotes in it; None where a quote does not close, or not at the end of a cell."""
    try:
        rows = list(csv.reader(io.StringIO(row, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _rows(
    file: Path,
    separator: str,
    rows: Iterator[tuple[int, int, list[str]]],
    columns: Sequence[str],
    either: Sequence[str],
) -> Iterator[TableRow | Rejected]:
    header: list[str] = []
    number = 0
    for number, first, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _header(file, cells, columns, either)
            continue
        where = f"{file} row {number}" + ("" if first == number else f" (line {first})")
        stray = next((place for place, cell in enumerate(cells) if not_utf8(cell)), None)
        if len(cells) != len(header):
            yield Rejected(f"{file.name}:{number}", f"{where}: {_wrong_count(cells, header, separator)}", str(file))
        elif stray is not None:
            reason = f"{where}, column {header[stray]!r}: {not_utf8(cells[stray])}"
            yield Rejected(f"{file.name}:{number}", reason, str(file))
        else:
            yield TableRow(where, dict(zip(header, cells)))
    if not header:
        raise UserError(f"{file} is empty (blank lines only): it was not downloaded or not written to the end")
    if number < 2:
        raise UserError(f"{file} has a header and no rows: it was cut short; download it again")


def _header(file: Path, cells: Sequence[str], columns: Sequence[str], either: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if not_utf8("".join(cells)):
        raise UserError(f"{file} is not UTF-8 text: its first row is {cells!r:.60}; is it an annotation file?")
    for name in {name for name in header if name and header.count(name) > 1}:
        raise UserError(f"{file} row 1: two columns have the name {name!r}, so it is not known which one counts")
    there = [name for name in either if name in header]
    missing = [name for name in columns if name not in header]
    if either and not there:
        missing.insert(0, " or ".join(either))
    if missing:
        near = difflib.get_close_matches(missing[0], header, 1)
        raise UserError(
            f"{file} row 1: no column {', '.join(map(repr, missing))}"
            f"{f' (nearest: {near[0]!r})' if near else ''}; there are {', '.join(header)}: is it the right file?"
        )
    return [either[0] if there and name == there[0] else name for name in header]


def _wrong_count(cells: Sequence[str], header: Sequence[str], separator: str) -> str:
    if len(cells) > len(header):
        return f"{len(cells)} cells, but {len(header)} columns: a {separator} inside of a text must be quoted"
    return (
        f"{len(cells)} cells, but {len(header)} columns: the row ends in column {header[len(cells) - 1]!r} "
        f"({cells[-1][:40]!r}) and has no {header[len(cells)]!r}: it was cut"
    )


def read_json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]] | Rejected]:
    """(file and row, object) of each line of a JSON-lines file; blank lines are passed over, broken ones rejected."""
    with open_text(file, "\n") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            where, key = f"{file} row {number}", f"{file.name}:{number}"
            if not_utf8(line):
                yield Rejected(key, f"{where}: {not_utf8(line)}", str(file))
                continue
            try:
                content = json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                reason = f"{where}, column {error.colno}: not JSON ({error.msg}): the line is damaged or was cut"
                yield Rejected(key, reason, str(file))
                continue
            if not isinstance(content, dict):
                yield Rejected(key, f"{where}: {line.strip()[:60]!r} is not an object", str(file))
                continue
            yield where, content


# Cells ------------------------------------------------------------------------------------------


def text_of(cells: dict[str, Any], column: str) -> str:
    """A text that is not empty, blanks around it kept."""
    value = cells.get(column)
    if not isinstance(value, str):
        raise BadCell(f"column {column!r}: " + ("is missing" if value is None else f"{value!r:.60} is not a text"))
    if not value.strip():
        raise BadCell(f"column {column!r}: is empty")
    return value


def id_of(cells: dict[str, Any], column: str) -> str:
    """An id: a text or a whole number."""
    value = cells.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(cells, column).strip()


def index_of(cells: dict[str, Any], column: str, count: int) -> int:
    """A whole number from 0 to `count` - 1, as a number or as text."""
    value = cells.get(column)
    found = str(value).strip() if value is not None and not isinstance(value, bool | float) else ""
    if not found:
        raise BadCell(f"column {column!r}: " + ("is empty" if value in (None, "") else f"{value!r:.60} is no index"))
    if not found.isascii() or not found.isdigit() or int(found) >= count:
        raise BadCell(f"column {column!r}: {value!r:.60} is not an index from 0 to {count - 1}")
    return int(found)


def seconds_of(cells: dict[str, Any], column: str) -> float:
    """A time in seconds, 0 or more."""
    value = cells.get(column)
    try:
        seconds = float(value) if not isinstance(value, bool) else -1.0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise BadCell(f"column {column!r}: {value!r:.60} is not a time in seconds")
    return seconds
