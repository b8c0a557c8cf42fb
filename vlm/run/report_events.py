"""What came between the steps of a run: where it stopped and went on, where it hung, which steps were
skipped, and where it went back (vlm.run.guard)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vlm.run.charts import Mark, number

BACK = "rolled_back"  # the reason of a row that is no skipped step
_HANG = re.compile(r"\d+-\d+-step-(\d+)-rank-\d+\.txt")
_SHOWN = 100  # rows of a table
_REASONS = {
    "loss": "the loss was not finite",
    "gradient": "the gradient was not finite",
    "spike": "the gradient's norm was far above those before",
}


def events(about: Mapping[str, Any], skipped: Sequence[Mapping[str, Any]], reports: Sequence[str] = ()) -> list[Mark]:
    """Marks of continuations (recipe.json's `resumed`, with why it stopped from `stopped`), hangs and skipped steps.

    Args:
        about: recipe.json of a run.
        skipped: rows of its skipped.jsonl.
        reports: names of the files in its folder `hang` (vlm.run.watchdog).
    """
    why = {_step(stop): str(stop.get("why", "")) for stop in _rows(about.get("stopped"))}
    marks = []
    world = about.get("world_size")
    for again in _rows(about.get("resumed")):
        step, now = _step(again), again.get("world_size", world)
        # Why it stopped is known of the first continuation from a step: a second one follows a failure.
        stopped = why.pop(step, "")
        grown = f", on {now} processes instead of {world}" if now != world else ""
        cause = f" after {stopped}" if stopped else ""
        marks.append(Mark(step, f"went on from step {step:g}{cause}{grown}", "stopped"))
        world = now
    marks += [
        Mark(_step(row), went_back(row), "back")
        if row.get("reason") == BACK
        else Mark(_step(row), f"step {_step(row):g} skipped: {reason_of(row)}", "skipped")
        for row in _rows(skipped)
    ]
    hangs: dict[int, list[str]] = {}
    for name in sorted(reports):
        if found := _HANG.fullmatch(name):
            hangs.setdefault(int(found[1]), []).append(f"hang/{name}")
    marks += [Mark(step, f"hung at step {step} ({', '.join(files)})", "hung") for step, files in hangs.items()]
    return [mark for mark in marks if math.isfinite(mark.x)]


def went_back(row: Mapping[str, Any]) -> str:
    """Where a run went back to, in words, and which steps were in vain."""
    passed = row.get("passed_over")
    vain = (
        f"; nothing is kept of steps {passed[0]} to {passed[1]}"
        if isinstance(passed, list) and len(passed) == 2
        else ""
    )
    return f"after step {_step(row):g} back to what was learnt up to step {row.get('to', '?')}{vain}"


def reason_of(row: Mapping[str, Any]) -> str:
    """Why a step was skipped, in words, with the value and its limit."""
    reason = str(row.get("reason", "unknown"))
    told = ", limit ".join(_figure(row[name]) for name in ("value", "limit") if row.get(name) is not None)
    told = f" ({told})" if told else ""
    return f"{_REASONS.get(reason, reason)}{told}"


def interruptions(marks: Sequence[Mark], skipped: Sequence[Mapping[str, Any]]) -> str:
    """Marks as a list and skipped steps as a table, HTML; "" where nothing happened."""
    whole = [mark.what for mark in marks if mark.style != "skipped"]
    parts = [f"<ul>{''.join(f'<li>{escape(what)}</li>' for what in whole)}</ul>"] if whole else []
    rows = [row for row in _rows(skipped) if row.get("reason") != BACK]
    if rows:
        counted = Counter(str(row.get("reason", "unknown")) for row in rows)
        said = "; ".join(f"{count}: {_REASONS.get(reason, reason)}" for reason, count in counted.items())
        parts.append(f"<p>Skipped steps: {len(rows)} ({escape(said)}).</p>")
        parts.append("<table><tr><th>step</th><th>why</th><th>samples, by rank</th></tr>")
        for row in rows[:_SHOWN]:
            cells = (f"{_step(row):g}", reason_of(row), _keys(row.get("ranks")))
            parts.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        parts.append("</table>")
        if len(rows) > _SHOWN:
            parts.append(f"<p>The other {len(rows) - _SHOWN} are in skipped.jsonl.</p>")
    return "".join(parts)


def _keys(ranks: Any) -> str:
    if not isinstance(ranks, dict):
        return ""
    told = []
    for rank, part in ranks.items():
        keys = part.get("keys") if isinstance(part, dict) else None
        if isinstance(keys, list) and keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            told.append(f"{rank}: {', '.join(_text(key) for key in keys[:4])}{more}")
    return "; ".join(told)


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, (list, tuple)) else []


def _step(row: Mapping[str, Any]) -> float:
    return _number(row.get("step"))


def _figure(value: Any) -> str:
    return number(value) if math.isfinite(_number(value)) else _text(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
