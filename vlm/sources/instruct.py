"""Dialogues about a video or an image, one a row, as instruction data is published:

- LLaVA: {id, image or video, conversations: [{from: human or gpt, value}]} (Liu et al. 2023,
  https://arxiv.org/abs/2304.08485; Video-ChatGPT's and ShareGPT's files too, also with `system` turns);
- VideoChat: {video or image, QA: [{q, a; optionally i}]}, optionally `start` and `end` in seconds (Li et al. 2023,
  https://arxiv.org/abs/2305.06355; `i` is VideoChat2's instruction);
- {videos or images: [path], messages: [{role, content}]} of LLaMA-Factory, and Video-ChatGPT's {video_id, q, a}.

All become the first: `conversations`, in which human and gpt take turns and the media stands once, as `<video>`, in a
turn of the human. A row that names no media, and no place for it either, is a dialogue of text alone (LLaVA's mixes
have such). Files are JSON lists or JSON lines. Media are found at the path that the row names, below the root or
below its folders `videos` and `images` (`COCO_train2014_` may stand before the name there), or by name without suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.sources.common import VideoFinder
from vlm.sources.common_json import read_items
from vlm.sources.common_media import IMAGE_SUFFIXES
from vlm.sources.common_tables import BadCell, id_of, seconds_of, text_of
from vlm.types import Rejected, Sample, UserError

PLACE = "<video>"

_MARK = re.compile(r"<(?:video|image|audio)>")
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_COLUMNS = ("video", "image", "videos", "images", "video_id", "image_id")
_FOLDERS = ("videos", "video", "images", "image")

Turn = dict[str, str]  # from: human, gpt or system; value


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `conversations`, `video` (as the row names it) and, where rows have them, `id` and `span`.

    The key is the name of the file and the row, since ids are neither always there nor always different.

    Args:
        root: the folder of the media.
        split: only used to find the file where none is given: `{root}/{split}.json` or `.jsonl`.
        annotations: the files.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    files = list(annotations) or [
        file for suffix in (".json", ".jsonl") if (file := root / f"{split}{suffix}").is_file()
    ]
    if not files:
        raise UserError(f"{root} has no {split}.json or {split}.jsonl: give the dialogues with --annotations")
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        double = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"two files of dialogues are called {double!r}: keys begin with that name; rename one")
    media = _Media(root)
    for file in files:
        for item in read_items(file):
            if isinstance(item, Rejected):
                yield item
                continue
            where, row = item
            key = f"{file.stem}/{int(where.rpartition(' ')[2]):07d}"
            try:
                yield _sample(key, where, row, media)
            except BadCell as error:
                yield Rejected(key, f"{where}, {error}", str(file))


def _sample(key: str, where: str, row: dict[str, Any], media: _Media) -> Sample:
    if not any(row.get(name) for name in (*_COLUMNS, "audios")):
        alone = _turns(row)
        if not any(_MARK.search(turn["value"]) for turn in alone):
            warning = f"{where}: names no video or image, so it is a dialogue of text alone"
            own = {"id": id_of(row, "id")} if row.get("id") is not None else {}
            return Sample(key=key, annotation={"conversations": alone} | own, warnings=(warning,))
    column, name = _media_of(row)
    turns, lacks_place = _with_place(_turns(row), column)
    annotation: dict[str, Any] = {"conversations": turns, "video": name}
    if row.get("id") is not None:
        annotation["id"] = id_of(row, "id")
    if row.get("start") is not None or row.get("end") is not None:
        start, end = seconds_of(row, "start"), seconds_of(row, "end")
        if start >= end:
            raise BadCell(f"column 'end': {row['end']!r} is not after column 'start' ({row['start']!r})")
        annotation["span"] = [start, end]
    warned = lacks_place and "QA" not in row and "q" not in row  # whose files never say where the media stands
    warnings = (f"{where}: no turn says where the {column} stands, so it comes first",) if warned else ()
    return Sample(key=key, video=media.find(column, name), annotation=annotation, warnings=warnings)


# Turns ------------------------------------------------------------------------------------------


def _turns(row: dict[str, Any]) -> list[Turn]:
    """Human and gpt in turn, after a system turn or none."""
    forms = [name for name in ("conversations", "messages", "QA", "q") if name in row]
    if len(forms) != 1:
        raise BadCell(
            f"columns {', '.join(map(repr, forms))}: it is not known which one counts"
            if forms
            else f"column 'conversations' (or 'messages', 'QA', 'q'): is missing; there are {', '.join(row) or 'none'}"
        )
    form, parts = forms[0], row[forms[0]]
    if form == "q":
        return [_turn("human", row, "q"), _turn("gpt", row, "a")]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise BadCell(f"column {form!r}: {parts!r:.60} is not a list of objects")
    turns = _questions_and_answers(parts) if form == "QA" else _spoken(parts, form)
    spoken = [turn for place, turn in enumerate(turns) if place or turn["from"] != "system"]
    if not spoken:
        raise BadCell(f"column {form!r}: has no turns")
    for number, (turn, speaker) in enumerate(zip(spoken, ("human", "gpt") * len(spoken)), 1):
        if turn["from"] != speaker:
            raise BadCell(f"column {form!r}, turn {number}: is of {turn['from']!r}, but it is the {speaker}'s turn")
    if len(spoken) % 2:
        raise BadCell(f"column {form!r}: the last of {len(spoken)} turns is the human's: there is no answer to learn")
    return turns


def _spoken(parts: Sequence[dict[str, Any]], form: str) -> list[Turn]:
    speaker, value = ("from", "value") if form == "conversations" else ("role", "content")
    turns = []
    for number, part in enumerate(parts, 1):
        place, name = f"column {form!r}, turn {number}, ", part.get(speaker)
        if not isinstance(name, str) or name not in _SPEAKERS:
            raise BadCell(f"{place}column {speaker!r}: {name!r:.60} is none of {', '.join(_SPEAKERS)}")
        turns.append(_turn(_SPEAKERS[name], part, value, place))
    return turns


def _questions_and_answers(parts: Sequence[dict[str, Any]]) -> list[Turn]:
    """VideoChat's turns. An instruction goes before the first question; captions have it instead of a question."""
    turns: list[Turn] = []
    for number, part in enumerate(parts, 1):
        place = f"column 'QA', part {number}, "
        asks = bool(part.get("q")) or not part.get("i")
        if number == 1 and asks and part.get("i"):
            turns.append(_turn("system", part, "i", place))
        turns += [_turn("human", part, "q" if asks else "i", place), _turn("gpt", part, "a", place)]
    return turns


def _turn(speaker: str, part: dict[str, Any], column: str, place: str = "") -> Turn:
    try:
        return {"from": speaker, "value": text_of(part, column)}
    except BadCell as error:
        raise BadCell(f"{place}{error}") from error


def _with_place(turns: list[Turn], column: str) -> tuple[list[Turn], bool]:
    """(turns with the media standing once, whether they did not say where)."""
    marks = [(turn["from"], mark) for turn in turns for mark in _MARK.findall(turn["value"])]
    if not marks:
        first = next(turn for turn in turns if turn["from"] == "human")
        return [turn | {"value": f"{PLACE}\n{turn['value']}"} if turn is first else turn for turn in turns], True
    if len(marks) > 1:
        raise BadCell(f"{' and '.join(mark for _, mark in marks[:4])} stand in the turns, but there is one {column}")
    if marks[0][0] != "human" or marks[0][1] == "<audio>":
        raise BadCell(f"{marks[0][1]} stands in a turn of {marks[0][0]!r}; the {column} belongs to the human's")
    return [turn | {"value": _MARK.sub(PLACE, turn["value"])} for turn in turns], False


# Media ------------------------------------------------------------------------------------------


def _media_of(row: dict[str, Any]) -> tuple[str, str]:
    """(column, path or name) of the one video or image of a row."""
    if row.get("audios"):
        raise BadCell("column 'audios': sound is not read")
    columns = [name for name in _COLUMNS if row.get(name)]
    paths = [name for name in columns if not name.endswith("_id")] or columns
    if not paths:
        raise BadCell("columns 'video' and 'image': are missing, so there is nothing to see")
    if len(paths) > 1:
        raise BadCell(f"columns {' and '.join(map(repr, paths))}: a record has one video or image")
    value = row[paths[0]]
    if isinstance(value, list):
        if len(value) != 1:
            raise BadCell(f"column {paths[0]!r}: {len(value)} files, but a record has one video or image")
        value = value[0]
    return paths[0], id_of({paths[0]: value}, paths[0])


class _Media:
    """Finds the file that a row names."""

    def __init__(self, root: Path) -> None:
        self._finder = VideoFinder(root)  # lists the folder only when asked
        self.folders = [root, *(folder for name in _FOLDERS if (folder := root / name).is_dir())]

    def find(self, column: str, name: str) -> Path:
        """The file; raises BadCell."""
        path = Path(name)
        names = [path]
        if column.startswith("image"):
            names += [] if path.suffix else [path.with_name(path.name + suffix) for suffix in IMAGE_SUFFIXES]
            names += [one.with_name(f"COCO_train2014_{one.name}") for one in names]
        for folder in self.folders:
            for one in names:
                if (folder / one).is_file():  # an absolute path stays as it is
                    return folder / one
        reason = f"no file {name!r} in {', '.join(map(str, self.folders))}"
        if column.startswith("video") and path.parent == Path() and (path.suffix in ("", ".pkl") or column != "video"):
            found = self._finder.find(path.stem if path.suffix == ".pkl" else name)
            if isinstance(found, Path):
                return found
            reason = found
        raise BadCell(f"column {column!r}: {reason}")
