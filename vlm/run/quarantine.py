"""The ledger of records that could not be used: counted, written down, and a stop when they are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm.data.loader import MicroBatch
from vlm.data.stream import Stream
from vlm.distributed import World, gather_objects, share_object
from vlm.files import write_text
from vlm.recipe import Recipe
from vlm.types import Incident, UserError


class Quarantine:
    """Unusable records met so far, the same on every rank; rank 0 appends new ones to quarantine.jsonl.

    Args:
        recipe: for its run_dir and data.quarantine_share.
        stream: the training samples.
        known: (shard set, shard, key) of each that is known already (from the checkpoint).
        world: this process among all.
    """

    def __init__(self, recipe: Recipe, stream: Stream, known: Sequence[Sequence[str]], world: World) -> None:
        self._ceiling = recipe.data.quarantine_share
        self._path = recipe.run_dir / "quarantine.jsonl"
        self._world = world
        self._sets = {str(one.samples.shards.path): one.samples.shards for one in stream.sets}
        self._sizes: dict[tuple[str, str], int] = {}  # records of a shard
        self.known: list[tuple[str, str, str]] = [(self._place(one[0]), one[1], one[2]) for one in known]
        if world.is_main:
            self._forget_lost_work()

    def add(self, micro_batches: Sequence[MicroBatch], step: int) -> None:
        """Take note of what this step's loading met. Collective: for steps in which a rank met something (`met`).

        Raises:
            UserError: the share of unusable records of a shard exceeds data.quarantine_share.
        """
        mine = met(micro_batches)
        gathered = gather_objects(mine)
        incidents: list[Incident] = share_object([i for part in gathered for i in part] if gathered else None)
        known = set(self.known)
        new = {_name(incident): incident for incident in incidents if _name(incident) not in known}
        self.known += new
        if self._world.is_main and new:
            with self._path.open("a") as stream:
                for incident in new.values():
                    stream.write(json.dumps({**incident._asdict(), "step": step + 1}) + "\n")
                    print(f"quarantined {incident.key} ({incident.shard}): {incident.reason}", flush=True)
        self._check_ceiling()

    def _place(self, path: str) -> str:
        """Where a shard set is now: it may have moved since it was noted. As noted, where that cannot be told."""
        if path in self._sets:
            return path
        alike = [one for one in self._sets if len(self._sets) == 1 or Path(one).name == Path(path).name]
        return alike[0] if len(alike) == 1 else path

    def _check_ceiling(self) -> None:
        bad_ones = Counter((path, shard) for path, shard, _ in self.known if path in self._sets)
        for (path, shard), bad in bad_ones.items():
            size = self._records(path, shard)
            if bad > self._ceiling * size:
                raise UserError(
                    f"{path}/{shard}: {bad} of {size} records ({bad / size:.1%}) cannot be used, more than "
                    f"data.quarantine_share={self._ceiling:.1%} of a shard allows; the list with reasons is "
                    f"{self._path} (tools/doctor.py ledger FILE tries them again). Mend the shards "
                    "(tools/make_shards.py without --no-check leaves such files out) or raise the share"
                )

    def _records(self, path: str, shard: str) -> int:
        """How many records a shard holds."""
        if (path, shard) not in self._sizes:
            shards = self._sets[path]
            there = np.asarray(shards.index["shard"]) == _number(shard)
            self._sizes[path, shard] = max(1, int(np.count_nonzero(there)))
        return self._sizes[path, shard]

    def _forget_lost_work(self) -> None:
        """Drop lines of work after the checkpoint: it is done again and will meet the same records."""
        if not self._path.is_file():
            return
        kept, known = [], set(self.known)
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
                if (self._place(row["shards"]), row["shard"], row["key"]) in known:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self._path, "".join(kept))


def met(micro_batches: Sequence[MicroBatch]) -> list[Incident]:
    """What loading these micro-batches met."""
    return [incident for item in micro_batches if item.weight for incident in item.batch.incidents]


def _name(incident: Incident) -> tuple[str, str, str]:
    return incident.shards, incident.shard, incident.key


def _number(shard: str) -> int:
    """The number of a shard from its name (vlm.data.shard_format.shard_name)."""
    return int(shard.removeprefix("shard-").removesuffix(".tar"))
