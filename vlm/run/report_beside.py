"""Two runs beside each other: their losses in one chart, how far they agree, what each came through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from vlm.run.charts import Line, Mark, line_chart, number, smooth

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


class Told(NamedTuple):
    """What a run folder tells of a run."""

    name: str
    about: Mapping[str, Any]  # recipe.json
    steps: Sequence[Mapping[str, Any]]  # rows of metrics.jsonl, each with a finite step
    marks: Sequence[Mark]
    metrics: Mapping[str, Any]  # metrics.json


def beside(run: Told, other: Told) -> str:
    """The section as HTML: `run` in the page's colour, `other` in another."""
    lines = []
    for told, pale, style in ((other, "other-pale", "other"), (run, "pale", "line")):
        xs, ys = [float(row["step"]) for row in told.steps], [_finite(row.get("loss")) for row in told.steps]
        lines += [
            Line(f"{told.name}, each step", xs, ys, pale),
            Line(f"{told.name}, running mean", xs, smooth(ys), style),
        ]
    marks = [mark._replace(what=f"{told.name}: {mark.what}") for told in (run, other) for mark in told.marks]
    legend = "".join(
        f'<span><i class="{style}"></i>{escape(told.name)}</span>' for told, style in ((run, "line"), (other, "other"))
    )
    both = _in_common(run, other)
    apart = Line("difference", [row["step"] for row, _ in both], [_difference(*_losses(pair)) for pair in both])
    charts = {
        "loss": line_chart(lines, y_label="loss", marks=marks),
        "difference of the losses, relative to the larger": line_chart(
            [apart], y_label="difference", marks=marks, from_zero=True
        ),
    }
    drawn = "".join(f"<figure><figcaption>{title}</figcaption>{chart}</figure>" for title, chart in charts.items())
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in agreement(run, other))
    return f'<p class="legend">{legend}</p><div class="charts">{drawn}</div><ul>{items}</ul>{_facts(run, other)}'


def agreement(run: Told, other: Told) -> list[str]:
    """How far the two tell the same: of the steps that both have, batches and losses."""
    pairs = _in_common(run, other)
    if not pairs:
        return ["no step is told by both"]
    said = [f"{number(len(pairs))} steps are told by both"]
    batches = [(row["step"], row["batch_digest"] == old["batch_digest"]) for row, old in pairs
               if row.get("batch_digest") and old.get("batch_digest")]  # fmt: skip
    changed = [step for step, same in batches if not same]
    if batches:
        first = f"; the first other one is that of step {number(changed[0])}" if changed else ""
        said.append(f"{number(len(batches) - len(changed))} of {number(len(batches))} batches are the same{first}")
    differences = [(_difference(*_losses(pair)), pair[0]["step"]) for pair in pairs]
    finite = [(difference, step) for difference, step in differences if math.isfinite(difference)]
    if finite:
        largest, step = max(finite)
        told = f"by at most {number(largest)} of the loss, at step {number(step)}" if largest else "in no digit"
        said.append(f"losses differ {told}")
    if len(finite) < len(pairs):
        said.append(f"steps without a loss in one of them: {number(len(pairs) - len(finite))}")
    return said


def _in_common(run: Told, other: Told) -> list[Pair]:
    """Rows of the same step."""
    theirs = {row["step"]: row for row in other.steps}
    return [(row, theirs[row["step"]]) for row in run.steps if row["step"] in theirs]


def _losses(pair: Pair) -> tuple[Any, Any]:
    return pair[0].get("loss"), pair[1].get("loss")


def _difference(one: Any, two: Any) -> float:
    """Relative to the larger one; nan where one of them is no number."""
    a, b = _finite(one), _finite(two)
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def _facts(run: Told, other: Told) -> str:
    rows = [
        ("recipe", *(str(told.about.get("recipe", "?")) for told in (run, other))),
        ("processes at the beginning", *(str(told.about.get("world_size", "?")) for told in (run, other))),
        ("steps", *(number(len(told.steps)) for told in (run, other))),
        ("continuations", *(str(_count(told, "stopped")) for told in (run, other))),
        ("hangs", *(str(_count(told, "hung")) for told in (run, other))),
        ("skipped steps", *(str(_count(told, "skipped")) for told in (run, other))),
        ("last loss", *(_last(told) for told in (run, other))),
    ]
    for name in sorted({*run.metrics, *other.metrics}):
        values = [_finite(told.metrics.get(name)) for told in (run, other)]
        if any(map(math.isfinite, values)):
            rows.append((name, *(number(value) if math.isfinite(value) else "–" for value in values)))
    head = f"<tr><th></th><th>{escape(run.name)}</th><th>{escape(other.name)}</th></tr>"
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _count(told: Told, style: str) -> int:
    return sum(mark.style == style for mark in told.marks)


def _last(told: Told) -> str:
    values = [value for row in told.steps if math.isfinite(value := _finite(row.get("loss")))]
    return number(values[-1]) if values else "–"


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
