"""Reading a quarantine ledger, and trying its records again, each in a process that may hang or crash."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data import shard_format as layout
from vlm.data.features import MEMBER, read_features
from vlm.data.shard_format import ShardError
from vlm.data.shard_set import ShardSet
from vlm.data.video import DecodeError, check_decoders, inspect
from vlm.data.watch import Watch
from vlm.data.workers import Loaded
from vlm.types import Record, UserError

_CHUNK = 1 << 20  # rows of an index that are looked through at a time


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a ledger: which record could not be used, and why."""

    key: str
    shards: str  # folder or address of its set
    shard: str  # file name
    offset: int | None  # bytes from the start of the shard, and …
    nbytes: int | None  # … how many; None: a ledger that does not say
    reason: str

    def place(self) -> str:
        """Where it lies, in words."""
        place = f"{self.shards}/{self.shard}"
        if self.offset is None or self.nbytes is None:
            return place
        return f"{place}, bytes {self.offset} to {self.offset + self.nbytes}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a record."""

    row: Row
    state: str  # "bad": it still cannot be used; "readable": it can; "changed": its set no longer has it
    now: str  # in words
    decoders: dict[str, str]  # what each decoder that may be used on it did


def read_ledger(file: Path, shards: str | None = None) -> list[Row]:
    """The records of a ledger, each once.

    Args:
        shards: where their set lies now; None: where the ledger says.
    Raises:
        UserError: the file cannot be read, a line is none of a ledger, or `shards` cannot stand for several sets.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    rows: dict[tuple[str, str, int | None, str], Row] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _parse(line, f"{file}: line {number}", shards)
            rows[row.shards, row.shard, row.offset, row.key] = row
    sets = sorted({row.shards for row in rows.values()})
    if shards is not None and len(sets) > 1:
        raise UserError(f"{file} is of several shard sets ({', '.join(sets)}); --shards can stand for one only")
    return [row if shards is None else replace(row, shards=shards) for row in rows.values()]


def _parse(line: str, where: str, shards: str | None) -> Row:
    try:
        found = json.loads(line)
        row = Row(found["key"], found.get("shards", shards), found["shard"], found.get("offset"), found.get("nbytes"),
                  found.get("reason", ""))  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not a line of a quarantine ledger ({error!r})") from error
    if row.shards is None:
        raise UserError(f"{where} does not say in which folder its shards lie; give it with --shards DIR")
    texts, numbers = (row.key, row.shards, row.shard, row.reason), (row.offset, row.nbytes)
    if not all(isinstance(text, str) for text in texts) or not all(type(n) in (int, type(None)) for n in numbers):
        raise UserError(f"{where} is not a line of a quarantine ledger (a text or a number is of another type)")
    return row


def recheck(rows: Sequence[Row], *, workers: int, seconds: float) -> Iterator[Finding]:
    """Read and decode each record again, by every decoder that may be used on it, in the order of `rows`.

    Args:
        workers: processes, at least 1.
        seconds: for reading a record, and for each decoder; one that takes longer is ended.
    """
    sets: dict[str, ShardSet] = {}
    closed: dict[str, str] = {}  # sets that cannot be opened -> why
    for shards in dict.fromkeys(row.shards for row in rows):
        try:
            sets[shards] = ShardSet(shards)
        except UserError as error:
            closed[shards] = str(error)
    places = {shards: _find(opened, [row for row in rows if row.shards == shards]) for shards, opened in sets.items()}
    jobs = [(row.shards, places[row.shards].get(row)) for row in rows if row.shards in sets]
    checked = Loaded(_Checks(sets), enumerate(jobs), workers, "--workers", sample_seconds=seconds)
    files: dict[tuple[str, int], str] = {}  # what is wrong with whole shards
    for row in rows:
        if row.shards in closed:
            yield Finding(row, "bad", closed[row.shards], {})
            continue
        at, (problem, decoders) = places[row.shards].get(row), next(checked)
        if at is None:
            yield Finding(row, "changed", f"{row.shards} no longer has a record of this key", {})
        elif problem:
            number = int(sets[row.shards].index[at]["shard"])
            if (row.shards, number) not in files:
                files[row.shards, number] = _suspicion(sets[row.shards], number)
            yield Finding(row, "bad", problem + files[row.shards, number], decoders)
        else:
            moved = _moved(sets[row.shards], at, row)
            yield Finding(row, "changed" if moved else "readable", moved or "it can be used", decoders)


# Where records lie now -----------------------------------------------------------------------------------------------


def _find(shards: ShardSet, rows: Sequence[Row]) -> dict[Row, int]:
    """The row of the index that each record has now: at its old place, or else wherever its key is."""
    found: dict[Row, int] = {}
    for row in rows:
        place = (_number(row.shard), row.offset or 0)
        at = bisect_left(range(len(shards)), place, key=lambda at: _place(shards, at))
        if row.offset is not None and at < len(shards) and _place(shards, at) == place and shards.key(at) == row.key:
            found[row] = at
    lost: dict[bytes, list[Row]] = {}
    for row in rows:
        if row not in found:
            lost.setdefault(layout.encode_key(row.key).encode(), []).append(row)
    for start in range(0, len(shards) if lost else 0, _CHUNK):
        keys = np.asarray(shards.index["key"][start : start + _CHUNK])
        for there in np.flatnonzero(np.isin(keys, np.array(list(lost)))).tolist():
            found |= dict.fromkeys(lost[bytes(keys[there])], start + there)
    return found


def _place(shards: ShardSet, at: int) -> tuple[int, int]:
    entry = shards.index[at]
    return int(entry["shard"]), int(entry["offset"])


def _number(shard: str) -> int:
    digits = shard.removeprefix("shard-").removesuffix(".tar")
    return int(digits) if digits.isdecimal() else -1


def _moved(shards: ShardSet, at: int, row: Row) -> str:
    """How a record lies now, where that is not as the ledger has it; "": as it was."""
    entry = shards.index[at]
    offset, nbytes = int(entry["offset"]), int(entry["nbytes"])
    if row.offset is None or (shards.shard_name(at), offset, nbytes) == (row.shard, row.offset, row.nbytes):
        return ""
    return f"the set was written anew; it can be used, at {shards.shard_name(at)}, bytes {offset} to {offset + nbytes}"


def _suspicion(shards: ShardSet, number: int) -> str:
    """Whether a shard is not what was written, for the end of a message; not asked of sets that lie elsewhere."""
    expected = shards.manifest["shards"][number]["sha256"]
    path = Path(shards.path) / layout.shard_name(number)
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == expected:
        return ""
    return f"; {path.name} is not what was written: it has sha256 {found[:16]}…, the manifest says {expected[:16]}…"


# Trying them ---------------------------------------------------------------------------------------------------------


class _Checks:
    """Tries one record: (what is wrong with it or "", what each decoder did)."""

    def __init__(self, sets: Mapping[str, ShardSet]) -> None:
        self.sets = sets

    def load(self, job: tuple[int, tuple[str, int | None]], watch: Watch) -> tuple[str, dict[str, str]]:
        number, (shards, at) = job
        if at is None:
            return "", {}
        about = f"{self.sets[shards].key(at)} of {shards}"
        decoders: dict[str, str] = {}
        try:
            _begin(watch, f"{number}.read", about)
            record = self.sets[shards].read(at)
            if record.video is None:
                if MEMBER in record.members:
                    read_features(record)
                return "", decoders
            _decode(record, record.video, watch, number, about, decoders)
        except (DecodeError, ShardError) as error:
            return str(error), decoders
        except Exception as error:
            return f"{type(error).__name__}: {error}", decoders
        finally:
            watch.end()
        return "", decoders


def _decode(record: Record, video: bytes, watch: Watch, number: int, about: str, decoders: dict[str, str]) -> None:
    """Try PyAV and, where the index admits it, decord; DecodeError says why the record cannot be used."""
    failed: list[str] = []
    info = None
    try:
        _begin(watch, f"{number}.pyav", f"{about}, by PyAV")
        info = inspect(video)
        decoders["pyav"] = f"{info.num_frames} frames"
        if record.num_frames not in (layout.UNKNOWN, info.num_frames):
            failed.append(f"{info.num_frames} frames decode, the index says {record.num_frames}")
    except DecodeError as error:
        decoders["pyav"] = str(error)
        failed.append(str(error))
    if info is not None and "decord" in record.decoders:
        try:
            _begin(watch, f"{number}.decord", f"{about}, by decord")
            agrees = "decord" in check_decoders(video, info)
            decoders["decord"] = "the same pictures as PyAV" if agrees else "fails or disagrees with PyAV"
        except DecodeError as error:
            decoders["decord"] = str(error)
            failed.append(f"decord {error}" if str(error).startswith("took") else f"decord: {error}")
    if failed:
        raise DecodeError("; ".join(failed))


def _begin(watch: Watch, label: str, about: str) -> None:
    reason = watch.begin(label, about)
    if reason:
        raise DecodeError(reason)


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding as --json prints it."""
    row = finding.row
    return {"key": row.key, "shards": row.shards, "shard": row.shard, "offset": row.offset, "nbytes": row.nbytes,
            "was": row.reason, "state": finding.state, "now": finding.now, "decoders": finding.decoders}  # fmt: skip
