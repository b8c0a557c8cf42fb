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
from vlm.data.shard_format import ShardError, ShardGoneError
from vlm.types import Record, UserError

HASHED_BYTES = 64 << 20
"""Largest index (about 600,000 rows) whose sha256 is compared with the manifest's when a set is opened (<= 0.3 s)."""


class ShardSet:
    """The records of a folder that `write_shards` finished, by row of its index.

    Opening costs no more for ten million rows than for a few: the index is mapped, not read. Checked are the manifest,
    the sizes of all files, the columns and rows of the index, and of an index up to `HASHED_BYTES` its sha256; each row
    is checked against the manifest when it is read. Cheap to send to worker processes (each maps the index and opens
    the tars itself), and reads share no file position, so threads and forked processes may read at once.

    Raises UserError for a folder that is missing, unfinished, damaged or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = self.manifest
        self._sizes: tuple[int, ...] = tuple(shard["bytes"] for shard in manifest["shards"])
        self.members: tuple[str, ...] = tuple(manifest["members"])
        self._counts_questions = "questions" in manifest["counts"]
        self._counts_tokens = "tokens" in manifest["counts"]
        hashes = ",".join(shard["sha256"] for shard in manifest["shards"])
        self.fingerprint = hashlib.sha256(f"{layout.FORMAT}/{layout.VERSION}:{hashes}".encode()).hexdigest()
        _check_sizes(self.path, manifest)
        self._open_index()
        if len(self.index) != manifest["counts"]["records"]:
            raise _damaged(self.path / layout.INDEX, f"{len(self.index)} rows", f"{manifest['counts']['records']}")
        _check_index_hash(self.path / layout.INDEX, manifest["index"]["sha256"])

    def _open_index(self) -> None:
        try:
            self.index = np.load(self.path / layout.INDEX, mmap_mode="r")
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"{self.path / layout.INDEX} cannot be opened ({error}); {_MEND}") from error
        found = self.index.dtype
        key_bytes = found["key"].itemsize if "key" in (found.names or ()) else 0
        expected = layout.index_dtype(max(1, key_bytes), self.members, self._counts_questions, self._counts_tokens)
        if found != expected or self.index.ndim != 1:
            raise UserError(f"{self.path / layout.INDEX} has columns {found}, not {expected}; {_MEND}")
        self._files = _OpenFiles()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "members", "fingerprint", "_sizes", "_counts_questions", "_counts_tokens")
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
        return self.index["questions"] if self._counts_questions else np.broadcast_to(np.int32(0), len(self))

    @property
    def tokens(self) -> np.ndarray | None:
        """(rows,) int32, mapped: tokens of annotation text of each record; None where none were counted (--tokenizer).

        Which tokenizer counted them, and its hash, is the manifest's `tokenizer`.
        """
        return self.index["tokens"] if self._counts_tokens else None

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The file names of the tars, in order."""
        return tuple(map(layout.shard_name, range(len(self._sizes))))

    def key(self, row: int) -> str:
        """The key of a record as its source gave it."""
        return layout.decode_key(_name(self._row(row)))

    def shard_name(self, row: int) -> str:
        """The file name of the tar that holds a record."""
        return layout.shard_name(int(self._row(row)["shard"]))

    def read(self, row: int) -> Record:
        """One record by one ranged read.

        Raises:
            ShardGoneError: the shard's file is no longer there.
            ShardError: the shard is too short or not what it was, or the row of the index cannot be true.
        """
        entry = self._row(row)
        name, shard = _name(entry), self.shard_name(row)
        offset, nbytes = int(entry["offset"]), int(entry["nbytes"])
        where = f"{self.path / shard}, bytes {offset} to {offset + nbytes} (record {layout.decode_key(name)!r})"
        flaw = self._flaw(entry)
        if flaw:
            raise ShardError(f"{where}: row {row} of {layout.INDEX} says that {flaw}, which cannot be")
        try:
            data = self._files.read(self.path / shard, offset, nbytes)
        except FileNotFoundError as error:
            raise ShardGoneError(f"{self.path / shard} is gone: it was there when the set was opened") from error
        except OSError as error:
            raise ShardError(f"{where}: cannot be read: {error.strerror or error}") from error
        if len(data) < nbytes:
            raise ShardError(f"{where}: only {len(data)} bytes are there; the file was cut short after it was written")
        if data[257:262] != b"ustar":
            raise ShardError(f"{where}: no record begins there; tar and index are not of one set")
        header = data[:100].rstrip(b"\0").decode("ascii", "replace")
        if not header.startswith((f"{name}.", "././@PaxHeader")):  # the latter precedes names of 100 letters and more
            raise ShardError(f"{where}: {header!r} is there; tar and index are not of one set")
        members = {member: self._member(entry, member, offset, data) for member in self.members}
        annotation = _read_annotation(members["json"] or b"", where)
        if self._counts_questions and _count_questions(annotation) != entry["questions"]:
            raise ShardError(
                f"{where}: it holds {_count_questions(annotation)} questions, the index says {entry['questions']}; tar "
                "and index are not of one set"
            )
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

    def _flaw(self, entry: Any) -> str:
        """What of a row cannot be true, given the manifest; "": nothing."""
        number, offset, nbytes, frames = (int(entry[name]) for name in ("shard", "offset", "nbytes", "num_frames"))
        if not 0 <= number < len(self._sizes):
            return f"it lies in shard {number} of {len(self._sizes)}"
        if offset < 0 or nbytes < layout.BLOCK or offset + nbytes > self._sizes[number]:
            return f"it has {nbytes} bytes from {offset} on in a shard of {self._sizes[number]}"
        for member in self.members:
            start, length = int(entry[f"{member}_offset"]), int(entry[f"{member}_nbytes"])
            if start != -1 and (length < 0 or not offset <= start <= offset + nbytes - length):
                return f"its {member} has {length} bytes from {start} on, outside of it"
        if not (frames == layout.UNKNOWN or 0 < frames <= nbytes):
            return f"{frames} frames are in {nbytes} bytes"
        return ""

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


def _name(entry: Any) -> str:
    """The key of a row as it stands in the tar; bytes that no key has are shown as escapes."""
    return entry["key"].decode("ascii", "backslashreplace")


def _read_annotation(data: bytes, where: str) -> dict[str, Any]:
    try:
        annotation = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: its annotation is not JSON ({error})") from error
    if not isinstance(annotation, dict):
        raise ShardError(f"{where}: its annotation is a {type(annotation).__name__}, not an object")
    return annotation


def _count_questions(annotation: Mapping[str, Any]) -> int:
    questions = annotation.get("questions", ())
    return len(questions) if isinstance(questions, (list, tuple)) else 0


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
    flaw = _manifest_flaw(manifest)
    if flaw:
        raise UserError(f"{path}: {flaw}, as no manifest says that tools/make_shards.py wrote; {_MEND}")
    return manifest


def _manifest_flaw(manifest: Mapping[str, Any]) -> str:
    """What this code relies on and the manifest does not say, or says so that it would lead outside the folder."""
    shards, index, counts, members = (manifest.get(name) for name in ("shards", "index", "counts", "members"))
    if not isinstance(shards, list):
        return "`shards` is not a list"
    for number, shard in enumerate(shards):
        if not _is_file_entry(shard, layout.shard_name(number)):
            return f"`shards` has no name {layout.shard_name(number)!r}, bytes and sha256 at place {number}"
    if not _is_file_entry(index, layout.INDEX):
        return f"`index` has no name {layout.INDEX!r}, bytes and sha256"
    if not isinstance(counts, dict) or not all(_is_count(counts.get(name)) for name in ("listed", "records")):
        return "`counts` has no numbers `listed` and `records`"
    if not isinstance(members, list) or not all(isinstance(name, str) for name in members):
        return "`members` is not a list of names"
    if "json" not in members or len(set(members)) < len(members):
        return "`members` has no 'json', or a name twice"
    return ""


def _is_file_entry(entry: Any, name: str) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("name") == name
        and _is_count(entry.get("bytes"))
        and isinstance(entry.get("sha256"), str)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    for file in (*manifest["shards"], manifest["index"]):
        path = folder / file["name"]
        found = path.stat().st_size if path.exists() else None
        if found != file["bytes"]:
            raise _damaged(path, "no file" if found is None else f"{found} bytes", f"{file['bytes']} bytes")


def _check_index_hash(path: Path, expected: str) -> None:
    if path.stat().st_size > HASHED_BYTES:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise _damaged(path, f"sha256 {found[:16]}…", f"{expected[:16]}…")
