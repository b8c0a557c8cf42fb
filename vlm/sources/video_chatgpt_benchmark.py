"""Questions that are answered in free words and judged: Video-ChatGPT's benchmark, and zero-shot question answering.

- General and temporal questions (Maaz et al. 2023, https://arxiv.org/abs/2306.05424): {video_name, Q, A}; consistency:
  {video_name, Q1, Q2, A}, two questions of one answer, each asked alone. Published as `generic_qa.json`,
  `temporal_qa.json`, `consistency_qa.json`.
- ActivityNet-QA, and others in its form: `test_q.json` {video_name, question, question_id} and `test_a.json` {answer},
  row by row. MSVD-QA and MSRVTT-QA (validation sets): {video_id, question, answer}, videos `vid12` and `video7010`.
  TGIF-QA's FrameQA: a table with columns gif_name, question, answer.

A record is a video with all its questions (`chat`); the id of a question is `<video>/<k>`, counted from 0 for each
video, and `<video>/<k>/1` and `/2` of a pair. Videos are found below the root by name (mp4, avi, mov, mkv, gif, …;
ActivityNet's also with `v_` before it); one that is missing is rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.sources.common import VIDEO_SUFFIXES, VideoFinder
from vlm.sources.common_features import take_features
from vlm.sources.common_json import read_items
from vlm.sources.common_tables import BadCell, TableRow, id_of, read_csv, read_tsv, text_of
from vlm.sources.common_video_questions import ArrayFolder, AskedVideo, is_array_folder, samples
from vlm.types import Rejected, Sample, UserError

VIDEO_COLUMNS = ("video_name", "video_id", "video", "gif_name")
_PLACES = ("", "Benchmarking_QA", "annotations")

_Row = tuple[str, dict[str, Any]]  # file and row, columns


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `video` and `chat` ({kind, question, answer, id}); the key is the name of the video.

    Args:
        root: the folder of the videos.
        split: only used to find the files where none are given: `{split}_qa.json`, or `{split}_q.json` and
            `{split}_a.json`.
        annotations: a file of questions with answers, or one of questions and one of answers; features, as a file or
            a folder of arrays.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    others, features = take_features(annotations)
    folders = [ArrayFolder(path) for path in others if is_array_folder(path)]
    files = [path for path in others if not path.is_dir()] or _default_files(root, split)
    videos: dict[str, AskedVideo] = {}
    counts: Counter[str] = Counter()
    for item in _paired(files) if len(files) == 2 else _rows(files[0]):
        if isinstance(item, Rejected):
            yield item
            continue
        where, row = item
        file = files[0]
        try:
            name = id_of(row, next((column for column in VIDEO_COLUMNS if column in row), VIDEO_COLUMNS[0]))
            at = counts[name]
            counts[name] += 1  # a damaged question keeps its number, so that others keep theirs
            asked = [
                {"kind": _kind(row, file), "question": text_of(row, question).strip(), "answer": answer, "id": id}
                for answer in [_answer(row)]
                for question, id in _questions(row, f"{name}/{at}")
            ]
        except BadCell as error:
            yield Rejected(f"{file.name}:{where.rpartition(' ')[2]}", f"{where}, {error}", str(file))
            continue
        videos.setdefault(name, AskedVideo(name=name, where=where, file=str(file))).rows.extend(asked)
    yield from samples(videos.values(), VideoFinder(root), names_of, features, folders)


def names_of(video: str) -> list[str | Path]:
    """What the file of a video may be called, without suffix."""
    stem = Path(video).stem if Path(video).suffix.lower() in VIDEO_SUFFIXES else video
    numbered = [f"video{stem}", f"vid{stem}"] if stem.isdigit() else []
    return [stem, *numbered, f"v_{stem}"]


def _questions(row: Mapping[str, Any], id: str) -> list[tuple[str, str]]:
    """(column, id) of each question of a row."""
    if "Q1" in row or "Q2" in row:
        return [("Q1", f"{id}/1"), ("Q2", f"{id}/2")]
    return [("Q" if "Q" in row else "question", id)]


def _answer(row: dict[str, Any]) -> str:
    column = "A" if row.keys() & {"A", "Q", "Q1", "Q2"} else "answer"
    value = row.get(column)
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return text_of(row | {column: str(value)} if is_count else row, column).strip()


def _kind(row: Mapping[str, Any], file: Path) -> str:
    if "Q1" in row:
        return "consistency"
    if "Q" in row:
        return "temporal" if "temporal" in file.stem.lower() else "general"
    return "qa"


# Files ---------------------------------------------------------------------------------------------------------------


def _default_files(root: Path, split: str) -> list[Path]:
    folders = [root / place for place in _PLACES]
    for names in ((f"{split}_qa.json",), (f"{split}_q.json", f"{split}_a.json"), (f"{split}.json",)):
        for folder in folders:
            files = [folder / name for name in names]
            if all(file.is_file() for file in files):
                return files
    raise UserError(
        f"{root} has no {split}_qa.json, and no {split}_q.json with {split}_a.json: give the questions with "
        "--annotations"
    )


def _rows(file: Path) -> Iterator[_Row | Rejected]:
    if file.suffix.lower() in (".csv", ".tsv"):
        read_table = read_csv if file.suffix.lower() == ".csv" else read_tsv
        for row in read_table(file, ("question", "answer"), VIDEO_COLUMNS[-1:] + VIDEO_COLUMNS[:-1]):
            yield (row.where, dict(row.cells)) if isinstance(row, TableRow) else row
    else:
        yield from read_items(file)


def _paired(files: Sequence[Path]) -> Iterator[_Row | Rejected]:
    """The rows of a file of questions, each with its answer from another: of the same number, or of the same id."""
    read_ = {file: list(_rows(file)) for file in files}
    asks = [file for file, rows in read_.items() if any("question" in row for _, row in _good(rows))]
    if len(read_) != 2 or len(asks) != 1:
        raise UserError(
            f"{', '.join(map(str, files))}: one of two files must hold questions and the other answers (test_q.json, "
            "test_a.json); questions of several kinds are a shard set each"
        )
    (answers,) = read_.keys() - set(asks)
    questions, given = read_[asks[0]], read_[answers]
    if len(questions) != len(given):
        raise UserError(f"{asks[0]} has {len(questions)} rows, but {answers} has {len(given)}: each is to answer one")
    by_id = {str(row["question_id"]): row for _, row in _good(given) if "question_id" in row}
    several = Counter(str(row.get("question_id")) for _, row in _good(given))
    for question, answer in zip(questions, given):
        if isinstance(question, Rejected):
            yield question
            continue
        where, row = question
        id = str(row.get("question_id", ""))
        if several[id] == 1 and id in by_id:
            yield where, row | {"answer": by_id[id].get("answer")}
        elif by_id and "question_id" in row:
            how = "stands in several rows of" if several[id] else "is not in"
            reason = f"{where}, column 'question_id': {row['question_id']!r:.60} {how} {answers}"
            yield Rejected(f"{asks[0].name}:{where.rpartition(' ')[2]}", reason, str(asks[0]))
        elif isinstance(answer, Rejected):
            yield answer
        else:
            yield where, row | {"answer": answer[1].get("answer")}


def _good(rows: Sequence[_Row | Rejected]) -> Iterator[_Row]:
    return (row for row in rows if not isinstance(row, Rejected))
