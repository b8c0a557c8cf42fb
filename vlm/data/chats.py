"""Questions and answers about videos whose features are read whole: what Video-ChatGPT (arXiv 2306.05424) trains on.

A record with `chat` gives a row of the view `dialogue` for each of its questions, as often as its kind is repeated; one
with `conversations` gives one row. A video takes as many places in a row as its features have (`num_video_tokens`), and
the times of questions and answers are counted in them (vlm.data.time_axis).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from vlm.data.chat_lengths import ChatRows, Repeats, chat_lengths, parts_of, question_of
from vlm.data.chat_records import (
    SEGMENTS,
    Asked,
    Side,
    Spoken,
    dialogue_of,
    has_chat,
    num_frames_of,
    placed,
    questions_of,
    segments_of,
    with_video,
)
from vlm.data.chat_templates import (
    END,
    PATCH,
    START,
    SYSTEM,
    V0_END,
    TemplateName,
    Words,
    chat,
    published_tokens,
    stripped,
    words_of,
)
from vlm.data.features import tensor_members
from vlm.data.frames import CLIP_COLOURS
from vlm.data.packing import row_of
from vlm.data.prompts import PromptEncoder
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.data.templates import PLACE
from vlm.data.time_axis import TimeAxis
from vlm.data.tokenizers import content_hash, tokenizer_of
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
from vlm.types import IGNORE, Ask, Batch, Example, Prompt, Record, Row, Tokens, UserError, Visit

VIEW = "dialogue"
_KINDS = ("at", "order", "counts", "anticipation", "written")  # of questions of vlm.sources.common_chat


@dataclass(slots=True, kw_only=True)
class ChatConfig:
    """Questions and answers, or dialogues, about videos whose features were computed before."""

    tokenizer: Path | None = None
    """A tokenizer.model (sentencepiece or tiktoken) or a folder with one; none: bytes, for debugging only."""
    words: int | None = None
    """Words of the language model that training starts with, before the three of videos; none: the tokenizer's.
    LLaVA-Lightning has 32003, for the words of images that it brings."""
    features: str = "clip_pooled"
    """Name of the members (NAME.safetensors or NAME.npy) that hold a video's features, (places, width), or (places,
    states, width) where several states of the tower are kept."""
    augmented: tuple[str, ...] = ()
    """Names of members with features of altered copies of the video (clip_states_flip, …), of which training draws one,
    or those of the video itself, at each visit. (): there are none."""
    num_video_tokens: int = 356
    """Places of a video (N): so many its features must have. 356: pooled, 100 of moments and 256 of places in the
    picture; 1000: moments alone."""
    frame_tokens: int = 1
    """States of the tower that are kept of each place (Q): 25 where they are fused."""
    frame_dim: int = 1024
    """Width of a feature (CLIP ViT-L/14: 1024)."""
    time_places: int | None = None
    """Places that the times of questions and answers are counted in; none: `num_video_tokens`. Of pooled features: 100,
    since the other 256 are no moments."""
    marks: bool = True
    """Whether a video stands between the words <vid_start> and <vid_end>, which are trained."""
    template: TemplateName = "vicuna_v1_1"
    """What is written around questions and answers in training (vlm.data.chat_templates)."""
    test_template: TemplateName | None = None
    """The same in tests; none: as in training. Video-ChatGPT is published to answer with another, video_chatgpt_v1."""
    system: str | None = None
    """The system's text, where a dialogue has none of its own; none: the template's."""
    question_side: Literal["alternate", "before", "after", "front", "given"] = "alternate"
    """Where the video stands: before or after the question, each on a line of its own; front: before the name of who
    asks; given: where the record has it (after questions that have none). alternate: after one, before the next, by the
    numbers of record and visit; tests then have it after the question, as published."""
    whitespace: Literal["strip", "keep"] = "strip"
    """Blanks and line ends next to a video. strip: they belong to its words and vanish, as with the tokenizer that the
    published models were trained with. keep: they are read."""
    label_mask: Literal["exact", "v1"] = "exact"
    """What of a row is to be learnt. exact: the answers and their ends. v1: what the published code finds by role names
    and counts (vlm.data.chat_templates.published_tokens), which teaches nothing of some dialogues."""
    max_length: int = 2048
    """Most tokens of a row in training; a longer one loses its last tokens, but the video stays whole."""
    repeats: tuple[int, int] = (12, 2)
    """How often an epoch has the first question of a record, which asks for its segments, and how often each other."""
    repeats_of: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(_KINDS))
    """The same for questions of one kind after the first; none: as `repeats` says. Where one is given, training begins
    by reading the kinds of all questions, which the index does not have."""
    task: Literal["segments", "caption"] = "segments"
    """What tests ask. segments: the first question of each record, whose answer is compared frame by frame; caption:
    every answer, compared with the true one as a text."""

    def __post_init__(self) -> None:
        self.tokenizer = None if self.tokenizer is None else Path(self.tokenizer)
        for name in ("num_video_tokens", "frame_tokens", "frame_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"inputs.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("words", "time_places"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"inputs.{name} is {getattr(self, name)}; it must be at least 1, or none")
        if len(self.repeats) != 2 or min(self.repeats) < 0 or not any(self.repeats):
            raise ValueError(f"inputs.repeats is {self.repeats}; it must be two numbers from 0, one of them above 0")
        for kind, count in self.repeats_of.items():
            if count is not None and count < 0:
                raise ValueError(f"inputs.repeats_of.{kind} is {count}; it must be from 0, or none")
        if self.max_length < (least := self.num_video_tokens + 2 * self.marks):
            raise ValueError(f"inputs.max_length is {self.max_length}; a video alone has {least} tokens with its marks")
        if self.template == "v0" and self.question_side == "front":
            raise ValueError("inputs.question_side=front: template v0 has no such form; set it to before")

    # ------------------------------------------------------------------------------------------ what the loader calls

    probes: ClassVar[tuple[str, ...]] = PROBES

    @property
    def members(self) -> tuple[str, ...]:
        """What is read of a record in tests, beside its annotation."""
        return tensor_members(self.features)

    def drawn_members(self, rng: SampleRng) -> tuple[str, ...]:
        """What is read of a record in training: of its copies the one that `train` draws with the same `rng`."""
        return tensor_members(self._drawn(rng))

    def parts(self, shards: ShardSet) -> np.ndarray | None:
        """(records,) samples of each record: its questions as often as they are repeated, or one dialogue."""
        return parts_of(shards, self._repeats)

    def lengths(self, shards: ShardSet) -> np.ndarray:
        """(samples,) tokens that each sample's row is expected to have, from the index."""
        whole = replace(self, max_length=1 << 30)
        counted_by = None if self.tokenizer is None else content_hash(self.tokenizer)
        return chat_lengths(shards, ChatRows(whole.row_lengths, self._repeats, self.max_length, counted_by))

    def row_lengths(self, record: Record) -> list[int]:
        """Tokens of the row of each question of a record, or of its dialogue; none of a damaged one, which is told
        when it is loaded."""
        try:
            count = len(questions_of(record, self._places)) if has_chat(record) else 1
            return [len(self._tokens(self._spoken(record, number, 0)).ids) for number in range(count)]
        except DecodeError:
            return []

    def train(self, record: Record, rng: SampleRng, visit: Visit) -> list[Example]:
        """One question of a record with its answer, or its dialogue.

        Raises:
            DecodeError: its features or text are missing or damaged.
            UserError: its features are of other sizes than the recipe's.
        """
        self.check_views(visit.views)
        part = visit.part or 0
        spoken = self._spoken(record, None, part)
        example = self._look(record, self._drawn(rng)) if spoken.shows else Example(key=record.key)
        tokens = self._tokens(spoken)
        counters: dict[str, int] = {}
        count_row(counters, tokens, too_long=len(tokens.ids) > self.max_length)
        key = record.key if visit.part is None else f"{record.key}/{visit.part}"
        return [replace(example, key=key, rows={VIEW: (row_of(tokens),)}, counters=counters)]

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        """A training batch: the rows end to end."""
        rows = pack_rows(examples, self.num_video_tokens, [example.rows[VIEW] for example in examples])
        assert rows is not None
        return replace(gather(examples, CLIP_COLOURS), views={VIEW: rows})

    # ------------------------------------------------------------------------------------------ what tests call

    def asks(self, record: Record) -> tuple[Ask, ...]:
        """What is asked: the segments of a record, or every answer."""
        if self.task == SEGMENTS:
            return (self._ask_segments(record),)
        return tuple(
            Ask(
                f"{record.key}/{number}",
                None,
                kind=spoken.asked[-1].kind,
                id=spoken.asked[-1].id,
                question=spoken.asked[-1].question.replace(PLACE, "").strip(),
                references=() if spoken.asked[-1].answer is None else (spoken.asked[-1].answer,),
            )
            for number, spoken in enumerate(self._test_rows(record))
        )

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """The prompts of a record, in the order of `asks`, under "" and under each probe's name."""
        check_probes(probes)
        rows = self._test_rows(record)
        counters: dict[str, int] = {}
        prompts = tuple(self._prompt_row(spoken, counters) for spoken in rows)
        example = self.look(record) if any(spoken.shows for spoken in rows) else Example(key=record.key)
        example = replace(example, prompts=prompts, counters=counters)
        return {"": [example], **{probe: [blinded(example)] for probe in probes}}

    def test_batch(self, examples: Sequence[Example]) -> Batch:
        """A test batch: all prompts, each a row alone."""
        prompts = pack_rows(examples, self.num_video_tokens, [example.prompts for example in examples])
        return replace(gather(examples, CLIP_COLOURS), prompts=prompts)

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to write."""
        tokens = torch.zeros(self.num_video_tokens, self.frame_tokens, self.frame_dim, dtype=torch.float16)
        return self.converse([("?", None)], Example(key="", frame_tokens=tokens))

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that end a text which a model writes: the end token, and what ends answers in the template."""
        return all_ends(self.tokenizer, self._ends)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that a model wrote, up to what ends it."""
        return decoded(self.tokenizer, ids, self._ends)

    # ------------------------------------------------------------------------------------------ what a chat calls

    def look(self, record: Record) -> Example:
        """What a model sees of a record: its features."""
        return self._look(record, self.features)

    def converse(self, turns: Sequence[tuple[str, str | None]], example: Example) -> Example:
        """The example with one prompt: a dialogue about its video, if it has one, up to the answer to the last turn.

        Args:
            turns: questions and answers so far; what is said of the last question does not count.
        """
        asked = [Asked("", question.replace(PLACE, ""), answer) for question, answer in turns]
        if example.frame_tokens is not None:
            asked[0] = asked[0]._replace(question=placed(asked[0].question, self._side(None)))
        counters: dict[str, int] = {}
        row = self._prompt_row(Spoken(self._system(self._test_template), asked), counters)
        return replace(example, prompts=(row,), counters=counters)

    # ------------------------------------------------------------------------------------------ parts

    @property
    def vocab_size(self) -> int:
        """Words that the model must know, those of videos among them."""
        return self._words + len(self._video_words)

    def axis(self, num_frames: int) -> TimeAxis:
        """The time axis of a video of so many frames."""
        return TimeAxis(num_frames, self._places)

    def check_views(self, views: Iterable[str]) -> None:
        """Refuse views that there are not (UserError)."""
        for view in views:
            if view != VIEW:
                raise UserError(f"views: there is no view {view!r} of questions and answers; known: {VIEW}")

    @property
    def _words(self) -> int:
        return tokenizer_of(self.tokenizer).vocab_size if self.words is None else self.words

    @property
    def _video_words(self) -> tuple[int, ...]:
        """Ids of <vid_patch>, <vid_start>, <vid_end>, in this order after the other words; without marks the first."""
        return tuple(range(self._words, self._words + (3 if self.marks else 1)))

    @property
    def _places(self) -> int:
        return self.time_places or self.num_video_tokens

    @property
    def _test_template(self) -> TemplateName:
        return self.test_template or self.template

    @property
    def _ends(self) -> tuple[str, ...]:
        return (V0_END,) if self._test_template == "v0" else ()

    def _system(self, template: TemplateName) -> str:
        return SYSTEM[template] if self.system is None else self.system

    def _side(self, number: int | None) -> Side:
        """Where the video stands at a visit of this number; None: in a test."""
        if self.question_side != "alternate":
            return self.question_side
        return "after" if number is None or number % 2 == 0 else "before"

    @property
    def _repeats(self) -> Repeats:
        kinds = tuple((kind, count) for kind, count in self.repeats_of.items() if count is not None)
        return Repeats(*self.repeats, kinds)

    def _drawn(self, rng: SampleRng) -> str:
        """The members that training reads at a visit. It is the first that is drawn there."""
        return rng.python.choice((self.features, *self.augmented)) if self.augmented else self.features

    def _look(self, record: Record, name: str) -> Example:
        tokens = read_tokens(record, name, self.frame_tokens, self.frame_dim)
        if len(tokens) != self.num_video_tokens:
            raise UserError(
                f"{record.shard}: {name} of {record.key!r} has {len(tokens)} places, but inputs.num_video_tokens="
                f"{self.num_video_tokens}: these features were pooled or sampled otherwise than the recipe's"
            )
        return Example(key=record.key, frame_tokens=tokens)

    def _spoken(self, record: Record, number: int | None, part: int) -> Spoken:
        """What a training row says: one question of a record, that of this number or of this part, or its dialogue."""
        side, system = self._side(record.row + part), self._system(self.template)
        if not has_chat(record):
            spoken = dialogue_of(record, system)
            return spoken._replace(asked=with_video(spoken.asked, side))
        questions = questions_of(record, self._places)
        asked = questions[question_of(part, self._repeats, [q.kind for q in questions]) if number is None else number]
        return Spoken(system, [asked._replace(question=placed(asked.question, side))])

    def _ask_segments(self, record: Record) -> Ask:
        asked = questions_of(record, self._places)[0] if has_chat(record) else None
        if asked is None or asked.kind != SEGMENTS:
            raise DecodeError(f"record {record.key!r} of {record.shard} has no question for its segments (chat)")
        return Ask(
            record.key,
            None,
            kind=str(record.annotation.get("name", "")),
            question=asked.question,
            references=() if asked.answer is None else (asked.answer,),
            segments=segments_of(record),
            num_frames=num_frames_of(record),
        )

    def _test_rows(self, record: Record) -> list[Spoken]:
        """What is asked in tests, the answer to each last question being that which is wanted."""
        side, system = self._side(None), self._system(self._test_template)
        if has_chat(record):
            questions = questions_of(record, self._places)
            questions = questions[:1] if self.task == SEGMENTS else questions
            return [Spoken(system, [one._replace(question=placed(one.question, side))]) for one in questions]
        spoken = dialogue_of(record, system)
        asked = with_video(spoken.asked, side)
        return [Spoken(spoken.system, asked[: number + 1]) for number, one in enumerate(asked) if one.answer]

    def _tokens(self, spoken: Spoken) -> Tokens:
        """A training row."""
        if self.label_mask == "exact":
            prompt = chat(spoken.pairs, self.template, spoken.system).prompt
            return self._encode(prompt, self.max_length)
        video = PATCH * self.num_video_tokens
        video = f"{START}{video}{END}" if self.marks else video
        return published_tokens(
            spoken.pairs, self.template, spoken.system, self._published_words(), video, self.max_length
        )

    def _published_words(self) -> Words:
        return words_of(tokenizer_of(self.tokenizer), self._video_words, strip=self.whitespace == "strip")

    def _prompt_row(self, spoken: Spoken, counters: dict[str, int]) -> Row:
        """A row to go on from: up to the last answer. It is never cut: without its end it would ask for something
        else."""
        made = chat(spoken.pairs, self._test_template, spoken.system)
        tokens = self._encode(made.prompt[: made.answers[-1]], None)
        note(counters, "rows_too_long", len(tokens.ids) > self.max_length)
        return row_of(tokens._replace(labels=(IGNORE,) * len(tokens.ids)))

    def _encode(self, prompt: Prompt, most: int | None) -> Tokens:
        prompt = stripped(prompt) if self.whitespace == "strip" else prompt
        encoder = _encoder(self.tokenizer, self.num_video_tokens, self._video_words, most)
        return encoder.encode(prompt, end=False)


@lru_cache(maxsize=64)
def _encoder(path: Path | None, places: int, words: tuple[int, ...], length: int | None) -> PromptEncoder:
    return PromptEncoder(
        tokenizer=tokenizer_of(path), num_video_tokens=places, video_words=words, max_length=length, overflow="tail"
    )
