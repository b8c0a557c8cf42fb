"""Talking about a video with any causal system: what the page and the terminal of launch/chat.py stand on.

    model = ChatModel(recipe, system, torch.device("cpu"))
    seen = model.see(Path("clip.mp4"))
    answer = model.say(seen, [Turn("What happens?")], Settings(temperature=0.2, top_p=0.9), on_text=print)

Threads may call all of it. One answer is written at a time, and depends on its own conversation alone.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm.data.glance import Glance, Limits, look_apart
from vlm.data.templates import PLACE
from vlm.data.video import DecodeError
from vlm.models.generation import GenerationConfig, Watch, generate
from vlm.recipe import Recipe
from vlm.run.chat_videos import MEMORY, Library, Seen, about, hash_file, pictures_of
from vlm.types import Batch, Example, Record, UserError

MOST_CHARACTERS = 20_000  # of a question, before its tokens are counted
MOST_TOKENS = 1_000_000  # of an answer; where the model reads fewer, so many
LEAST_ROOM = 16  # tokens that are left for an answer, at the least

Encode = Callable[[Path], Record]
"""A video file -> a record with the features that the recipe's inputs read (vlm.run.encode_one); DecodeError."""
OnText = Callable[[str], None]
"""Called with the whole answer so far whenever it has grown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an answer is written."""

    temperature: float = 0.0
    """0: always the likeliest word; above, words are drawn, the more wildly the higher."""
    top_p: float = 1.0
    """Draw among the likeliest words that have this probability together."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    seed: int = 0
    """Another number, other words (with a temperature above 0)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature {self.temperature:g}: it must be from 0 (no drawing) to 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p:g}: it must be above 0 and at most 1")
        if not 1 <= self.max_new_tokens <= MOST_TOKENS:
            said = "a number beyond that" if self.max_new_tokens > MOST_TOKENS else self.max_new_tokens
            raise UserError(f"max tokens {said}: it must be at least 1, and at most {MOST_TOKENS:,}")


class Turn(NamedTuple):
    """A question and its answer; the last question of a conversation has none yet."""

    question: str
    answer: str | None = None


class Answer(NamedTuple):
    """What was written."""

    text: str
    stopped: bool = False  # by whoever asked
    forgotten: int = 0  # oldest turns that were not read, since the conversation was too long
    notes: tuple[str, ...] = ()  # what the person should know, in sentences


class ChatModel:
    """A model that is talked with, and the videos that it was shown."""

    def __init__(
        self,
        recipe: Recipe,
        system: Any,
        device: torch.device,
        *,
        encode: Encode | None = None,
        limits: Limits | None = None,
        memory: int = MEMORY,
    ) -> None:
        """
        Args:
            system: the recipe's causal system with its weights, on `device`.
            encode: what makes the features that the recipe's inputs read; None: only records that hold them can be
                shown, unless the inputs read pixels.
        Raises:
            UserError: the recipe's inputs hold no conversations.
        """
        self.recipe, self.inputs, self.system, self.device = recipe, recipe.inputs, system.eval(), device
        self.encode, self.limits = encode, limits or Limits()
        self.videos = Library(memory)
        self._lock = threading.Lock()  # of the model: one pass at a time
        self._encoding = threading.Lock()
        check_conversations(recipe)
        if encode is not None and self.reads_pixels:
            raise UserError("this recipe reads pixels (inputs.source=pixels), so --encoder says nothing: leave it out")

    @property
    def reads_pixels(self) -> bool:
        """Whether the recipe's inputs read the pixels of a video, and no features."""
        return self.inputs.members == ("video",)

    @property
    def remembers(self) -> bool:
        """Whether questions are read with what was said before; systems that answer questions read each alone."""
        return self.inputs.task != "choice"

    @property
    def can_make(self) -> bool:
        """Whether video files can be shown, and not only records with features."""
        return self.reads_pixels or self.encode is not None

    # ------------------------------------------------------------------------------------------ videos

    def see(self, path: Path, holder: str = "") -> Seen:
        """A video file as the model reads it, worked out once for each content.

        Raises:
            UserError: the file is no video, damaged, too large or too long, or features of it cannot be made here. One
                sentence for the person who chose it.
        """
        key = hash_file(path)

        def make() -> Seen:
            if not self.can_make:
                raise UserError(
                    "this recipe reads features of videos, and no encoder was given to make them: start with "
                    "--encoder, or choose one of the examples"
                )
            glance = look_apart(path, self.limits)
            if self.encode is not None:
                with self._encoding:
                    record = self.encode(path)
            else:
                info = glance.info
                record = Record(
                    key="",
                    shard=path.name,
                    row=0,
                    video=path.read_bytes(),
                    annotation={},
                    num_frames=info.num_frames,
                    fps=info.fps,
                    decoders=("pyav",),
                )
            record = replace(record, key=key[:16])
            warnings = tuple(f"{warning[:1].upper()}{warning[1:]}." for warning in glance.info.warnings)
            example = self._example(record)
            told = about(glance) + self._axis(glance)
            return Seen(key=key, example=example, pictures=pictures_of(glance), about=told, warnings=warnings)

        return self._kept(key, make, holder, path.name)

    def see_record(self, record: Record, holder: str = "") -> Seen:
        """A record of a shard set: by the features that it holds, else as a video file. UserError: as `see`."""
        stored = any(name in record.members for name in self.inputs.members)
        if not stored and record.video is None:
            raise UserError(f"{record.key}: its record has no {' or '.join(self.inputs.members)}, which is read here")
        with tempfile.TemporaryDirectory(prefix="vlm_chat_") as folder:
            file = Path(folder) / record.key.replace("/", "_")
            if record.video is not None:
                file.write_bytes(record.video)
            if not stored:
                return self.see(file, holder)

            def make() -> Seen:
                example = self._example(record)
                if record.video is None:
                    return Seen(key=key, example=example, pictures=(), about="features alone, without pictures")
                glance = look_apart(file, self.limits)
                told = about(glance) + self._axis(glance)
                return Seen(key=key, example=example, pictures=pictures_of(glance), about=told)

            key = f"{record.shard}/{record.row}/{record.key}"
            return self._kept(key, make, holder, record.key)

    def _kept(self, key: str, make: Callable[[], Seen], holder: str, name: str) -> Seen:
        try:
            return self.videos.get(key, make, holder)
        except (DecodeError, UserError) as error:
            raise UserError(f"the file {name} cannot be used: {error}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the file {name} cannot be used: there is not enough memory for it ({first_line(error)})"
            ) from error

    @torch.no_grad()
    def _example(self, record: Record) -> Example:
        """What the model reads of a record: of pixels, what its tower makes of them."""
        example = self.inputs.look(record)
        if example.frames is None or not hasattr(self.system, "see"):
            return example
        batch = self._batch(self.inputs.converse([("?", None)], example))
        with self._lock:
            tokens = self.system(batch, instead=self.system.see)
        return replace(example, frames=None, frame_tokens=tokens.cpu())

    def _axis(self, glance: Glance) -> str:
        """What the numbers in answers about segments are."""
        places = getattr(self.inputs, "time_places", None) or getattr(self.inputs, "num_video_tokens", 0)
        if self.inputs.task != "segments" or not places or not glance.info.duration:
            return ""
        return f"; times in answers count {places:,} parts of {glance.info.duration / places:.2g} s"

    # ------------------------------------------------------------------------------------------ words

    def say(
        self,
        seen: Seen,
        turns: Sequence[Turn],
        settings: Settings,
        on_text: OnText | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """The answer to the last of these turns.

        Args:
            on_text: called in this thread with the answer so far, as it grows. What is shown is final but for the end:
                a letter, or what ends an answer, is held back until all of it is there.
            stop: when it is set, the answer ends with the next token, or before it began.
        Raises:
            UserError: the question is empty or does not fit, with the video, into what the model reads.
        """
        stop = stop or threading.Event()
        _check_question(turns[-1].question)
        turns = turns if self.remembers else turns[-1:]
        example, forgotten, room = self._fitting(seen.example, turns, settings)
        shown = ""

        def watch(rows: list[list[int]]) -> bool:
            nonlocal shown
            text = self.inputs.decode(self._settled(rows[0])).rstrip("\N{REPLACEMENT CHARACTER}")
            if text != shown and on_text is not None:
                on_text(text)
            shown = text
            return stop.is_set()  # type: ignore[union-attr]

        while not self._lock.acquire(timeout=0.05):
            if stop.is_set():
                return Answer("", stopped=True)
        try:
            if stop.is_set():
                return Answer("", stopped=True)
            ids = self._write(example, replace(settings, max_new_tokens=room), len(turns), watch)
        except torch.OutOfMemoryError as error:
            raise UserError(f"there is not enough memory for this conversation ({first_line(error)})") from error
        finally:
            self._lock.release()
        stopped = stop.is_set() and len(ids) < room
        text = self.inputs.decode(self._settled(ids) if stopped else ids)
        return Answer(text, stopped, forgotten, self._notes(forgotten, len(turns), len(ids), room, settings, stopped))

    def _write(self, example: Example, settings: Settings, turn: int, watch: Watch) -> list[int]:
        base = getattr(self.recipe.eval, "generation", None) or GenerationConfig()
        drawn = settings.temperature > 0
        config = replace(
            base,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=min(base.min_new_tokens, settings.max_new_tokens),
            sample=drawn,
            temperature=settings.temperature if drawn else 1.0,
            top_p=settings.top_p if drawn else 1.0,
            top_k=base.top_k if drawn else None,
            num_beams=1,
            length_penalty=1.0,
            rules="hf",
            prompt_pad="left",
        )
        batch = self._batch(example)
        return generate(
            self.system,
            batch,
            config,
            ends=self.inputs.ends,
            seed=settings.seed,
            keys=[f"{example.key}/{turn}"],
            watch=watch,
        )[0]

    def _fitting(self, example: Example, turns: Sequence[Turn], settings: Settings) -> tuple[Example, int, int]:
        """(the example with the prompt of as many of the last turns as fit, turns left out, tokens for the answer)."""
        most = self.inputs.max_length
        reserved = min(settings.max_new_tokens, max(LEAST_ROOM, most // 4))
        for first in range(len(turns)):
            made = self.inputs.converse(turns[first:], example)
            length = len(made.prompts[0].ids)
            last = first == len(turns) - 1
            if length + (LEAST_ROOM if last else reserved) <= most:
                return made, first, min(settings.max_new_tokens, most - length)
        raise UserError(
            f"the question is too long: with the video it has {length:,} tokens, and the model reads {most:,} at most, "
            "its answer included: please shorten it (whoever runs this may raise inputs.max_length, if the language "
            "model knows longer texts)"
        )

    def _settled(self, ids: Sequence[int]) -> Sequence[int]:
        """Ids without their end, or the beginning of one."""
        for end in self.inputs.ends:
            for length in range(min(len(end), len(ids)), 0, -1):
                if tuple(ids[-length:]) == tuple(end[:length]):
                    return ids[:-length]
        return ids

    def _notes(
        self, forgotten: int, turns: int, written: int, room: int, settings: Settings, stopped: bool
    ) -> tuple[str, ...]:
        notes = []
        if forgotten:
            oldest = "question and answer" if forgotten == 1 else f"{forgotten} questions and answers"
            notes.append(
                f"The conversation is longer than the {self.inputs.max_length:,} tokens that the model reads: the "
                f"oldest {oldest} of {turns - 1} were left out."
            )
        if written >= room and not stopped:
            why = (
                f"max tokens is {room:,}"
                if room == settings.max_new_tokens
                else f"no more than {room:,} tokens had room beside the conversation"
            )
            notes.append(f"The answer was cut off: {why}.")
        return tuple(notes)

    def _batch(self, example: Example) -> Batch:
        return self.inputs.test_batch([example]).to(self.device)


def check_conversations(recipe: Recipe) -> None:
    """UserError where a recipe's inputs hold no conversations, or see no video."""
    if not hasattr(recipe.inputs, "converse"):
        raise UserError(
            f"there is no talking with this recipe: its inputs ({type(recipe.inputs).__name__}) hold no conversations. "
            "Recipes to talk with: video_chatgpt.*, video_llama.* (but gebc_*), vamos.*"
        )
    if not getattr(recipe.inputs, "use_video", True):
        raise UserError(
            "there is no talking with this recipe: inputs.use_video is false, so it reads captions alone and sees no "
            "video; take one that sees frames (…_vis, …_vis_cap)"
        )


def harmless(text: str) -> str:
    """A text without characters that steer what shows it: a model may write any."""
    seen = (letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return "".join(seen)


def first_line(error: BaseException) -> str:
    """The first sentence of a long message."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _check_question(question: str) -> None:
    if not question.replace(PLACE, "").strip():
        raise UserError("The question is empty.")
    if len(question) > MOST_CHARACTERS:
        raise UserError(f"the question is too long: {len(question):,} characters, at most {MOST_CHARACTERS:,} are read")
