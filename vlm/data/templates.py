"""What Video-LLaMA (arXiv 2306.02858) writes around captions and dialogues for the language model that it reads with.

`vicuna_v0` is the template of Vicuna v0, BiLLa and Ziya, `llama2` that of LLaMA-2-chat. A text says where its video or
image stands by `<video>`, once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vlm.data.prompts import PromptEncoder
from vlm.types import IGNORE, Control, Prompt, Segment, Text, Tokens, Video

PLACE = "<video>"
VICUNA_END = "###"
SYSTEM = {"vicuna_v0": "", "llama2": " "}
"""What stands for the system's text where there is none."""

_MARKS = re.compile(r"[.!\"()*#:;~]")

TemplateName = Literal["vicuna_v0", "llama2"]
Turn = Mapping[str, str]  # from: human, gpt or system; value


class Media(NamedTuple):
    """How the video or image is written."""

    is_image: bool = False
    message: str = ""  # what is said of a video after it

    def write(self, text: str) -> list[Segment]:
        """A text and its video: at its place, if it names one."""
        before, place, after = text.partition(PLACE)
        if not place:
            return [Text(text)]
        name = "Image" if self.is_image else "Video"
        if not self.is_image:
            after = f" {self.message}{after.removeprefix(chr(10))}"
        return [Text(f"{before}<{name}>"), Video(), Text(f"</{name}>{after}")]


class Dialogue(NamedTuple):
    """A dialogue as a prompt."""

    prompt: Prompt
    answers: tuple[int, ...]  # segments that are the assistant's answers


def frames_message(seconds: Sequence[float], num_frames: int) -> str:
    """What a dialogue tells of the frames; without times where they are not known."""
    when = f" sampled at {', '.join(map(str, seconds))} seconds" if seconds else ""
    return f"The video contains {num_frames} frames{when}. "


def caption_lead(line: str | None, template: TemplateName, system: str, media: Media) -> Prompt:
    """What stands before a caption: the video alone, or a line that asks for it in the template."""
    if line is None:
        return (Video(),)
    if template == "llama2":
        return tuple(media.write(f"[INST] {_llama_system(system)}{line} [/INST] "))
    return tuple(media.write(f"{_header(system)}###Human: {line} ###Assistant: "))


def dialogue(turns: Sequence[Turn], template: TemplateName, system: str, media: Media | None) -> Dialogue:
    """Turns of human and gpt, after a system turn or none, of which the answers and what ends each are to be learnt."""
    system, turns = _system_of(turns, system)
    prompt: list[Segment] = []
    answers = []
    for number, turn in enumerate(turns):
        value = turn["value"]
        if turn["from"] == "gpt":
            answers.append(len(prompt))
            prompt += [Text(f" {value} ", learn=True), Control("end", learn=True)] if template == "llama2" else []
            prompt += [Text(f" {value}\n{VICUNA_END}", learn=True)] if template == "vicuna_v0" else []
            continue
        written: list[Segment]
        if template == "llama2":
            prompt += [Control("begin")] if number else []
            text = f"[INST] {'' if number else _llama_system(system)}{value} [/INST]"
            written = media.write(text) if media else [Text(text)]
        else:
            before = "Human: " if number else f"{system}\n\n{VICUNA_END}Human: "
            text = f"{before}{value}\n{VICUNA_END}Assistant:"
            written = media.write(text) if media else [Text(text)]
        prompt += written
    return Dialogue(tuple(prompt), tuple(answers))


def drift_labels(
    tokens: Tokens, turns: Sequence[Turn], system: str, media: Media | None, encoder: PromptEncoder
) -> tuple[int, ...]:
    """Labels (L,) of a dialogue of `vicuna_v0` as the published code has them.

    It learns all but the questions and their leads, and takes for the length of each turn that of the turn alone with a
    begin token: so its windows run ahead by one more token with each turn, into what is to be learnt and what is not.
    """
    system, turns = _system_of(turns, system)
    labels = [IGNORE if tokens.video[0] <= place < tokens.video[1] else token for place, token in enumerate(tokens.ids)]
    most = encoder.max_length or len(labels)

    def length(segments: Sequence[Segment]) -> int:
        return min(most, len(encoder.encode(tuple(segments), end=False).ids))

    start = length([Text(f"{system}\n\n")])
    windows = [(0, start)]
    for turn in turns:
        speaker = "Human" if turn["from"] == "human" else "Assistant"
        text = f"{VICUNA_END}{speaker}: {turn['value']}\n"
        end = start + length(media.write(text) if media and speaker == "Human" else [Text(text)])
        if speaker == "Human":
            windows.append((start + 2, end))
        start = end
    for first, stop in windows:
        for place in range(first, min(stop, len(labels))):
            labels[place] = IGNORE
    return tuple(labels)


def blip_caption(text: str, most_words: int = 50) -> str:
    """A caption as BLIP (arXiv 2201.12086) reads it: lower case, without most punctuation, 50 words at most."""
    words = _MARKS.sub(" ", text.lower())
    words = re.sub(r"\s{2,}", " ", words).rstrip("\n").strip(" ")
    return " ".join(words.split(" ")[:most_words])


def _system_of(turns: Sequence[Turn], system: str) -> tuple[str, Sequence[Turn]]:
    """(the system's text, the other turns)."""
    return (turns[0]["value"], turns[1:]) if turns[0]["from"] == "system" else (system, turns)


def _header(system: str) -> str:
    return f"{system}\n\n" if system else ""


def _llama_system(system: str) -> str:
    return f"<<SYS>>\n{system}\n<</SYS>>\n\n"
