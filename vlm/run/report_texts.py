"""The report's texts: a dozen with frames, what people wrote, what the model wrote, and what it wrote under probes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlm.run.report_clips import MOST_WRONG, NUM_CLIPS, TestClips, frames_of
from vlm.types import Writing

_LONGEST = 600  # characters of a text that the page shows


def choose(writings: Sequence[Writing]) -> list[Writing]:
    """A dozen texts: up to MOST_WRONG that nobody wrote, then others, one kind after the other, from all over the
    test."""
    other = [writing for writing in writings if not _same(writing)][:: max(1, len(writings) // (2 * NUM_CLIPS))]
    shown = other[:MOST_WRONG]
    kinds: dict[str, list[Writing]] = {}
    for writing in writings:
        if not any(writing is one for one in shown):
            kinds.setdefault(writing.kind, []).append(writing)
    room = NUM_CLIPS - len(shown)
    each = {kind: several[:: max(1, len(several) // room)] for kind, several in sorted(kinds.items())}
    while len(shown) < NUM_CLIPS and any(each.values()):
        for several in each.values():
            if several and len(shown) < NUM_CLIPS:
                shown.append(several.pop(0))
    return shown


def _same(writing: Writing) -> bool:
    return _words(writing.text) in map(_words, writing.references)


def _words(text: str) -> list[str]:
    return text.casefold().strip(" .").split()


def texts(writings: Sequence[Writing], clips: TestClips) -> str:
    """HTML of a dozen texts, with frames where the shards hold the video."""
    return "".join(_text(writing, clips) for writing in choose(writings))


def _text(writing: Writing, clips: TestClips) -> str:
    kind = f" ({escape(writing.kind)})" if writing.kind else ""
    lines = [f"<code>{escape(writing.key)}</code>{kind}"]
    if writing.question:
        lines.append(f"<b>{_shown(writing.question)}</b>")
    lines += [f"truth: {_shown(reference)}" for reference in writing.references] or ["truth: not published"]
    lines.append(f'<b class="written">text: {_shown(writing.text)}</b>')
    for probe, text in writing.probes.items():
        lines.append(f'<span class="quiet">{escape(probe.replace("_", " "))}: {_shown(text)}</span>')
    frames = frames_of(writing.video or writing.key, clips)
    return f'<div class="clip"><div class="frames">{frames}</div><p>{"<br>".join(lines)}</p></div>'


def _shown(text: str) -> str:
    return escape(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …") or "(nothing)"


def kinds_said(writings: Sequence[Writing]) -> str:
    """How many texts there are, and how many of them nobody's are there to compare with."""
    silent = sum(not writing.references for writing in writings)
    said = f"{len(writings)} texts"
    if silent:
        said += f", {silent} of them without published captions, so not scored"
    kinds = sorted({writing.kind for writing in writings if writing.kind})
    return said + (f"; kinds: {', '.join(kinds)}." if kinds else ".")
