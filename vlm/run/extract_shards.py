"""What a frozen encoder makes of the videos of a shard set, as members of the same records in a new set.

Each process builds shards of the new set whole, one after the other: every shard is made of the shard of the same
number alone, with batches of its own, so that its bytes are the same whoever builds it. A killed run goes on with the
shards that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlm.data.features import tensor_bytes
from vlm.data.shard_derive import Added, Derived
from vlm.data.shard_set import ShardSet
from vlm.distributed import World, from_main, gather_objects
from vlm.run.encode import Work, encode
from vlm.types import UserError

Progress = Callable[[int, int, int], None]  # records done, of how many, frames done: of this process


def extract_shards(
    source: ShardSet,
    out: Path,
    work: Work,
    *,
    tensors: Mapping[str, Mapping[str, Any]],
    keep: Collection[str],
    world: World,
    max_failed: float,
    progress: Progress,
) -> dict[str, Any]:
    """Make the set in `out`. Returns its manifest, in every process. Called by all processes of `world` alike.

    Records without video go along as they are; those whose video cannot be read are left out, with their reasons.

    Args:
        work: its reader takes rows of `source`.
        tensors: name of each tensor that the encoder gives -> what decides over it: goes into the manifest.
        keep: members of the source that go along.
        max_failed: share of the records that may be left out.

    Raises UserError as `Derived` does, and for numbers that the dtype cannot hold.
    """
    before = source.manifest["arguments"].get("tensors", {})
    made = {**{name: said for name, said in before.items() if f"{name}.safetensors" in keep}, **tensors}
    derived = Derived(source, out, arguments={"tensors": made}, keep=keep)
    if from_main(world, lambda: derived.is_complete):
        return ShardSet(out).manifest
    with ExitStack() as stack:

        def begin() -> list[int]:
            stack.enter_context(derived.held())
            return derived.missing()

        share = from_main(world, begin)[world.rank :: world.size]
        added = _Adder(source, [derived.rows(number) for number in share], work, set(tensors), progress)
        for number in share:
            derived.build(number, map(added.of, derived.rows(number)))
        gather_objects(None)  # all have done their share
        return from_main(world, lambda: derived.finish(max_failed))


class _Adder:
    """What is new of each record of some shards, in order. Videos are decoded ahead, batches end with each shard."""

    def __init__(
        self, source: ShardSet, shards: Sequence[range], work: Work, names: Collection[str], progress: Progress
    ) -> None:
        self.source, self.names, self.progress = source, set(names), progress
        has_video = source.index["video_offset"] >= 0
        self.seen, ends = [], set()
        for rows in shards:
            self.seen += [row for row in rows if has_video[row]]
            ends.add(len(self.seen) - 1)
        self.total = sum(map(len, shards))
        self.done = self.frames = self.begun = 0
        self.encoded = encode(self.seen, work, lambda at: source.key(self.seen[at]), ends)

    def of(self, row: int) -> Added:
        self.done += 1
        if self.begun == len(self.seen) or self.seen[self.begun] != row:
            self.progress(self.done, self.total, self.frames)
            return Added({})  # no video
        one = next(self.encoded)
        assert one.at == self.begun
        self.begun += 1
        self.frames += one.frames
        self.progress(self.done, self.total, self.frames)
        if one.failure:
            return Added({}, one.failure)
        if one.tensors.keys() != self.names:
            raise UserError(
                f"the encoder gave {sorted(one.tensors)} of {self.source.key(row)!r}, not {sorted(self.names)}"
            )
        members = {f"{name}.safetensors": tensor_bytes(name, tensor) for name, tensor in one.tensors.items()}
        return Added(members, warnings=one.warnings)
