"""Stories of several actions as chats: the rows that Video-ChatGPT's demo gives its language model, in words alone.

As vlm/models/story_rows.py, in the template of vlm/data/chat_templates.py. A story has as many places as a video of the
demo, and at each one word: how the shape went since the place before. No place tells its number, so the model has to
count. The forms are the kinds of questions (vlm/sources/common_chat.py) that such a story answers:

- `segments`: all actions, each with its start and its end
- `at`: what happens when
- `order`, `counts`: what comes first, or after another; how often
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from vlm.data.chat_templates import SYSTEM, TemplateName, chat, stripped
from vlm.data.prompts import PromptEncoder
from vlm.data.sampling import middle_frames
from vlm.data.templates import PLACE
from vlm.data.time_axis import TimeAxis
from vlm.data.tokenizers import SentencePieceTokenizer, Tokenizer
from vlm.models.story_rows import Rows, encode_rows, train_tokenizer, word_ids
from vlm.sources import common_chat
from vlm.sources.common_shapes import ACTIVITY, CLASSES, SHAPES
from vlm.sources.common_stories import WAYS, sequences, ways
from vlm.types import Prompt

PLACES = 40
"""Places of a story, and of a video."""
MARKS = ("[", "]")
"""What stands before and after a story; around a video, words that the projector is trained with."""
FORMS = ("segments", "at", "order", "counts")
VOCAB_SIZE = 636  # words of the tokenizer, which follows from the expressions alone

_TEMPLATE: TemplateName = "vicuna_v1_1"


def encode_segments(tokenizer: Tokenizer, number: int, seed: int) -> dict[str, Rows]:
    """The rows of each form about `number` stories, one of each form about each."""
    draw = random.Random(seed)
    encoder = segment_encoder(tokenizer)
    ids = word_ids(tokenizer, [(WAYS,)])
    prompts: dict[str, list[Prompt]] = {form: [] for form in FORMS}
    words = []
    for clip in sequences(number, seed):
        num_frames = len(clip.centres)
        words.append([[ids[way]] for way in ways(clip.centres[middle_frames(num_frames, PLACES)])])
        for form in FORMS:
            row = draw.choice([row for row in clip.annotation["chat"] if row["kind"] == form])
            prompts[form].append(asked(row, num_frames))
    told = torch.tensor(words)
    return {form: encode_rows(encoder, several, told, end=False) for form, several in prompts.items()}


def segment_encoder(tokenizer: Tokenizer) -> PromptEncoder:
    """Rows with a story in the place of a video."""
    marks = [tokenizer.encode(mark)[-1] for mark in MARKS]
    return PromptEncoder(tokenizer=tokenizer, num_video_tokens=PLACES, video_words=(0, *marks))


def asked(row: common_chat.Row, num_frames: int) -> Prompt:
    """A question about a story of so many frames, after it, and its answer."""
    axis = TimeAxis(num_frames, PLACES)
    question, answer = axis.render(row["question"]), axis.render(row["answer"])
    return stripped(chat([(f"{PLACE}\n{question}", answer)], _TEMPLATE, SYSTEM[_TEMPLATE]).prompt)


def make_segment_tokenizer(file: Path) -> SentencePieceTokenizer:
    """A sentencepiece model that knows each expression of chats and stories, and each border of places, as one piece,
    and any text by bytes."""
    tokenizer = train_tokenizer(file, list(dict.fromkeys(_fixed())))
    assert tokenizer.vocab_size == VOCAB_SIZE, f"{tokenizer.vocab_size} words: set VOCAB_SIZE"
    return tokenizer


def _fixed() -> Iterator[str]:
    """What chats say whatever the story is."""
    yield f"{SYSTEM[_TEMPLATE]} USER:"
    yield " ASSISTANT:"
    yield from MARKS
    yield from (",", ", then", "-", "?", ".")
    yield from (f" {motion.words}" for motion in CLASSES)
    yield from (str(border) for border in range(PLACES + 1))
    activities = [ACTIVITY.format(shape=shape) for shape in SHAPES]
    yield from (common_chat.ALL_SEGMENTS.format(activity=activity) for activity in activities)
    told = (common_chat.MOMENTS, common_chat.SPANS, common_chat.TIMES, common_chat.HOW_OFTEN, common_chat.DIFFERENT)
    turns = (common_chat.AFTER, common_chat.BEFORE, common_chat.FIRST, common_chat.LAST, common_chat.IN_TURN)
    for wordings in (*told, *turns):
        for wording in wordings:
            yield from (part.rstrip(" ?.") for part in re.split(r"\{\w+\}", wording) if part.strip(" ?."))
