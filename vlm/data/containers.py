"""Files of encoded video, opened: known by their content, never by their name, and refused by what they are."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av

Source = bytes | Path

# What PyAV is seen to raise on damaged files: FFmpeg's own errors, and plain ones from its Python side.
PYAV_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError, RuntimeError)


class DecodeError(Exception):
    """A clip, or a frame of it, that cannot be decoded. The message is one sentence that says what the file is."""


def container_extension(data: bytes) -> str | None:
    """The file name extension that the first bytes of a media file call for, or None when they are not known."""
    head = data[:4096]
    if head[4:8] == b"ftyp":
        return {b"qt": "mov", b"3g": "3gp"}.get(head[8:10], "mp4")
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "webm" if b"webm" in head[:64] else "mkv"
    if head.startswith(b"RIFF") and head[8:11] == b"AVI":
        return "avi"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if len(data) > 188 and head[:1] == b"G" and data[188:189] == b"G":
        return "ts"
    magics = ((b"OggS", "ogv"), (b"GIF8", "gif"), (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wmv"), (b"\0\0\1\xba", "mpg"),
              (b"\0\0\1\xb3", "mpg"), (b"FLV\1", "flv"), (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"))  # fmt: skip
    return next((extension for magic, extension in magics if head.startswith(magic)), None)


def is_still(data: bytes) -> bool:
    """Whether this is a picture and no clip."""
    return container_extension(data) in ("jpg", "png", "webp")


def _refuse_text(head: bytes) -> None:
    """Text saved under a video's name: also playlists, which FFmpeg would follow to other files."""
    if not head:
        raise DecodeError("empty file (0 bytes)")
    if container_extension(head) is not None:
        return  # "RIFF\n…": a size may begin with a line end
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if start.startswith(b"version https://git-lfs"):
        raise DecodeError("not a video: a git-lfs pointer (text); the file itself was never fetched (git lfs pull)")
    if start.startswith((b"<!doctype html", b"<html")) or b"<html" in start or b"<head" in start:
        raise DecodeError("not a video: looks like HTML, the page of a failed download")
    if start.startswith((b"<?xml", b"<error")):
        raise DecodeError("not a video: looks like XML, the answer of a failed download")
    with suppress(UnicodeDecodeError):
        text = head[: head.rfind(b"\n") + 1 or len(head)].decode("utf-8")
        if all(letter.isprintable() or letter in "\r\n\t" for letter in text):
            raise DecodeError("not a video: looks like text")  # whose words are nobody's business


@contextmanager
def opened(data: Source) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) with single-threaded decoding; the name of a file is never shown to FFmpeg."""
    try:
        file: Any = data.open("rb") if isinstance(data, Path) else io.BytesIO(data)
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror or error}") from error
    with file:
        head = file.read(4096)
        file.seek(0)
        _refuse_text(head)
        try:
            # no protocol at all: a list of other files, however it is disguised, opens none of them
            container = av.open(file, mode="r", options={"protocol_whitelist": "none"})
        except PYAV_ERRORS as error:
            if container_extension(head) in ("mp4", "mov", "3gp") and not _contains(data, b"moov"):
                raise DecodeError('cut short: an mp4 without its index ("moov"), which follows the frames') from error
            raise DecodeError(f"not a video that FFmpeg knows ({plain(error)})") from error
        with container:
            stream = _video_stream(container)
            try:
                stream.thread_type = "NONE"
                stream.codec_context.thread_count = 1
            except PYAV_ERRORS as error:
                raise DecodeError(f"no decoder for the video stream ({plain(error)})") from error
            yield container, stream


def _video_stream(container: Any) -> Any:
    """FFmpeg's best video stream; cover pictures attached to a sound file are none."""
    pictures = [s for s in container.streams.video if s.disposition & av.stream.Disposition.attached_pic]
    videos = [s for s in container.streams.video if s not in pictures and s.codec_context is not None]
    if not videos:
        kinds = sorted({s.type for s in container.streams} - {"video"})
        what = f"{' and '.join(kinds)} only" if kinds else "the container holds no stream"
        raise DecodeError(f"no video stream ({what}{', with a cover picture' if pictures else ''})")
    best = container.streams.best("video")
    if best in videos:
        return best
    return max(videos, key=lambda s: (bool(s.disposition & av.stream.Disposition.default), s.frames, -s.index))


def is_picture(container: Any) -> bool:
    """Whether it is the file of a still picture."""
    return container.format.name.endswith("_pipe")


def refuse_cut_jpeg(data: Source) -> None:
    """A JPEG ends with a marker, which comes after the last scan begins. Thumbnails, with their own, come before."""
    content = data if isinstance(data, bytes) else data.read_bytes()
    if content.startswith(b"\xff\xd8\xff") and content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):
        raise DecodeError(f"cut short: a JPEG of {len(content)} bytes without its end")


def _contains(data: Source, what: bytes) -> bool:
    if isinstance(data, bytes):
        return what in data
    with data.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(what) >= 0


def plain(error: BaseException) -> str:
    """An FFmpeg error without its number and the repeated file name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
