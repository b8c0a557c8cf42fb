"""Charts as inline SVG text: no library, no script. Colours come from the page's style sheet by class name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 12, 40
MAX_POINTS = 600


class Line(NamedTuple):
    """One line of a chart: y over x. `style` is a class of the page's style sheet ("line", "pale")."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "line"


class Mark(NamedTuple):
    """Something that happened at x. `style` is a class of the page's style sheet ("stopped", "skipped")."""

    x: float
    what: str
    style: str


def line_chart(
    lines: Sequence[Line], *, y_label: str, x_label: str = "step", from_zero: bool = False, marks: Sequence[Mark] = ()
) -> str:
    """An SVG of the lines on common axes; points that are not finite leave a gap.

    Args:
        marks: upright lines; one beyond the points stands at the edge.
    Returns:
        the SVG, or a paragraph that says so where there is nothing to draw.
    """
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys) if math.isfinite(y)]
    if not points:
        return f'<p class="missing">no values of {escape(y_label)}</p>'
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 6)
    y_ticks = ticks(min(0.0, *(y for _, y in points)) if from_zero else min(y for _, y in points),
                    max(y for _, y in points), 5)  # fmt: skip
    x_low, x_high = min(x for x, _ in points), max(max(x for x, _ in points), x_ticks[0] + 1e-12)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for value in y_ticks:
        _, down = place(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        if x_low <= value <= x_high:
            across, _ = place(value, y_low)
            parts.append(
                f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(value)}</text>'
            )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for mark in marks:
        across, _ = place(min(max(mark.x, x_low), x_high), y_low)
        parts.append(
            f'<line class="mark {mark.style}" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(mark.what)}</title></line>"
        )
    for line in lines:
        for run in _runs(line):
            path = " ".join(f"{a:.1f},{d:.1f}" for a, d in (place(x, y) for x, y in run))
            parts.append(
                f'<polyline class="{line.style}" points="{path}"><title>{escape(line.name)}</title></polyline>'
            )
    return "".join([*parts, "</svg>"])


def _runs(line: Line) -> list[list[tuple[float, float]]]:
    """Stretches of finite points; a single point is drawn as a dash by doubling it."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(*thin(line.xs, line.ys)):
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run if len(run) > 1 else [*run, (run[0][0] + 1e-9, run[0][1])] for run in runs if run]


def thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points that keep each stretch's lowest and highest value."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    width = math.ceil(len(xs) / (MAX_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(xs), width):
        stretch = range(start, min(start + width, len(xs)))
        finite = [i for i in stretch if math.isfinite(ys[i])] or [start]
        kept += sorted({min(finite, key=lambda i: ys[i]), max(finite, key=lambda i: ys[i])})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def smooth(ys: Sequence[float]) -> list[float]:
    """A running mean over a fortieth of the curve (finite values only); the curve's own length."""
    half = max(1, len(ys) // 80)
    smoothed = []
    for i in range(len(ys)):
        near = [y for y in ys[max(0, i - half) : i + half + 1] if math.isfinite(y)]
        smoothed.append(sum(near) / len(near) if near else math.nan)
    return smoothed


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values that cover low…high; the first is at or below `low`, the last at or above `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as a person writes it: few digits, thousands apart, powers of ten where it is very large or small."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def matrix_chart(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """An SVG of counts: a row a true class, a column a predicted one; names and figures are left out where K > 40.

    Args:
        counts: (K, K) clips by true and predicted class.
        names: (K,) class names.
    """
    classes, labelled = len(counts), len(counts) <= 40
    cell = max(4, min(34, 640 // max(classes, 1)))
    left = 12 + max((7 * min(len(name), 60) for name in names), default=0) if labelled else 20
    top, size = 30, classes * cell
    parts = [f'<svg class="matrix" width="{left + size + 12}" height="{top + size + 24}" role="img" '
             'aria-label="confusion matrix">']  # fmt: skip
    for row, values in enumerate(counts):
        total = sum(values)
        y = top + row * cell
        for column, count in enumerate(values):
            x = left + column * cell
            share = count / total if total else 0.0
            says = f"{names[row]} → {names[column]}: {count} of {total}"
            kind = "right" if row == column else "wrong"
            parts.append(f'<rect class="cell" x="{x}" y="{y}" width="{cell}" height="{cell}"/>')
            if count:
                parts.append(
                    f'<rect class="{kind}" x="{x}" y="{y}" width="{cell}" height="{cell}" '
                    f'fill-opacity="{0.15 + 0.85 * share:.2f}"><title>{escape(says)}</title></rect>'
                )
            if count and labelled and cell >= 14:
                ink = "ink" if share > 0.5 else ""
                parts.append(
                    f'<text class="{ink}" x="{x + cell / 2}" y="{y + cell / 2 + 4}" text-anchor="middle">{count}</text>'
                )
        if labelled:
            name = f"{row}  {names[row]}"[:62]
            parts.append(f'<text x="{left - 6}" y="{y + cell / 2 + 4}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<text x="{left + (row + 0.5) * cell}" y="{top - 6}" text-anchor="middle">{row}</text>')
    parts.append(f'<text x="{left}" y="{top + size + 18}">rows: truth; columns: prediction</text>')
    return "".join([*parts, "</svg>"])


class Bar(NamedTuple):
    """One row of a timeline: its name, and (start, end, label) of what stands in it."""

    name: str
    spans: Sequence[tuple[int, int, str]]


BAR_WIDTH, BAR_HEIGHT, BAR_LEFT = 960, 24, 92


def timeline_chart(bars: Sequence[Bar], length: int, colours: Mapping[str, str], *, title: str) -> str:
    """An SVG of bars, one above the other, on a common axis 0 … length, in frames.

    Args:
        colours: what a label is filled with; one that is not there is drawn as an outline.
    """
    height = len(bars) * (BAR_HEIGHT + 4) + 20
    scale = (BAR_WIDTH - BAR_LEFT - 16) / length
    parts = [f'<svg class="timeline" viewBox="0 0 {BAR_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for number_of_bar, bar in enumerate(bars):
        top = number_of_bar * (BAR_HEIGHT + 4)
        middle = top + BAR_HEIGHT / 2 + 4
        parts.append(f'<text x="{BAR_LEFT - 8}" y="{middle}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(
            f'<rect class="none" x="{BAR_LEFT}" y="{top}" width="{length * scale:.1f}" height="{BAR_HEIGHT}"/>'
        )
        for start, end, label in bar.spans:
            left, width = BAR_LEFT + start * scale, (end - start) * scale
            look = f'fill="{colours[label]}"' if label in colours else 'class="unknown"'
            parts.append(
                f'<rect {look} x="{left:.1f}" y="{top}" width="{max(width, 0.5):.1f}" height="{BAR_HEIGHT}">'
                f"<title>{escape(f'{bar.name}: {label}, frames {start} to {end}')}</title></rect>"
            )
            name = label.replace("_", " ")
            if 6.2 * len(name) + 8 < width:
                ink = "name" if label in colours else ""
                parts.append(f'<text class="{ink}" x="{left + 4:.1f}" y="{middle}">{escape(name)}</text>')
    for value in ticks(0, length, 8):
        if value <= length:
            across = BAR_LEFT + value * scale
            parts.append(f'<text x="{across:.1f}" y="{height - 4}" text-anchor="middle">{number(value)}</text>')
    return "".join([*parts, "</svg>"])
