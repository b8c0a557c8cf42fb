"""Tables of questions: CSV and JSON lines, read with errors that name file, row and column.

Rows are counted as an editor shows them: the header is row 1. A byte order mark, CRLF and line ends inside quotes are
legal; cells stay text ("NA" and "None" are words, ids with eleven digits stay as they are).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.sources.common import read_text
from vlm.types import Rejected, UserError


class BadCell(Exception):
    """A cell that no question can be made of. The message names the column."""


class TableRow(NamedTuple):
    """One row of a CSV file."""

    where: str  # file and row
    cells: dict[str, str]  # by column


def read_csv(file: Path, columns: Sequence[str], either: Sequence[str] = ()) -> Iterator[TableRow | Rejected]:
    """The rows of a CSV file with a header; a row with too few or too many cells is rejected.

    Args:
        columns: which must be there; others may be.
        either: one of these must be there too (two names of one column); it is given under the first name.

    Raises UserError for a file without one of the columns, or with quotes that do not close.
    """
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    header: list[str] = []
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
            break
        number, first, line = number + 1, line, reader.line_num + 1
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _header(file, cells, columns, either)
            continue
        where = f"{file} row {number}" + ("" if first == number else f" (line {first})")
        if len(cells) != len(header):
            yield Rejected(f"{file.name}:{number}", f"{where}: {_wrong_count(cells, header)}", str(file))
        else:
            yield TableRow(where, dict(zip(header, cells)))
    if number < 2:
        raise UserError(f"{file} has a header and no rows: it was cut short; download it again")


def _header(file: Path, cells: Sequence[str], columns: Sequence[str], either: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
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


def _wrong_count(cells: Sequence[str], header: Sequence[str]) -> str:
    if len(cells) > len(header):
        return f"{len(cells)} cells, but {len(header)} columns: a comma inside of a text must be quoted"
    return (
        f"{len(cells)} cells, but {len(header)} columns: the row ends in column {header[len(cells) - 1]!r} "
        f"({cells[-1][:40]!r}) and has no {header[len(cells)]!r}: it was cut"
    )


def read_json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]] | Rejected]:
    """(file and row, object) of each line of a JSON-lines file; blank lines are passed over, broken ones rejected."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file} row {number}"
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            yield Rejected(
                f"{file.name}:{number}",
                f"{where}, column {error.colno}: not JSON ({error.msg}): the line is damaged or was cut",
                str(file),
            )
            continue
        if not isinstance(content, dict):
            yield Rejected(f"{file.name}:{number}", f"{where}: {line.strip()[:60]!r} is not an object", str(file))
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
