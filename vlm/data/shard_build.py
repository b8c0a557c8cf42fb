"""Planned items -> one shard and its sidecar.

A shard appears under its name only when it is complete, and counts as finished when its sidecar (the rows of the index
and the rejected items) lies beside the plan; whoever starts next builds what has no sidecar.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from vlm.data.array_files import array_bytes
from vlm.data.features import tensor_bytes
from vlm.data.shard_format import (
    BLOCK,
    UNFINISHED,
    UNKNOWN,
    count_asked,
    counted_texts,
    encode_key,
    shard_name,
    text_length,
    texts,
    to_json,
)
from vlm.data.shard_reencode import Reencode, is_still, reencode
from vlm.data.tokenizers import Tokenizer, load_tokenizer
from vlm.data.video import DecodeError, check_decoders, container_extension, inspect
from vlm.files import replace_file, sync
from vlm.types import UserError
from vlm.weights import Loader, open_tensors

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of a file called so it is no news that it is a still picture
Report = Callable[[int, int], None]  # position of the item that is begun, bytes of its file


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How records are made of items, beyond what the plan says."""

    check: bool = True  # decode every clip whole
    reencode: Reencode | None = None
    tokenizer: Path | None = None  # counts the tokens of annotation text


class Place(NamedTuple):
    """Where a record lies in its tar."""

    offset: int
    nbytes: int
    members: dict[str, tuple[int, int]]  # column of the index -> (offset, nbytes) of the content


class ShardFile:
    """Writes a tar and keeps account of offsets and hash. Same content, same bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.nbytes = 0
        self._writer = TarWriter(self, user="", group="", mode=0o444, mtime=0, encoder=False, compress=False)

    def write(self, data: bytes) -> int:
        """For the tar writer: the bytes go to the file and into the hash."""
        self._hash.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def add(self, key: str, members: Mapping[str, tuple[str, bytes]]) -> Place:
        """Append one record. `members`: column of the index -> (extension of the member's name, content)."""
        start = self._writer.tarstream.offset
        places = {}
        for column, (extension, content) in members.items():
            self._writer.write({"__key__": encode_key(key), extension: content})
            padded = -(-len(content) // BLOCK) * BLOCK
            places[column] = (self._writer.tarstream.offset - padded, len(content))
        return Place(start, self._writer.tarstream.offset - start, places)

    def finish(self) -> str:
        """Close the tar, force it to disk and return its sha256."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file without finishing the tar."""
        self._file.close()


def sidecar(out: Path, number: int) -> Path:
    """The file that says a shard is finished: its rows, rejected items, warnings, size and hash."""
    return out / UNFINISHED / f"shard-{number:06d}.json"


def is_finished(out: Path, number: int, plan: str) -> bool:
    """Whether a shard of the plan of this digest and its sidecar are there, of one size."""
    try:
        side = json.loads(sidecar(out, number).read_bytes())
        return side["plan"] == plan and (out / shard_name(number)).stat().st_size == side["bytes"]
    except FileNotFoundError:
        return False


def unfinished_name(name: str) -> str:
    """A name for a file that is being written: no other process on any machine has it."""
    return f"{name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


# One shard -----------------------------------------------------------------------------------------------------------


def build_shard(
    out: Path,
    number: int,
    lines: Sequence[bytes],
    plan: str,
    settings: Settings,
    skip: Mapping[int, str],
    report: Report,
) -> None:
    """Write one shard of the plan of this digest, and its sidecar.

    Another process may build the same shard: whoever is first to finish wins, and the bytes are the same. `skip`:
    item -> why it is rejected unseen; `report` is told of each item.
    """
    temporary = out / UNFINISHED / unfinished_name(shard_name(number))
    records: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    warnings: list[dict[str, Any]] = []
    shard = ShardFile(temporary)
    try:
        for item in map(json.loads, lines):
            report(item["at"], item["size"])
            name = {"at": item["at"], "key": item["key"], "file": item["file"]}
            try:
                if item["at"] in skip:
                    raise DecodeError(skip[item["at"]])
                members, facts, warned = _load(item, settings)
            except DecodeError as error:
                rejected.append({**name, "reason": str(error)})
                continue
            place = shard.add(item["key"], members)
            records.append({"key": encode_key(item["key"]), **place._asdict(), **facts})
            warnings += [{**name, "warning": warning} for warning in warned]
        digest = shard.finish()
        if is_finished(out, number, plan):
            return
        temporary.replace(out / shard_name(number))
        sync(out)
    finally:
        shard.abandon()
        temporary.unlink(missing_ok=True)
    summary = {"plan": plan, "bytes": shard.nbytes, "sha256": digest, "records": records, "rejected": rejected,
               "warnings": warnings}  # fmt: skip
    replace_file(sidecar(out, number), to_json(summary))


def _load(
    item: Mapping[str, Any], settings: Settings
) -> tuple[dict[str, tuple[str, bytes]], dict[str, Any], list[str]]:
    """(members of the record, columns of the index, warnings); raises DecodeError for what cannot be kept."""
    annotation = item["annotation"]
    facts: dict[str, Any] = {"num_frames": UNKNOWN, "decoders": []}
    members: dict[str, tuple[str, bytes]] = {}
    warned: list[str] = []
    if item["file"]:
        extension, data, warned = _load_video(item, settings)
        members["video"] = (extension, data)
        facts["decoders"] = ["pyav"]
        facts["outside"] = bool(item.get("outside"))
        if settings.check:
            info = inspect(data, picture=Path(item["file"]).suffix.lower() in PICTURES)
            warned += info.warnings
            facts["decoders"] = list(check_decoders(data, info))
            facts.update({name: getattr(info, name) for name in ("num_frames", "fps", "duration", "width", "height")})
            annotation, misfits = _fitted(annotation, info.num_frames)
            warned += misfits
    facts |= _told(annotation, settings)
    for name, source in sorted(item.get("members", {}).items()):
        members[name] = (name, _read_member(name, source))
    members["json"] = ("json", to_json(annotation))
    return members, facts, [*item.get("warnings", ()), *warned]


def _told(annotation: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The columns of the index about an annotation."""
    facts: dict[str, Any] = {"text_length": text_length(annotation)}
    if settings.tokenizer is not None:
        encode = _tokenizer(settings.tokenizer).encode
        facts["tokens"] = sum(len(encode(text)) for text in texts(annotation))
        facts["counted"] = {
            name: [sum(len(encode(text)) for text in part) for part in parts]
            for name, parts in counted_texts(annotation).items()
        }
    asked = count_asked(annotation)
    return facts | ({"questions": asked} if asked else {})


def _fitted(annotation: Mapping[str, Any], num_frames: int) -> tuple[Mapping[str, Any], list[str]]:
    """(an annotation without questions about times when the video is over, what its segments lack or have too much)."""
    segments = annotation.get("segments")
    if not segments:
        return annotation, []
    last = segments[-1]["end"]
    if last < num_frames:
        return annotation, [f"segments end at frame {last} of {num_frames}: the last {num_frames - last} are in none"]
    if last == num_frames:
        return annotation, []
    warning = f"segments end at frame {last}, but the video has {num_frames}: what is beyond counts as its end"
    rows = [row for row in annotation.get("chat", ()) if not _asks_beyond(row, num_frames)]
    if len(rows) < len(annotation.get("chat", ())):
        warning += f"; questions about it that are left out: {len(annotation['chat']) - len(rows)}"
        annotation = {**annotation, "chat": rows}
    beyond = [part["name"] for part in segments if part["start"] >= num_frames]
    return annotation, [warning + (f"; it does not show {', '.join(beyond)}" if beyond else "")]


def _asks_beyond(row: Mapping[str, Any], num_frames: int) -> bool:
    """Whether a question of chat begins at a time when the video is over."""
    time = re.search(r"<t:(\d+)>", row["question"]) if row["kind"] == "at" else None
    return time is not None and int(time[1]) >= num_frames


def _load_video(item: Mapping[str, Any], settings: Settings) -> tuple[str, bytes, list[str]]:
    """(extension, content, warnings) of the video member; raises DecodeError."""
    path = Path(item["file"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror or error}") from error
    suffix = path.suffix[1:].lower()
    container = container_extension(data)
    if item.get("outside") and not settings.check and container is None:
        raise DecodeError(
            "lies outside --root and does not begin like a video, so it is not packed unseen (--no-check)"
        )
    if settings.reencode is not None and not is_still(data):
        made, warned = reencode(data, settings.reencode)
        return "mp4", made, warned
    return container or (suffix if suffix.isalnum() and suffix.isascii() else "bin"), data, []


def _read_member(name: str, source: Mapping[str, str]) -> bytes:
    """A whole file, or one tensor of a file as `NAME.npy` or `NAME.safetensors`; raises DecodeError."""
    try:
        if "tensor" not in source:
            return _read_file(Path(source["file"]))
        tensor = _open_tensors(source["file"])[source["tensor"]]()
    except OSError as error:
        raise DecodeError(f"{source['file']} cannot be read: {error.strerror or error}") from error
    except (UserError, KeyError) as error:
        raise DecodeError(f"{source['file']} changed while shards were written from it: {error}") from error
    if name.endswith(".safetensors"):
        return tensor_bytes(name.removesuffix(".safetensors"), tensor)
    file = io.BytesIO()
    np.save(file, tensor.numpy(), allow_pickle=False)
    return file.getvalue()


def _read_file(file: Path) -> bytes:
    """A whole file; a pickle of an array as `.npy`, since nobody should open a pickle in training."""
    if file.suffix.lower() != ".pkl":
        return file.read_bytes()
    try:
        return array_bytes(file)
    except UserError as error:
        raise DecodeError(str(error)) from error


@lru_cache(maxsize=4)
def _open_tensors(file: str) -> dict[str, Loader]:
    """The tensors of a file; it stays open (mapped) in this process, since thousands of records come from it."""
    return open_tensors(file)


@lru_cache(maxsize=1)
def _tokenizer(file: Path) -> Tokenizer:
    return load_tokenizer(file)
