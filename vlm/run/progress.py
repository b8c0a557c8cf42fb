"""How far a long program is: one line rewritten on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Items done, rate and time left.

    progress("write", 12, 340)           12/340 items (3 %), 4.1 items/s, 0:01:20 left
    progress("list", 12, None)           listing: 12 items
    """

    def __init__(self, items: str = "items", seconds_between_lines: float = 5.0) -> None:
        self.items = items
        self.terminal = sys.stderr.isatty()
        self.pause = 0.2 if self.terminal else seconds_between_lines
        self.stage = ""
        self.start = (0.0, 0, 0)  # time, items and parts when the stage began
        self.shown = 0.0
        self.last = ""

    def __call__(
        self, stage: str, done: int, total: int | None, parts: int = 0, name_of_parts: str = "", note: str = ""
    ) -> None:
        """Show it, unless the last time is too short ago. `parts`: what items are made of, whose rate is shown too."""
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.start, self.shown = stage, (now, done, parts), now if stage == "list" else 0.0
        if now - self.shown < self.pause and done != total:
            return
        self.shown = now
        if total is None:
            self._show(f"listing: {done} {self.items}")
            return
        elapsed = max(now - self.start[0], 1e-6)
        rate = (done - self.start[1]) / elapsed
        also = f", {(parts - self.start[2]) / elapsed:.0f} {name_of_parts}/s" if name_of_parts else ""
        left = f", {_clock((total - done) / rate)} left" if rate > 0 and done < total else ""
        share = 100 * done // max(total, 1)
        if done == total and self.last == f"{stage} {done}":  # said already
            return
        self.last = f"{stage} {done}"
        self._show(f"{done}/{total} {self.items} ({share} %), {rate:.1f} {self.items}/s{also}{left}{note}")

    def _show(self, text: str) -> None:
        print(
            f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def close(self) -> None:
        if self.terminal and self.stage:
            print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
