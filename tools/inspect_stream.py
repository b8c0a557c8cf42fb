"""Shows which samples each process of a training run gets at each step: the loader's own schedule, without decoding.

python tools/inspect_stream.py --shards data/demo/shards/train --world 3 --global-batch-size 8 --steps 2
python tools/inspect_stream.py --shards data/webvid:100 --shards data/cc3m:24 --world 4096 --global-batch-size 8192 \\
    --start-step 1000000 --steps 1 --digest
python tools/inspect_stream.py --recipe vamos.demo --world 2 --steps 3 seed=5

Prints one JSON line a step: {"step": k, "epoch": e, "batches": {"0": [keys...], "1": [...]}}, steps counted from 0;
with --pack also {"packs": {"0": [samples in each pack, ...], ...}}. With --digest: {"step": k, "epoch": e,
"batch_digest": d, "digest": c}, where d is what training logs as batch_digest (its lines count steps from 1) and c the
sha256 of the c before and this batch's keys, a chain from --start-step on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vlm.data.loader import MicroPlan, Plans, plan_step
from vlm.data.mix import parse_mix
from vlm.data.order import batch_digest
from vlm.data.shards import ShardSet
from vlm.data.stream import Parted, Source, Stream
from vlm.data.watch import Watch
from vlm.data.workers import Loaded
from vlm.recipe import load
from vlm.types import UserError


class Keys:
    """Loads a micro-batch's keys, and nothing else."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def load(self, plan: MicroPlan, watch: Watch) -> list[list[str]]:
        """The keys of each of its positions."""
        return [self.stream.keys(position) for position in plan.positions]


class Ranks:
    """The micro-batches of all ranks: a step's of rank 0, then of rank 1, …"""

    def __init__(self, start_step: int, stop_step: int, global_batch_size: int, world: int, micro: int) -> None:
        self.steps = range(start_step, stop_step)
        self.arguments = [(global_batch_size, world, rank, micro) for rank in range(world)]

    def __iter__(self) -> Iterator[MicroPlan]:
        for step in self.steps:
            for arguments in self.arguments:
                yield from plan_step(step, *arguments)

    def __len__(self) -> int:
        return sum(len(Plans(self.steps.start, self.steps.stop, arguments)) for arguments in self.arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        for line in inspect(options):
            print(json.dumps(line), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
    return 0


def inspect(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line of output for each step."""
    stream, batch_size = _stream(options)
    _at_least(options, world=1, workers=0, start_step=0, steps=0, micro_batch_size=1)
    if batch_size < 1:
        raise UserError(f"--global-batch-size {batch_size}: it must be at least 1")
    stop = options.start_step + options.steps
    ranks = Ranks(options.start_step, stop, batch_size, options.world, options.micro_batch_size)
    loaded = Loaded(Keys(stream), ranks, options.workers, "--workers")
    chain = ""
    for step in ranks.steps:
        batches: dict[str, list[list[str]]] = {}
        for rank, of_rank in enumerate(ranks.arguments):
            parts = [(next(loaded), plan.weight) for plan in plan_step(step, *of_rank)]
            batches[str(rank)] = [keys for packs, weight in parts if weight for keys in packs]
        line: dict[str, Any] = {"step": step, "epoch": stream.epoch(step * batch_size)}
        if options.digest:
            keys = [key for packs in batches.values() for pack in packs for key in pack]
            chain = hashlib.sha256("\n".join([chain, *keys]).encode()).hexdigest()
            yield {**line, "batch_digest": batch_digest(keys), "digest": chain}
            continue
        line["batches"] = {rank: [key for pack in packs for key in pack] for rank, packs in batches.items()}
        if stream.pack_length is not None:
            line["packs"] = {rank: [len(pack) for pack in packs] for rank, packs in batches.items()}
        yield line


def _stream(options: argparse.Namespace) -> tuple[Stream, int]:
    """The stream that the options or the recipe describe, and its global batch size."""
    mix, seed, batch_size, pack = ",".join(options.shards), options.seed, options.global_batch_size, options.pack
    parted: Parted | None = None
    if options.recipe:
        recipe = load(options.recipe, options.overrides)
        parted = recipe.inputs
        mix = mix or recipe.data.shards
        seed = recipe.seed if seed is None else seed
        batch_size = recipe.global_batch_size if batch_size is None else batch_size
        pack = recipe.data.pack_length if pack is None else pack
    elif options.overrides:
        raise UserError(f"{options.overrides[0]}: key=value changes a field of a recipe: add --recipe NAME")
    if not mix:
        raise UserError("--shards DIR is missing: the folder that tools/make_shards.py wrote; or give --recipe NAME")
    if batch_size is None:
        raise UserError("--global-batch-size N is missing: the samples of a step over all processes")
    if pack is not None and pack < 1:
        raise UserError(f"--pack {pack}: it must be at least 1 token")
    sources = [Source(ShardSet(path), weight) for path, weight in parse_mix(mix)]
    return Stream(sources, seed or 0, parted, pack), batch_size


def _at_least(options: argparse.Namespace, **least: int) -> None:
    for name, value in least.items():
        if getattr(options, name) < value:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be at least {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", action="append", default=[], metavar="DIR[:WEIGHT]", help="a shard set; several make a mix"
    )
    parser.add_argument("--world", type=int, default=1, metavar="W", help="processes that train (all are simulated)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes, really started; 0: none")
    parser.add_argument("--global-batch-size", type=int, metavar="G", help="samples (with --pack: packs) a step")
    parser.add_argument("--micro-batch-size", type=int, default=1 << 30, metavar="B", help="most of them at a time")
    parser.add_argument("--seed", type=int, metavar="S", help="default: the recipe's, or 0")
    parser.add_argument("--start-step", type=int, default=0, metavar="K", help="first step, from 0")
    parser.add_argument("--steps", type=int, default=1, metavar="M", help="how many")
    parser.add_argument("--pack", type=int, metavar="LENGTH", help="pack samples up to so many tokens")
    parser.add_argument("--digest", action="store_true", help="hashes instead of keys")
    parser.add_argument("--recipe", metavar="NAME", help="what a sample is (one of several questions of a record), and "
                        "the defaults of the options above")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe")
    return parser


if __name__ == "__main__":
    sys.exit(main())
