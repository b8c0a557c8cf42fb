"""One time axis for questions, answers and features: borders between frames, and borders between a video's places.

A video of N frames is read as T places (video tokens). The border f, 0 … N, lies before frame f and after frame f - 1;
the border t, 0 … T, lies before place t. Place t stands for the frames from border `frame(t)` to border `frame(t + 1)`
and looks at the one in their middle: the published code takes (round(t * s) + round((t + 1) * s)) // 2 with
s = (N - 1) / T, which is that frame or one beside it. An action that begins with frame f and ends before frame g is
written `place(f)-place(g)`, half-open, and is read back the same way.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TIME = re.compile(r"<t:(\d+)>")


class TimeAxis(NamedTuple):
    """How borders of frames and borders of places of one video belong together.

    Both ways the nearest border is taken, of two as near the later: t <-> round(t * N / T). The ends 0 and N are 0 and
    T exactly, and the order is kept. Where N >= T, `place(frame(t)) == t`; where N <= T, `frame(place(f)) == f`.
    """

    num_frames: int  # N, at least 1
    places: int  # T, at least 1

    def place(self, frame: int) -> int:
        """The border of places nearest to a border of frames. Beyond an end of the video it is that end."""
        return _rescaled(frame, self.num_frames, self.places)

    def frame(self, place: int) -> int:
        """The border of frames nearest to a border of places. Beyond an end of the video it is that end."""
        return _rescaled(place, self.places, self.num_frames)

    def render(self, text: str) -> str:
        """A text with its times, written `<t:F>` for the border F of frames, as borders of places."""
        return _TIME.sub(lambda found: str(self.place(int(found[1]))), text)


def _rescaled(border: int, of: int, to: int) -> int:
    """round(border * to / of), halves up, in whole numbers alone."""
    if of < 1 or to < 1:
        raise ValueError(
            f"a time axis of {of} and {to} borders: a video must have frames and places, 1 or more of each"
        )
    return (2 * min(max(border, 0), of) * to + of) // (2 * of)
