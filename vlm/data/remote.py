"""The files of a shard set that lies elsewhere: fetched as they are needed, with patience, into a bounded cache.

Records come by byte range where the other side can (HTTP with ranges, s3, hf, …), else shard by shard (`pipe:`, servers
without ranges). What is asked for is a pure function of the index, so the order of training is what it is on a local
disk. Manifest and index are fetched when the set is opened, and the index is checked against the manifest's hash, as is
every shard that is fetched whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlm.data import shard_format as layout
from vlm.data.piece_cache import Piece, PieceCache
from vlm.data.remote_sources import CHUNK, Gone, NoRanges, SourceError, make_source, time_for
from vlm.data.shard_files import ShardChangedError, changed, damaged
from vlm.data.shard_format import ShardError, ShardGoneError
from vlm.types import UserError

T = TypeVar("T")

BACKOFF = 0.5  # seconds before the second attempt; twice as many before the next, and so on
LONGEST_BACKOFF = 30.0
STRETCHES = 64  # shards from which a shuffled order may read at a time (vlm.data.order)
CHECKED_INDEX = 64 << 20  # bytes of the largest cached index that is checked whole when it is used again


class Changed(SourceError):
    """The file is another than the manifest says."""


def default_cache() -> Path:
    """Where pieces are kept if nothing is said: `vlm` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"


class RemoteFiles:
    """The files of a set behind a URL or a command (see `shard_files.Files`).

    Args:
        url: of the folder.
        cache: folder for pieces; None: `default_cache()`.
        cache_bytes: most that it may take.
        retries: how often a file that does not come is tried again.
    """

    def __init__(self, url: str, cache: Path | None, cache_bytes: int, retries: int) -> None:
        self.source = make_source(url)
        self.place = self.source.shown
        self.cache = PieceCache(Path(cache or default_cache()), cache_bytes)
        self.retries = retries
        self.bytes_read = 0
        self._digest = ""  # sha256 of the manifest: the name of the set in the cache
        self._sizes: tuple[int, ...] = ()
        self._hashes: tuple[str, ...] | None = None
        self._start()

    def _start(self) -> None:
        self.bytes_read = 0
        self._versions: dict[int, set[str]] = {}  # shard -> versions known to be what was written
        self._refused: dict[tuple[int, str], str] = {}  # (shard, version) -> why it is not read
        self._latest: dict[int, str] = {}  # shard -> version of what was read last
        self._lost: set[str] = set()  # files that did not come with all patience
        self._told: set[str] = set()
        self._used = 0.0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("source", "place", "cache", "retries", "_digest", "_sizes")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hashes=None)
        self._start()

    @property
    def rereads(self) -> bool:
        return self.source.ranges

    def where(self, name: str) -> str:
        return self.source.where(name)

    # Manifest and index

    def manifest(self) -> bytes:
        if self._digest and (data := self.cache.get(self._piece("manifest"))) is not None:
            return data
        limit = time_for(256 << 20)
        try:
            data = self._patiently(
                layout.MANIFEST, lambda: b"".join(self.source.stream(layout.MANIFEST, limit)), limit, gone_at_once=True
            )
        except Gone as error:
            raise UserError(
                f"{self.place} holds no shard set: {self.where(layout.MANIFEST)} cannot be had ({error}); make a set "
                "with tools/make_shards.py and copy the whole folder there"
            ) from error
        except SourceError as error:
            raise UserError(f"{self.where(layout.MANIFEST)} cannot be read: {error}") from error
        digest = hashlib.sha256(data).hexdigest()
        if self._digest and digest != self._digest:
            raise UserError(f"{self.where(layout.MANIFEST)} was replaced while the set was in use: begin again")
        self._digest = digest
        self._keep(self._piece("manifest"), data)
        return data

    def check(self, manifest: Mapping[str, Any]) -> None:
        self._sizes = tuple(shard["bytes"] for shard in manifest["shards"])
        if not self.source.ranges:
            self._check_room()

    def index(self, entry: Mapping[str, Any]) -> Path:
        name = self._piece("index")
        if not self.cache.fits(entry["bytes"]):
            raise UserError(
                f"{self.where(layout.INDEX)} has {entry['bytes']} bytes, too much for a cache of {self.cache.bound} "
                "bytes: allow more (cache_bytes)"
            )
        for _ in range(2):  # a process that makes room may take it away at once
            piece = self.cache.open(name)
            if piece is not None and not _is_whole(piece, entry["bytes"]):
                self.cache.remove(name)
                piece = None
            if piece is None:
                self._fetch_index(name, entry)
            if self.cache.path(name).exists():
                return self.cache.path(name)
        raise UserError(f"{self.cache.folder}: pieces vanish as they are written; is something else clearing it?")

    def _fetch_index(self, name: str, entry: Mapping[str, Any]) -> None:
        try:
            with self.cache.turn(name, time_for(entry["bytes"])):
                if self.cache.open(name) is None:
                    self._fetch(layout.INDEX, name, entry["bytes"], entry["sha256"], counted=False)
        except Gone as error:
            raise damaged(self.where(layout.INDEX), "no file", f"{entry['bytes']} bytes") from error
        except Changed as error:
            raise UserError(str(error)) from error
        except SourceError as error:
            raise UserError(f"{self.where(layout.INDEX)} cannot be read: {error}") from error
        except OSError as error:
            raise self._unwritable(error) from error

    # Shards

    def read(self, number: int, offset: int, nbytes: int, again: bool = False) -> bytes:
        name = layout.shard_name(number)
        self._touch_index()
        start = time.monotonic()
        try:
            if self.source.ranges:
                try:
                    return self._read_range(number, offset, nbytes, again)
                except NoRanges:
                    pass
            return self._read_whole(number, offset, nbytes)
        except Changed as error:
            self._lost.add(name)
            raise ShardChangedError(str(error)) from error
        except SourceError as error:
            self._lost.add(name)
            how = "is gone" if isinstance(error, Gone) else "cannot be had"
            raise ShardGoneError(
                f"{self.where(name)} {how}: {error} (given up after {time.monotonic() - start:.0f} s)"
            ) from error

    def mapped(self, number: int, offset: int, nbytes: int) -> memoryview | None:
        return None

    def confirm(self, number: int) -> None:
        version = self._latest.get(number, "")
        if self._is_known(number, version):
            return
        name = layout.shard_name(number)
        verdict = self._piece(f"{number}-same-{zlib.crc32(version.encode()):08x}")
        if (number, version) not in self._refused and self.cache.get(verdict) is None:
            self._say(
                f"version of {name}",
                f"{self.where(name)} has another version than before ({version}): comparing its "
                f"{self._sizes[number]} bytes with the manifest's sha256",
            )
            self._refused[number, version] = self._compare(number)
        if self._refused.get((number, version)):
            raise ShardChangedError(self._refused[number, version])
        self._keep(verdict, b"same")
        self._versions[number].add(version)

    def suspicion(self, number: int) -> str:
        known = self._is_known(number, self._latest.get(number, ""))
        return "" if known else "; the file has another version than before"

    def _is_known(self, number: int, version: str) -> bool:
        """Whether a version of a shard was seen to be right; the first one that this process meets is taken as such."""
        return not version or version in self._versions.setdefault(number, {version})

    def _read_range(self, number: int, offset: int, nbytes: int, again: bool) -> bytes:
        piece, name = self._piece(f"{number}-{offset}-{nbytes}"), layout.shard_name(number)
        if not again and (data := self.cache.get(piece)) is not None and len(data) == nbytes:
            return data
        data = self._patiently(name, lambda: self._get(number, offset, nbytes), time_for(nbytes))
        if self._is_known(number, self._latest.get(number, "")):
            self._keep(piece, data)
        return data

    def _get(self, number: int, offset: int, nbytes: int) -> bytes:
        """One attempt at a range of a shard. Notes the version it was of."""
        name = layout.shard_name(number)
        fetched = self.source.get(name, offset, offset + nbytes)
        self.bytes_read += len(fetched.data)
        if fetched.total is not None and fetched.total != self._sizes[number]:
            raise Changed(changed(self.where(name), f"{fetched.total} bytes", f"{self._sizes[number]} bytes"))
        if len(fetched.data) != nbytes:
            raise SourceError(f"only {len(fetched.data)} of {nbytes} bytes came")
        if fetched.version:
            self._latest[number] = fetched.version
        return fetched.data

    def _read_whole(self, number: int, offset: int, nbytes: int) -> bytes:
        piece, name = self._piece(str(number)), layout.shard_name(number)
        if (data := self.cache.get(piece, offset, nbytes)) is not None:
            return data
        self._check_room()
        try:
            with self.cache.turn(piece, time_for(self._sizes[number])):
                if (data := self.cache.get(piece, offset, nbytes)) is not None:
                    return data
                fetched = self._fetch(name, piece, self._sizes[number], self._sha256_of(number), counted=True)
                return fetched.read(offset, nbytes)
        except ValueError as error:
            raise ShardError(f"{self.cache.path(piece)} was damaged as it was written ({error})") from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _fetch(self, name: str, piece: str, nbytes: int, sha256: str, counted: bool) -> Piece:
        """A whole file, checked against its hash, into the cache. OSError: the cache cannot be written."""

        def attempt() -> Piece:
            with self.cache.writing(piece, nbytes) as writer:
                digest = hashlib.sha256()
                for part in self._parts(name, nbytes):
                    if counted:
                        self.bytes_read += len(part)
                    writer.add(part)
                    digest.update(part)
                    if writer.nbytes > nbytes:
                        break
                if writer.nbytes != nbytes:
                    found = f"{'at least ' * (writer.nbytes > nbytes)}{writer.nbytes} bytes"
                    raise Changed(changed(self.where(name), found, f"{nbytes} bytes"))
                if digest.hexdigest() != sha256:
                    raise Changed(changed(self.where(name), f"sha256 {digest.hexdigest()}", sha256))
            assert writer.piece is not None
            return writer.piece

        try:
            return attempt() if self.source.ranges else self._patiently(name, attempt, time_for(nbytes))
        except NoRanges:
            return self._patiently(name, attempt, time_for(nbytes))

    def _parts(self, name: str, nbytes: int) -> Iterator[bytes]:
        """A whole file, part by part; where there are ranges, each part has all patience for itself."""
        if not self.source.ranges:
            yield from self.source.stream(name, time_for(nbytes))
            return
        for start in range(0, nbytes, CHUNK):
            stop = min(start + CHUNK, nbytes)

            def get(start: int = start, stop: int = stop) -> bytes:
                fetched = self.source.get(name, start, stop)
                if fetched.total is not None and fetched.total != nbytes:
                    raise Changed(changed(self.where(name), f"{fetched.total} bytes", f"{nbytes} bytes"))
                if len(fetched.data) != stop - start:
                    raise SourceError(f"only {len(fetched.data)} of {stop - start} bytes came")
                return fetched.data

            yield self._patiently(name, get, time_for(stop - start))

    def _compare(self, number: int) -> str:
        """Why a shard is not the one that was written; "": its hash is the manifest's. SourceErrors as shard errors."""
        name, digest = layout.shard_name(number), hashlib.sha256()
        try:
            for part in self._parts(name, self._sizes[number]):
                digest.update(part)
        except Changed as error:
            return str(error)
        except SourceError as error:
            raise ShardGoneError(f"{self.where(name)} cannot be had: {error}") from error
        found, expected = digest.hexdigest(), self._sha256_of(number)
        return "" if found == expected else changed(self.where(name), f"sha256 {found}", expected)

    def _sha256_of(self, number: int) -> str:
        if self._hashes is None:
            self._hashes = tuple(shard["sha256"] for shard in json.loads(self.manifest())["shards"])
        return self._hashes[number]

    # Patience, cache, words

    def _patiently(self, name: str, attempt: Callable[[], T], seconds: float, gone_at_once: bool = False) -> T:
        """The result of an attempt, tried again `retries` times (once only where that was in vain before).

        At most (retries + 1) * seconds and the pauses go by. Raises the last SourceError.
        """
        last = 0 if name in self._lost else self.retries
        for number in range(last + 1):
            try:
                result = attempt()
                self._lost.discard(name)
                return result
            except SourceError as error:
                self.source.forget(name)
                if number == last or isinstance(error, NoRanges) or (gone_at_once and isinstance(error, Gone)):
                    raise
                pauses = [min(BACKOFF * 2**n, LONGEST_BACKOFF) for n in range(last)]
                self._say(
                    "retries",
                    f"{self.where(name)}: {error}; trying again, {last}x at most and for no more than "
                    f"{(last + 1) * seconds + 1.5 * sum(pauses):.0f} s. Said once",
                )
                spread = zlib.crc32(f"{os.getpid()}/{name}/{number}".encode()) / 2**33  # so that not all ask at once
                time.sleep(pauses[number] * (1 + spread))
        raise AssertionError("unreachable")

    def _piece(self, what: str) -> str:
        return f"{self._digest[:32]}-{what}"

    def _keep(self, piece: str, data: bytes) -> None:
        try:
            self.cache.put(piece, data)
        except OSError as error:
            self._say("cache", f"{self.cache.folder}: nothing can be kept there ({error.strerror or error})")

    def _touch_index(self) -> None:
        """Once a minute: the index is in use, other pieces are to leave before it."""
        if time.monotonic() - self._used > 60:
            self._used = time.monotonic()
            for what in ("index", "manifest"):
                self.cache.open(self._piece(what))

    def _check_room(self) -> None:
        """UserError where the cache cannot hold a whole shard; a word where it holds few of them."""
        largest = max(self._sizes, default=0)
        if not self.cache.fits(largest):
            raise UserError(
                f"{self.place} gives whole shards of up to {largest} bytes, and a cache of {self.cache.bound} bytes "
                "cannot hold one: allow more (cache_bytes), or write smaller shards"
            )
        if min(sum(self._sizes), STRETCHES * largest) > self.cache.bound:
            self._say(
                "room",
                f"{self.place} gives whole shards, up to {STRETCHES} of which are read at a time; a cache of "
                f"{self.cache.bound} bytes holds {self.cache.bound // max(1, largest)}, so each may be fetched "
                "many times: allow more (cache_bytes)",
            )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.cache.folder}: the cache cannot be written ({error.strerror or error}), and {self.place} cannot be "
            "read without: make room, or name another folder"
        )

    def _say(self, about: str, words: str) -> None:
        """Tell something once a process."""
        if about not in self._told:
            self._told.add(about)
            print(words, file=sys.stderr, flush=True)


def _is_whole(piece: Piece, nbytes: int) -> bool:
    """Whether a piece is what it was; a very large one is only looked at from both ends."""
    try:
        if nbytes <= CHECKED_INDEX:
            piece.read(0, nbytes)
        else:
            piece.read(0, 1)
            piece.read(nbytes - 1, 1)
        return piece.nbytes == nbytes
    except ValueError:
        return False
