"""Small encoded clips that the tests of the data plane make for themselves."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def pictures(count: int, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """(count, height, width, 3) uint8: a coarse random picture and a bar that wanders, so no two frames are alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    still = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    frames = np.repeat(still[None], count, 0)
    for index, frame in enumerate(frames):
        place = index * max(1, width // max(count, 1)) % width
        frame[:, place : place + max(1, width // 8)] = rng.integers(0, 255, 3)
    return frames


def encode(
    frames: np.ndarray,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rate: int = 12,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
) -> bytes:
    """A file of one video stream. `times`: presentation times in units of 1 / rate; default 0, 1, 2, …"""
    with (  # a named file: "faststart" opens it a second time
        tempfile.NamedTemporaryFile(suffix=".clip") as file,
        av.open(file.name, "w", format=container, options=container_options or {}) as output,
    ):
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.codec_context.thread_count = 1  # the same bytes each time
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        output.close()
        return Path(file.name).read_bytes()


def sound(cover: np.ndarray | None = None) -> bytes:
    """An mp4 with sound alone, or with an (H, W, 3) cover picture attached to it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=44100)
        if cover is not None:
            picture: Any = output.add_stream("mjpeg", rate=1)
            picture.height, picture.width = cover.shape[:2]
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(cover, format="rgb24").reformat(format="yuvj420p")
            frame.pts = 0
            output.mux(picture.encode(frame))
            output.mux(picture.encode())
        for index in range(40):
            samples = (3000 * np.sin(np.arange(1024) / 20)).astype(np.int16)[None]
            tone = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            tone.sample_rate, tone.pts = 44100, 1024 * index
            output.mux(stream.encode(tone))
        output.mux(stream.encode())
    return file.getvalue()


def jpeg(picture: np.ndarray) -> bytes:
    """One (H, W, 3) picture as a JPEG file."""
    return encode(picture[None], container="image2pipe", codec="mjpeg", pix_fmt="yuvj420p")


def damaged() -> dict[str, bytes]:
    """Files that are no video although a list calls them one: file stem -> content."""
    whole = encode(pictures(24))
    return {
        "zero_bytes": b"",
        "html": b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head><body></body></html>\n",
        "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 385746\n",
        "audio_only": sound(),
        "no_index": whole[: whole.index(b"moov") - 4],
    }


def truncated(frames: np.ndarray) -> tuple[bytes, bytes]:
    """An mp4 whose index comes first: whole, and without its second half (fewer frames than its header promises)."""
    whole = encode(frames, container_options={"movflags": "faststart"}, options={"g": "6"})
    return whole, whole[: (whole.index(b"mdat") + len(whole)) // 2]
