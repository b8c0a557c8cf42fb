"""Reading a shard set: records by row of the index, one ranged read each.

Tars are only containers: whoever reads goes by the index, so any record is one read away and the order of training is
free. The layout is in `shard_format`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data import shard_format as layout
from vlm.data.shard_format import ShardError
from vlm.types import Record, UserError


class ShardSet:
    """The records of a folder that `write_shards` finished, by row of its index.

    Opening costs no more for ten million rows than for ten: the index is mapped, not read. Only the sizes of the tars
    are checked. Cheap to send to worker processes (each maps the index and opens the tars itself), and reads share no
    file position, so threads and forked processes may read at once.

    Raises UserError for a folder that is missing, unfinished, damaged or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = self.manifest
        self.shard_names: tuple[str, ...] = tuple(shard["name"] for shard in manifest["shards"])
        self.members: tuple[str, ...] = tuple(manifest["members"])
        self._counts_questions = "questions" in manifest["counts"]
        hashes = ",".join(shard["sha256"] for shard in manifest["shards"])
        self.fingerprint = hashlib.sha256(f"{layout.FORMAT}/{layout.VERSION}:{hashes}".encode()).hexdigest()
        _check_sizes(self.path, manifest)
        self._open_index()
        if len(self.index) != manifest["counts"]["records"]:
            raise _damaged(self.path / layout.INDEX, f"{len(self.index)} rows", f"{manifest['counts']['records']}")

    def _open_index(self) -> None:
        try:
            self.index = np.load(self.path / layout.INDEX, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / layout.INDEX} cannot be opened ({error}); {_MEND}") from error
        columns = layout.index_dtype(1, self.members, self._counts_questions).names
        if self.index.dtype.names != columns:
            raise UserError(f"{self.path / layout.INDEX} has columns {self.index.dtype.names}, not {columns}; {_MEND}")
        self._files = _OpenFiles()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "shard_names", "members", "fingerprint", "_counts_questions")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_index()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says: counts, hours, bytes, shards, arguments, rejected items, warnings."""
        return _read_manifest(self.path)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_frames(self) -> np.ndarray:
        """(rows,) int32, mapped: frames of each record, -1 where it was not decoded (--no-check)."""
        return self.index["num_frames"]

    @property
    def text_length(self) -> np.ndarray:
        """(rows,) int32, mapped: characters of annotation text of each record."""
        return self.index["text_length"]

    @property
    def num_questions(self) -> np.ndarray:
        """(rows,) int32: questions of each record; zeros where the set has none. Mapped, where there are some."""
        return self.index["questions"] if self._counts_questions else np.zeros(len(self), np.int32)

    def key(self, row: int) -> str:
        """The key of a record as its source gave it."""
        return layout.decode_key(self._row(row)["key"].decode("ascii"))

    def shard_name(self, row: int) -> str:
        """The file name of the tar that holds a record."""
        return self.shard_names[self._row(row)["shard"]]

    def read(self, row: int) -> Record:
        """One record by one ranged read. Raises ShardError when the shard is gone, too short or not what it was."""
        entry = self._row(row)
        name = entry["key"].decode("ascii")
        shard = self.shard_names[entry["shard"]]
        offset, nbytes = int(entry["offset"]), int(entry["nbytes"])
        where = f"{self.path / shard}, bytes {offset} to {offset + nbytes} (record {layout.decode_key(name)!r})"
        try:
            data = self._files.read(self.path / shard, offset, nbytes)
        except OSError as error:
            raise ShardError(f"{where}: cannot be read: {error.strerror or error}") from error
        if len(data) < nbytes:
            raise ShardError(f"{where}: only {len(data)} bytes are there; the file was cut short after it was written")
        header = data[:100].rstrip(b"\0").decode("ascii", "replace")
        if not header.startswith((f"{name}.", "././@PaxHeader")):  # the latter precedes names of 100 letters and more
            raise ShardError(f"{where}: {header[:100]!r} is there; tar and index are not of one set")
        members = {member: self._member(entry, member, offset, data) for member in self.members}
        try:
            annotation = json.loads(members["json"] or b"")
        except ValueError as error:
            raise ShardError(f"{where}: its annotation is not JSON ({error})") from error
        return Record(
            key=layout.decode_key(name),
            shard=shard,
            row=row,
            video=members.get("video"),
            annotation=annotation,
            num_frames=int(entry["num_frames"]),
            fps=float(entry["fps"]),
            decoders=tuple(name for name, bit in layout.DECODER_BITS.items() if entry["decoders"] & bit),
            members={
                name: content
                for name, content in members.items()
                if content is not None and name not in ("video", "json")
            },
        )

    def _row(self, row: int) -> Any:
        if not 0 <= row < len(self.index):
            raise IndexError(f"{self.path} has rows 0 to {len(self.index) - 1}, not {row}")
        return self.index[row]

    def _member(self, entry: Any, member: str, offset: int, data: bytes) -> bytes | None:
        start = int(entry[f"{member}_offset"]) - offset
        return data[start : start + int(entry[f"{member}_nbytes"])] if start >= 0 else None


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
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, path: Path, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes; fewer only where the file ends."""
        if self._process != os.getpid():  # a forked process: its parent's lock may be held by a thread that is gone
            self.__init__(self.most)  # type: ignore[misc]
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file
            if len(self._files) > self.most:
                self._files.popitem(last=False)
        parts = []
        while nbytes > 0 and (part := os.pread(file.descriptor, nbytes, offset)):
            parts.append(part)
            offset, nbytes = offset + len(part), nbytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


_MEND = "copy the folder again, or delete it and run tools/make_shards.py"


def _damaged(file: Path, found: str, expected: str) -> UserError:
    return UserError(f"{file} has {found}, the manifest says {expected}: it was changed or cut after writing; {_MEND}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / layout.MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make the shards with tools/make_shards.py")
    if not path.exists() and (folder / layout.UNFINISHED).exists():
        raise UserError(f"{folder} is unfinished: tools/make_shards.py stopped in it; run the same command again")
    if not path.exists():
        raise UserError(f"{folder} holds no shard set (no {layout.MANIFEST}); make one with tools/make_shards.py")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {_MEND}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != layout.FORMAT:
        raise UserError(f"{path} is not the manifest of a shard set")
    if manifest.get("version") != layout.VERSION:
        raise UserError(f"{path} has format version {manifest.get('version')}, this code reads {layout.VERSION}; "
                        "write the shards again with tools/make_shards.py")  # fmt: skip
    return manifest


def _check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    for file in (*manifest["shards"], manifest["index"]):
        path = folder / file["name"]
        found = path.stat().st_size if path.exists() else None
        if found != file["bytes"]:
            raise _damaged(path, "no file" if found is None else f"{found} bytes", f"{file['bytes']} bytes")
