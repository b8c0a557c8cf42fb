"""The report's table of judged.json: every score with who judged, and over how many answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from vlm.run.judging import FIGURES
from vlm.run.run_folder import read_json
from vlm.types import UserError

_LISTED = 20


def judged(folder: Path) -> str:
    """HTML of a run's judged scores; "" where none were asked for.

    Raises:
        UserError: judged.json is damaged.
    """
    path = folder / FIGURES
    if not path.exists():
        return ""
    entries = read_json(path).get("judged")
    if not isinstance(entries, list):
        raise UserError(f"{path}: has no list `judged`; judge again (tools/judge.py)")
    try:
        rows = [_row(entry) for entry in entries]
        bare = [(entry, item) for entry in entries for item in entry["unjudged_items"]]
        notes = [f"{entry['aspect']}: {item['key']}: {item['problem']}" for entry, item in bare[:_LISTED]]
        stale = _stale(folder, entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: is damaged ({type(error).__name__}: {error}); judge again (tools/judge.py)"
        ) from error
    columns = ("aspect", "score, 0 to 5", "accuracy", "judged", "of", "without verdict", "not asked", "judge", "when")
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    said = (
        "Scores that a language model gave. They compare only with scores of the same judge: another model, or "
        "the same name some months later, is another scale. In brackets: the mean of whole parts, as published scripts "
        "count."
    )
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    more = f"<p>Replies without a verdict, which no mean counts:</p><ul>{lines}</ul>" if lines else ""
    warning = f'<p class="missing">{escape(stale)}</p>' if stale else ""
    return f"<p>{said}</p>{warning}<table><tr>{head}</tr>{''.join(rows)}</table>{more}"


def _row(entry: Mapping[str, Any]) -> str:
    figures = (
        f"{_figure(entry['score'])} ({_figure(entry['score_int'])})",
        _figure(entry["accuracy"], 3) if "accuracy" in entry else "",
        *(f"{int(entry[name]):,}" for name in ("judged", "items", "unjudged", "not_asked")),
    )
    cells = "".join(f"<td class=figure>{escape(figure)}</td>" for figure in figures)
    when = " to ".join(dict.fromkeys((str(entry["first"])[:10], str(entry["last"])[:10])))
    return (
        f"<tr><th>{escape(str(entry['aspect']))}</th>{cells}<td>{escape(_who(entry))}</td><td>{escape(when)}</td></tr>"
    )


def _figure(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{float(value):.{places}f}"


def _who(entry: Mapping[str, Any]) -> str:
    judge = entry["judge"]
    own = str(judge["model"])
    said = f" (as {entry['answered_by']})" if entry["answered_by"] not in ("", own) else ""
    return f"{own}{said} at {judge['endpoint']}, temperature {judge['temperature']}, wording {entry['prompts']}"


def _stale(folder: Path, entries: list[dict[str, Any]]) -> str:
    """Says so where scores are of other predictions than those that lie there now."""
    path = folder / "predictions.jsonl"
    if not path.exists():
        return ""
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    others = [e["aspect"] for e in entries if Path(e["predictions"]["file"]).name == path.name
              and e["predictions"]["sha256"] != now]  # fmt: skip
    if not others:
        return ""
    return f"The predictions were made again after these were judged: {', '.join(map(str, others))}. Judge again."


def line_of(entry: Mapping[str, Any]) -> str:
    """An entry of judged.json in one line for a terminal."""
    accuracy = f"accuracy {_figure(entry['accuracy'], 4)}  " if "accuracy" in entry else ""
    rest = "".join(
        f", {entry[name]:,} {said}"
        for name, said in (
            ("unjudged", "without verdict"),
            ("not_asked", "not asked"),
            ("without_answer", "without a published answer"),
        )
        if entry[name]
    )
    return (
        f"{entry['aspect']}: {accuracy}score {_figure(entry['score'], 4)} ({_figure(entry['score_int'], 4)} of whole "
        f"parts) over {entry['judged']:,} of {entry['items']:,}{rest}; {_who(entry)}"
    )
