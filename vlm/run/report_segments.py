"""The report's timelines: of a dozen videos what really happens when, above what was predicted; figures of each kind;
the answers that could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlm.metrics.segments import VideoFigures, chance, pooled, video_figures
from vlm.run.charts import Bar, timeline_chart
from vlm.run.report_clips import MOST_WRONG, NUM_CLIPS, TestClips, frames_of
from vlm.types import Segmentation

_MOST_UNREAD = 100  # answers that could not be read, in the page
_LONGEST = 300  # characters of one
_FIGURES = ("mof", "edit", "f1_10", "f1_25", "f1_50", "chance")


def timelines(rows: Sequence[Segmentation], clips: TestClips) -> str:
    """HTML of all of it; frames of a video stand above its timeline where the shards hold it."""
    figures = [video_figures(row.truth, row.prediction) for row in rows]
    chosen = choose(rows, figures)
    unread = [row for row in rows if row.problem]
    rest = f"Shown: {len(chosen)} of {len(rows)} videos" + (
        ", the least right ones first, then some of each kind." if len(chosen) < len(rows) else "."
    )
    if len(chosen) < len(rows):
        rest += f" The other {len(rows) - len(chosen)} are in predictions.jsonl."
    shown = [rows[place] for place in chosen]
    colours = colours_of(rows)
    pictures = "".join(_timeline(rows[place], figures[place], colours, clips) for place in chosen)
    return (
        f"<p>{len(rows)} videos, of which {len(unread)} have an answer that could not be read.</p>"
        f"{_kinds(rows, figures)}{_unread(unread)}<p>{rest}</p>{_legend(shown, colours)}"
        f'<div class="timelines">{pictures}</div>'
    )


def choose(rows: Sequence[Segmentation], figures: Sequence[VideoFigures]) -> list[int]:
    """Places of a dozen videos: up to MOST_WRONG with the fewest right frames, then middling ones of one kind after the
    other."""
    shares = [one.right / max(one.frames, 1) for one in figures]
    order = sorted(range(len(rows)), key=lambda place: (not rows[place].problem, shares[place], place))
    shown = [place for place in order if rows[place].problem or shares[place] < 1][:MOST_WRONG]
    kinds: dict[str, list[int]] = {}
    for place in order:
        if place not in shown:
            kinds.setdefault(rows[place].kind, []).append(place)
    while len(shown) < NUM_CLIPS and any(kinds.values()):
        for _, places in sorted(kinds.items()):
            if places and len(shown) < NUM_CLIPS:
                shown.append(places.pop(len(places) // 2))
    return shown


def colours_of(rows: Sequence[Segmentation]) -> dict[str, str]:
    """A colour for each label of the truth; the same test has the same colours in every report. Labels that are in no
    truth have none."""
    labels = sorted({label for row in rows for *_, label in row.truth})
    return {
        label: f"hsl({place * 137.508 % 360:.0f} {(60, 45)[place // 3 % 2]}% {(40, 31, 46)[place % 3]}%)"
        for place, label in enumerate(labels)
    }


def _timeline(row: Segmentation, figures: VideoFigures, colours: dict[str, str], clips: TestClips) -> str:
    bars = [Bar("truth", row.truth), Bar("prediction", row.prediction)]
    bars += [Bar(name.replace("_", " ")[:14], probe["prediction"]) for name, probe in row.probes.items()]
    kind = f" ({escape(row.kind)})" if row.kind else ""
    right = 100 * figures.right / max(figures.frames, 1)
    said = f"<code>{escape(row.key)}</code>{kind}: {right:.0f} % of the frames right, edit score {figures.edit:.2f}"
    if row.problem:
        said += f'<br><span class="bad">could not be read: {escape(row.problem)}</span>'
    frames = "" if clips.missing else frames_of(row.video or row.key, clips)
    strip = f'<div class="frames">{frames}</div>' if frames.startswith("<img") else ""
    chart = timeline_chart(bars, row.num_frames, colours, title=f"{row.key}: truth above prediction")
    return f"<figure><figcaption>{said}</figcaption>{strip}{chart}</figure>"


def _legend(rows: Sequence[Segmentation], colours: dict[str, str]) -> str:
    said = {label for row in rows for *_, label in (*row.truth, *row.prediction)}
    items = [
        f'<span><i style="background: {colours[label]}"></i>{escape(label)}</span>'
        for label in sorted(said & colours.keys())
    ]
    others = sorted(said - colours.keys())
    if others:
        named = ", ".join(escape(label[:60]) for label in others[:20]) + (" …" if len(others) > 20 else "")
        items.append(f"<span>dashed: labels that are in no truth of this test ({named})</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def _kinds(rows: Sequence[Segmentation], figures: Sequence[VideoFigures]) -> str:
    kinds = sorted({row.kind for row in rows if row.kind})
    head = "".join(f"<th>{name}</th>" for name in ("activity", "videos", "unparsable", *_FIGURES))
    lines = []
    for kind in [*kinds, None]:
        places = [place for place, row in enumerate(rows) if kind in (None, row.kind)]
        found = pooled([figures[place] for place in places])
        found["chance"] = chance(rows[place].truth for place in places)
        values = [str(len(places)), str(sum(bool(rows[place].problem) for place in places))]
        values += [f"{found[name]:.3f}" for name in _FIGURES]
        name = "<b>all</b>" if kind is None else escape(kind)
        lines.append(f"<tr><td>{name}</td>{''.join(f'<td class=figure>{value}</td>' for value in values)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>" if kinds else ""


def _unread(rows: Sequence[Segmentation]) -> str:
    """The answers that could not be read, with what is wrong with each."""
    if not rows:
        return ""
    lines = [
        f"<tr><td><code>{escape(row.key)}</code></td><td>{escape(row.problem)}</td>"
        f"<td>{escape(row.text[:_LONGEST]) + (' …' if len(row.text) > _LONGEST else '') or '(nothing)'}</td></tr>"
        for row in rows[:_MOST_UNREAD]
    ]
    more = len(rows) - len(lines)
    rest = f"<p>The other {more} are in predictions.jsonl, those with a problem.</p>" if more else ""
    return (
        "<p>Answers that could not be read, scored as empty predictions:</p>"
        f"<table><tr><th>video</th><th>problem</th><th>answer</th></tr>{''.join(lines)}</table>{rest}"
    )
