"""Instruction data of Video-ChatGPT and its fork: one question a row, many rows a video.

- VideoInstruct-100K (Maaz et al. 2023, https://arxiv.org/abs/2306.05424): {video_id, q, a}.
- Chat JSON, made of these or by the fork's converters: {id, video: "<id>.pkl", conversations: [human, gpt]}, `<video>`
  standing before or after the question. Copies of a row, by which the fork repeats what it asks for segments, count
  once: how often an epoch has a question is a setting (`inputs.repeats`).

A record is a video with all its questions (`chat`), so that it is stored, and its features are computed, once. Videos
are found below the root by name; those of the fork's ids (`P03_tea_ch0_stereo_all`) at `P03/stereo/P03_tea_ch0.avi`.

In the fork's rows the answers to "List down all the segments" are frames, which become `segments` and `<t:F>`. Of the
numbers in other rows, which were divided by a whole number, nothing is certain without the frames of the videos: with
`vid_frames_breakfast.json` or `vid_frames.json` among the annotations they are multiplied again, else they stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.sources import breakfast, salads
from vlm.sources.common import VideoFinder
from vlm.sources.common_chat import ALL_SEGMENTS, lines_of, words_of
from vlm.sources.common_features import take_features
from vlm.sources.common_fork_chat import breakfast_divider, read_frames, salads_divider
from vlm.sources.common_json import read_items
from vlm.sources.common_segments import Segment, segment
from vlm.sources.common_tables import BadCell, id_of, open_text, text_of
from vlm.sources.common_video_questions import ArrayFolder, AskedVideo, is_array_folder, samples
from vlm.sources.common_written import with_times
from vlm.types import Rejected, Sample, UserError

_FORK = re.compile(r"(P\d+)_([a-z]+)((?:_ch\d)?)_(cam\d+|webcam\d+|stereo)")
_LINE = re.compile(r"(\d{1,9})\s*-\s*(\d{1,9})\s+(\S.*)")
_ASKS = re.compile(re.escape(ALL_SEGMENTS).replace(r"\{activity\}", r"(.+?)") + r"\.?")
_CLASSES = {words_of(name): name for names in (breakfast.ACTIONS, salads.ACTIONS) for name in names}
_NUMBERS = {name: at for names in (breakfast.ACTIONS, salads.ACTIONS) for at, name in enumerate(names)}
_UNCLASSED = {words_of(name) for name in breakfast.UNCLASSED}


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `video`, `chat` and, of the fork's rows, `name`, `segments` and `num_frames` where they are known.

    Args:
        root: the folder of the videos.
        split: only used to find the file where none is given: `{root}/{split}.json`.
        annotations: files of rows; frames of videos ({video: number}); features, as a file or a folder of arrays.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    others, features = take_features(annotations)
    folders = [ArrayFolder(path) for path in others if is_array_folder(path)]
    files = [path for path in others if not path.is_dir()]
    counts = [file for file in files if file.suffix.lower() == ".json" and _begins(file) == "{"]
    files = [file for file in files if file not in counts] or [root / f"{split}.json"]
    frames = {video: number for file in counts for video, number in read_frames(file).items()}
    videos: dict[str, AskedVideo] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; give the questions with --annotations")
        for item in read_items(file):
            if isinstance(item, Rejected):
                yield item
                continue
            where, row = item
            try:
                name, question, answer = _asked(row)
            except BadCell as error:
                yield Rejected(f"{file.name}:{where.rpartition(' ')[2]}", f"{where}, {error}", str(file))
                continue
            rows = videos.setdefault(name, AskedVideo(name=name, where=where, file=str(file))).rows
            rows.append({"kind": "written", "question": question, "answer": answer})
    for video in videos.values():
        _finish(video, frames)
    yield from samples(videos.values(), VideoFinder(root), names_of, features, folders)


def names_of(video: str) -> list[str | Path]:
    """What the file of a video may be called, without suffix, or where it lies."""
    bare = video.removesuffix("_all")
    found = _FORK.fullmatch(bare)
    if found is None:
        return [video, bare] if bare != video else [video]
    person, activity, channel, camera = found.groups()
    place = Path(person, camera, f"{person}_{activity}{channel}.avi")
    return [*(Path(base, place) for base in breakfast.VIDEO_FOLDERS), video, bare]


def _begins(file: Path) -> str:
    with open_text(file) as text:
        return text.read(64).lstrip()[:1]


def _asked(row: dict[str, Any]) -> tuple[str, str, str]:
    """(video, question, answer) of a row."""
    column = next((name for name in ("video", "video_id", "id") if row.get(name) is not None), "video_id")
    name = re.sub(r"\.(?:pkl|npy|mp4|avi|mov|mkv|webm)$", "", id_of(row, column))
    if "conversations" not in row:
        return name, text_of(row, "q").strip(), text_of(row, "a").strip()
    turns = row["conversations"]
    turns = turns if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) else []
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        raise BadCell(
            "column 'conversations': is not one question and its answer; dialogues of several turns are read by the "
            "source instruct"
        )
    try:
        question, answer = (text_of(turn, "value") for turn in turns)
    except BadCell as error:
        raise BadCell(f"column 'conversations', {error}") from error
    if question.count("<video>") > 1 or "<video>" in answer:
        raise BadCell("column 'conversations': <video> stands twice, or in the answer")
    bare = question.replace("<video>", "").strip()
    if not bare:
        raise BadCell("column 'conversations': there is no question beside <video>")
    return name, bare, answer.strip()


def _finish(video: AskedVideo, frames: Mapping[str, int]) -> None:
    """Copies and segments of a video's rows, and the times in them."""
    kept = list({(row["question"], row["answer"]): row for row in video.rows}.values())
    segments: list[Segment] = []
    in_frames: list[dict[str, str]] = []  # rows whose numbers nobody divided
    for row in kept:
        found = _ASKS.fullmatch(row["question"])
        made = _segments(row["answer"]) if found and not segments else []
        if found and made:
            segments = made
            row["kind"], row["answer"] = "segments", lines_of(segments)
            video.annotation |= {"name": found[1], "segments": segments}
        elif found:
            in_frames.append(row)
            why = "there is another such answer" if segments else "not all of its lines are segments of known actions"
            video.warnings.append(f"{video.where}: {row['answer']!r:.60} is taken as words alone: {why}")
    kept.sort(key=lambda row: row["kind"] != "segments")
    bare = video.name.removesuffix("_all")
    number = frames.get(bare, frames.get(video.name))
    if number is not None:
        video.annotation["num_frames"] = number
        divider = breakfast_divider(number) if _FORK.fullmatch(bare) else salads_divider(number)
        ends = {round(part["end"] / divider): part["end"] for part in segments}
        for row in kept:
            if row["kind"] == "written" and row not in in_frames:
                row["question"] = with_times(row["question"], ends, divider)
                row["answer"] = with_times(row["answer"], ends, divider)
    elif segments and any(re.search(r"\d", row["question"] + row["answer"]) for row in kept[1:]):
        video.warnings.append(
            f"{video.where}: numbers of its other questions were divided by a number that follows from the frames of "
            f"the video, and stay as they are: give vid_frames_breakfast.json with --annotations"
        )
    video.rows = kept


def _segments(answer: str) -> list[Segment]:
    """The segments of an answer in frames, counted from 1, ends inclusive and shared; none where it is another."""
    segments: list[Segment] = []
    before = 0
    for line in filter(None, map(str.strip, answer.splitlines())):
        found = _LINE.fullmatch(line)
        label = words_of(found[3]) if found else ""
        if found is None or not (label in _CLASSES or label in _UNCLASSED):
            return []
        first, last = int(found[1]), int(found[2])
        if not 1 <= first <= last or first < before:
            return []
        start = max(first - 1, before)
        if start < last and label in _CLASSES:
            segments.append(segment(start, last, _CLASSES[label], _NUMBERS))
        before = last
    return segments
