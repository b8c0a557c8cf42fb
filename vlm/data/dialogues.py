"""Captions of and dialogues about videos and images: what Video-LLaMA trains on in its two stages, and writes in tests.

A record with `caption` gives a row of the view `caption`, one with `conversations` a row of the view `dialogue`; a
record that has both gives both. A dialogue may be of text alone. Frames are read by vlm.data.frames, or what a frozen
encoder made of them before is (`source="features"`); what is written around the words is in vlm.data.templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from vlm.data.dialogue_lengths import Length, dialogue_lengths, times
from vlm.data.dialogue_records import caption_of, conversed, is_image, is_text, text_alone, turns_of
from vlm.data.features import tensor_members
from vlm.data.frames import CLIP_COLOURS, Look, Sampling, sample, seconds_of, see
from vlm.data.packing import row_of
from vlm.data.prompts import PromptEncoder
from vlm.data.rng import SampleRng
from vlm.data.sampling import uniform_frames
from vlm.data.shards import ShardSet
from vlm.data.templates import (
    PLACE,
    SYSTEM,
    VICUNA_END,
    Media,
    TemplateName,
    blip_caption,
    caption_lead,
    dialogue,
    drift_labels,
    frames_message,
)
from vlm.data.tokenizers import tokenizer_of
from vlm.data.video import DecodeError
from vlm.data.video_rows import (
    PROBES,
    all_ends,
    blinded,
    check_probes,
    count_row,
    decoded,
    gather,
    note,
    pack_rows,
    read_tokens,
)
from vlm.types import IGNORE, Ask, Batch, Colours, Control, Example, Prompt, Record, Row, Text, Tokens, UserError, Visit

VIEWS = ("caption", "dialogue")
IMAGE_LINES = (
    f"{PLACE} Describe this image in detail.",
    f"{PLACE} Take a look at this image and describe what you notice.",
    f"{PLACE} Please provide a detailed description of the picture.",
    f"{PLACE} Could you describe the contents of this image for me?",
)
"""What the second stage of Video-LLaMA asks for captions of images with (after MiniGPT-4, arXiv 2304.10592)."""


@dataclass(slots=True, kw_only=True)
class DialogueConfig:
    """Captions and dialogues about videos and images."""

    tokenizer: Path | None = None
    """A tokenizer.model (sentencepiece or tiktoken) or a folder with one; none: bytes, for debugging only."""
    source: Literal["pixels", "features"] = "pixels"
    """pixels: frames of the records' videos and images. features: what the frozen tower made of each frame before
    (tools/extract_features.py), which costs no tower in training, and knows no random crops."""
    features: str = "q_former"
    """Name of the members (NAME.safetensors or NAME.npy) that hold these features, (frames, tokens, width) each."""
    frame_tokens: int = 32
    """Tokens of a frame, where frames come as features (Q)."""
    frame_dim: int = 768
    """Width of such a token."""
    num_video_tokens: int = 32
    """Places that a video takes in its row (N)."""
    num_frames: int = 8
    """Most frames of a video; a shorter one has fewer."""
    size: int = 224
    """Height and width of a frame, in pixels."""
    caption_sampling: Sampling = "headtail"
    """Frames of a training video with a caption. headtail: drawn, as many from each half; uniform: evenly spread. Tests
    spread them evenly in any case."""
    dialogue_sampling: Sampling = "uniform"
    """Frames of a training video with a dialogue."""
    augment: bool = True
    """Training sees a random part of each video or image, of all its frames the same."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Least and greatest share of the frame's area that this part takes."""
    uint8_wrap: bool = False
    """Levels that the enlarged part has beyond 0 … 255 come out at the other end of the scale, as in the published
    code; else the nearest is taken."""
    template: TemplateName = "vicuna_v0"
    """What is written around what is said: vicuna_v0 (Vicuna v0, BiLLa, Ziya) or llama2 (LLaMA-2-chat)."""
    system: str | None = None
    """The system's text, where a dialogue has none of its own; none: the template's."""
    prompts: tuple[str, ...] = ()
    """Lines that ask for a caption, in the template; one is drawn for each sample, tests take the first. `<video>` is
    where the video or image stands. (): a caption follows its video without words (the first stage)."""
    caption_end: str | None = "\n"
    """What ends a caption: a text, or none for the end token."""
    max_caption_length: int = 32
    """Most tokens of a caption and its end; a longer one ends where it is cut."""
    max_length: int = 512
    """Most tokens of a dialogue's row, its video included; a longer one loses its last tokens."""
    frames_message: bool = True
    """Tell before the first question how many frames of the video there are and of which seconds; the Chinese models
    were trained without."""
    test_views: tuple[str, ...] = VIEWS
    """What is written of a record in tests: its caption, the answers of its dialogue, or both."""
    clean: Literal["videos", "all", "none"] = "videos"
    """Whose captions are put into lower case, without most punctuation, and cut after 50 words, as BLIP's. videos: not
    those of images, as published."""
    label_mask: Literal["exact", "drift"] = "exact"
    """What of a dialogue is to be predicted. exact: what the assistant says and what ends it. drift: as the published
    code, whose windows run ahead by a token each turn, so that it learns of the leads and misses of the answers;
    template llama2 never had this fault."""

    def __post_init__(self) -> None:
        self.tokenizer = None if self.tokenizer is None else Path(self.tokenizer)
        for name in ("num_video_tokens", "num_frames", "size", "max_caption_length", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"inputs.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"inputs.crop_scale is {self.crop_scale}; it must be two shares, 0 < least <= most <= 1")
        for line in self.prompts:
            if line.count(PLACE) != 1:
                raise ValueError(f"inputs.prompts: {line!r} must have {PLACE} once, where the video or image stands")
        if self.caption_end == "":
            raise ValueError("inputs.caption_end is empty, so captions would never end; none is the end token")
        if not self.test_views or not set(self.test_views) <= set(VIEWS):
            raise ValueError(f"inputs.test_views is {self.test_views}; it must be some of {', '.join(VIEWS)}")
        if self.label_mask == "drift" and self.template == "llama2":
            raise ValueError("inputs.label_mask=drift: template llama2 never had this fault; leave it at exact")

    # ------------------------------------------------------------------------------------------ what the loader calls

    task = "caption"
    probes: ClassVar[tuple[str, ...]] = PROBES

    @property
    def members(self) -> tuple[str, ...]:
        """What is read of a record, beside its annotation."""
        return ("video",) if self.source == "pixels" else tensor_members(self.features)

    def parts(self, shards: ShardSet) -> None:
        """A record is one sample."""

    def lengths(self, shards: ShardSet) -> np.ndarray:
        """(records,) tokens that each record's rows are expected to have, in all views (vlm.data.dialogue_lengths)."""
        line = max(self.prompts, key=lambda prompt: len(self._encode((Text(prompt),)).ids), default=None)
        lines = () if line is None else (line,)
        whole = replace(self, prompts=lines, max_caption_length=1 << 30, max_length=1 << 30)
        most = {"caption": self.max_caption_length, "conversations": self.max_length}
        return dialogue_lengths(shards, self.tokenizer, whole._measure, most)

    def _measure(self, record: Record) -> dict[str, Length]:
        media = None if is_text(record) else self._media(is_image(record), *times(record, self.num_frames))
        lead = caption_lead(self._line(None), self.template, self._system, media or Media())
        before = {"caption": len(self._encode(lead).ids), "dialogue": 0}
        try:
            rows = self._rows(record, VIEWS, media, SampleRng(0), {})
        except (DecodeError, UserError):
            return {}
        return {_FIELDS[view]: Length(before[view], len(row.ids) - before[view]) for view, (row,) in rows.items()}

    def train(self, record: Record, rng: SampleRng, visit: Visit) -> list[Example]:
        """The rows of a record in the views that the recipe weighs.

        Raises:
            DecodeError: its video, image, features or text are missing or damaged.
            UserError: it has none of these views.
        """
        self.check_views(visit.views)
        has = [name for name in VIEWS if _FIELDS[name] in record.annotation]
        wanted = [name for name in has if name in visit.views]
        if not wanted:
            raise UserError(
                f"record {record.key!r} of {record.shard} has {' and '.join(has) or 'neither caption nor dialogue'}, "
                f"but the recipe's views are {', '.join(visit.views)}: give views.{has[0] if has else 'caption'} a "
                "weight, or take other shards"
            )
        sampling = self.dialogue_sampling if "dialogue" in wanted else self.caption_sampling
        example, media = self._look(record, rng, sampling, self.crop_scale if self.augment else None)
        counters: dict[str, int] = {}
        rows = self._rows(record, wanted, media, rng, counters)
        return [replace(example, rows=rows, counters=counters)]

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        """A training batch: the rows of each view end to end."""
        views = {}
        for view in VIEWS:
            rows = pack_rows(examples, self.num_video_tokens, [example.rows.get(view, ()) for example in examples])
            if rows is not None:
                views[view] = rows
        return replace(gather(examples, self.colours), views=views)

    # ------------------------------------------------------------------------------------------ what tests call

    def asks(self, record: Record) -> tuple[Ask, ...]:
        """A caption to be written, then each answer of the assistant, with all that was really said before it."""
        asked = []
        if self._tests("caption", record):
            words = self._caption(record, is_image(record))
            line = (self._line(None) or "").replace(PLACE, "").strip()
            asked.append(Ask(record.key, None, kind="", question=line, references=(words,)))
        if self._tests("dialogue", record):
            turns = turns_of(record)
            answers = [place for place, turn in enumerate(turns) if turn["from"] == "gpt"]
            asked += [
                Ask(
                    f"{record.key}/{number}",
                    None,
                    kind="",
                    question=turns[place - 1]["value"].replace(PLACE, "").strip(),
                    references=(turns[place]["value"],),
                )
                for number, place in enumerate(answers)
            ]
        return tuple(asked)

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """The prompts of a record, in the order of `asks`, under "" and under each probe's name."""
        check_probes(probes)
        example, media = self._look(record, rng, "uniform", None)
        counters: dict[str, int] = {}
        prompts: list[Row] = []
        if self._tests("caption", record):
            lead = caption_lead(self._line(None), self.template, self._system, media or Media())
            prompts.append(self._prompt_row(lead, counters))
        if self._tests("dialogue", record):
            spoken = dialogue(turns_of(record), self.template, self._system, media)
            prompts += [self._prompt_row(spoken.prompt[:place], counters) for place in spoken.answers]
        if not prompts:
            raise DecodeError(f"record {record.key!r} of {record.shard} has no {' and no '.join(self.test_views)}")
        example = replace(example, prompts=tuple(prompts), counters=counters)
        return {"": [example], **{probe: [blinded(example)] for probe in probes}}

    def test_batch(self, examples: Sequence[Example]) -> Batch:
        """A test batch: all prompts, each a row alone."""
        prompts = pack_rows(examples, self.num_video_tokens, [example.prompts for example in examples])
        return replace(gather(examples, self.colours), prompts=prompts)

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to write."""
        row = self._prompt_row(caption_lead(self._line(None), self.template, self._system, Media()), {})
        if self.source == "features":
            return Example(key="", frame_tokens=torch.zeros(1, self.frame_tokens, self.frame_dim), prompts=(row,))
        return Example(key="", frames=torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8), prompts=(row,))

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that end a text which a model writes: the end token, and what else ends captions and answers."""
        return all_ends(self.tokenizer, self._ends)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that a model wrote, up to what ends it."""
        return decoded(self.tokenizer, ids, self._ends)

    # ------------------------------------------------------------------------------------------ what a chat calls

    def look(self, record: Record) -> Example:
        """What a model sees of a record, its frames evenly spread, and how that is told."""
        example, media = self._look(record, SampleRng(0), "uniform", None)
        return example if media is None else replace(example, told=(media.is_image, media.message))

    def converse(self, turns: Sequence[tuple[str, str | None]], example: Example) -> Example:
        """The example with one prompt: these questions and answers about its video, up to the last answer."""
        return conversed(turns, example, self.template, self._system, self._prompt_row)

    # ------------------------------------------------------------------------------------------ parts

    def _tests(self, view: str, record: Record) -> bool:
        return view in self.test_views and _FIELDS[view] in record.annotation

    @property
    def vocab_size(self) -> int:
        """Words that the model must know."""
        return tokenizer_of(self.tokenizer).vocab_size

    @property
    def colours(self) -> Colours:
        """What the model normalises pixels with: CLIP's."""
        return CLIP_COLOURS

    def check_views(self, views: Iterable[str]) -> None:
        """Refuse views that there are not (UserError)."""
        for view in views:
            if view not in VIEWS:
                raise UserError(
                    f"views: there is no view {view!r} of captions and dialogues; known: {', '.join(VIEWS)}"
                )

    @property
    def _system(self) -> str:
        return SYSTEM[self.template] if self.system is None else self.system

    @property
    def _ends(self) -> tuple[str, ...]:
        own = () if self.caption_end is None else (self.caption_end,)
        return tuple(dict.fromkeys((*own, *((VICUNA_END,) if self.template == "vicuna_v0" else ()))))

    def _line(self, rng: SampleRng | None) -> str | None:
        """A line that asks for a caption: a drawn one, or without `rng` the first."""
        if not self.prompts:
            return None
        return self.prompts[0] if rng is None else rng.python.choice(self.prompts)

    def _look(
        self, record: Record, rng: SampleRng, sampling: Sampling, crop_scale: tuple[float, float] | None
    ) -> tuple[Example, Media | None]:
        """(an example with the frames of a record, how they are written); without video: text alone."""
        if self.source == "pixels":
            if record.video is None:
                return text_alone(record)
            seen = see(record, Look(self.num_frames, self.size, sampling, crop_scale, self.uint8_wrap), rng)
            example = Example(key=record.key, frames=seen.frames)
            return example, self._media(seen.is_image, seen.seconds, len(seen.frames))
        if not any(name in record.members for name in self.members) and is_text(record):
            return text_alone(record)
        tokens = read_tokens(record, self.features, self.frame_tokens, self.frame_dim)
        chosen = sample(len(tokens), self.num_frames, sampling, rng)
        known = record.num_frames > 0
        shown = uniform_frames(record.num_frames, len(tokens)) if known else np.zeros(0, dtype=np.int64)
        when = seconds_of(shown[chosen], record.fps) if len(shown) == len(tokens) else ()
        media = self._media(is_image(record), when, len(chosen))
        return Example(key=record.key, frame_tokens=tokens[torch.from_numpy(chosen)]), media

    def _media(self, still: bool, seconds: Sequence[float], num_frames: int) -> Media:
        return Media(still, frames_message(seconds, num_frames) if self.frames_message and not still else "")

    def _rows(
        self,
        record: Record,
        views: Iterable[str],
        media: Media | None,
        rng: SampleRng,
        counters: dict[str, int],
    ) -> dict[str, tuple[Row, ...]]:
        """A row for each of these views that the record has."""
        rows: dict[str, tuple[Row, ...]] = {}
        for view in views:
            if _FIELDS[view] not in record.annotation:
                continue
            tokens = (
                self._caption_tokens(record, media, rng) if view == "caption" else self._turns_tokens(record, media)
            )
            count_row(counters, tokens, too_long=bool(tokens.excess))
            rows[view] = (row_of(tokens),)
        return rows

    def _caption_tokens(self, record: Record, media: Media | None, rng: SampleRng) -> Tokens:
        """What stands before a caption, the caption, its end."""
        if media is None:
            raise DecodeError(f"record {record.key!r} of {record.shard} has a caption, but no video or image")
        lead = caption_lead(self._line(rng), self.template, self._system, media)
        words = self._caption(record, media.is_image)
        text: Prompt = (Text(words + (self.caption_end or ""), learn=True, apart=True),)
        if self.caption_end is None:
            text = (*text, Control("end", learn=True))
        before = len(self._encode(lead).ids)
        return self._encode((*lead, *text), before + self.max_caption_length)

    def _turns_tokens(self, record: Record, media: Media | None) -> Tokens:
        turns = turns_of(record)
        prompt = dialogue(turns, self.template, self._system, media).prompt
        tokens = self._encode(prompt, self.max_length)
        if self.label_mask == "drift":
            encoder = _encoder(self.tokenizer, self.num_video_tokens, self.max_length)
            return tokens._replace(labels=drift_labels(tokens, turns, self._system, media, encoder))
        return tokens

    def _prompt_row(self, prompt: Prompt, counters: dict[str, int]) -> Row:
        """A row to go on from. It is never cut: without its end it would ask for something else."""
        tokens = self._encode(prompt)
        note(counters, "rows_too_long", len(tokens.ids) > self.max_length)
        return row_of(tokens._replace(labels=(IGNORE,) * len(tokens.ids)))

    def _encode(self, prompt: Prompt, most: int | None = None) -> Tokens:
        return _encoder(self.tokenizer, self.num_video_tokens, most).encode(prompt, end=False)

    def _caption(self, record: Record, still: bool) -> str:
        words = caption_of(record)
        cleaned = self.clean == "all" or (self.clean == "videos" and not still)
        return blip_caption(words) if cleaned else words


_FIELDS = {"caption": "caption", "dialogue": "conversations"}  # view -> name in annotations


@lru_cache(maxsize=64)
def _encoder(path: Path | None, places: int, length: int | None) -> PromptEncoder:
    return PromptEncoder(tokenizer=tokenizer_of(path), num_video_tokens=places, max_length=length, overflow="tail")
