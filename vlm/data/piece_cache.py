"""A folder of pieces of files that lie elsewhere, bounded, shared by any processes and runs.

A piece is written under another name and renamed, and ends with checksums of its blocks: what a killed process, a full
disk or a bad sector left is noticed when it is read, and taken away. Locks go with their processes and are waited for
only so long; without them the bound is not exact, and large pieces may be fetched twice.

    FOLDER/00 … ff/NAME   pieces: the content, then crc32 of each MiB of it, then its length (a trailer, so that a
                          content that is an .npy can be mapped as it is)
    FOLDER/unfinished/    pieces being written, locked by their writers; what a killed process left goes with the next
                          that looks for room
    FOLDER/use            its length, times 4096, is what all of it takes; locked while someone counts
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

BLOCK = 1 << 20  # bytes that share a checksum
UNIT = 4096  # bytes that a byte of `use` stands for
FULL, KEPT = 0.95, 0.85  # of the bound: pieces go when more than the former is used, until the latter is
PATIENCE = 5.0  # seconds to wait for others who count; a process that was stopped in between may hold them up
ABANDONED = 3600.0  # seconds after which what nobody touched is not in use
LAST = ("-index", "-manifest")  # ends of names of pieces that leave after all others while they are in use
_TAIL = struct.Struct("<8sQ")
_MAGIC = b"vlmpiece"


class Piece:
    """An open piece; it stays readable when its file is taken away meanwhile."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, _TAIL.size, max(0, size - _TAIL.size))
        magic, self.nbytes = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (b"", 0)
        blocks = -(-self.nbytes // BLOCK)
        if magic != _MAGIC or size != _with_tail(self.nbytes):
            raise ValueError("the end is missing")
        self._sums = struct.unpack(f"<{blocks}I", os.pread(descriptor, 4 * blocks, self.nbytes))

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the content. ValueError: what lies there is not what was written, or there are not so many."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} of {self.nbytes}")
        parts = []
        first, last = offset // BLOCK, -(-(offset + nbytes) // BLOCK)
        for number in range(first, last):
            block = os.pread(self._descriptor, min(BLOCK, self.nbytes - number * BLOCK), number * BLOCK)
            if zlib.crc32(block) != self._sums[number]:
                raise ValueError(f"block {number} is damaged")
            start = max(0, offset - number * BLOCK)
            parts.append(block[start : offset + nbytes - number * BLOCK])
        return parts[0] if len(parts) == 1 else b"".join(parts)


class PieceCache:
    """The pieces of a folder.

    Args:
        folder: made where there is none.
        bound: bytes that the folder may take. Pieces used least recently leave. Where several processes share it, the
            smallest bound holds.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound

    def path(self, name: str) -> Path:
        """Where a piece lies, or would."""
        return self.folder / f"{zlib.crc32(name.encode()) & 0xFF:02x}" / name

    def fits(self, nbytes: int) -> bool:
        """Whether a piece of so many bytes can be kept at all."""
        return _taken(_with_tail(nbytes)) <= KEPT * self.bound

    def open(self, name: str) -> Piece | None:
        """A piece, counted as used now; None: it is not there, or was damaged at its end and has been removed."""
        path = self.path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            piece = Piece(descriptor)
        except (ValueError, OSError):
            self.remove(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return piece

    def get(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes | None:
        """Bytes of a piece (all of it by default); None: it is not there, or was damaged and has been removed."""
        piece = self.open(name)
        if piece is None:
            return None
        try:
            return piece.read(offset, piece.nbytes - offset if nbytes is None else nbytes)
        except (ValueError, OSError):
            self.remove(name)
            return None

    def remove(self, name: str) -> None:
        """Take a piece away; those who have it open may go on reading it."""
        with contextlib.suppress(OSError):
            self.path(name).unlink()

    def put(self, name: str, data: bytes) -> None:
        """Keep a piece. One that is larger than the folder may be is not kept. OSError: the disk refuses."""
        if self.fits(len(data)):
            with self.writing(name, len(data)) as write:
                write.add(data)

    @contextmanager
    def writing(self, name: str, nbytes: int) -> Iterator[Writer]:
        """Write a piece of `nbytes` bytes part by part; it appears when the block ends without an exception."""
        descriptor, temporary = self._reserve(nbytes)
        writer = Writer(descriptor)
        try:
            yield writer
            writer.finish()
            self.path(name).parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the folder was cleared meanwhile: it is not kept
                os.rename(temporary, self.path(name))  # noqa: PTH104
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise
        finally:
            _WRITTEN_HERE.discard(temporary)
            if writer.piece is None:
                os.close(descriptor)

    @contextmanager
    def turn(self, name: str, seconds: float) -> Iterator[None]:
        """Let one process after the other do what a large piece needs, so that it is fetched once.

        Who waited for `seconds` goes on all the same, and so does everyone where the file system knows no locks.
        """
        until = time.monotonic() + seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"turn-{zlib.crc32(name.encode()) & 0xF:x}"
        with file.open("ab") as held, _locked(held, _THREADS["turn"], until):
            yield

    def _reserve(self, nbytes: int) -> tuple[int, str]:
        """Make room for a piece and an unfinished file of its size. Returns (descriptor, path of it).

        The file has its full size from the beginning, so whoever looks through the folder meanwhile counts it.
        """
        size = _with_tail(nbytes)
        unfinished = self.folder / "unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / "use").open("ab", buffering=0) as counter,
            _locked(counter, _THREADS["use"], time.monotonic() + PATIENCE),
        ):
            known = os.fstat(counter.fileno()).st_size * UNIT
            if known == 0 or known + _taken(size) > FULL * self.bound:
                os.ftruncate(counter.fileno(), self._make_room(_taken(size)) // UNIT)
            counter.write(b"\0" * (_taken(size) // UNIT))
            descriptor, path = tempfile.mkstemp(dir=unfinished)
            _WRITTEN_HERE.add(path)
            with contextlib.suppress(OSError):
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that its writer lives
            os.ftruncate(descriptor, size)
        return descriptor, path

    def _make_room(self, taken: int) -> int:
        """Remove what was used least recently until `taken` more bytes fit. Returns the bytes that remain."""
        found, used = [], 0
        for entry in _files(self.folder):
            try:
                status = entry.stat()
            except OSError:  # another process removed it
                continue
            unfinished = Path(entry.path).parent.name == "unfinished"
            if unfinished and _is_abandoned(entry.path, time.time() - status.st_mtime):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)  # noqa: PTH108
                continue
            used += _taken(status.st_size)
            if not unfinished:
                last = entry.name.endswith(LAST) and time.time() - status.st_mtime < ABANDONED
                found.append((last, status.st_mtime_ns, status.st_size, entry.path))
        if used + taken > FULL * self.bound:
            for _, _, size, path in sorted(found):
                if used + taken <= KEPT * self.bound:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108
                used -= _taken(size)
        return used


class Writer:
    """A piece on its way to disk."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.lseek(descriptor, 0, os.SEEK_SET)
        self._sums: list[int] = []
        self._rest = 0  # bytes of the block that is not full yet
        self.nbytes = 0
        self.piece: Piece | None = None  # when it is finished

    def add(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            part = view[: BLOCK - self._rest]
            if self._rest:
                self._sums[-1] = zlib.crc32(part, self._sums[-1])
            else:
                self._sums.append(zlib.crc32(part))
            _write(self._descriptor, part)
            self.nbytes += len(part)
            self._rest = (self._rest + len(part)) % BLOCK
            view = view[len(part) :]

    def finish(self) -> None:
        """Append the checksums; from here on the piece owns the file."""
        os.ftruncate(self._descriptor, self.nbytes)  # where less came than was reserved
        _write(self._descriptor, struct.pack(f"<{len(self._sums)}I", *self._sums) + _TAIL.pack(_MAGIC, self.nbytes))
        self.piece = Piece(self._descriptor)


_THREADS: dict[str, threading.Lock] = {}  # locks of files hold between processes only


_WRITTEN_HERE: set[str] = set()  # unfinished files of this process: to itself they look unlocked


def _begin_process() -> None:
    """A forked process holds no lock: its parent's threads are not here, nor does it write their files."""
    _THREADS.update(turn=threading.Lock(), use=threading.Lock())
    _WRITTEN_HERE.clear()


_begin_process()
os.register_at_fork(after_in_child=_begin_process)


def _is_abandoned(path: str, age: float) -> bool:
    """Whether nobody writes to an unfinished file any more: its lock is free, or where there are none, it is old."""
    if path in _WRITTEN_HERE:
        return False
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return age > ABANDONED
    finally:
        os.close(descriptor)


@contextmanager
def _locked(file: IO[bytes], threads: threading.Lock, until: float) -> Iterator[None]:
    """Hold a file against other processes and threads; the lock goes with the process, and no fork inherits it.

    Not held after `until`, nor where the file system knows no locks.
    """
    mine = threads.acquire(timeout=max(0.0, until - time.monotonic()))
    try:
        while mine:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > until:
                    break
                time.sleep(0.003)
            except OSError:
                break
        yield
    finally:
        if mine:
            threads.release()


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _with_tail(nbytes: int) -> int:
    return nbytes + 4 * -(-nbytes // BLOCK) + _TAIL.size


def _taken(nbytes: int) -> int:
    """Bytes that a file of `nbytes` takes on disk."""
    return -(-nbytes // UNIT) * UNIT


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for inner in folders:
            with contextlib.suppress(OSError), os.scandir(inner) as files:
                yield from (entry for entry in files if entry.is_file(follow_symlinks=False))
