"""What the sources of questions about videos share: their published trees, and questions gathered by video.

A record is one video with all its questions (8.8 on average in NExT-QA), so that the features, the caption and the pass
over them are there once for all. A question that is damaged is rejected alone; its video keeps the others. A video of
which there is nothing to see or read is rejected, unless that is so of all: a table alone makes records of questions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlm.sources.common import VideoFinder, read_json
from vlm.sources.common_features import FEATURE_SUFFIXES, FeatureFile, is_features, open_features
from vlm.sources.common_tables import BadCell, TableRow, id_of, index_of, read_csv, seconds_of, text_of
from vlm.types import Rejected, Sample, UserError

FEATURE_FILES = ("clipvitl14.pth",)


class Asked(NamedTuple):
    """One question, checked."""

    where: str  # file and row
    file: Path
    video: str
    question: dict[str, Any]  # id, question, options, answer (None: not published); optionally kind, span, dialogue


# Files ------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Tree:
    """The files of a dataset: questions, and what there is of features, captions and videos."""

    root: Path
    questions: Path
    captions: dict[str, dict[str, str]] = field(default_factory=dict)  # name of the file -> video -> caption
    features: FeatureFile | None = None
    finder: VideoFinder = field(init=False)

    def __post_init__(self) -> None:
        self.finder = VideoFinder(self.root)

    @property
    def is_bare(self) -> bool:
        """Whether there are questions and nothing else: no features, no captions, no video at all."""
        return self.features is None and not self.captions and not len(self.finder)


def find_tree(
    root: Path,
    annotations: Sequence[Path],
    *,
    questions: Sequence[str],
    captions: Sequence[str],
    is_questions: Callable[[Path], bool],
) -> Tree:
    """The files of a published tree: those given in `annotations`, else those of published names under `root`.

    Args:
        questions: names under which the questions of the split are published.
        captions: names of published caption files, all of which are taken where none is given.
        is_questions: whether a given file holds the questions.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --root must be the folder of the dataset")
    tables = [file for file in annotations if is_questions(file)]
    features = [file for file in annotations if is_features(file)]
    given = [file for file in annotations if file not in tables and file not in features]
    if len(tables) > 1:
        raise UserError(f"{tables[0]} and {tables[1]} both hold questions: give one")
    strange = [file for file in given if file.suffix.lower() != ".json"]
    if strange:
        raise UserError(
            f"{strange[0]}: expected questions, features ({', '.join(FEATURE_SUFFIXES)}) or captions (.json)"
        )
    tables = tables or [root / name for name in questions if (root / name).is_file()]
    if not tables:
        raise UserError(f"{root} has no {' or '.join(questions)}: is --split right? Else give it with --annotations")
    features = features or [root / name for name in FEATURE_FILES if (root / name).is_file()]
    given = given or [root / name for name in captions if (root / name).is_file()]
    captions_by_name = {file.stem: _read_captions(file) for file in given}
    return Tree(root=root, questions=tables[0], captions=captions_by_name, features=open_features(features))


def _read_captions(file: Path) -> dict[str, str]:
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: captions are a JSON object of video: text, not {type(content).__name__}")
    for video, text in content.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{file}: the caption of video {video!r} is {text!r:.60}, not a text")
    return content


# Records ------------------------------------------------------------------------------------------


def gather(
    asked: Iterable[Asked | Rejected], tree: Tree, *, fps: float, extra: Mapping[str, Any] | None = None
) -> Iterator[Sample | Rejected]:
    """Rejected questions as they are met, then the videos in the order in which they were first asked about.

    Args:
        fps: features a second in published files; those of `tools/extract_features.py` say it themselves.
        extra: further names of every annotation.
    """
    videos: dict[str, list[Asked]] = {}
    seen: dict[tuple[str, str], str] = {}
    for item in asked:
        if isinstance(item, Rejected):
            yield item
            continue
        name = (item.video, item.question["id"])
        if name in seen:
            reason = f"{item.where}: question {name[1]!r} of video {name[0]!r} stands already in {seen[name]}"
            yield Rejected("_".join(name), reason, str(item.file))
            continue
        seen[name] = item.where
        videos.setdefault(item.video, []).append(item)
    for video, several in videos.items():
        yield _sample(video, several, tree, fps, dict(extra or {}))


def _sample(video: str, asked: Sequence[Asked], tree: Tree, fps: float, extra: dict[str, Any]) -> Sample | Rejected:
    annotation = {"video": video, "questions": [item.question for item in asked]} | extra
    sample = Sample(key=video, annotation=annotation)
    captions = {name: texts[video] for name, texts in tree.captions.items() if video in texts}
    warnings = [f"no caption of this video in {name}.json" for name in tree.captions if name not in captions]
    if captions:
        annotation["captions"] = captions
    lacks_features = tree.features.add_to(sample, fps) if tree.features is not None else ""
    if lacks_features:
        warnings.append(lacks_features)
    file = tree.finder.find(video)
    if isinstance(file, str):
        if file[0].isdigit():  # several files have its name
            warnings.append(file)
        if tree.is_bare:
            warnings.append(f"{tree.root} has no features, captions or videos: the record holds questions alone")
        elif not sample.members and not captions:
            also = f"; {lacks_features}" if tree.features is not None and video in tree.features.videos else ""
            reason = (
                f"{asked[0].where}, column 'video': of {video!r} there are no features and no caption, and {file}{also}"
            )
            return Rejected(video, reason, str(asked[0].file))
    else:
        sample.video = file
    sample.warnings = tuple(warnings)
    return sample


# Questions of CSV files ------------------------------------------------------------------------------------------


def read_option_table(
    file: Path, *, num_options: int, kinds: Collection[str] | None, spans: bool = False
) -> Iterator[Asked | Rejected]:
    """The questions of a CSV with columns video (or video_id), question, answer, qid, a0, a1, ….

    `answer` is an index from 0, or in the variants of NExT-GQA the text of an option; the whole file is of one kind.

    Args:
        kinds: what column `type` may hold; None: there is none.
        spans: read columns start and end (seconds, or both empty) where they are there.
    """
    options = [f"a{number}" for number in range(num_options)]
    columns = ["question", "answer", "qid", *options, *(["type"] if kinds is not None else [])]
    rows = list(read_csv(file, columns, either=("video", "video_id")))
    by_index = _answers_are_indices([row for row in rows if isinstance(row, TableRow)], options)
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        cells: dict[str, Any] = row.cells
        try:
            question = _question(cells, options, by_index, kinds)
            if spans and "start" in cells and "end" in cells:
                question |= _span(cells)
            yield Asked(row.where, file, id_of(cells, "video"), question)
        except BadCell as error:
            key = f"{cells['video'].strip() or file.name}_{cells['qid'].strip()}"
            yield Rejected(key, f"{row.where}, {error}", str(file))


def _answers_are_indices(rows: Sequence[TableRow], options: Sequence[str]) -> bool:
    """Whether most answers are numbers; else they must be texts of options."""
    texts = sum(
        not row.cells["answer"].strip().isdigit() and row.cells["answer"] in [row.cells[name] for name in options]
        for row in rows
    )
    return 2 * texts <= len(rows)


def _question(
    cells: dict[str, Any], options: Sequence[str], by_index: bool, kinds: Collection[str] | None
) -> dict[str, Any]:
    id_of(cells, "video")
    if "num_option" in cells and cells["num_option"].strip() != str(len(options)):
        raise BadCell(f"column 'num_option': {cells['num_option']!r}, but there are {len(options)} options")
    if "frame_count" in cells and (not cells["frame_count"].strip().isdigit() or int(cells["frame_count"]) < 1):
        raise BadCell(f"column 'frame_count': {cells['frame_count']!r} is not the number of frames of a video")
    texts = [text_of(cells, name) for name in options]
    question: dict[str, Any] = {"id": id_of(cells, "qid"), "question": text_of(cells, "question"), "options": texts}
    if by_index:
        question["answer"] = index_of(cells, "answer", len(options))
    elif text_of(cells, "answer") in texts:
        question["answer"] = texts.index(cells["answer"])
    else:
        raise BadCell(f"column 'answer': {cells['answer']!r:.60} is none of the options {texts}")
    if kinds is not None:
        kind = text_of(cells, "type").strip()
        if kind not in kinds:
            raise BadCell(f"column 'type': {kind!r} is none of {', '.join(kinds)}")
        question["kind"] = kind
    return question


def _span(cells: dict[str, Any]) -> dict[str, Any]:
    if not cells["start"].strip() and not cells["end"].strip():
        return {}
    start, end = seconds_of(cells, "start"), seconds_of(cells, "end")
    if start >= end:
        raise BadCell(f"column 'end': {cells['end']!r} is not after column 'start' ({cells['start']!r})")
    return {"span": [start, end]}
