"""The words of the shard format: names, keys, the columns of the index, whole writes.

A shard set is a folder:

    shard-000000.tar …   uncompressed tars that plain webdataset reads: `{key}.{mp4|webm|…}`, whatever else a source
                         gives (`{key}.features.npy`) and `{key}.json`, the members of a key side by side, every
                         header the same for the same content
    index.npy            one row a record (`index_dtype`), opened by memory mapping
    manifest.json        counts, hours, bytes, hashes, every rejected item; written last: without it the set is
                         unfinished
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np

FORMAT = "vlm-shards"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
UNFINISHED = ".unfinished"  # folder of what only a running or killed writer needs
BLOCK = 512  # tar's unit
MAX_KEY_BYTES = 240
MOST_PARTS = 4096  # of one kind of text in a record; where one has more, that kind is not counted by parts
FEW_PARTS = 64  # each record may have a column of so many; more only where `worth` it
DECODER_BITS = {"decord": 1, "pyav": 2}  # best first
TEXTS = ("subject", "status_before", "status_after")  # of a boundary
UNKNOWN = -1  # num_frames of a record that was not decoded

# Bytes that may stand in a key as they are. Not "." (webdataset cuts member names there), "/", "%" or "\".
_PLAIN = re.compile(rb"[ -~]")
_ESCAPED = b"./%\\"


class ShardError(Exception):
    """A record that cannot be read back from its shard. The message names the shard and the bytes."""


class ShardGoneError(ShardError):
    """The shard's file itself is no longer there: nothing is wrong with the record alone."""


def encode_key(key: str) -> str:
    """The name under which a key stands in tar and index: ASCII, percent-encoded where it has to be."""
    return "".join(
        chr(byte) if _PLAIN.match(bytes([byte])) and byte not in _ESCAPED else f"%{byte:02X}"
        for byte in key.encode("utf-8", "surrogatepass")
    )


def decode_key(name: str) -> str:
    """The inverse of `encode_key`; what it never made (a damaged index) comes back as it is."""
    try:
        return unquote(name, errors="surrogatepass")
    except UnicodeDecodeError:
        return name


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def worth(parts: int, records: int, real: int) -> bool:
    """Whether a kind of text is counted by parts: the most of a record are `parts`, those of all `real`. Where a record
    or two have very many, the index would be little but zeros, and lengths are estimated instead."""
    return parts <= FEW_PARTS or (parts <= MOST_PARTS and parts * records <= 8 * real)


def index_dtype(
    key_bytes: int,
    members: Sequence[str],
    questions: bool = False,
    tokens: bool = False,
    counted: Mapping[str, int] | None = None,
) -> np.dtype:
    """One packed row a record. Offsets are bytes from the start of the tar; a member that is absent has -1, 0.

    `questions`: records hold several questions, rows of chat, or boundaries' texts, and a column counts them.
    `tokens`: a column counts the tokens of their annotation text, and `counted` names further ones that count those of
    one kind of text (`counted_texts`): name -> most parts that a record has of it; those that a record lacks have 0.
    """
    columns: list[tuple[Any, ...]] = [
        ("key", f"S{key_bytes}"),  # as encode_key writes it
        ("shard", "<i4"),
        ("offset", "<i8"),  # of the record's first tar header
        ("nbytes", "<i8"),  # up to the end of its last member, padding included
        ("num_frames", "<i4"),  # -1: unknown
        ("fps", "<f8"),  # 0: unknown, as the four below
        ("duration", "<f8"),  # seconds
        ("width", "<i4"),  # pixels, rotation applied
        ("height", "<i4"),
        ("text_length", "<i4"),  # characters of annotation text
        ("decoders", "u1"),  # DECODER_BITS
    ]
    if questions:
        columns.append(("questions", "<i4"))
    if tokens:
        columns.append(("tokens", "<i4"))
    columns += [(f"tokens.{name}", "<i4", (parts,)) for name, parts in sorted((counted or {}).items())]
    for member in members:
        columns += [(f"{member}_offset", "<i8"), (f"{member}_nbytes", "<i8")]
    return np.dtype(columns)


def texts(annotation: Any) -> Iterator[str]:
    """All texts in an annotation, its keys left out."""
    if isinstance(annotation, str):
        yield annotation
    elif isinstance(annotation, Mapping):
        for value in annotation.values():
            yield from texts(value)
    elif isinstance(annotation, Sequence):
        for value in annotation:
            yield from texts(value)


def counted_texts(annotation: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """What a language model may read of an annotation: name of the text -> its parts -> the texts of each part.

    `caption` and `captions.NAME` are one part each; `questions` (question and options) and `dialogues` have one a
    question, `conversations` one a turn, `boundaries` three a boundary, `chat` (question and answer) one a row.
    """
    found = {f"captions.{name}": [[text]] for name, text in _object(annotation.get("captions")).items()}
    if "caption" in annotation:
        found["caption"] = [[annotation["caption"]]]
    questions = _objects(annotation.get("questions"))
    if questions:
        found["questions"] = [[row.get("question"), *_list(row.get("options"))] for row in questions]
    if any("dialogue" in row for row in questions):
        found["dialogues"] = [[row.get("dialogue", "")] for row in questions]
    turns = _objects(annotation.get("conversations"))
    if turns:
        found["conversations"] = [[turn.get("value")] for turn in turns]
    rows = _objects(annotation.get("chat"))
    if rows:
        found["chat"] = [[row.get("question"), row.get("answer")] for row in rows]
    boundaries = _objects(annotation.get("boundaries"))
    if boundaries:
        found["boundaries"] = [[boundary.get(kind, "")] for boundary in boundaries for kind in TEXTS]
    return {name: [[text for text in part if isinstance(text, str)] for part in parts] for name, parts in found.items()}


def count_asked(annotation: Mapping[str, Any]) -> int:
    """Samples that a record holds: its questions, the rows of its chat, or three texts of each of its boundaries."""
    boundaries = len(TEXTS) * len(_list(annotation.get("boundaries")))
    return len(_list(annotation.get("questions"))) or len(_list(annotation.get("chat"))) or boundaries


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [_object(row) for row in _list(value)]


def text_length(annotation: Any) -> int:
    """Characters of all texts in an annotation, its keys not counted."""
    return sum(map(len, texts(annotation)))


def to_json(value: Any, **options: Any) -> bytes:
    """The same bytes for the same value; raises ValueError or TypeError for what JSON cannot hold.

    File names that are not UTF-8 come through (their stray bytes as JSON escapes), so a list of files can be kept.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, **options)
    return text.encode("utf-8", "backslashreplace")
