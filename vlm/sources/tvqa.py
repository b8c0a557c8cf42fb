"""TVQA (Lei et al. 2018, https://arxiv.org/abs/1809.01696): five options about a moment of a television clip.

The published tree is that of Flipped-VQA and of ViCo: `{root}/tvqa_{train,val}.jsonl` (`tvqa_test_public.jsonl` for
test, without answers), `clipvitl14.pth` (clip -> frames at 3 a second), subtitles `tvqa_subtitles/{clip}.srt` and
captions `blip2_n6.json`. Videos are found below the root by name. TVQA+ (a JSON list, `ts` a pair of numbers) is read
too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.sources.common import read_json, read_text
from vlm.sources.common_questions import Asked, find_tree, gather
from vlm.sources.common_tables import BadCell, id_of, index_of, read_json_lines, seconds_of, text_of
from vlm.types import Rejected, Sample, UserError

OPTIONS = ("a0", "a1", "a2", "a3", "a4")
CAPTIONS = ("blip2_n6.json",)
SUBTITLES = "tvqa_subtitles"
FEATURE_FPS = 3.0  # published features a second; 1 in all other sources

_SPAN = re.compile(r"\s*(nan|\d+(?:\.\d*)?)\s*-\s*(nan|\d+(?:\.\d*)?)\s*", re.IGNORECASE)
_TIMES = re.compile(r"\s*(\d+):(\d+):(\d+)(?:[,.]\d+)?\s*-->\s*(\d+):(\d+):(\d+)(?:[,.]\d+)?.*")


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `questions` of five options, most with a `span` and a `dialogue`, and `features.npy`.

    Args:
        root: the folder of the dataset.
        split: train, val or test.
        annotations: the questions (JSON lines, or a JSON list), a file of features and caption files (JSON objects),
            each instead of those under `root`; all optional.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    tree = find_tree(
        root,
        annotations,
        questions=("tvqa_test_public.jsonl" if split == "test" else f"tvqa_{split}.jsonl",),
        captions=CAPTIONS,
        is_questions=_is_questions,
    )
    subtitles = Subtitles(root / SUBTITLES)
    asked = _questions(tree.questions, split, subtitles)
    for item in gather(asked, tree, fps=FEATURE_FPS, extra={"span_rule": "rounded"}):
        if isinstance(item, Sample) and item.key in subtitles.problems:
            item.warnings = (*item.warnings, subtitles.problems[item.key])
        yield item


def _is_questions(file: Path) -> bool:
    suffix = file.suffix.lower()
    return suffix == ".jsonl" or (suffix == ".json" and isinstance(read_json(file), list))


def _questions(file: Path, split: str, subtitles: Subtitles) -> Iterator[Asked | Rejected]:
    rows = list(_rows(file))
    good = [row for row in rows if not isinstance(row, Rejected)]
    answered = any("answer_idx" in cells for _, cells in good)
    if good and not answered and split != "test":
        raise UserError(
            f"{file}: none of its {len(good)} questions has an answer, as in the test split: is it {split}?"
        )
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        where, cells = row
        try:
            video = id_of(cells, "vid_name")
            question = _question(cells, answered)
            dialogue = subtitles.between(video, question.get("span"))
            yield Asked(where, file, video, question | ({"dialogue": dialogue} if dialogue else {}))
        except BadCell as error:
            yield Rejected(str(cells.get("qid", where.rpartition("/")[2])), f"{where}, {error}", str(file))


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]] | Rejected]:
    if file.suffix.lower() != ".json":
        yield from read_json_lines(file)
        return
    for number, row in enumerate(read_json(file), 1):
        where = f"{file} item {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            yield Rejected(f"{file.name}:{number}", f"{where}: {row!r:.60} is not an object", str(file))


def _question(cells: dict[str, Any], answered: bool) -> dict[str, Any]:
    options = [text_of(cells, name) for name in OPTIONS]
    answer = index_of(cells, "answer_idx", len(options)) if answered else None
    question = {"id": id_of(cells, "qid"), "question": text_of(cells, "q"), "options": options, "answer": answer}
    span = _span(cells)
    return question | ({"span": span} if span else {})


def _span(cells: dict[str, Any]) -> list[float] | None:
    """Seconds that the question is about; None where the file says "nan": the whole clip."""
    value = cells.get("ts")
    if isinstance(value, list) and len(value) == 2:
        times = {"ts": value[0]}, {"ts": value[1]}
    else:
        found = _SPAN.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise BadCell(f"column 'ts': {value!r:.60} is not of the form 'seconds-seconds'")
        if "nan" in (found[1].lower(), found[2].lower()):
            return None
        times = {"ts": found[1]}, {"ts": found[2]}
    start, end = (seconds_of(time, "ts") for time in times)
    if start > end:
        raise BadCell(f"column 'ts': {value!r:.60} ends before it begins")
    return [start, end]


# Subtitles ------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One subtitle, in whole seconds of the clip, as the published prompts count."""

    start: int
    end: int
    text: str


class Subtitles:
    """The subtitles of clips, in a folder of .srt files; without the folder there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: dict[str, str] = {}  # clip -> why it has no subtitles, or not all
        self._exists = folder.is_dir()
        self._lines: dict[str, list[Line]] = {}

    def between(self, clip: str, span: Sequence[float] | None) -> str:
        """What is said: lines within the span, and the one that is being said as it begins. Each has a blank before."""
        if not self._exists:
            return ""
        if clip not in self._lines:
            self._lines[clip] = self._read(clip)
        start, end = span or (-1000.0, 1000.0)
        return "".join(
            f" {line.text}"
            for line in self._lines[clip]
            if (line.start >= start and line.end <= end) or line.start <= start <= line.end <= end
        )

    def _read(self, clip: str) -> list[Line]:
        file = self.folder / f"{clip}.srt"
        if not file.is_file():
            self.problems[clip] = f"no subtitles {file}"
            return []
        try:
            lines, bad = parse_srt(read_text(file))
        except UserError as error:
            self.problems[clip] = f"no subtitles: {error}"
            return []
        if bad:
            self.problems[clip] = f"{file}: no times in the subtitle of line {bad[0]}" + (
                f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            )
        return lines


def parse_srt(text: str) -> tuple[list[Line], list[int]]:
    """(subtitles in the file's order, lines at which a block without times begins)."""
    lines: list[Line] = []
    bad: list[int] = []
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)] + [(0, "")]
    block: list[tuple[int, str]] = []
    for number, line in numbered:
        if line:
            block.append((number, line))
            continue
        if block:
            times = [_TIMES.fullmatch(part) for _, part in block[:2]]
            place = next((place for place, found in enumerate(times) if found), None)
            if place is None:
                bad.append(block[0][0])
            else:
                found = [int(part) for part in times[place].groups()]  # type: ignore[union-attr]
                start, end = (3600 * h + 60 * m + s for h, m, s in (found[:3], found[3:]))
                lines.append(Line(start, end, " ".join(part for _, part in block[place + 1 :])))
        block = []
    return lines, bad
