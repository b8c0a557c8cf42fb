"""STAR (Wu et al. 2021, NeurIPS Datasets and Benchmarks): four options about a segment of a Charades video.

The published tree is that of Flipped-VQA and of ViCo: `{root}/STAR_{train,val}.json`, `clipvitl14.pth` (video -> frames
at 1 a second) and captions `star_caption_7B.json`. Videos are found below the root by name. The official test file has
no answers. Programs and situation graphs of the official files are the ground truth's own derivation and are left out.
Papers report the mean over the four kinds on `val`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.sources.common import read_json
from vlm.sources.common_questions import Asked, find_tree, gather
from vlm.sources.common_tables import BadCell, id_of, seconds_of, text_of
from vlm.types import Rejected, Sample, UserError

KINDS = ("Interaction", "Sequence", "Prediction", "Feasibility")
CAPTIONS = ("star_caption_7B.json",)
NUM_OPTIONS = 4


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `questions` of four options and a `span` each, `captions`, and `features.npy` (frames, width).

    Args:
        root: the folder of the dataset.
        split: train, val or test.
        annotations: the questions (a JSON list), a file of features and caption files (JSON objects), each instead of
            those under `root`; all optional.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    tree = find_tree(
        root,
        annotations,
        questions=(f"STAR_{split}.json",),
        captions=CAPTIONS,
        is_questions=lambda file: file.suffix.lower() == ".json" and isinstance(read_json(file), list),
    )
    yield from gather(_questions(tree.questions, split), tree, fps=1.0, extra={"span_rule": "rounded"})


def _questions(file: Path, split: str) -> Iterator[Asked | Rejected]:
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} must be a JSON list of questions, not {type(rows).__name__}")
    answered = any(isinstance(row, Mapping) and "answer" in row for row in rows)
    if not answered and split != "test":
        raise UserError(
            f"{file}: none of its {len(rows)} questions has an answer, as in the test split: is it {split}?"
        )
    for number, row in enumerate(rows, 1):
        where = f"{file} item {number}"
        if not isinstance(row, dict):
            yield Rejected(f"{file.name}:{number}", f"{where}: {row!r:.60} is not an object", str(file))
            continue
        try:
            yield Asked(where, file, id_of(row, "video_id"), _question(row, answered))
        except BadCell as error:
            yield Rejected(str(row.get("question_id") or f"{file.name}:{number}"), f"{where}, {error}", str(file))


def _question(row: dict[str, Any], answered: bool) -> dict[str, Any]:
    name = text_of(row, "question_id")
    kind = name.partition("_")[0]
    if kind not in KINDS:
        raise BadCell(f"column 'question_id': {name!r} does not begin with one of {', '.join(KINDS)}")
    options = _options(row)
    start, end = seconds_of(row, "start"), seconds_of(row, "end")
    if start > end:
        raise BadCell(f"column 'end': {end} is before column 'start' ({start})")
    answer = None
    if answered:
        text = text_of(row, "answer")
        if text not in options:
            raise BadCell(f"column 'answer': {text!r:.60} is none of the choices {options}")
        answer = options.index(text)
    return {
        "id": name,
        "question": text_of(row, "question"),
        "options": options,
        "answer": answer,
        "kind": kind,
        "span": [start, end],
    }


def _options(row: dict[str, Any]) -> list[str]:
    """The choices in the order of their ids."""
    choices = row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadCell(f"column 'choices': {choices!r:.60} is not a list of choices")
    numbers = [choice.get("choice_id") for choice in choices]
    if sorted(map(str, numbers)) != [str(number) for number in range(NUM_OPTIONS)]:
        raise BadCell(f"column 'choices': their ids are {numbers}, not 0 to {NUM_OPTIONS - 1}")
    return [text_of(choice, "choice") for choice in sorted(choices, key=lambda choice: int(choice["choice_id"]))]
