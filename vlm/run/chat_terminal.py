"""Talking about one video in the terminal: questions are read line by line, answers appear as they are written.

Ctrl-C stops an answer, not the program; at the prompt, twice ends it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO

from vlm.run.chat import Answer, ChatModel, OnText, Settings, harmless
from vlm.run.conversation import Conversation
from vlm.types import UserError

HELP = """\
Write a question, or one of:
  /regenerate      the last answer anew
  /temperature X   0: always the likeliest word; above, words are drawn
  /top_p X         draw among the likeliest words of this probability together
  /max_tokens N    length of an answer, at most
  /video FILE      talk about another video
  /clear           forget what was said
  /quit            end (also Ctrl-D). Ctrl-C stops an answer"""


class Terminal:
    """One conversation, from lines of `source` to `out`."""

    def __init__(self, model: ChatModel, settings: Settings, source: IO[str], out: IO[str]) -> None:
        self.model, self.settings, self.source, self.out = model, settings, source, out
        self.talk = Conversation(model, "terminal")
        self.writing = False
        self._shown = ""
        self._interrupts = 0

    def run(self, video: Path) -> None:
        """Until /quit or the end of input. UserError: the video cannot be used."""
        self._look(video)
        self._tell("Write a question; /help names the commands.")
        if not self.model.remembers:
            self._tell("[this model reads each question alone, not what was said before]")
        with self._interruptible():
            while (line := self._read()) is not None:
                self._interrupts = 0
                try:
                    if not self._do(line.strip()):
                        break
                except UserError as error:
                    self._tell(f"error: {harmless(str(error))}")
                except KeyboardInterrupt:  # twice, in one answer
                    self._tell("\n[stopped]")
        self.talk.end()

    def _do(self, line: str) -> bool:
        """What a line asks for; whether to go on."""
        name, _, value = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._answer(lambda on_text: self.talk.ask(line, self.settings, on_text))
        elif name in ("/quit", "/exit"):
            return False
        elif name == "/help":
            self._tell(HELP)
        elif name == "/regenerate":
            self._answer(lambda on_text: self.talk.again(self.settings, on_text))
            if not self.settings.temperature:
                self._tell("[with temperature 0 the same question always has the same answer: /temperature 0.7]")
        elif name == "/clear":
            self.talk.clear()
            self._tell("[forgotten]")
        elif name == "/video" and value:
            self._look(_path(value))
        elif name in _NUMBERS:
            self.settings = _set(self.settings, name, value)
            self._tell(f"[{name[1:]} is {getattr(self.settings, _NUMBERS[name][0]):g}]")
        else:
            raise UserError(f"there is no command {line!r}; /help names them. A question does not begin with /")
        return True

    def _look(self, video: Path) -> None:
        seen = self.model.see(video, self.talk.name)
        self.talk.look(seen)
        self._tell(f"{harmless(video.name)}: {seen.about}")
        for warning in seen.warnings:
            self._tell(f"[{warning}]")

    def _answer(self, write: Callable[[OnText], Answer]) -> None:
        self._shown = ""
        self.writing = True
        try:
            answer = write(self._show)
        finally:
            self.writing = False
        if not answer.text.startswith(self._shown):  # a tokenizer that takes back what it said
            self._tell("")
            self._shown = ""
        self._show(answer.text)
        self._tell("" if answer.text else "[no words]")
        if answer.stopped:
            self._tell("[stopped]")
        for note in answer.notes:
            self._tell(f"[{note}]")

    def _show(self, text: str) -> None:
        if text.startswith(self._shown):
            self.out.write(harmless(text[len(self._shown) :]))
            self.out.flush()
            self._shown = text

    def _tell(self, text: str) -> None:
        self.out.write(f"{text}\n")
        self.out.flush()

    def _read(self) -> str | None:
        """The next line; None: there is none."""
        while True:
            try:
                if self.source.isatty() and self.source is sys.stdin:
                    return input("> ")
                return self.source.readline() or None
            except EOFError:
                self._tell("")
                return None
            except KeyboardInterrupt:
                self._interrupts += 1
                if self._interrupts > 1:
                    self._tell("")
                    return None
                self._tell("\n[/quit, Ctrl-D, or Ctrl-C once more ends]")

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT stops an answer; the second in one answer ends it at once."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if not self.writing or self.talk.stopping:
                raise KeyboardInterrupt
            self.talk.stop()

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


_NUMBERS: dict[str, tuple[str, Callable[[str], float]]] = {
    "/temperature": ("temperature", float),
    "/top_p": ("top_p", float),
    "/max_tokens": ("max_new_tokens", int),
}


def _path(value: str) -> Path:
    try:
        return Path(value.strip()).expanduser()
    except RuntimeError as error:
        raise UserError(f"/video {value}: there is no such user") from error


def _set(settings: Settings, name: str, value: str) -> Settings:
    field, number = _NUMBERS[name]
    try:
        known = number(value)
    except ValueError as error:
        raise UserError(f"{name} {value or '(nothing)'}: a number is expected, such as {name} 1") from error
    return replace(settings, **{field: known})  # type: ignore[arg-type]
