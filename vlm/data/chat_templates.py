"""What LLaVA and Video-ChatGPT (arXiv 2306.05424) write around questions and answers, and what the published code
teaches of it.

`vicuna_v1_1` is what both train with, `video_chatgpt_v1` what Video-ChatGPT is published to answer with, `v0` the form
of LLaVA's first models. A question says where its video stands by `<video>`. Beside what is right there is here what
the published code makes of a dialogue (`published_tokens`): it finds answers by looking for role names in the text and
by counting the tokens of pieces anew, and it takes words such as `</s>` in what is said for the tokens of that name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from vlm.data.templates import PLACE, Turn
from vlm.data.tokenizers import Tokenizer
from vlm.types import IGNORE, Control, Prompt, Segment, Text, Tokens, Video

TemplateName = Literal["vicuna_v1_1", "video_chatgpt_v1", "v0"]

SYSTEM: Mapping[str, str] = {
    "vicuna_v1_1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    ),
    "video_chatgpt_v1": (  # no blank after "language.", as published
        "You are Video-ChatGPT, a large vision-language assistant. You are able to understand the video content that "
        "the user provides, and assist the user with a variety of tasks using natural language.Follow the instructions "
        "carefully and explain your answers in detail based on the provided video."
    ),
    "v0": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions."
    ),
}
V0_END = "###"
"""What ends an answer in `v0`; in the others it is the end token."""

PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"
_EOS = "</s>"


class Chat(NamedTuple):
    """A dialogue as a prompt."""

    prompt: Prompt
    answers: tuple[int, ...]  # segments that are the assistant's answers; what stands before one asks for it


def pairs(turns: Sequence[Turn], system: str) -> tuple[str, list[tuple[str, str | None]]]:
    """(the system's text, questions and answers) of turns of human and gpt after a system turn or none.

    What the assistant says before it is asked is left out, as in the published code; the last question may have no
    answer. Raises ValueError where human and gpt do not take turns.
    """
    if turns and turns[0]["from"] == "system":
        system, turns = turns[0]["value"], turns[1:]
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[number % 2]:
            raise ValueError(f"turn {number + 1} is from {turn['from']!r}, but human and gpt must take turns")
    values: list[str | None] = [turn["value"] for turn in turns]
    values += [None] * (len(values) % 2)
    return system, [(question or "", answer) for question, answer in zip(values[::2], values[1::2])]


def chat(asked: Sequence[tuple[str, str | None]], template: TemplateName, system: str) -> Chat:
    """Questions with their answers, of which these and what ends each are to be learnt.

    An answer that is empty or missing leaves its place open: nothing is learnt there.
    """
    prompt: list[Segment] = []
    answers = []
    lead = f"{system}\n\n{V0_END} " if template == "v0" else f"{system} "
    for question, answer in asked:
        ask, reply = _roles(template, question)
        before, place, rest = question.partition(PLACE)
        prompt.append(Text(f"{lead}{ask}{before}{'' if place else reply}"))
        prompt += [Video(), Text(f"{rest}{reply}")] if place else []
        answers.append(len(prompt))
        lead = ""
        if template == "v0" and answer is not None:
            prompt.append(Text(f" {answer}\n{V0_END}", learn=bool(answer)))
            lead = " "
        elif answer:
            prompt += [Text(f" {answer}", learn=True), Control("end", learn=True)]
    if lead == " ":
        prompt.append(Text(lead))
    return Chat(tuple(prompt), tuple(answers))


def _roles(template: TemplateName, question: str) -> tuple[str, str]:
    """What stands before a question and after it."""
    if template == "v0":
        return "Human: ", f"\n{V0_END} Assistant:"
    return ("USER: ", " ASSISTANT:") if question else ("USER:", "ASSISTANT:")


def stripped(prompt: Prompt) -> Prompt:
    """The prompt without blanks and line ends right before and right after its video: so the tokenizer reads texts
    that the published models were trained with, which takes them for a part of the video's words."""
    found = list(prompt)
    for place, segment in enumerate(prompt):
        if not isinstance(segment, Video):
            continue
        if place and isinstance(before := found[place - 1], Text):
            found[place - 1] = before._replace(text=before.text.rstrip())
        if place + 1 < len(found) and isinstance(after := found[place + 1], Text):
            found[place + 1] = after._replace(text=after.text.lstrip())
    return tuple(found)


def in_front(question: str) -> str:
    """A question whose video stands before the name of who asks (LLaVA's sep_image_conv_front)."""
    return f"{PLACE} USER: {question.replace(PLACE, '').strip()}"


# What the published code makes of a dialogue ------------------------------------------------------------------------


class Words(NamedTuple):
    """A tokenizer with words that are one token each, as the slow tokenizer of transformers 4.28 reads a text."""

    encode: Callable[[str], list[int]]  # of a text without such words
    special: Mapping[str, int]  # word -> its id
    bos: int | None
    strip: bool  # blanks and line ends next to words of videos belong to them

    def ids(self, text: str) -> list[int]:
        """The begin token and the ids of a text."""
        pieces = re.split(f"({'|'.join(map(re.escape, sorted(self.special, key=len, reverse=True)))})", text)
        found = [] if self.bos is None else [self.bos]
        for number, piece in enumerate(pieces):
            if number % 2:
                found.append(self.special[piece])
                continue
            if self.strip and number and pieces[number - 1] in (PATCH, START, END):
                piece = piece.lstrip()
            if self.strip and number + 1 < len(pieces) and pieces[number + 1] in (PATCH, START, END):
                piece = piece.rstrip()
            found += self.encode(piece) if piece else []
        return found


def words_of(tokenizer: Tokenizer, video_words: Sequence[int], *, strip: bool) -> Words:
    """The words of a tokenizer, its control tokens, and those of videos (<vid_patch>, then the marks if there are)."""
    special = {"<unk>": 0, _EOS: tokenizer.eos} | dict(zip((PATCH, START, END), video_words))
    if tokenizer.bos is not None:
        special["<s>"] = tokenizer.bos
    return Words(tokenizer.encode, special, tokenizer.bos, strip)


def published_text(asked: Sequence[tuple[str, str | None]], template: TemplateName, system: str) -> str:
    """The text of a dialogue, `</s>` written out."""
    if template == "v0":
        said = "".join(_v0_turns(asked))
        return f"{system}\n\n{said}{V0_END} "
    text = f"{system} "
    for question, answer in asked:
        text += f"USER: {question} " if question else "USER:"
        text += f"ASSISTANT: {answer}{_EOS}" if answer else "ASSISTANT:"
    return text


def published_tokens(
    asked: Sequence[tuple[str, str | None]],
    template: TemplateName,
    system: str,
    words: Words,
    video: str,
    max_length: int,
) -> Tokens:
    """A dialogue's row with the labels of the published code.

    Args:
        video: what `<video>` becomes: its words, as many as its row has places for it.
        max_length: most tokens; those beyond are cut, the last first, but the video stays whole.
    """
    asked = [(q.replace(PLACE, video), a if a is None else a.replace(PLACE, video)) for q, a in asked]
    text = published_text(asked, template, system)
    ids = words.ids(text)
    place = (0, 0)
    if video in text:
        before = len(words.ids(text[: text.rindex(video)] + PATCH)) - 1  # of several the last, as published
        inside = words.ids(video)[0 if words.bos is None else 1 :]
        marks = int(inside[0] != words.special[PATCH])
        place = before + marks, before + len(inside) - marks
        max_length = max(max_length, before + len(inside))
    cut = ids[:max_length]
    labels = (_v0_labels if template == "v0" else _v1_labels)(cut, asked, text, system, words, max_length)
    return Tokens(tuple(cut), tuple(labels), place, len(ids) - len(cut))


def _v1_labels(
    ids: Sequence[int], asked: object, text: str, system: object, words: Words, max_length: int
) -> list[int]:
    """Rounds end at `</s>`, and what stands after " ASSISTANT: " in one is learnt; where the tokens counted so are not
    those of the row, nothing is."""
    labels = list(ids)
    role, place = " ASSISTANT: ", 1
    _ignore(labels, 0, place)
    for one in text.split(_EOS):
        parts = one.split(role)
        if not one or len(parts) != 2:
            break
        instruction = len(words.ids(parts[0] + role)) - 2  # the begin token, and a blank that an answer begins with
        _ignore(labels, place, place + instruction)
        place += len(words.ids(one))  # its begin token stands for the end token
    _ignore(labels, place, len(labels))
    if place < max_length and place != sum(token != words.special["<unk>"] for token in ids):
        return [IGNORE] * len(labels)
    return labels


def _v0_labels(
    ids: Sequence[int],
    asked: Sequence[tuple[str, str | None]],
    text: object,
    system: str,
    words: Words,
    max_length: int,
) -> list[int]:
    """All but questions and header is learnt; each turn is counted with a begin token of its own, so what is left out
    runs ahead by one token more with each."""
    labels = list(ids)
    place = min(max_length, len(words.ids(f"{system}\n\n")))
    _ignore(labels, 0, place)
    for number, turn in enumerate(_v0_turns(asked)):
        length = min(max_length, len(words.ids(turn)))
        if number % 2 == 0:
            _ignore(labels, place + 2, place + length)
        place += length
    return labels


def _v0_turns(asked: Sequence[tuple[str, str | None]]) -> list[str]:
    turns = [one for pair in asked for one in zip(("Human", "Assistant"), pair) if one[1] is not None]
    return [f"{V0_END} {speaker}: {value}\n" for speaker, value in turns]


def _ignore(labels: list[int], start: int, stop: int) -> None:
    for place in range(start, min(stop, len(labels))):
        labels[place] = IGNORE
