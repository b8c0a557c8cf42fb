"""What the buttons of launch/chat.py's page do, for each person apart. Nothing here knows how the page is drawn."""

from __future__ import annotations

import base64
import html
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.run.chat import Answer, ChatModel, OnText, Settings, harmless
from vlm.run.chat_examples import Examples
from vlm.run.chat_videos import Seen
from vlm.run.conversation import Conversation
from vlm.types import UserError

MOST_SESSIONS = 200  # people at once; the one who was silent longest makes room
PACE_SECONDS = 0.08  # between two states of a growing answer: words faster than this come together
SWEEP_SECONDS = 600.0  # after which an upload that nobody took is deleted

History = list[dict[str, str]]  # of the chat: role (user or assistant) and content


class Sessions:
    """The conversation of each person (browser tab)."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model
        self._talks: dict[str, Conversation] = {}  # the one who spoke last stands last
        self._lock = threading.Lock()

    def talk(self, name: str) -> Conversation:
        with self._lock:
            talk = self._talks.pop(name, None) or Conversation(self.model, name)
            self._talks[name] = talk
            silent = next(iter(self._talks)) if len(self._talks) > MOST_SESSIONS else None
        if silent is not None:
            self.end(silent)
        return talk

    def end(self, name: str) -> None:
        with self._lock:
            talk = self._talks.pop(name, None)
        if talk is not None:
            talk.end()

    def __len__(self) -> int:
        return len(self._talks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the page is of, and its limits."""

    model: ChatModel
    title: str
    examples: Examples
    settings: Settings
    uploads: Path  # folder of what is uploaded; emptied


# What the buttons do --------------------------------------------------------------------------------------------------


class Handlers:
    """Functions of the page. The last argument of each is Gradio's request, which knows who asks."""

    def __init__(self, page: Page, keep: Any = None) -> None:
        """
        Args:
            keep: what leaves a field of the page as it is.
        """
        self.page, self.model, self.keep = page, page.model, keep
        self.sessions = Sessions(page.model)
        self._taken: dict[Path, str] = {}  # uploads that were looked at -> keys of their content

    def upload(self, file: str | None, request: Any) -> tuple[Any, ...]:
        """(file field, example, frames, chat, status) after a file was uploaded."""
        if file is None:
            return None, None, "", [], ""
        path = Path(file)
        try:
            return None, None, *self._look(lambda name: self._see(path, name), path.name, request)
        finally:
            with suppress(OSError):
                path.unlink()
            self._sweep()

    def _see(self, path: Path, holder: str) -> Seen:
        """Gradio keeps files by their content, so one that another person has just handed over may be gone already."""
        known = self._taken.get(path)
        if known is not None and not path.exists():
            with suppress(UserError):
                seen = self.model.videos.find(known)
                return self.model.videos.get(known, lambda: seen, holder)
        seen = self.model.see(path, holder)
        self._taken[path] = seen.key
        while len(self._taken) > MOST_SESSIONS:
            self._taken.pop(next(iter(self._taken)))
        return seen

    def choose(self, name: str | None, request: Any) -> tuple[Any, ...]:
        """(frames, chat, status) after an example was chosen."""
        if name not in self.page.examples.names:
            return "", [], ""
        see, number = self.page.examples.see, self.page.examples.names.index(name)
        assert see is not None
        return self._look(lambda holder: see(number, holder), name, request)

    def ask(
        self, question: str, temperature: float, top_p: float, most: float, request: Any
    ) -> Iterator[tuple[History, str, str]]:
        """(chat, text field, status), again and again while the answer grows."""
        talk = self.sessions.talk(request.session_hash)

        def write(on_text: OnText) -> Answer:
            settings = Settings(temperature=temperature, top_p=top_p, max_new_tokens=int(most))
            return talk.ask(question, settings, on_text)

        yield from self._stream(talk, question.strip(), write, question)

    def again(
        self, typed: str, temperature: float, top_p: float, most: float, request: Any
    ) -> Iterator[tuple[History, str, str]]:
        """As `ask`, of the last question; what is in the text field stays."""
        talk = self.sessions.talk(request.session_hash)

        def write(on_text: OnText) -> Answer:
            settings = Settings(temperature=temperature, top_p=top_p, max_new_tokens=int(most))
            answer = talk.again(settings, on_text)
            same = "With temperature 0 the same question always has the same answer." if not temperature else ""
            return answer._replace(notes=(*answer.notes, *filter(None, [same])))

        question = talk.turns[-1].question if talk.turns else ""
        yield from self._stream(talk, question, write, typed, anew=True)

    def stop(self, request: Any) -> tuple[History, Any, str]:
        """(chat, text field, status) once the answer in the works has ended; a question without a word of an answer
        goes back to the text field."""
        talk = self.sessions.talk(request.session_hash)
        asked = talk.asking
        talk.stop()
        talk.wait()
        answered = bool(talk.turns) and asked is not None and talk.turns[-1].question == asked.strip()
        return _history(talk), self.keep if asked is None or answered else asked, _note("Stopped.")

    def clear(self, request: Any) -> tuple[History, str]:
        """(chat, status) after what was said was forgotten."""
        self.sessions.talk(request.session_hash).clear()
        return [], ""

    def leave(self, request: Any) -> None:
        """The tab was closed."""
        self.sessions.end(request.session_hash)

    # ------------------------------------------------------------------------------------------ parts

    def _look(self, see: Callable[[str], Seen], name: str, request: Any) -> tuple[str, History, str]:
        talk = self.sessions.talk(request.session_hash)
        try:
            seen = see(talk.name)
            talk.look(seen)
        except Exception as error:
            return "" if talk.key is None else self.keep, _history(talk), _alert(_sentence(error))
        alone = [] if self.model.remembers else ["This model reads each question alone, not what was said before."]
        return _frames(seen, name), [], "".join(_note(note) for note in (*seen.warnings, *alone))

    def _stream(
        self, talk: Conversation, question: str, write: Callable[[OnText], Answer], typed: str, anew: bool = False
    ) -> Iterator[tuple[History, str, str]]:
        before = _history(talk)[: -2 if anew else None]
        told: queue.Queue[str | Answer | Exception] = queue.Queue()

        def work() -> None:
            try:
                told.put(write(told.put))
            except Exception as error:
                told.put(error)

        threading.Thread(target=work, name="answer", daemon=True).start()
        done = False
        left = typed if anew else ""
        asked = [*before, {"role": "user", "content": _plain(question)}]
        try:
            if question:
                yield [*asked, {"role": "assistant", "content": "…"}], left, ""
            while not done:
                item = _newest(told)
                if isinstance(item, str):
                    yield [*asked, {"role": "assistant", "content": _plain(item)}], left, ""
                    time.sleep(PACE_SECONDS)
                    continue
                done = True
                if isinstance(item, Exception):
                    yield _history(talk), typed, _alert(_sentence(item))
                else:
                    notes = [*(["Stopped."] if item.stopped else []), *item.notes]
                    kept = item.text or not item.stopped
                    yield _history(talk), left if kept else typed, "".join(map(_note, notes))
        finally:
            if not done:  # the person has gone, or has chosen something else
                talk.stop()

    def _sweep(self) -> None:
        """Delete uploads that nobody took."""
        old = time.time() - SWEEP_SECONDS
        for path in sorted(self.page.uploads.rglob("*"), reverse=True):  # what is in a folder before the folder
            with suppress(OSError):
                if path.stat().st_mtime < old:
                    path.rmdir() if path.is_dir() else path.unlink()


def _newest(told: queue.Queue[str | Answer | Exception]) -> str | Answer | Exception:
    """The next that is told; of texts the longest that is there already."""
    item = told.get()
    while isinstance(item, str):
        try:
            item = told.get_nowait()
        except queue.Empty:
            break
    return item


def _history(talk: Conversation) -> History:
    found: History = []
    for turn in talk.turns:
        found.append({"role": "user", "content": _plain(turn.question)})
        found.append({"role": "assistant", "content": _plain(turn.answer or "(no words)")})
    return found


def _plain(text: str) -> str:
    """A text as it is: what looks like HTML in it is shown, never obeyed (it could call other hosts)."""
    return html.escape(harmless(text), quote=False)


def _sentence(error: Exception) -> str:
    """What a person is told of an error; what is no fault of theirs goes to the terminal in full."""
    if isinstance(error, UserError):
        text = str(error)
        return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"
    traceback.print_exception(error)
    sys.stderr.flush()
    return f"Something went wrong here ({type(error).__name__}); the page goes on. Its terminal has the details."


def _alert(text: str) -> str:
    return f'<div class="vlm-alert" role="alert">{html.escape(text)}</div>'


def _note(text: str) -> str:
    return f'<div class="vlm-note" role="status">{html.escape(text)}</div>'


def _frames(seen: Seen, name: str) -> str:
    """The frames of a video and what is known of it."""
    figures = "".join(
        f'<figure><img alt="frame at {picture.second:.1f} s" '
        f'src="data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}">'
        f"<figcaption>{picture.second:.1f} s</figcaption></figure>"
        for picture in seen.pictures
    )
    about = f'<div class="vlm-about"><b>{html.escape(name)}</b> {html.escape(seen.about)}</div>'
    return f'{about}<div class="vlm-frames">{figures}</div>'
