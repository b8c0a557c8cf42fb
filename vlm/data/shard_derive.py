"""A shard set made of another: the same records in the same shards, with members added to them.

    derived = Derived(source, out, arguments={"tensors": …}, keep=("json",))
    with derived.held():                      # one process; any may build meanwhile
        for number in derived.missing():
            derived.build(number, ...)        # what is new of each record, in order
        derived.finish(max_failed=0.05)

Shard i is made of shard i alone, so the bytes do not depend on who built what, and a killed run goes on with the shards
that are missing. The layout, its index and its manifest are those of `write_shards`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm.config import differences
from vlm.data import shard_format as layout
from vlm.data.shard_build import ShardFile, is_finished, sidecar, unfinished_name
from vlm.data.shard_join import join
from vlm.data.shard_plan import Cut, Plan, read_head
from vlm.data.shard_set import ShardSet
from vlm.data.shard_tasks import HEAD, unfinished
from vlm.data.shards import locked, remove_work
from vlm.data.video import container_extension
from vlm.files import replace_file, sync
from vlm.types import UserError

_PLACES = ("key", "shard", "offset", "nbytes")  # columns of the index that say where a record lies


class Added(NamedTuple):
    """What is new of one record."""

    members: dict[str, bytes]
    failure: str = ""  # why there is none: the record is left out; "": none
    warnings: tuple[str, ...] = ()


class Derived:
    """The set in `out` that is made of `source`.

    Args:
        arguments: JSON-able; what decides over the new members.
        keep: members of the source that go along; "json" always does.

    Raises UserError where `out` is the source.
    """

    def __init__(self, source: ShardSet, out: Path, arguments: Mapping[str, Any], keep: Collection[str]) -> None:
        if isinstance(source.path, Path) and out.resolve() == source.path.resolve():
            raise UserError(f"--out {out} is the set that is read: choose another folder")
        self.source, self.out, self.keep = source, out, tuple(keep)
        said = source.manifest["arguments"]
        full = {name: said[name] for name in ("source", "split", "check", "tokenizer") if name in said}
        full |= {"made_of": {"shards": str(source.path), "fingerprint": source.fingerprint, "arguments": said}}
        full |= {"keep": sorted(self.keep), **arguments}
        full = json.loads(layout.to_json(full))
        self._bounds = np.searchsorted(source.index["shard"], np.arange(len(source.shard_names) + 1))
        cuts = tuple(Cut(int(a), 0, int(b - a)) for a, b in zip(self._bounds, self._bounds[1:]))
        digest = hashlib.sha256(layout.to_json(full)).hexdigest()
        self.plan = Plan(arguments=full, listed=len(source), cuts=cuts, rejected=(), digest=digest)

    def rows(self, number: int) -> range:
        """The rows of the source in one shard."""
        return range(int(self._bounds[number]), int(self._bounds[number + 1]))

    @property
    def is_complete(self) -> bool:
        """Whether the set is there already. UserError: another one is."""
        if not (self.out / layout.MANIFEST).exists():
            return False
        self._refuse_others(ShardSet(self.out).manifest["arguments"])
        return True

    def _refuse_others(self, begun: Mapping[str, Any]) -> None:
        if begun != self.plan.arguments:
            found = "; ".join(differences(begun, self.plan.arguments))
            raise UserError(
                f"{self.out} was begun with other settings ({found}; there -> now): features of two kinds would be "
                "mixed. Choose another --out, or remove it"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """This process's alone, until it ends in whatever way. UserError: another holds it, or other settings."""
        with locked(self.out, alone=True) as work:
            head = read_head(work / HEAD)
            if head is None:
                replace_file(work / HEAD, layout.to_json(self.plan.head()))
            else:
                self._refuse_others(head["arguments"])
            yield
        if (self.out / layout.MANIFEST).exists():
            remove_work(self.out)

    def missing(self) -> list[int]:
        """The shards that are yet to be built."""
        return [number for number in range(len(self.plan.cuts)) if not is_finished(self.out, number, self.plan.digest)]

    def build(self, number: int, added: Iterable[Added]) -> None:
        """Write one shard and its sidecar, from what is new of each of its records, in order."""
        temporary = self.out / layout.UNFINISHED / unfinished_name(layout.shard_name(number))
        side: dict[str, list[dict[str, Any]]] = {"records": [], "rejected": [], "warnings": []}
        shard = ShardFile(temporary)
        try:
            for row, new in zip(self.rows(number), added, strict=True):
                key = self.source.key(row)
                name = {"at": row, "key": key, "file": self.source.shard_name(row)}
                if new.failure:
                    side["rejected"].append({**name, "reason": new.failure})
                    continue
                place = shard.add(key, self._members(row, new.members))
                side["records"].append({"key": layout.encode_key(key), **place._asdict(), **self._facts(row)})
                side["warnings"] += [{**name, "warning": warning} for warning in new.warnings]
            digest = shard.finish()
            temporary.replace(self.out / layout.shard_name(number))
            sync(self.out)
        finally:
            shard.abandon()
            temporary.unlink(missing_ok=True)
        summary = {"plan": self.plan.digest, "bytes": shard.nbytes, "sha256": digest, **side}
        replace_file(sidecar(self.out, number), layout.to_json(summary))

    def _members(self, row: int, new: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
        """Column of the index -> (extension, content), in the order of every set: video, others, annotation."""
        record = self.source.read(row, members=[name for name in self.keep if name not in new])
        members: dict[str, tuple[str, bytes]] = {}
        if "video" in self.keep and record.video is not None:
            members["video"] = (container_extension(record.video) or "bin", record.video)
        members |= {name: (name, bytes(content)) for name, content in sorted({**record.members, **new}.items())}
        return members | {"json": ("json", layout.to_json(record.annotation))}

    def _facts(self, row: int) -> dict[str, Any]:
        """What the source's index says of a record, its video's frames and seconds too where the video stays away."""
        entry = self.source.index[row]
        facts: dict[str, Any] = {"counted": {}}
        for column in entry.dtype.names or ():
            if column in _PLACES or column.endswith(("_offset", "_nbytes")):
                continue
            value = entry[column].tolist()
            if column.startswith("tokens."):
                facts["counted"][column.removeprefix("tokens.")] = value
            elif column == "decoders":
                kept = "video" in self.keep
                facts[column] = [name for name, bit in layout.DECODER_BITS.items() if kept and value & bit]
            else:
                facts[column] = value
        return facts

    def finish(self, max_failed: float) -> dict[str, Any]:
        """Write index and manifest, and return this. UserError: more than the share `max_failed` of the records failed,
        or shards are missing."""
        left = unfinished(self.out, range(len(self.plan.cuts)))
        if left:
            raise UserError(f"{self.out}: {len(left)} shards are still to be built: run the same command again")
        sides = (json.loads(sidecar(self.out, number).read_bytes()) for number in range(len(self.plan.cuts)))
        failed = [row for side in sides for row in side["rejected"]]
        if len(failed) > max_failed * self.plan.listed or len(failed) == self.plan.listed:
            reasons = "; ".join(f"{row['key']}: {row['reason']}" for row in failed[:3])
            raise UserError(
                f"{len(failed)} of {self.plan.listed} records have no features, more than the share of {max_failed} "
                f"that --max-failed allows ({reasons}{'; …' if len(failed) > 3 else ''}). {self.out} stays unfinished: "
                "raise --max-failed to go on without them, or remove it to try them again"
            )
        return join(self.out, self.plan)
