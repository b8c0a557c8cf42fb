"""Where tensors stand in a safetensors file before it is written, and whether a file still is what its manifest says.

Format: https://github.com/huggingface/safetensors#format. Who knows names, types and shapes knows every byte's place,
so many processes write one file at once (vlm.run.checkpoint).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vlm.types import UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
CHUNK = 1 << 23
"""Bytes that are hashed, read or written at once."""

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Layout:
    """A safetensors file that is to be written."""

    header: bytes  # all that comes before the first tensor
    places: dict[str, tuple[int, int]]  # name -> first byte and the one after the last, in the file; in file order
    size: int  # bytes of the file


def layout_of(described: Described, metadata: Mapping[str, str] | None = None, path: str | Path = "file") -> Layout:
    """The layout of a file with these tensors: same input, same bytes.

    Args:
        described: name -> dtype and shape.
        path: names the file in messages.
    Raises:
        UserError: a dtype that the format lacks.
    """
    # the largest elements first: each tensor stays aligned
    order = sorted(described, key=lambda name: (-described[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset, ends = 0, {}
    for name in order:
        dtype, shape = described[name]
        if dtype not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {dtype}, which safetensors cannot hold.")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        ends[name] = (offset, end)
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, {n: (len(head) + a, len(head) + b) for n, (a, b) in ends.items()}, len(head) + offset)


# ---------------------------------------------------------------------------------------------- manifests


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of itself: a bit that flips in it is found as well."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_file(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare a file of a checkpoint with the folder's manifest, to the bit.

    An entry of `files` has `bytes` and either `sha256` (of the whole) or `header_sha256` and `hashes`: the name of the
    manifest's own table with the sha256 of each tensor.

    Raises:
        UserError: missing, not readable, or not what was written.
    """
    entry = manifest["files"].get(path.name)
    if entry is None or not path.is_file():
        raise UserError(f"{path}: is missing; use another checkpoint of the run")
    try:
        damage = _damage(path, entry, manifest)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # no writer of ours made it so
        damage = f"it, or the manifest, is not of the form that it should have: {error!r}"
    if damage:
        raise UserError(
            f"{path}: content differs from the manifest ({damage}; damaged on disk?); use another checkpoint"
        )


def _damage(path: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """What of a file is not as its manifest says; "" where all is."""
    size = path.stat().st_size
    if size != entry.get("bytes"):
        return f"{size} bytes instead of {entry.get('bytes')}"
    with path.open("rb") as file:
        if "header_sha256" not in entry:
            return "" if hash_of(_read(file, 0, size)) == entry.get("sha256") else "another sha256"
        length = int.from_bytes(file.read(8), "little") + 8
        if length > size or hash_of(_read(file, 0, length)) != entry["header_sha256"]:
            return "the header"
        file.seek(8)
        header = json.loads(file.read(length - 8))
        header.pop("__metadata__", None)
        stated = manifest.get(str(entry.get("hashes"))) or {}
        if header.keys() != stated.keys():
            return f"other tensors: {', '.join(sorted(header.keys() ^ stated.keys())[:5])}"
        for name, place in header.items():
            begin, end = place["data_offsets"]
            if not 0 <= begin <= end <= size - length:
                return f"tensor {name} at {begin} to {end}"
            if hash_of(_read(file, length + begin, length + end)) != stated[name].get("sha256"):
                return f"tensor {name}"
    return ""


def hash_of(chunks: Iterable[Any]) -> str:
    """sha256 of what the chunks make together."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _read(file: BinaryIO, begin: int, end: int) -> Iterable[bytes]:
    file.seek(begin)
    while begin < end:
        chunk = file.read(min(CHUNK, end - begin))
        if not chunk:
            return
        begin += len(chunk)
        yield chunk
