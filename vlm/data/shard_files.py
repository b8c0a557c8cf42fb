"""The files of a shard set in a folder: opened as they are read, watched for being replaced."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm.data import shard_format as layout
from vlm.data.shard_format import ShardError, ShardGoneError
from vlm.types import UserError

BACKOFF = 0.1  # seconds before a file that cannot be read is tried again; twice as many before the next time
MEND = "copy the folder again, or delete it and run tools/make_shards.py"


class ShardChangedError(ShardError):
    """The shard is another than the one that was written: no fault of the record alone."""


class Files(Protocol):
    """Where the files of a set lie. Tells errors by the names of files; knows nothing of records."""

    place: str  # folder or URL, for messages, without what is secret in a URL
    bytes_read: int  # of shards, taken from there by this process (from a local cache: not counted)

    @property
    def rereads(self) -> bool:
        """Whether a read of the same bytes may give others the second time."""

    def where(self, name: str) -> str:
        """A file of the set, for messages."""

    def manifest(self) -> bytes:
        """The bytes of the manifest, the same ones each time. UserError: there is none."""

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Told of the manifest (found sound) when the set is opened, once. UserError: files are not as it says."""

    def index(self, entry: Mapping[str, Any]) -> Path:
        """A local file that begins with the index; `entry` is what the manifest says of it."""

    def read(self, number: int, offset: int, nbytes: int, again: bool = False) -> bytes:
        """Bytes of a shard; fewer where it ends. `again`: not those that were given before.

        Raises:
            ShardGoneError, ShardChangedError, ShardError: it cannot be read, and trying again did not help.
        """

    def mapped(self, number: int, offset: int, nbytes: int) -> memoryview | None:
        """Bytes of a shard as they lie in the file, without a copy; whoever writes there writes to a copy of his own.
        None: this is not to be had here: `read` them."""

    def confirm(self, number: int) -> None:
        """Raise ShardChangedError if a shard from which a good record was read is another than the one written."""

    def suspicion(self, number: int) -> str:
        """What is to be added to the message on a bad record of a shard."""


class LocalFiles:
    """The files of a folder.

    Args:
        retries: how often a shard that is missing or cannot be read is tried again.
    """

    rereads = False

    def __init__(self, folder: Path, retries: int) -> None:
        self.folder, self.retries = folder, retries
        self.place = str(folder)
        self.bytes_read = 0
        self._hashes: tuple[str, ...] | None = None
        self._seen = np.empty((0, 3), np.int64)  # (shards, 3): size, mtime, inode
        self._open = _OpenFiles()
        self._refused: dict[int, tuple[tuple[int, int, int], str]] = {}  # shard -> (its state, why it is not read)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.folder, self.retries, self._seen

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state[:2])  # type: ignore[misc]
        self._seen = state[2]

    def where(self, name: str) -> str:
        return f"{self.folder / name}"

    def manifest(self) -> bytes:
        path = self.folder / layout.MANIFEST
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; make the shards with tools/make_shards.py")
        if not path.exists() and (self.folder / layout.UNFINISHED).exists():
            raise UserError(
                f"{self.folder} is unfinished: tools/make_shards.py stopped in it; run the same command again"
            )
        if not path.exists():
            raise UserError(
                f"{self.folder} holds no shard set (no {layout.MANIFEST}); make one with tools/make_shards.py"
            )
        return path.read_bytes()

    def check(self, manifest: Mapping[str, Any]) -> None:
        files = (*manifest["shards"], manifest["index"])
        states = _states([str(self.folder / file["name"]) for file in files])
        for file, (size, _, _) in zip(files, states):
            if size != file["bytes"]:
                found = "no file" if size < 0 else f"{size} bytes"
                raise damaged(self.where(file["name"]), found, f"{file['bytes']} bytes")
        self._seen = np.array(states[:-1], np.int64).reshape(-1, 3)

    def index(self, entry: Mapping[str, Any]) -> Path:
        return self.folder / layout.INDEX

    def read(self, number: int, offset: int, nbytes: int, again: bool = False) -> bytes:
        path = self.folder / layout.shard_name(number)
        for attempt in range(self.retries + 1):
            try:
                data = self._open.read(path, _state(path), offset, nbytes)
                self.bytes_read += len(data)
                return data
            except OSError as error:
                if attempt < self.retries:
                    time.sleep(BACKOFF * 2**attempt)
                elif isinstance(error, FileNotFoundError):
                    raise ShardGoneError(f"{path} is gone: it was there when the set was opened") from error
                else:
                    raise ShardError(f"{path}: cannot be read: {error.strerror or error}") from error
        raise AssertionError("unreachable")

    def mapped(self, number: int, offset: int, nbytes: int) -> memoryview | None:
        path = self.folder / layout.shard_name(number)
        try:
            view = self._open.mapped(path, _state(path), offset, nbytes)
        except (OSError, ValueError):  # no longer so long, or of a file system that cannot: `read` says what it is
            return None
        self.bytes_read += nbytes
        return view

    def confirm(self, number: int) -> None:
        if not self._changed(number):
            return
        path = self.folder / layout.shard_name(number)
        state, message = self._refused.get(number, ((-1, -1, -1), ""))
        try:
            now = _state(path)
            if state != now:
                state, found, expected = now, _sha256(path), self._sha256_of(number)
                message = "" if found == expected else changed(str(path), f"sha256 {found}", expected)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read: {error.strerror or error}") from error
        if message:
            self._refused[number] = state, message
            raise ShardChangedError(message)
        self._seen = self._seen.copy()  # it may be shared
        self._seen[number] = state

    def suspicion(self, number: int) -> str:
        return "; the file was changed after the set was opened" if self._changed(number) else ""

    def _changed(self, number: int) -> bool:
        try:
            return _state(self.folder / layout.shard_name(number)) != tuple(self._seen[number])
        except OSError:
            return True

    def _sha256_of(self, number: int) -> str:
        if self._hashes is None:
            self._hashes = tuple(shard["sha256"] for shard in json.loads(self.manifest())["shards"])
        return self._hashes[number]


class _File:
    """A file descriptor that closes with its last user."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenFiles:
    """The tars read last, kept open; a bounded number, since a set may have thousands."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._files: OrderedDict[Path, tuple[tuple[int, int, int], _File]] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, path: Path, state: tuple[int, int, int], offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes; fewer only where the file ends. A file whose state is another is opened again."""
        file = self._file(path, state)
        parts = []
        while nbytes > 0 and (part := os.pread(file.descriptor, nbytes, offset)):
            parts.append(part)
            offset, nbytes = offset + len(part), nbytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def mapped(self, path: Path, state: tuple[int, int, int], offset: int, nbytes: int) -> memoryview:
        """ValueError: the file ends before."""
        first = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        descriptor = self._file(path, state).descriptor
        whole = mmap.mmap(descriptor, offset + nbytes - first, access=mmap.ACCESS_COPY, offset=first)
        return memoryview(whole)[offset - first :]

    def _file(self, path: Path, state: tuple[int, int, int]) -> _File:
        if self._process != os.getpid():  # a forked process: its parent's lock may be held by a thread that is gone
            self.__init__(self.most)  # type: ignore[misc]
        with self._lock:
            before, file = self._files.pop(path, (None, None))
            if file is None or before != state:
                file = _File(path)
            self._files[path] = state, file
            if len(self._files) > self.most:
                self._files.popitem(last=False)
        return file


def _state(path: str | Path) -> tuple[int, int, int]:
    """(bytes, time of the last change in ns, inode): another one where a file was replaced or written to."""
    status = os.stat(path)  # noqa: PTH116 - thousands of times
    return status.st_size, status.st_mtime_ns, status.st_ino


def _states(paths: Sequence[str]) -> list[tuple[int, int, int]]:
    """The states of many files; size -1: there is none. On a network each costs a round trip: many at a time."""

    def some(part: Sequence[str]) -> Iterator[tuple[int, int, int]]:
        for path in part:
            try:
                yield _state(path)
            except OSError:
                yield -1, -1, -1

    if len(paths) <= 256:
        return list(some(paths))
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda start: list(some(paths[start : start + 64])), range(0, len(paths), 64))
        return [state for part in parts for state in part]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(file: str, found: str, expected: str) -> UserError:
    """What is told of a file of the set that is not as the manifest says when the set is opened."""
    return UserError(f"{file} has {found}, the manifest says {expected}: it was changed or cut after writing; {MEND}")


def changed(file: str, found: str, expected: str) -> str:
    """What is told of a shard that changed after the set was opened."""
    return f"{file} changed since it was written: it has {found}, the manifest says {expected}"
