"""A clip -> the same pictures, smaller and in short groups, so that any frame is a few decoded frames away.

H.264 in mp4, upright, 8 bit, yuv420p, without sound. Every frame is kept unless `fps` thins them out, at its own time.
The same bytes each time with the same libraries: one thread, a constant quality, and x264 told to use nothing that
depends on the processor (without, 1 file in 20 differs from run to run).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from vlm.data.containers import is_still as is_still  # such a file stays as it is
from vlm.data.video import DecodeError, all_frames, count_frames
from vlm.types import UserError

_CLOCK = 90_000  # ticks a second: a whole number of them for each frame at 24, 25, 30 and 30000/1001 a second
_TICK = 6e-4  # seconds by which containers round the times of frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Reencode:
    """How clips are encoded again. The defaults are those of `tools/make_shards.py --reencode`."""

    short_side: int = 256
    """Pixels of the shorter side; smaller clips are not enlarged. 0: the size stays (but for a pixel: it is even)."""
    gop: int = 8
    """Every so many frames one that needs no other: what is decoded to reach a frame."""
    fps: float | None = None
    """At most so many frames a second, the ones on show at 0, 1/fps, 2/fps, …; None: all frames."""
    crf: int = 20
    """x264's quality: lower is nearer to the original, and larger."""

    def __post_init__(self) -> None:
        if self.short_side < 0 or self.short_side == 1 or self.gop < 1 or not 0 <= self.crf <= 51:
            raise UserError(
                f"encoding again needs a short side of 0 or 2 and more (got {self.short_side}), a gop of 1 and more "
                f"(got {self.gop}) and a crf of 0 to 51 (got {self.crf})"
            )
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UserError(f"{self.fps} frames a second: a rate is above 0 and at most 1000")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a clip of this size gets: even numbers, sides in proportion to half a pixel or so."""
        scale = min(1.0, self.short_side / min(width, height)) if self.short_side else 1.0
        return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def reencode(data: bytes, how: Reencode) -> tuple[bytes, list[str]]:
    """(mp4, what there is to warn of in the original); DecodeError where it cannot be done, or frames went missing."""
    warnings: list[str] = []
    wanted = _thinned(how.fps) if how.fps else lambda start, end: True
    file = io.BytesIO()
    lengths: list[int] = []  # ticks that each frame is on show
    last = -1
    try:
        with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream: Any = None
            for start, end, picture in all_frames(data, warnings, wanted):
                size = how.size(picture.shape[1], picture.shape[0])
                stream = stream or _add_stream(container, size, how.gop, how.crf)
                frame = _to_frame(picture, size)
                begin = start if how.fps is None or end - start >= 1 / how.fps else _on_grid(start, how.fps)
                frame.pts = last = max(last + 1, round(begin * _CLOCK))
                frame.time_base = Fraction(1, _CLOCK)
                lengths.append(max(1, round(max(end - start, 1 / how.fps if how.fps else 0.0) * _CLOCK)))
                _mux(container, stream.encode(frame), lengths)
            _mux(container, stream.encode(None), lengths)
    except (av.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DecodeError(f"cannot be encoded again ({getattr(error, 'strerror', None) or error})") from error
    made = file.getvalue()
    found = count_frames(made)
    if found != len(lengths):
        raise DecodeError(f"cannot be encoded again: {len(lengths)} frames were written, {found} decode")
    return made, warnings


def _mux(container: Any, packets: Sequence[Any], lengths: Sequence[int]) -> None:
    """Write packets, the last frame's with its own length (of the others, the next frame's time tells it)."""
    for packet in packets:
        packet.duration = lengths[-1]
        container.mux(packet)


def _add_stream(container: Any, size: tuple[int, int], gop: int, crf: int) -> Any:
    """An H.264 stream of fixed groups, without B-frames (times and order then agree for every reader)."""
    private = f"cpu-independent=1:scenecut=0:keyint={gop}:min-keyint={gop}:open-gop=0:force-cfr=0"
    options = {"preset": "veryfast", "tune": "fastdecode", "crf": str(crf), "g": str(gop), "bf": "0", "threads": "1",
               "x264-params": private}  # fmt: skip
    stream = container.add_stream("libx264", rate=Fraction(30), options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.time_base = stream.codec_context.time_base = Fraction(1, _CLOCK)
    stream.codec_context.thread_count = 1
    return stream


def _to_frame(picture: np.ndarray, size: tuple[int, int]) -> Any:
    """A frame of yuv420p from an (H, W, 3) picture, resized to (width, height).

    AREA: the colour of four pixels is their mean; by default FFmpeg takes that of one of them.
    """
    picture = np.ascontiguousarray(picture)
    if size != (picture.shape[1], picture.shape[0]):
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p", interpolation="AREA", threads=1
    )


def _on_grid(start: float, fps: float) -> float:
    """The first of the seconds 0, 1/fps, 2/fps, … that is not before `start`."""
    return -int(-(start - _TICK) * fps // 1) / fps


def _thinned(fps: float) -> Callable[[float, float], bool]:
    """Whether a frame on show from `start` to `end` is kept: it is on show at one of the seconds 0, 1/fps, …"""
    return lambda start, end: _on_grid(start, fps) < end - _TICK or end - start >= 1 / fps
