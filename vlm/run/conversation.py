"""What one person and a model say about one video: questions, answers anew, stopping, forgetting.

talk = Conversation(model)
talk.look(model.see(Path("clip.mp4")))
answer = talk.ask("What happens?", Settings(), on_text=print)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from vlm.run.chat import Answer, ChatModel, OnText, Settings, Turn
from vlm.run.chat_videos import Seen
from vlm.types import UserError


class Conversation:
    """What one person says about one video. Calls from several threads are refused while an answer is written, but for
    `stop`."""

    def __init__(self, model: ChatModel, name: str = "") -> None:
        """
        Args:
            name: who holds the videos that are chosen (`Library`).
        """
        self.model, self.name = model, name
        self.key: str | None = None
        self.turns: list[Turn] = []
        self.asking: str | None = None  # the question whose answer is in the works
        self._drawn = 0  # how often an answer was written anew
        self._stop = threading.Event()  # of the answer in the works, or of the last
        self._begin = threading.RLock()  # whoever stops an answer that has just begun stops that one
        self._busy = threading.Lock()

    def look(self, seen: Seen) -> None:
        """Talk about this video from now on; what was said of another is forgotten. An answer in the works ends."""
        self.stop()
        with self._busy:
            self.key = seen.key
            self.turns.clear()

    def ask(self, question: str, settings: Settings, on_text: OnText | None = None) -> Answer:
        """The next answer. UserError: no video is chosen, or as `ChatModel.say`; the question then is not kept."""
        return self._answer(lambda turns: [*turns, Turn(question.strip())], settings, on_text, asked=question)

    def again(self, settings: Settings, on_text: OnText | None = None) -> Answer:
        """The last answer anew. UserError: nothing was asked."""

        def last(turns: list[Turn]) -> list[Turn]:
            if not turns:
                raise UserError("Nothing was asked yet.")
            self._drawn += 1
            return [*turns[:-1], Turn(turns[-1].question)]

        return self._answer(last, settings, on_text)

    def clear(self) -> None:
        """Forget what was said; the video stays. An answer in the works ends."""
        self.stop()
        with self._busy:
            self.turns.clear()

    def stop(self) -> None:
        """End the answer in the works, if there is one."""
        with self._begin:
            self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether the answer in the works was told to end."""
        return self._stop.is_set()

    def end(self) -> None:
        """Forget all, and let go of the videos."""
        self.clear()
        self.key = None
        self.model.videos.release(self.name)

    def wait(self) -> None:
        """Until no answer is in the works."""
        with self._busy:
            pass

    def _answer(
        self,
        asking: Callable[[list[Turn]], list[Turn]],
        settings: Settings,
        on_text: OnText | None,
        asked: str | None = None,
    ) -> Answer:
        """
        Args:
            asking: what was said so far -> the turns whose last is to be answered.
        """
        with self._begin:
            if not self._busy.acquire(blocking=False):
                raise UserError("The answer before this is still being written: wait for it, or stop it.")
            self._stop = threading.Event()
        try:  # what was said, and of which video, is looked at here: another call may have changed it until now
            if self.key is None:
                raise UserError("Please choose a video first.")
            turns = asking(self.turns)
            self.asking = asked
            seen = self.model.videos.find(self.key)
            settings = replace(settings, seed=settings.seed + self._drawn)
            answer = self.model.say(seen, turns, settings, on_text, self._stop)
            if answer.text or not answer.stopped:
                self.turns[:] = [*turns[:-1], Turn(turns[-1].question, answer.text)]
            return answer
        finally:
            self.asking = None
            self._busy.release()
