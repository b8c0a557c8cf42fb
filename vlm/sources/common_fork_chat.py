"""Chat JSON as the published converters of Video-ChatGPT and of its fork write it, their faults kept: to compare with.

Rows are {id, video: "<id>.pkl", conversations: [human, gpt]}; the video stands after the question in every other row of
the whole file, before it in the rest. The fork repeats each row, for want of a setting in training, and mixes two axes
of time: the segments of Breakfast are told in frames, what a language model wrote in frames divided by a whole number,
in which `divided` goes wrong besides. `vlm/sources/common_chat.py` makes what these rows were meant to be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm.sources.common import read_json, read_text
from vlm.sources.common_chat import ALL_SEGMENTS
from vlm.sources.common_fork import SALADS_TEST
from vlm.types import UserError

PLACES = 1000  # that a video was to have
BREAKFAST_REPEATS = (12, 2)  # of the first question of a video, and of each other
SALADS_REPEATS = (150, 90)

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LARGEST = 1e9
_VIDEOS = Path("Videos") / "BreakfastII_15fps_qvga_sync"


class Exchange(NamedTuple):
    """A question about a video and its answer."""

    video: str
    question: str
    answer: str
    repeats: int = 1


# Numbers -------------------------------------------------------------------------------------------------------------


def breakfast_divider(num_frames: int) -> int:
    return round((num_frames - 1) / PLACES) or 1


def salads_divider(num_frames: int) -> int:
    return max(1, round(num_frames / PLACES))  # 0 would end in an error; no published video is so short


def divided(text: str, divider: int) -> str:
    """A line whose first two numbers are divided, wherever their digits stand: with divider 4, "30-300" is "8-80"."""
    numbers = [float(number) for number in _NUMBER.findall(text)]
    if not numbers:
        return text
    if max(numbers) > _LARGEST:
        raise UserError(f"{text!r:.60} tells a number that is no frame of a video")
    for number in (numbers[0], numbers[1] if len(numbers) > 1 else numbers[0]):
        text = text.replace(str(int(number)), str(round(number / divider)))
    return text


def multiplied(text: str, frames_per_place: float) -> str:
    """An answer in frames, as the fork's inference makes it: of "30-150 take" only the 150, which a blank follows, is
    multiplied, and what was multiplied before may be so again."""
    for number in sorted({float(number) for number in _NUMBER.findall(text)}):
        text = text.replace(f"{int(number)} ", f"{round(number * frames_per_place)} ")
    return text


# Rows ----------------------------------------------------------------------------------------------------------------


def chat_json(exchanges: Iterable[Exchange]) -> Iterator[dict[str, Any]]:
    """The rows; whether the video stands before or after the question goes by their number."""
    number = 0
    for exchange in exchanges:
        for _ in range(exchange.repeats):
            asked = f"<video>\n{exchange.question}" if number % 2 else f"{exchange.question}\n<video>"
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": exchange.answer}]
            yield {"id": exchange.video, "video": f"{exchange.video}.pkl", "conversations": turns}
            number += 1


def instruct_exchanges(rows: Iterable[Mapping[str, Any]]) -> Iterator[Exchange]:
    """Of VideoInstruct-100K: {video_id, q, a}."""
    return (Exchange(str(row["video_id"]), str(row["q"]), str(row["a"])) for row in rows)


def breakfast_exchanges(
    root: Path,
    frames: Mapping[str, int],
    without: Collection[str] = (),
    repeats: tuple[int, int] = BREAKFAST_REPEATS,
) -> Iterator[Exchange]:
    """Of the fork's tree `LLM/Breakfast`: segments beside the videos, and in `Breakfast` what a language model wrote.

    Args:
        frames: video (P03_tea_ch0_stereo) -> its frames.
        without: test videos, /P03/cam01/P03_tea.avi.
    """
    folder = root / "Breakfast"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the root is the fork's LLM/Breakfast")
    for file in sorted(folder.glob("*/*/*")):
        place = file.relative_to(folder)
        if f"/{place.as_posix()}".removesuffix(".labels") in without:
            continue
        if "_" not in file.name.partition(".")[0] or not file.is_file():
            raise UserError(f"{file}: is no file of questions such as P03/cam01/P03_tea.avi.labels")
        video = f"{file.name.partition('.')[0]}_{file.parent.name}"
        segments = root / _VIDEOS / place
        if not segments.exists():
            segments = segments.with_name(segments.name.replace("ch0", "ch1"))
        activity = file.name.partition(".")[0].split("_")[1]
        asked = {ALL_SEGMENTS.format(activity=activity): read_text(segments)}
        asked |= _written(file, breakfast_divider(_frames_of(video, frames)), asked)
        yield from _repeated(f"{video}_all", asked, repeats)


def salads_exchanges(
    folder: Path,
    frames: Mapping[str, int],
    without: Collection[str] = SALADS_TEST,
    repeats: tuple[int, int] = SALADS_REPEATS,
) -> Iterator[Exchange]:
    """Of the fork's folder of 50Salads: what a language model wrote, a file a video (rgb-01-1)."""
    files = sorted(file for file in folder.glob("*") if file.is_file()) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder} holds no file; the root is the folder of files such as rgb-01-1")
    for file in files:
        if file.name not in without:
            asked = _written(file, salads_divider(_frames_of(file.name, frames)), {})
            yield from _repeated(file.name, asked, repeats)


def read_frames(file: Path) -> dict[str, int]:
    """video -> its frames, from `vid_frames.json`."""
    content = read_json(file)
    if not isinstance(content, dict) or not all(type(value) is int and value > 0 for value in content.values()):
        raise UserError(f"{file} must be a JSON object of video: number of frames")
    return content


def _repeated(video: str, asked: Mapping[str, str], repeats: tuple[int, int]) -> Iterator[Exchange]:
    for number, (question, answer) in enumerate(asked.items()):
        yield Exchange(video, question, answer.replace("_", " "), repeats[0 if number == 0 else 1])


def _frames_of(video: str, frames: Mapping[str, int]) -> int:
    if video not in frames:
        raise UserError(
            f"the frames of video {video!r} are not in the file of --frames; its numbers are divided by them"
        )
    return frames[video]


def _written(file: Path, divider: int, before: Mapping[str, str]) -> dict[str, str]:
    """Question -> answer; one that is asked again keeps its place and loses its first answer."""
    asked: dict[str, str] = dict(before)
    question = None
    for line in re.sub(r"Format [12]: ?\n", "", read_text(file)).split("\n"):
        line = line.replace("A: ", "").replace("A:", "")
        if not line.strip():
            continue
        if "Q:" in line:
            question = divided(line.replace("Q: ", ""), divider)
            asked[question] = ""
        elif question is None:
            raise UserError(f"{file}: {line!r:.60} stands before the first question")
        else:
            asked[question] += divided(line.replace("\t", "").strip(), divider) + "\n"
    return asked
