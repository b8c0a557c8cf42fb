"""A first look at a file that somebody hands over: is it a video, how long, and a few small pictures of it.

The look is taken in a process of its own, which is ended when it takes too long and has no more memory than it needs:
whatever the file does to a decoder, the program that asks lives on.

    glance = look_apart(Path("upload.mp4"), Limits(seconds=600))
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm.data.containers import DecodeError, is_still, opened
from vlm.data.video import VideoInfo, all_frames, inspect

MOST_PIXELS = 8192 * 8192  # of a frame
MOST_MEMORY = 6 << 30  # bytes of data that the process may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is refused."""

    seconds: float = 1200.0  # of video
    nbytes: int = 512 << 20  # of file
    patience: float = 300.0  # seconds until a look is given up


class Glance(NamedTuple):
    """What a first look showed."""

    pictures: np.ndarray  # uint8 (n, h, w, 3): evenly spread frames, made small
    seconds: tuple[float, ...]  # when each is on show
    info: VideoInfo
    is_image: bool


def look(path: Path, limits: Limits, *, count: int = 8, height: int = 120) -> Glance:
    """Decode a whole video, in this process; an image is a video of one frame.

    Raises:
        DecodeError: empty, too large, too long, damaged, or no video at all. One sentence, without the file's name.
    """
    _check_size(path, limits)
    with path.open("rb") as file:
        still = is_still(file.read(4096))
    _check_header(path, limits)
    kept: list[tuple[float, np.ndarray]] = []
    step = 0.0

    def wanted(start: float, end: float) -> bool:
        if end > limits.seconds + 1:
            raise DecodeError(_too_long(end, limits))
        return not kept or start >= kept[-1][0] + step

    for start, end, picture in all_frames(path, [], wanted):
        kept.append((start, _small(picture, height)))
        if len(kept) > 4 * count:  # twice as far apart from here on
            kept[:] = kept[::2]
            step = max(2 * step, 2 * (end - start), kept[1][0] - kept[0][0])
    info = inspect(path, picture=still)
    chosen = [kept[at] for at in np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int)]
    return Glance(np.stack([picture for _, picture in chosen]), tuple(second for second, _ in chosen), info, still)


def look_apart(path: Path, limits: Limits, *, count: int = 8, height: int = 120) -> Glance:
    """As `look`, in a process of its own."""
    _check_size(path, limits)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, path, limits, count, height), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limits.patience):
            raise DecodeError(f"decoding it takes longer than {limits.patience:g} seconds")
        try:
            found = ours.recv()
        except (EOFError, ConnectionError):
            process.join(5)
            raise DecodeError(f"damaged: {_how_it_ended(process.exitcode)} while decoding it") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(found, str):
        raise DecodeError(found)
    assert isinstance(found, Glance)
    return found


def _work(connection: Connection, path: Path, limits: Limits, count: int, height: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        connection.send(look(path, limits, count=count, height=height))
    except DecodeError as error:
        connection.send(str(error))
    except MemoryError:
        connection.send(f"decoding it takes more than {MOST_MEMORY >> 30} GiB of memory")
    except OSError as error:
        connection.send(f"cannot be read: {error.strerror or error}")


def _check_size(path: Path, limits: Limits) -> None:
    try:
        nbytes = path.stat().st_size
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror or error}") from error
    if path.is_dir():
        raise DecodeError("is a folder, not a file")
    if not nbytes:
        raise DecodeError("empty file (0 bytes)")
    if nbytes > limits.nbytes:
        raise DecodeError(f"too large: {nbytes / 2**20:,.1f} MB, and at most {limits.nbytes / 2**20:,.6g} MB are taken")


def _check_header(path: Path, limits: Limits) -> None:
    """What the header admits, before anything is decoded."""
    with opened(path) as (container, stream):
        width, height = stream.codec_context.width or 0, stream.codec_context.height or 0
        if width * height > MOST_PIXELS:
            raise DecodeError(f"its frames are too large: {width} x {height} pixels, at most {MOST_PIXELS:,} are taken")
        promised = (container.duration or 0) / 1e6
        if promised > 2 * limits.seconds:  # else it is counted, since headers err
            raise DecodeError(_too_long(promised, limits))


def _too_long(seconds: float, limits: Limits) -> str:
    return f"too long: {seconds:,.0f} seconds or more, and at most {limits.seconds:,g} seconds are taken"


def _small(picture: np.ndarray, height: int) -> np.ndarray:
    """(H, W, 3) -> (height, w, 3), aspect kept."""
    width = max(1, min(4 * height, round(picture.shape[1] * height / picture.shape[0])))
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _how_it_ended(code: int | None) -> str:
    return f"the decoder crashed ({signal.Signals(-code).name})" if code and code < 0 else "the decoder gave up"
