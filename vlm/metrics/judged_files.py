"""Predictions that are to be judged, from a run's rows and from the files of Video-ChatGPT's scripts, and back.

The published forms are JSON lists of objects, named here by what they hold:

- general: {video_name, Q, A, pred} (correctness, detail, context and temporal understanding);
- consistency: {video_name, Q1, Q2, A, pred1, pred2};
- qa: {id, question, answer, pred} (zero-shot question answering, as the published inference writes it; the published
  judge of the same reads the general form).

A form is known by its columns. In a run (`Writing` rows) two texts that go together are two rows of one record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.metrics.judged import Item
from vlm.types import UserError, Writing


class _Form(NamedTuple):
    video: str
    questions: tuple[str, ...]
    answer: str
    predictions: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.video, *self.questions, self.answer, *self.predictions)


FORMS = {
    "general": _Form("video_name", ("Q",), "A", ("pred",)),
    "consistency": _Form("video_name", ("Q1", "Q2"), "A", ("pred1", "pred2")),
    "qa": _Form("id", ("question",), "answer", ("pred",)),
}


# Published files --------------------------------------------------------------------------------------


def read_published(file: Path) -> list[Item]:
    """The items of a published prediction file, a JSON list or JSON lines.

    Keys are `video_0`, `video_1`, … as the published judges count the rows of a video.

    Raises:
        UserError: the file cannot be read, is empty, or a row (with its number) is of no form, of another than the
            first, or lacks a text.
    """
    rows = _rows(file)
    if not rows:
        raise UserError(f"{file}: holds no row")
    form = _form_of(rows[0], f"{file}: row 1")
    counts: Counter[str] = Counter()
    items = []
    for number, row in enumerate(rows, 1):
        where = f"{file}: row {number}"
        _check(row, form, where)
        video = str(row[form.video])
        items.append(
            Item(
                key=f"{video}_{counts[video]}",
                questions=tuple(row[name] for name in form.questions),
                answer=row[form.answer],
                predictions=tuple(row[name] for name in form.predictions),
                video=video,
                id=str(row.get("id", row.get("question_id", ""))),
            )
        )
        counts[video] += 1
    return items


def _rows(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8 text") from error
    lines = text.splitlines() if text.lstrip().startswith("{") else [text]
    rows: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            line_number = number if len(lines) > 1 else error.lineno
            raise UserError(
                f"{file}: line {line_number} is not JSON ({error.msg}): it is damaged or cut short"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number} cannot be read ({error})") from error
        rows += value if isinstance(value, list) else [value]
    return rows


def _form_of(row: Any, where: str) -> _Form:
    if isinstance(row, dict):
        for form in FORMS.values():
            if set(form.columns) <= row.keys():
                return form
        if "Q" in row or "question" in row or "Q1" in row:
            hint = (
                "it has no prediction yet"
                if not any(name.startswith("pred") for name in row)
                else "columns are missing"
            )
            raise UserError(f"{where} has the columns {', '.join(map(str, row))}: {hint}; {_said()}")
    raise UserError(f"{where} is {repr(row)[:60]}, none of the published forms; {_said()}")


def _said() -> str:
    return "wanted is " + " or ".join(f"{{{', '.join(form.columns)}}}" for form in FORMS.values())


def _check(row: Any, form: _Form, where: str) -> None:
    if not isinstance(row, dict) or not set(form.columns) <= row.keys():
        raise UserError(f"{where} is not of the form {{{', '.join(form.columns)}}} of the first row")
    for name in form.columns[1:]:
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name} is {repr(row[name])[:60]}, not a text")
    if not isinstance(row[form.video], (str, int)):
        raise UserError(f"{where}: {form.video} is {repr(row[form.video])[:60]}, not a name")


def published_rows(items: Sequence[Item], form: str) -> list[dict[str, str]]:
    """Items as rows of a published form, for others' judges to read.

    Raises:
        UserError: there is no such form, or an item has not as many questions as it holds.
    """
    if form not in FORMS:
        raise UserError(f"there is no form {form!r} of predictions: there are {', '.join(FORMS)}")
    columns = FORMS[form]
    rows = []
    for item in items:
        if len(item.questions) != len(columns.questions):
            raise UserError(
                f"{item.key}: {len(item.questions)} questions, but the form {form} holds {len(columns.questions)}"
            )
        name = item.id or item.key if form == "qa" else item.video or item.key
        texts = (*item.questions, item.answer, *item.predictions)
        rows.append({columns.video: name} | dict(zip(columns.columns[1:], texts, strict=True)))
    return rows


# Rows of a run ----------------------------------------------------------------------------------------

KINDS: Mapping[str, tuple[str, ...]] = {
    "general": ("correctness", "detail", "context"),
    "temporal": ("temporal",),
    "consistency": ("consistency",),
    "qa": ("qa",),
}
"""What rows of these kinds are judged by, where a run says its rows' kinds by these names."""


def items_of_run(writings: Sequence[Writing], *, pairs: bool) -> tuple[list[Item], list[str]]:
    """(items in the order of the rows, keys of rows that nothing is known to be right for).

    Args:
        pairs: two rows make an item: of the texts of one record (`Writing.video`) those whose ids are `x/1` and `x/2`;
            where they have no such ids, one after the other, those that have the same reference.

    Raises:
        UserError: a row of a pair has no partner.
    """
    known = [row for row in writings if row.references]
    without = [row.key for row in writings if not row.references]
    if pairs:
        return [_item(several) for several in _paired(known)], without
    return [_item((row,)) for row in known], without


def _paired(writings: Sequence[Writing]) -> Iterator[tuple[Writing, Writing]]:
    waiting: dict[tuple[str, str], Writing] = {}
    for row in writings:
        name = (row.video, _pair_of(row))
        if name in waiting:
            yield waiting.pop(name), row
        else:
            waiting[name] = row
    for (video, common), row in waiting.items():
        raise UserError(
            f"{row.key}: no other text of {video!r} goes with it ({common[:60]!r}); consistency is judged by two "
            "questions of one record, with ids that end in /1 and /2 or with the same answer"
        )


def _pair_of(row: Writing) -> str:
    """What the two of a pair have in common: their id but for its last part, 1 or 2; without such ids, the answer."""
    stem, slash, last = row.id.rpartition("/")
    return stem if slash and last in ("1", "2") else _answer(row)


def _item(rows: Sequence[Writing]) -> Item:
    return Item(
        key=rows[0].key,
        questions=tuple(row.question for row in rows),
        answer=_answer(rows[0]),
        predictions=tuple(row.text for row in rows),
        video=rows[0].video,
        id=rows[0].id,
    )


def _answer(row: Writing) -> str:
    """What people wrote; where several did, each is as right as the other."""
    return " or ".join(dict.fromkeys(row.references))
