"""The ledger of records that could not be used: counted, written down, and a stop when they are too many."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlm.data.loader import MicroBatch
from vlm.data.shards import ShardSet
from vlm.distributed import World, gather_objects, share_object, sum_over_ranks
from vlm.files import write_text
from vlm.recipe import Recipe
from vlm.types import Incident, UserError


class Quarantine:
    """Unusable records met so far, the same on every rank; rank 0 appends new ones to quarantine.jsonl.

    Args:
        recipe: for its run_dir and data.quarantine_share.
        shards: the training records.
        keys: keys already known (from the checkpoint).
        world: this process among all.
    """

    def __init__(self, recipe: Recipe, shards: ShardSet, keys: Sequence[str], world: World) -> None:
        self.keys = list(keys)
        self._ceiling = recipe.data.quarantine_share
        self._path = recipe.run_dir / "quarantine.jsonl"
        self._shards, self._world = shards, world
        if world.is_main:
            self._forget_lost_work()

    def add(self, micro_batches: Sequence[MicroBatch], step: int, problem: UserError | None = None) -> None:
        """Take note of what this step's loading met, on all ranks together.

        Args:
            problem: why this rank could not load the step at all; every rank then stops with it.
        Raises:
            UserError: the share of unusable records exceeds data.quarantine_share, or a rank has a problem.
        """
        mine = [incident for item in micro_batches if item.weight for incident in item.batch.incidents]
        met, stopped = sum_over_ranks([float(len(mine)), float(problem is not None)], self._world.device)
        if stopped:
            told = gather_objects(None if problem is None else str(problem))
            raise UserError(share_object(next(filter(None, told)) if told else None)) from problem
        if not met:
            return
        gathered = gather_objects(mine)
        incidents: list[Incident] = share_object([i for part in gathered for i in part] if gathered else None)
        new = {incident.key: incident for incident in incidents if incident.key not in self.keys}
        self.keys += new
        if self._world.is_main and new:
            with self._path.open("a") as stream:
                for incident in new.values():
                    stream.write(json.dumps({**incident._asdict(), "step": step + 1}) + "\n")
                    print(f"quarantined {incident.key} ({incident.shard}): {incident.reason}", flush=True)
        share = len(self.keys) / len(self._shards)
        if share > self._ceiling:
            raise UserError(
                f"{self._shards.path}: {len(self.keys)} of {len(self._shards)} records ({share:.1%}) cannot be used, "
                f"more than data.quarantine_share={self._ceiling:.1%} allows; the list with reasons is {self._path}. "
                "Mend the shards (tools/make_shards.py without --no-check leaves such files out) or raise the share"
            )

    def _forget_lost_work(self) -> None:
        """Drop lines of work after the checkpoint: it is done again and will meet the same records."""
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["key"] in self.keys:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self._path, "".join(kept))
