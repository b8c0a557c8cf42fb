"""What a source lists -> which item goes into which shard, decided before anything is written.

The plan depends on the listed items, their file sizes and the arguments, on nothing else; its digest tells whether a
folder that holds some shards already was begun for the same thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlm.data.shard_format import MAX_KEY_BYTES, encode_key, to_json
from vlm.types import Rejected, Sample, StoredArray, UserError

MAX_SHARD_ITEMS = 50_000
"""Items after which a new shard begins in any case: the rows of one shard are held in memory while it is built."""


class Cut(NamedTuple):
    """The lines of the plan file that make one shard."""

    offset: int
    nbytes: int
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The items themselves are in the plan file: one JSON line an item, {at, key, file, size, annotation} and, where
    there are any, {members, warnings, outside}."""

    arguments: dict[str, Any]
    listed: int  # items that the source listed, rejected ones included
    cuts: tuple[Cut, ...]
    rejected: tuple[dict[str, Any], ...]  # {at, key, file, reason} of the items that were rejected while planning
    digest: str

    @property
    def planned(self) -> int:
        return sum(cut.items for cut in self.cuts)

    @property
    def lines(self) -> str:
        """The name of the plan file, which two plans do not share."""
        return f"plan-{self.digest[:16]}.jsonl"

    def head(self) -> dict[str, Any]:
        """Everything but the items, for JSON. `arguments`, `listed` and `plan` are what the manifest will say."""
        return {"arguments": self.arguments, "listed": self.listed, "plan": self.digest,
                "cuts": [list(cut) for cut in self.cuts], "rejected": list(self.rejected)}  # fmt: skip

    @classmethod
    def from_head(cls, head: Mapping[str, Any]) -> Plan:
        """The inverse of `head`."""
        return cls(arguments=head["arguments"], listed=head["listed"], cuts=tuple(Cut(*cut) for cut in head["cuts"]),
                   rejected=tuple(head["rejected"]), digest=head["plan"])  # fmt: skip


def make_plan(
    items: Iterable[Sample | Rejected],
    arguments: Mapping[str, Any],
    *,
    shard_size: int,
    shard_samples: int | None,
    root: Path | None = None,
    file: BinaryIO | None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Cut the items, in their order, into shards of at most `shard_size` bytes of media and `shard_samples` items.

    `file` takes the plan's lines; None only computes the digest. An item without its file, with a key that another
    has, or with an annotation that JSON cannot hold is rejected here. A video that lies, links followed, outside `root`
    is noted. No item is kept: 2.5 million take 100 MB of memory, to know keys that come twice.
    """
    most = min(shard_samples or MAX_SHARD_ITEMS, MAX_SHARD_ITEMS)
    real_root = None if root is None else Path(os.path.realpath(root))
    digest = hashlib.sha256(to_json(dict(arguments)))
    seen = _Keys()
    rejected: list[dict[str, Any]] = []
    cuts: list[Cut] = []
    start = end = count = media = listed = 0
    for at, item in enumerate(items):
        listed = at + 1
        planned = _planned(at, item, seen, real_root)
        if isinstance(planned, Rejected):
            rejected.append({"at": at, **planned._asdict()})
            digest.update(_line(rejected[-1]))
        else:
            line, size = planned
            digest.update(line)
            if count and (media + size > shard_size or count == most):
                cuts.append(Cut(start, end - start, count))
                start, count, media = end, 0, 0
            if file is not None:
                file.write(line)
            end, count, media = end + len(line), count + 1, media + size
        if progress is not None:
            progress(listed)
    if count:
        cuts.append(Cut(start, end - start, count))
    return Plan(arguments=dict(arguments), listed=listed, cuts=tuple(cuts), rejected=tuple(rejected),
                digest=digest.hexdigest())  # fmt: skip


def _planned(at: int, item: Sample | Rejected, seen: _Keys, root: Path | None) -> tuple[bytes, int] | Rejected:
    """(line of the plan, bytes of media) of an item, or why it cannot become a record."""
    if isinstance(item, Rejected):
        return item
    file = str(item.video) if item.video is not None else ""
    if not item.key or len(encode_key(item.key)) > MAX_KEY_BYTES:
        return Rejected(
            item.key[:80], f"a key of {len(item.key)} letters; 1 to {MAX_KEY_BYTES} bytes are allowed", file
        )
    size = 0
    if item.video is not None:
        try:
            status = item.video.stat()
        except OSError as error:
            return Rejected(item.key, f"{file}: {error.strerror or error}", file)
        if not stat.S_ISREG(status.st_mode):
            return Rejected(item.key, f"{file}: not a file", file)
        size = status.st_size
    try:
        members, more = _members(item)
    except OSError as error:
        return Rejected(item.key, f"{error.filename}: {error.strerror or error}", str(error.filename))
    try:
        row = {"at": at, "key": item.key, "file": file, "size": size + more, "annotation": item.annotation}
        row |= {"members": members} if members else {}
        row |= {"warnings": list(item.warnings)} if item.warnings else {}
        row |= {"outside": True} if root and file and not Path(os.path.realpath(file)).is_relative_to(root) else {}
        line = _line(row)
    except (TypeError, ValueError) as error:
        return Rejected(item.key, f"the annotation cannot be written as JSON: {error}", file)
    other = seen.claim(item.key, at)
    if other is not None:
        return Rejected(item.key, f"duplicate key: item {at} of the list has the key of item {other}", file)
    return line, size + more


class _Keys:
    """Which item has a key: a table of 64-bit hashes and item numbers, 16 bytes a place and at most 2 in 3 taken.

    That two of 2.5 million keys have one hash, and the second is taken for a duplicate, happens in one of 5 million
    such lists, and then always.
    """

    def __init__(self) -> None:
        self._marks, self._items = array("Q", bytes(8 << 12)), array("q", bytes(8 << 12))
        self._taken = 0

    def claim(self, key: str, at: int) -> int | None:
        """The item that has the key already; None: item `at` has it now."""
        name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        mark = int.from_bytes(name, "little") or 1  # 0 is an empty place
        place = self._place(mark)
        if self._marks[place]:
            return self._items[place]
        self._marks[place], self._items[place] = mark, at
        self._taken += 1
        if 3 * self._taken > 2 * len(self._marks):
            self._grow()
        return None

    def _place(self, mark: int) -> int:
        """Where a mark is, or the empty place where it belongs."""
        last = len(self._marks) - 1
        place = mark & last
        while self._marks[place] not in (0, mark):
            place = (place + 1) & last
        return place

    def _grow(self) -> None:
        marks, items = self._marks, self._items
        self._marks, self._items = array("Q", bytes(16 * len(marks))), array("q", bytes(16 * len(marks)))
        for mark, item in zip(marks, items):
            if mark:
                place = self._place(mark)
                self._marks[place], self._items[place] = mark, item


def _members(item: Sample) -> tuple[dict[str, dict[str, str]], int]:
    """(what the plan says of the members besides video and annotation, their bytes); raises OSError."""
    members, size = {}, 0
    for name, source in item.members.items():
        assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", name), f"{name!r} cannot be the name of a member"
        if isinstance(source, StoredArray):
            members[name] = {"file": str(source.file), "tensor": source.name}
            size += source.nbytes
        else:
            members[name] = {"file": str(source)}
            size += source.stat().st_size
    return members, size


def _line(row: dict[str, Any]) -> bytes:
    return to_json(row) + b"\n"


def refuse_other_plan(folder: Path, begun: Mapping[str, Any], plan: Plan) -> None:
    """Raise UserError, saying what differs, unless the folder was begun (or finished) for this plan.

    `begun` holds `arguments`, `listed` and the digest `plan`, as the manifest does.
    """
    if begun.get("plan") == plan.digest:
        return
    differences = _differences(begun.get("arguments", {}), plan.arguments)
    if begun.get("listed") != plan.listed:
        differences.append(f"{begun.get('listed')} items were listed, now {plan.listed}")
    raise _other_plan(folder, differences)


def refuse_other_arguments(folder: Path, begun: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """`refuse_other_plan` without a list: only the arguments are compared."""
    differences = _differences(begun.get("arguments", {}), arguments)
    if differences:
        raise _other_plan(folder, differences)


def read_head(file: Path) -> dict[str, Any] | None:
    """What `Plan.head` said of a folder that was begun; None: there is no such file."""
    try:
        head = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    if "cuts" not in head:
        raise UserError(f"{file} was begun by another version of tools/make_shards.py: delete {file.parent.parent}")
    return head


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _other_plan(folder: Path, differences: list[str]) -> UserError:
    return UserError(
        f"{folder} holds shards of another plan: "
        + ("; ".join(differences) or "the same arguments, but annotations, file sizes or missing files have changed")
        + ". Finished shards would be mixed with other ones: choose another --out, or delete this folder"
    )
