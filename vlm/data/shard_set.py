"""Reading a shard set: records by row of the index, one ranged read each.

Tars are only containers: whoever reads goes by the index, so any record is one read away and the order of training is
free. The layout is in `shard_format`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from vlm.data import shard_format as layout
from vlm.data.mix import is_elsewhere
from vlm.data.remote import RemoteFiles
from vlm.data.shard_files import MEND, Files, LocalFiles, ShardChangedError, damaged
from vlm.data.shard_format import ShardError, ShardGoneError
from vlm.types import Record, UserError

HASHED_BYTES = 64 << 20
"""Largest index (about 600,000 rows) whose sha256 is compared with the manifest's when a set is opened (<= 0.3 s)."""
CACHE_BYTES = 20 << 30
MAPPED_BYTES = 1 << 20
"""Members of this size and more, of sets in a folder, are mapped, not read: what nobody looks at is never fetched."""
_MAPPED = (".safetensors", ".npy")
_GAP = 4 * layout.BLOCK  # bytes between two members that are read rather than asked around: padding and headers


class ShardSet:
    """The records of a folder that `write_shards` finished, by row of its index.

    Args:
        path: the folder: a path, `https://…`, `s3://bucket/dir`, `hf://datasets/org/repo/dir`, any URL that fsspec
            knows, or `pipe:COMMAND` where `{}` stands for the name of a file.
        cache: folder for pieces of sets that lie elsewhere; None: the user's folder for caches (`vlm.data.remote`).
        cache_bytes: most that this folder may take; pieces used least recently leave.
        retries: how often a file that is missing or does not come is tried again before that is an error.

    Opening costs no more for ten million rows than for a few: the index is mapped, not read. Checked are the manifest,
    the sizes of all files, the columns and rows of the index, and of an index up to `HASHED_BYTES` its sha256; each row
    is checked against the manifest when it is read. Cheap to send to worker processes (each maps the index and opens
    the tars itself), and reads share no file position, so threads and forked processes may read at once. A shard that
    was replaced after opening is noticed: its sha256 is compared with the manifest's, once.

    Raises UserError for a folder that is missing, unfinished, damaged or of another version.
    """

    def __init__(
        self, path: Path | str, *, cache: Path | None = None, cache_bytes: int = CACHE_BYTES, retries: int = 3
    ) -> None:
        place = unquote(str(path).removeprefix("file://")) if str(path).startswith("file://") else str(path)
        self._files: Files = (
            RemoteFiles(place, cache, cache_bytes, retries) if is_elsewhere(place) else LocalFiles(Path(place), retries)
        )
        self.path: Path | str = self._files.place if is_elsewhere(place) else Path(place)
        manifest = self.manifest
        self._sizes: tuple[int, ...] = tuple(shard["bytes"] for shard in manifest["shards"])
        self.members: tuple[str, ...] = tuple(manifest["members"])
        self._counts_questions = "questions" in manifest["counts"]
        self._counts_tokens = "tokens" in manifest["counts"]
        self._counted: dict[str, int] = manifest.get("counted", {})
        hashes = ",".join(shard["sha256"] for shard in manifest["shards"])
        self.fingerprint = hashlib.sha256(f"{layout.FORMAT}/{layout.VERSION}:{hashes}".encode()).hexdigest()
        self._index_entry: dict[str, Any] = manifest["index"]
        self._files.check(manifest)
        index = self._open_index()
        where = self._files.where(layout.INDEX)
        if len(self.index) != manifest["counts"]["records"]:
            raise damaged(where, f"{len(self.index)} rows", f"{manifest['counts']['records']}")
        _check_index_hash(index, where, self._index_entry)

    def _open_index(self) -> Path:
        where = self._files.where(layout.INDEX)
        try:
            path = self._files.index(self._index_entry)
            self.index = np.load(path, mmap_mode="r")
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"{where} cannot be opened ({error}); {MEND}") from error
        found = self.index.dtype
        key_bytes = found["key"].itemsize if "key" in (found.names or ()) else 0
        expected = layout.index_dtype(
            max(1, key_bytes), self.members, self._counts_questions, self._counts_tokens, self._counted
        )
        if found != expected or self.index.ndim != 1:
            raise UserError(f"{where} has columns {found}, not {expected}; {MEND}")
        return path

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "members", "fingerprint", "_files", "_sizes", "_index_entry", "_counts_questions",
                "_counts_tokens", "_counted")  # fmt: skip
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_index()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says: counts, hours, bytes, shards, arguments, rejected items, warnings."""
        return _read_manifest(self._files.manifest(), self._files.where(layout.MANIFEST))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def bytes_read(self) -> int:
        """Bytes of shards that this process took from where the set lies; what a local cache gave is not counted."""
        return self._files.bytes_read

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
        """(rows,) int32: questions of each record, rows of its chat, or texts of its boundaries; zeros where the set
        has none. Mapped, where there are some."""
        return self.index["questions"] if self._counts_questions else np.broadcast_to(np.int32(0), len(self))

    @property
    def tokens(self) -> np.ndarray | None:
        """(rows,) int32, mapped: tokens of annotation text of each record; None where none were counted (--tokenizer).

        Which tokenizer counted them, and its hash, is the manifest's `tokenizer`.
        """
        return self.index["tokens"] if self._counts_tokens else None

    def counted(self, name: str) -> np.ndarray | None:
        """(rows, parts) int32, mapped: tokens of each part of one kind of text (`shard_format.counted_texts`).

        Parts that a record has not are 0. None where no record has such a text, or none were counted (--tokenizer).
        """
        return self.index[f"tokens.{name}"] if name in self._counted else None

    @property
    def tokenizer_hash(self) -> str | None:
        """sha256 (vlm.data.tokenizers.content_hash) of the tokenizer that counted tokens; None: none were counted."""
        about = self.manifest["arguments"].get("tokenizer")
        return about["sha256"] if isinstance(about, dict) and isinstance(about.get("sha256"), str) else None

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

    def read(self, row: int, members: Sequence[str] | None = None) -> Record:
        """One record by one ranged read.

        Args:
            members: read only these of its members, and the annotation, by as few reads as their places allow. None:
                all. Names that the record has not are let pass, as they are when everything is read.

        Raises:
            ShardGoneError: the shard's file is no longer there, or cannot be had.
            ShardChangedError: the shard is another than the one that was written.
            ShardError: the shard is too short or not what it was, or the row of the index cannot be true.
        """
        entry = self._row(row)
        flaw = self._flaw(entry)
        if flaw:
            where = self._where(entry, int(entry["offset"]), int(entry["nbytes"]))
            raise ShardError(f"{where}: row {row} of {layout.INDEX} says that {flaw}, which cannot be")
        number = int(entry["shard"])
        try:
            record = self._read(row, entry, members, again=False)
        except (ShardGoneError, ShardChangedError):
            raise
        except ShardError as error:
            if not self._files.rereads:
                raise ShardError(f"{error}{self._files.suspicion(number)}") from error
            try:  # what came, or what the cache holds, may be to blame
                record = self._read(row, entry, members, again=True)
            except (ShardGoneError, ShardChangedError):
                raise
            except ShardError as second:
                raise ShardError(f"{second}{self._files.suspicion(number)}") from second
        self._files.confirm(number)
        return record

    def _read(self, row: int, entry: Any, members: Sequence[str] | None, again: bool) -> Record:
        name, number = _name(entry), int(entry["shard"])
        places = {member: (int(entry[f"{member}_offset"]), int(entry[f"{member}_nbytes"])) for member in self.members}
        places = {member: place for member, place in places.items() if place[0] >= 0}
        whole = int(entry["offset"]), int(entry["nbytes"])
        wanted = {m: place for m, place in places.items() if members is None or m in members or m == "json"}
        contents: dict[str, Any] = self._mapped(number, wanted)
        needed = {m: (begin, 0 if m in contents else nbytes) for m, (begin, nbytes) in wanted.items()}
        at_once = wanted == places and not contents
        for start, length in [whole] if at_once else _spans(needed.values()):
            where = self._where(entry, start, length)
            data = self._files.read(number, start, length, again)
            if len(data) < length:
                raise ShardError(
                    f"{where}: only {len(data)} bytes are there; the file was cut short after it was written"
                )
            _check_header(data[: layout.BLOCK], name, where, first=at_once)
            for member, (begin, nbytes) in needed.items():
                if start < begin <= start + length - nbytes:
                    contents.setdefault(member, data[begin - start : begin - start + nbytes])
                    if not at_once:
                        header = data[begin - start - layout.BLOCK : begin - start]
                        _check_header(header, name, where, member=member, nbytes=wanted[member][1])
        where = self._where(entry, *whole)
        annotation = _read_annotation(contents.get("json", b""), where)
        asked = layout.count_asked(annotation)
        if self._counts_questions and asked != entry["questions"]:
            raise ShardError(
                f"{where}: it holds {asked} questions, the index says {entry['questions']}; tar and index are not of "
                "one set"
            )
        return Record(
            key=layout.decode_key(name),
            shard=layout.shard_name(number),
            row=row,
            video=contents.pop("video", None),
            annotation=annotation,
            num_frames=int(entry["num_frames"]),
            fps=float(entry["fps"]),
            decoders=tuple(name for name, bit in layout.DECODER_BITS.items() if entry["decoders"] & bit),
            members={name: content for name, content in contents.items() if name != "json"},
        )

    def _mapped(self, number: int, wanted: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """The large ones among these members as they lie in the file."""
        views = {
            member: self._files.mapped(number, begin, nbytes)
            for member, (begin, nbytes) in wanted.items()
            if nbytes >= MAPPED_BYTES and member.endswith(_MAPPED)
        }
        return {member: view for member, view in views.items() if view is not None}

    def _where(self, entry: Any, offset: int, nbytes: int) -> str:
        """Bytes of a record, for messages."""
        shard, key = layout.shard_name(int(entry["shard"])), layout.decode_key(_name(entry))
        return f"{self._files.where(shard)}, bytes {offset} to {offset + nbytes} (record {key!r})"

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
            if start != -1 and (length < 0 or not offset + layout.BLOCK <= start <= offset + nbytes - length):
                return f"its {member} has {length} bytes from {start} on, outside of it"
        if not (frames == layout.UNKNOWN or 0 < frames <= nbytes):
            return f"{frames} frames are in {nbytes} bytes"
        return ""


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


def _spans(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The reads (offset, nbytes) that cover contents at `places` and their headers; those side by side are one."""
    spans: list[tuple[int, int]] = []
    for start, nbytes in sorted(places):
        first = start - layout.BLOCK
        if spans and first - sum(spans[-1]) <= _GAP:
            spans[-1] = spans[-1][0], start + nbytes - spans[-1][0]
        else:
            spans.append((first, start + nbytes - first))
    return spans


def _check_header(
    header: bytes, name: str, where: str, *, first: bool = False, member: str = "", nbytes: int = -1
) -> None:
    """ShardError unless this is the tar header of a member of the record: of its `first`, or of `member`."""
    if header[257:262] != b"ustar":
        raise ShardError(f"{where}: no record begins there; tar and index are not of one set")
    found = header[:100].rstrip(b"\0").decode("ascii", "replace")
    begins = f"{name}.{member if member != 'video' else ''}"[:100]  # a video's suffix is that of its container
    if not (found.startswith(begins) or (first and found.startswith("././@PaxHeader"))):  # before very long names
        raise ShardError(f"{where}: {found!r} is there; tar and index are not of one set")
    if nbytes >= 0 and header[124:136].rstrip(b"\0 ") != f"{nbytes:011o}".encode():
        raise ShardError(f"{where}: its {member} has another length than the index says; they are not of one set")


def _read_manifest(data: bytes, path: str) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {MEND}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != layout.FORMAT:
        raise UserError(f"{path} is not the manifest of a shard set")
    if manifest.get("version") != layout.VERSION:
        raise UserError(f"{path} has format version {manifest.get('version')}, this code reads {layout.VERSION}; "
                        "write the shards again with tools/make_shards.py")  # fmt: skip
    flaw = _manifest_flaw(manifest)
    if flaw:
        raise UserError(f"{path}: {flaw}, as no manifest says that tools/make_shards.py wrote; {MEND}")
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
    counted = manifest.get("counted", {})
    if not isinstance(counted, dict) or not all(
        _is_count(parts) and 0 < parts <= layout.MOST_PARTS for parts in counted.values()
    ):
        return "`counted` is not an object of names and numbers"
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


def _check_index_hash(path: Path, where: str, entry: Mapping[str, Any]) -> None:
    """`path` begins with the index; more may follow in a cache."""
    if entry["bytes"] > HASHED_BYTES:
        return
    with path.open("rb") as file:
        found = hashlib.sha256(file.read(entry["bytes"])).hexdigest()
    if found != entry["sha256"]:
        raise damaged(where, f"sha256 {found[:16]}…", f"{entry['sha256'][:16]}…")
