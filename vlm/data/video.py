"""Encoded video -> frames. The only file that knows how to decode.

PyAV is the reference: the frame of index i is the i-th frame PyAV yields when the video stream is decoded from its
start, turned as the container's display matrix asks. decord 0.6.0 is quicker to seek but returns wrong pictures, in
silence, on several real containers, so it is used only on clips where `check_decoders` saw it return the reference's
pictures to the bit, and PyAV takes over whenever it fails.

Files are known by their content, never by their name: the usual input is the bytes of a tar member.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from vlm.data.containers import PYAV_ERRORS, DecodeError, Source, is_picture, opened, plain, refuse_cut_jpeg
from vlm.data.containers import container_extension as container_extension  # of encoded video, as all that is here

_CHECKED_READS = (3, 5, 8, 16)  # evenly spaced frames that check_decoders compares, read by read
_MAX_CHECK_BYTES = 256 << 20  # memory one of these reads may take
_LEAPS = (-1.0, 60.0)  # seconds from frame to frame beyond which a clock has leapt (smaller steps back: it jitters)
_TICK = 6e-4  # seconds by which containers round the times of frames


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What decoding the whole video stream showed."""

    num_frames: int  # frames that PyAV decodes, not what the header promises
    fps: float  # 0 when it cannot be known, and of a still picture
    duration: float  # seconds from the first frame to the end of the last; 0 of a still picture
    width: int  # of the frames as `decode` returns them, rotation applied
    height: int
    codec: str
    container: str  # FFmpeg's name of the container, such as "mov,mp4,m4a,3gp,3g2,mj2"
    rotation: int  # degrees counterclockwise that `decode` turns each frame: 0, 90, 180 or 270
    warnings: tuple[str, ...] = ()


def inspect(data: Source, *, picture: bool = False) -> VideoInfo:
    """Decode the whole video stream with PyAV and say what is in it; raises DecodeError when no frame decodes.

    `picture`: a still picture is expected, which else is warned of. A picture that was cut short is an error, since
    FFmpeg would fill the missing part with grey.
    """
    with opened(data) as (container, stream):
        reader = _FrameReader(stream, container)
        times: list[float] = []
        sizes: list[tuple[int, int, int]] = []
        first, last = None, None
        for index, frame in enumerate(reader):
            first, last = first or frame, frame
            if frame.time is not None:
                times.append(float(frame.time))
            if not sizes or sizes[-1][1:] != (frame.width, frame.height):
                sizes.append((index, frame.width, frame.height))
        if first is None or last is None:
            raise DecodeError(f"no frame of the video stream decodes ({reader.stopped or 'the stream is empty'})")
        nominal = _nominal_fps(stream)
        last_gap = float(last.duration * last.time_base) if last.duration and last.time_base else 0.0
        last_gap = last_gap or (1 / nominal if nominal else 0.0)
        duration = max(times) - min(times) + last_gap if times else 0.0
        measured = reader.count / duration if duration > 0 else 0.0
        wild = nominal and measured and not 0.5 < measured / nominal < 2
        turns, odd_angle = _quarter_turns(first)
        width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
        still = reader.count == 1 and is_picture(container)
        if still:
            refuse_cut_jpeg(data)
            nominal = duration = measured = 0.0
        warnings = _header_warnings(container, stream, reader, duration, picture)
        if odd_angle:
            warnings.append(f"the display matrix turns by {odd_angle} degrees, which is not applied")
        for index, other_width, other_height in sizes[1:]:
            warnings.append(f"the picture size becomes {other_width}x{other_height} at frame {index}; "
                            f"it is scaled to the first frame's {first.width}x{first.height}")  # fmt: skip
        return VideoInfo(
            num_frames=reader.count,
            fps=measured if wild or not nominal else nominal,
            duration=duration,
            width=width,
            height=height,
            codec=stream.codec_context.codec.canonical_name,
            container=container.format.name,
            rotation=90 * turns,
            warnings=tuple(warnings),
        )


def count_frames(data: Source) -> int:
    """Frames that decode before the stream ends or breaks; raises DecodeError when there is none."""
    with opened(data) as (container, stream):
        reader = _FrameReader(stream, container)
        for _ in reader:
            pass
        if not reader.count:
            raise DecodeError(f"no frame of the video stream decodes ({reader.stopped or 'the stream is empty'})")
        return reader.count


def decode(data: Source, indices: Sequence[int], *, decoders: Sequence[str] = ("pyav",)) -> np.ndarray:
    """The frames of the given indices, in the order given: uint8 (len(indices), H, W, 3), RGB, rotation applied.

    Indices may repeat and need not be sorted. Decoders are tried in order; one that fails hands over to the next, and
    PyAV is always the last. Raises DecodeError when an index lies beyond the last frame that decodes.
    """
    wanted = [int(index) for index in indices]
    assert wanted, "decode() needs at least one frame index"
    assert min(wanted) >= 0, f"frame indices start at 0, got {min(wanted)}"
    for name in decoders:
        if name == "pyav":
            break
        assert name == "decord", f"unknown decoder {name!r}"
        with suppress(DecodeError):  # PyAV answers instead, and has the last word on what is wrong
            return _decode_decord(data, wanted)
    return _decode_pyav(data, wanted)


def frames_at(data: Source, fps: float, warnings: list[str]) -> Iterator[np.ndarray]:
    """The pictures on show at seconds 0, 1/fps, 2/fps, … after the first frame: uint8 (H, W, 3), as from `decode`.

    By the frames' own times, so also where the frame rate varies; decoded once, none kept. A video of s seconds has
    ceil(s * fps) of them, at least one. `warnings` gets what `inspect` would warn of; DecodeError as from `decode`.
    """
    with opened(data) as (container, stream):
        reader = _FrameReader(stream, container)
        nominal = _nominal_fps(stream)
        step = 1 / nominal if nominal else 0.0
        first, shown, now, count = None, None, 0.0, 0
        for next_time, frame in _clocked(reader, step):
            while shown is not None and count / fps < next_time - _TICK:
                yield _to_rgb(shown, first, reader.count - 2)
                count += 1
            first, shown, now = first or frame, frame, next_time
        if shown is None:
            raise DecodeError(f"no frame of the video stream decodes ({reader.stopped or 'the stream is empty'})")
        now += _shown_for(shown, step)
        while count / fps < now - _TICK or not count:
            yield _to_rgb(shown, first, reader.count - 1)
            count += 1
        warnings += _header_warnings(container, stream, reader, now)


def all_frames(
    data: Source, warnings: list[str], wanted: Callable[[float, float], bool] = lambda start, end: True
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Every frame that is wanted, in order: (second from which it is on show, until when, (H, W, 3) as from `decode`).

    Seconds count from the first frame. Decoded once, none kept. `wanted` is asked about every frame by these seconds.
    `warnings` gets what `inspect` would warn of; DecodeError as from `decode`.
    """
    with opened(data) as (container, stream):
        reader = _FrameReader(stream, container)
        nominal = _nominal_fps(stream)
        step = 1 / nominal if nominal else 0.0
        first, shown, now = None, None, 0.0
        for next_time, frame in _clocked(reader, step):
            if shown is not None and wanted(now, next_time):
                yield now, next_time, _to_rgb(shown, first, reader.count - 2)
            first, shown, now = first or frame, frame, next_time
        if shown is None:
            raise DecodeError(f"no frame of the video stream decodes ({reader.stopped or 'the stream is empty'})")
        end = now + _shown_for(shown, step)
        if wanted(now, end):
            yield now, end, _to_rgb(shown, first, reader.count - 1)
        warnings += _header_warnings(container, stream, reader, end)


class MiscountedError(Exception):
    """A stream was said to hold another number of frames than decode: `count`."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


def count_packets(data: Source) -> int:
    """Frames that the container holds, found without decoding: seldom others than those that decode."""
    with opened(data) as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def ordered_frames(data: Source, indices: Sequence[int], num_frames: int, warnings: list[str]) -> Iterator[np.ndarray]:
    """The frames of indices that never fall, one by one, each (H, W, 3) as from `decode`. Decoded once, none kept.

    An index that comes again gives the same array again. All is decoded, so as to know the number of frames:
    MiscountedError, at the end, where it is not `num_frames`. `warnings` gets what `inspect` would warn of.
    """
    with opened(data) as (container, stream):
        reader = _FrameReader(stream, container)
        wanted = iter(int(index) for index in indices)
        following = next(wanted, None)
        first, times = None, [0.0, 0.0]
        for index, frame in enumerate(reader):
            if frame.time is not None:
                times = [times[0] if first else float(frame.time), float(frame.time)]
            first = first or frame
            picture = _to_rgb(frame, first, index) if index == following else None
            while index == following:
                assert picture is not None
                yield picture
                following = next(wanted, None)
        if first is None:
            raise DecodeError(f"no frame of the video stream decodes ({reader.stopped or 'the stream is empty'})")
        if reader.count != num_frames:
            raise MiscountedError(reader.count)
        nominal = _nominal_fps(stream)
        warnings += _header_warnings(
            container, stream, reader, times[1] - times[0] + (1 / nominal if nominal else 0.0), is_picture(container)
        )


def check_decoders(data: Source, info: VideoInfo) -> tuple[str, ...]:
    """The decoders that may be used on this clip, best first: ("decord", "pyav") or ("pyav",).

    decord is admitted when it counts the same frames as PyAV and returns the same pictures, to the bit, in several
    reads of evenly spaced frames from the first to the last. Several, because its errors depend on the gaps between
    the frames asked for: there are clips that it reads well densely and wrongly with gaps, and the other way round.
    """
    most = max(2, _MAX_CHECK_BYTES // (3 * info.width * info.height))
    spaced = (np.linspace(0, info.num_frames - 1, min(count, most)).round() for count in _CHECKED_READS)
    reads = [sorted({int(index) for index in read}) for read in spaced]
    try:
        decord_reader = _decord_reader(data)
        if len(decord_reader) != info.num_frames:
            return ("pyav",)
        expected = {index: _digest(picture) for index, picture in _pictures(data, set().union(*reads))}
        for read in reads:
            frames = _decord_batch(decord_reader, read)
            if [_digest(frame) for frame in frames] != [expected[index] for index in read]:
                return ("pyav",)
    except DecodeError:
        return ("pyav",)
    return ("decord", "pyav")


# The reference -------------------------------------------------------------------------------------------------------


class _FrameReader:
    """The frames of a stream in order; the first error ends it, and `stopped` then says what it was."""

    def __init__(self, stream: Any, container: Any) -> None:
        self.frames = container.decode(stream)
        self.count = 0
        self.stopped: str | None = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                frame = next(self.frames)
            except StopIteration:
                return
            except PYAV_ERRORS as error:
                self.stopped = plain(error)
                return
            self.count += 1
            yield frame


def _clocked(reader: _FrameReader, step: float) -> Iterator[tuple[float, Any]]:
    """(seconds since the first frame, frame) by the frames' own times, which never run back.

    `step`: seconds that go by where a frame has no time, or where the container's clock leaps.
    """
    start, now, begun = 0.0, 0.0, False  # start: the container's time of second 0
    for frame in reader:
        next_time = now + step if begun else 0.0
        if frame.time is not None:
            if not begun or not _LEAPS[0] < frame.time - start - now <= _LEAPS[1]:
                start = frame.time - next_time
            next_time = max(now, frame.time - start)
        begun, now = True, next_time
        yield now, frame


def _shown_for(frame: Any, step: float) -> float:
    """Seconds that the last frame of a stream is on show."""
    last = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
    return last if last <= _LEAPS[1] else step


def _quarter_turns(frame: Any) -> tuple[int, int]:
    """(counterclockwise quarter turns to apply, an angle that is not a multiple of 90 and is left alone)."""
    angle = frame.rotation
    return (0, angle) if angle % 90 else (angle // 90 % 4, 0)


def _to_rgb(frame: Any, first: Any, index: int) -> np.ndarray:
    """(H, W, 3) uint8 of the frame of an index, at the size of the stream's first frame, turned upright."""
    try:
        picture = frame.to_ndarray(format="rgb24", width=first.width, height=first.height, threads=1)
    except PYAV_ERRORS as error:
        raise DecodeError(f"frame {index} cannot be turned into RGB ({plain(error)})") from error
    return np.rot90(picture, _quarter_turns(first)[0])


def _pictures(data: Source, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(index, (H, W, 3) picture) of each wanted frame; stops decoding after the last of them."""
    last = max(wanted)
    with opened(data) as (container, stream):
        reader = _FrameReader(stream, container)
        first = None
        for index, frame in enumerate(reader):
            first = first or frame
            if index in wanted:
                yield index, _to_rgb(frame, first, index)
            if index == last:
                return
        cause = f": {reader.stopped}" if reader.stopped else ""
        raise DecodeError(f"frame {last} was asked for, only {reader.count} frames decode{cause}")


def _decode_pyav(data: Source, wanted: list[int]) -> np.ndarray:
    places: dict[int, list[int]] = {}
    for place, index in enumerate(wanted):
        places.setdefault(index, []).append(place)
    frames: np.ndarray | None = None
    for index, picture in _pictures(data, set(wanted)):
        if frames is None:
            frames = np.empty((len(wanted), *picture.shape), np.uint8)
        frames[places[index]] = picture
    assert frames is not None
    return frames


def _digest(picture: np.ndarray) -> bytes:
    """Identifies an (H, W, 3) picture by its shape and bytes."""
    return hashlib.blake2b(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).digest()


def _nominal_fps(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else 0.0


def _header_warnings(
    container: Any, stream: Any, reader: _FrameReader, duration: float, picture: bool = False
) -> list[str]:
    """Where the header and the decoded frames disagree."""
    found = []
    if stream.frames and stream.frames != reader.count:
        found.append(f"header promises {stream.frames} frames, {reader.count} decode")
    if not stream.frames and container.duration:
        promised = container.duration / av.time_base
        if promised - duration > max(1.0, 0.1 * promised):
            found.append(f"header promises {promised:.2f} s, {duration:.2f} s decode ({reader.count} frames)")
    if reader.stopped:
        found.append(f"decoding stops after {reader.count} frames: {reader.stopped}")
    if is_picture(container) and not picture:
        found.append(f"a still picture ({stream.codec_context.codec.canonical_name}), not a video")
    return found


# decord: optional, and used only where it was checked ----------------------------------------------------------------


def _decord_reader(data: Source) -> Any:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise DecodeError(f"decord cannot be used here ({error})") from error
    try:
        decord.logging.set_level(decord.logging.QUIET)
        return decord.VideoReader(str(data) if isinstance(data, Path) else io.BytesIO(data), num_threads=1)
    except Exception as error:  # decord raises its own DECORDError, RuntimeError and others
        raise DecodeError(f"decord cannot open it ({type(error).__name__})") from error


def _decord_batch(reader: Any, wanted: list[int]) -> np.ndarray:
    """(len(wanted), H, W, 3) uint8 from an open decord reader."""
    if max(wanted) >= len(reader):
        raise DecodeError(f"frame {max(wanted)} was asked for, decord counts {len(reader)}")
    try:
        return reader.get_batch(wanted).asnumpy()
    except Exception as error:
        raise DecodeError(f"decord cannot read frames {wanted} ({type(error).__name__})") from error


def _decode_decord(data: Source, wanted: list[int]) -> np.ndarray:
    """decord is asked for each frame once, in order: the pattern in which it was checked."""
    distinct = sorted(set(wanted))
    frames = _decord_batch(_decord_reader(data), distinct)
    if len(frames) != len(distinct):
        raise DecodeError(f"decord returned {len(frames)} frames of {len(distinct)}")
    if wanted == distinct:
        return frames
    places = {index: place for place, index in enumerate(distinct)}
    return frames[[places[index] for index in wanted]]
