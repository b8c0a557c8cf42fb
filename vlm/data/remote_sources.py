"""Where files that lie elsewhere come from: HTTP servers, what fsspec knows (s3, hf, gs, …), commands (`pipe:`).

One attempt each, within a time of its own; trying again is `remote`'s. Everything that goes wrong is a `SourceError`.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
import psutil
import requests
from fsspec.registry import known_implementations
from webdataset.gopen import gopen, set_options

from vlm.types import UserError

T = TypeVar("T")

SILENCE = 10.0  # seconds without a byte after which an attempt has failed; a command may take three times as long
SLOWEST = 1 << 20  # bytes a second that are waited for
CHUNK = 16 << 20
RECHECK = 600.0  # seconds between looks at size and version of a file, where reading it does not tell them


class SourceError(Exception):
    """An attempt that failed. The message has no file in it."""


class Gone(SourceError):
    """There is no such file."""


class NoRanges(SourceError):
    """The server gives whole files only."""


class Fetched(NamedTuple):
    """Bytes of a file, and what is known of all of it."""

    data: bytes  # fewer than asked for only where the file ends
    total: int | None  # bytes of the file; None: unknown
    version: str  # changes when the file does; "": unknown


class Source(Protocol):
    """A folder elsewhere."""

    shown: str  # for messages
    ranges: bool

    def where(self, name: str) -> str: ...

    def get(self, name: str, start: int, stop: int) -> Fetched: ...

    def stream(self, name: str, seconds: float) -> Iterator[bytes]: ...

    def forget(self, name: str) -> None:
        """Nothing that was learnt of a file counts any more."""


def make_source(url: str) -> Source:
    """The folder that a URL or a `pipe:` command names. UserError: nothing reads such URLs."""
    if url.startswith("pipe:"):
        return PipeSource(url)
    return HttpSource(url) if re.match(r"https?://", url) else FsspecSource(url)


def time_for(nbytes: int) -> float:
    """Seconds that one attempt to read so many bytes may take."""
    return SILENCE + nbytes / SLOWEST


class _Own:
    """Something that every process makes for itself: what a fork copies of connections must not be used."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._process, self._made = make, -1, None

    def __call__(self) -> Any:
        if self._process != os.getpid():
            self._made, self._process = self._make(), os.getpid()
        return self._made

    def __reduce__(self) -> tuple[Any, ...]:
        return _Own, (self._make,)


# HTTP ----------------------------------------------------------------------------------------------------------------


class HttpSource:
    """A folder of an HTTP server; connections are kept and used again. Proxies and .netrc are respected."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        host = self._url.netloc.rpartition("@")[2]
        self.shown = urlunsplit((self._url.scheme, host, self._url.path.rstrip("/"), "", ""))
        self.ranges = True
        self._session = _Own(requests.Session)

    def where(self, name: str) -> str:
        return f"{self.shown}/{name}"

    def get(self, name: str, start: int, stop: int) -> Fetched:
        """Bytes start to stop. NoRanges: the server would send the whole file, and it is larger."""
        until = time.monotonic() + time_for(stop - start)
        with self._answer(name, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            span = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", ""))
            total = int(span[2]) if span and span[2] != "*" else None
            if answer.status_code == 416:
                return Fetched(b"", total if total is not None else start, version)
            if answer.status_code == 200:
                length = answer.headers.get("Content-Length")
                self.ranges = False
                if start or length is None or int(length) > stop:
                    raise NoRanges("the server does not serve byte ranges")
                return Fetched(b"".join(self._body(answer, until)), int(length), version)
            if span is None or span[1] != str(start):
                raise SourceError(f"the server answered with other bytes ({answer.headers.get('Content-Range')})")
            return Fetched(b"".join(self._body(answer, until)), total, version)

    def stream(self, name: str, seconds: float) -> Iterator[bytes]:
        until = time.monotonic() + seconds
        with self._answer(name, {}) as answer:
            yield from self._body(answer, until)

    def forget(self, name: str) -> None:
        pass

    def _answer(self, name: str, headers: dict[str, str]) -> requests.Response:
        url = urlunsplit(self._url._replace(path=f"{self._url.path.rstrip('/')}/{name}"))
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            answer = self._session().get(url, headers=headers, stream=True, timeout=(SILENCE, SILENCE))
        except requests.RequestException as error:
            raise SourceError(self._why(error)) from error
        if answer.status_code in (200, 206) or (answer.status_code == 416 and "Range" in headers):
            return answer
        answer.close()
        said = f"the server answers {answer.status_code} {answer.reason}"
        raise Gone(said) if answer.status_code in (404, 410) else SourceError(said)

    def _body(self, answer: requests.Response, until: float) -> Iterator[bytes]:
        expected, came = answer.headers.get("Content-Length"), 0
        try:
            for part in answer.iter_content(1 << 18):
                came += len(part)
                yield part
                if time.monotonic() > until:
                    raise SourceError(f"only {came} bytes came in the time that was given")
        except requests.RequestException as error:
            raise SourceError(f"{self._why(error)} after {came} bytes") from error
        if expected is not None and came < int(expected):
            raise SourceError(f"the connection ended after {came} of {expected} bytes")

    def _why(self, error: requests.RequestException) -> str:
        """What went wrong, in a few words and without the URL, which may hold a secret."""
        if isinstance(error, requests.ConnectTimeout):
            return f"no connection within {SILENCE:g} s"
        if isinstance(error, requests.ReadTimeout) or "timed out" in str(error):
            return f"no byte came for {SILENCE:g} s"
        cause: Any = error
        while inner := [part for part in (*cause.args, getattr(cause, "reason", None)) if isinstance(part, Exception)]:
            cause = inner[-1]
        words = str(getattr(cause, "strerror", None) or cause) or type(cause).__name__
        for secret in (self._url.query, self._url.netloc.rpartition("@")[0]):
            words = words.replace(secret, "…") if secret else words
        return f"{type(error).__name__} ({words})"


# fsspec --------------------------------------------------------------------------------------------------------------


class FsspecSource:
    """A folder of any file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        self._url = url
        scheme, mark, rest = url.partition("://")
        self.shown = f"{scheme}{mark}{rest.rpartition('@')[2] if mark and '@' in rest.split('/')[0] else rest}".rstrip(
            "/"
        )
        self.ranges = True
        self._opened = _Own(self._open)
        self._known: dict[str, tuple[float, int | None, str]] = {}  # name -> (when it was looked at, bytes, version)
        self._opened()

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "shown": self.shown, "ranges": True, "_known": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened = _Own(self._open)

    def _open(self) -> tuple[Any, str]:
        protocol = re.split(r"://|::", self._url)[0].lower()
        try:
            system, path = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
        except ImportError as error:
            package = known_implementations.get(protocol, {}).get("class", protocol).split(".")[0]
            extra = "pip install -e '.[remote]'" if package == "s3fs" else f"pip install {package}"
            raise UserError(f"{self.shown}: {protocol}:// needs a package that is not installed: {extra}") from error
        except ValueError as error:
            raise UserError(f"{self.shown}: nothing reads {protocol}:// ({error})") from error
        return system, str(path).rstrip("/")

    def where(self, name: str) -> str:
        return f"{self.shown}/{name}"

    def get(self, name: str, start: int, stop: int) -> Fetched:
        """Bytes start to stop."""
        system, folder = self._opened()
        path = f"{folder}/{name}"
        if name in self._known and time.monotonic() - self._known[name][0] > RECHECK:
            self.forget(name)
        if name not in self._known:
            about = _within(time_for(0), lambda: system.info(path))
            self._known[name] = time.monotonic(), about.get("size"), _version(about)
        _, total, version = self._known[name]
        if total is not None and start >= total:
            return Fetched(b"", total, version)
        own = system.async_impl or type(system).cat_file is not fsspec.AbstractFileSystem.cat_file
        plain = {} if own else {"cache_type": "none"}  # else it would open the file and read 5 MB ahead
        data = _within(time_for(stop - start), lambda: system.cat_file(path, start=start, end=stop, **plain))
        return Fetched(bytes(data), total, version)

    def forget(self, name: str) -> None:
        self._known.pop(name, None)
        with suppress(Exception):  # file systems keep listings too, and some know nothing of it
            self._opened()[0].invalidate_cache(self._opened()[1])

    def stream(self, name: str, seconds: float) -> Iterator[bytes]:
        system, folder = self._opened()
        yield _within(seconds, lambda: system.cat_file(f"{folder}/{name}"))


def _version(about: dict[str, Any]) -> str:
    """What of a file system's words on a file changes with its content."""
    names = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")
    known = [str(about[name]) for name in names if about.get(name) is not None]
    return known[0] if known else ""


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, if it does within so many seconds; else it is left behind in a thread of its own."""
    results: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            results.append((call(), None))
        except BaseException as error:  # whatever it is, the caller is to have it
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise SourceError(f"no answer within {seconds:.0f} s")
    result, error = results[0]
    if isinstance(error, FileNotFoundError) or "NotFound" in type(error).__name__:
        raise Gone(f"the file system says that there is no such file ({type(error).__name__})") from error
    if isinstance(error, UserError | SourceError):
        raise error
    if error is not None:  # every file system has errors of its own
        raise SourceError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return result  # type: ignore[return-value]


# Commands ------------------------------------------------------------------------------------------------------------


class PipeSource:
    """What a shell command writes: webdataset's `pipe:COMMAND`, where `{}` stands for the name of the file."""

    ranges = False

    def __init__(self, url: str) -> None:
        if "{}" not in url:
            raise UserError(
                f"{url}: `{{}}` must stand where the name of a file goes, as in pipe:ssh host cat /data/{{}}"
            )
        self.shown = url

    def where(self, name: str) -> str:
        return self.shown.replace("{}", name)

    def get(self, name: str, start: int, stop: int) -> Fetched:
        raise NoRanges("a command gives whole files")

    def stream(self, name: str, seconds: float) -> Iterator[bytes]:
        until, came = time.monotonic() + seconds, 0
        pipe = gopen(self.where(name))
        try:
            descriptor = pipe.stream.fileno()
            while True:
                wait = min(3 * SILENCE, until - time.monotonic())
                if wait <= 0 or not select.select([descriptor], [], [], wait)[0]:
                    raise SourceError(f"the command gave {came} bytes, and then nothing in the time that was given")
                part = os.read(descriptor, 1 << 20)
                if not part:
                    break
                came += len(part)
                yield part
            set_options(pipe, timeout=SILENCE)
            try:
                pipe.close()
            except Exception as error:  # its exit status, or that it does not end
                words = f"the command ended with exit code {pipe.proc.poll()} after {came} bytes"
                raise (SourceError if came else Gone)(words) from error
        finally:
            _end(pipe)

    def forget(self, name: str) -> None:
        pass


def _end(pipe: Any) -> None:
    """Leave nothing of a command running."""
    if pipe.proc.poll() is None:
        with suppress(psutil.Error):
            for child in psutil.Process(pipe.proc.pid).children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        pipe.proc.kill()
    with suppress(Exception):
        pipe.close()
