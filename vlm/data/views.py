"""Views: what of a question is shown and what is to be predicted, as prompts. A view's name is its loss's name.

    item = items(record.annotation)[0]
    prompt = VIEWS["answer"](item, item.answer)

The texts are those of Flipped-VQA (Ko et al. 2023, https://arxiv.org/abs/2310.15747), Vamos (Wang et al. 2024,
https://arxiv.org/abs/2311.13627) and ViCo to the letter, since released weights were trained on them.

- `answer`: video and question -> the letter of the answer
- `question`: video and answer -> the question
- `video_order`: question and answer -> the frames in their order (a loss over frame features, not over words)
- `caption`: video -> its description
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.data.prompts import NEWLINE
from vlm.types import Prompt, Text, UserError, Video

_OPTION = re.compile(r"\(?[A-Za-z][).:]\s*(\S.*)")

LEADS = ("In the video we see these scenes: ", "The video shows: ")
"""Sentences that published captions begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question about one video, as the views need it."""

    question: str
    options: tuple[str, ...]
    answer: int | None = None  # index of the right option; None: not published
    kind: str = ""
    id: str = ""  # as its dataset calls it
    key: str = ""  # what identifies it among all questions of a shard set
    span: tuple[float, float] | None = None  # seconds of the video that the question is about; None: all of it
    dialogue: str = ""  # what is said in the span
    context: str = ""  # caption that `answer` may read
    caption: str = ""  # caption that `caption` teaches


def items(annotation: Mapping[str, Any], *, context: str = "", caption: str = "") -> tuple[Item, ...]:
    """The questions of a record's annotation, in order, each with the same captions."""
    return tuple(
        Item(
            question=row["question"],
            options=tuple(row["options"]),
            answer=row.get("answer"),
            kind=row.get("kind", ""),
            id=row.get("id", ""),
            span=tuple(row["span"]) if row.get("span") else None,
            dialogue=row.get("dialogue", ""),
            context=context,
            caption=caption,
        )
        for row in annotation["questions"]
    )


def free_question(text: str) -> Item:
    """The question that a person typed: with options, where each line after the first is one, such as `(A) a dog`."""
    first, *rest = [line.strip() for line in text.strip().splitlines() if line.strip()] or [""]
    found = [_OPTION.fullmatch(line) for line in rest]
    options = tuple(match[1] for match in found if match is not None)
    if rest and len(options) == len(rest):
        return Item(question=first, options=options)
    return Item(question=" ".join([first, *rest]), options=())


# The views ------------------------------------------------------------------------------------------


def answer(item: Item, choice: int) -> Prompt:
    """Video (and caption, dialogue) and question -> option `choice`, the letter in brackets.

    A question without options, which no dataset has, is asked for an answer in free words.
    """
    task = "dialogue, video and question" if item.dialogue else "video and question"
    options = _options(item) if item.options else ""
    ask = Text(f"{_question(item)}\n{options}{_ANSWER}", apart=not item.context)
    caption = (
        (Text("Video: ", apart=True), Text(item.context, shorten=True, mark=True), Text("\n")) if item.context else ()
    )
    return (
        Text(f"Instruction: Predict the answer based on the {task}.\nVideo:"),
        Video(),
        NEWLINE,
        *_dialogue(item),
        *caption,
        ask,
        Text(_letter(choice), learn=True),
    )


def question(item: Item, choice: int) -> Prompt:
    """Video (and dialogue), options and option `choice` as the answer -> the question."""
    task = "dialogue, video and answer" if item.dialogue else "video and answer"
    label, _, text = _question(item).partition(" ")
    return (
        Text(f"Instruction: Predict the question based on the {task}.\nVideo:"),
        Video(),
        NEWLINE,
        *_dialogue(item),
        Text(f"{_options(item)}{_ANSWER}{_letter(choice)}\n{label} ", apart=True),
        Text(text, learn=True),
    )


def video_order(item: Item, choice: int) -> Prompt:
    """Question and option `choice` as the answer (and dialogue) -> the frames: predicted at the video's place."""
    task = "dialogue, question and answer" if item.dialogue else "question and answer"
    return (
        Text(f"Instruction: Predict the video based on the {task}.\n"),
        *_dialogue(item),
        Text(f"{_question(item)}\n{_options(item)}{_ANSWER}{_letter(choice)}\nVideo:", apart=bool(item.dialogue)),
        Video(),
    )


def caption(item: Item, choice: int = 0, *, skip: int = 0) -> Prompt:
    """Video -> its description; `choice` says nothing here. `skip`: first tokens of it that are not to be predicted."""
    return (
        Text("Instruction: describe the what happens in the video.\nVideo:"),
        Video(),
        NEWLINE,
        Text("Description: ", apart=True),
        Text(f"{item.caption}\n", learn=True, shorten=True, skip=skip),
    )


View = Callable[[Item, int], Prompt]
VIEWS: Mapping[str, View] = {"answer": answer, "question": question, "video_order": video_order, "caption": caption}


def task(item: Item, *, options: bool) -> str:
    """What a selector chooses caption tokens for: the question as the prompt words it, and its options if wanted."""
    return f"{_question(item)}\n{_options(item)}" if options else _question(item)


# Their texts ------------------------------------------------------------------------------------------

_ANSWER = "Answer: The answer is "


def _letter(choice: int) -> str:
    return f"({string.ascii_uppercase[choice]})"


def _question(item: Item) -> str:
    text = item.question.capitalize().strip()  # lower case but for the first letter
    return f"Question: {text}" if text.endswith("?") else f"Question: {text}?"


def _options(item: Item) -> str:
    return "Choices: \n" + "".join(f"{_letter(place)} {option}\n" for place, option in enumerate(item.options))


def _dialogue(item: Item) -> tuple[Text, ...]:
    if not item.dialogue:
        return ()
    return (Text(f"Dialogue: {item.dialogue}\n", shorten=True, apart=True),)


# Captions ------------------------------------------------------------------------------------------


def find_caption(annotation: Mapping[str, Any], name: str) -> str:
    """The caption of this name (that of its published file). UserError where the record has none."""
    captions = annotation.get("captions", {})
    if name not in captions:
        raise UserError(
            f"the record of video {annotation.get('video')!r} has no caption {name!r} (it has "
            f"{', '.join(captions) or 'none'}): choose another, or make the shards again with that caption file"
        )
    return captions[name]


def without_lead(text: str) -> str:
    """A caption without the sentence that published files put before each ("In the video we see these scenes: "), up to
    the last place of it, as published. A file has one such sentence; another one's is text."""
    leads = [lead for lead in LEADS if lead in text]
    return text.rpartition(min(leads, key=text.find))[2].strip() if leads else text.strip()


def random_suffix(text: str, rng: random.Random) -> str:
    """ViCo's caption target: the caption from the beginning of one of its sentences, drawn evenly.

    The last sentences cannot be drawn: of the places two characters behind a full stop the last two are left out.
    """
    starts = [place + 2 for place, letter in enumerate(text) if letter == "."][:-2]
    return text[rng.choice([0, *starts]) :]
