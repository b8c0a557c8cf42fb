"""Writes docs/scaling.md: what happens to four recipes on 8, 64, 512 and 4,096 GPUs, computed and simulated, not run.

python tools/scaling.py
python tools/scaling.py --out mine.md --gpus 16,128 copy_gb_per_s=25 restart_seconds=600

`name=value` changes an assumption; the page lists them (vlm/run/scale.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.config import override
from vlm.data.shards import DEFAULT_SHARD_SIZE
from vlm.files import write_text
from vlm.run import failures
from vlm.run.scale import SIMULATED, Assumptions, Case, Files, Reads, run, save, simulate
from vlm.types import UserError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
GPUS = (8, 64, 512, 4096)

CASES = (
    Case(
        "vamos.nextqa_vis_cap",
        "Vamos on LLaMA-3 8B (NExT-QA): adapters in front of a frozen language model, features of frames",
        ((Files("NExT-QA", 3_870, 140_000, 6, parts=34_132), None),),
        tokens=700,
        decode_ms=1,
    ),
    Case(
        "video_llama.pretrain",
        "Video-LLaMA, stage 1 (WebVid-2.5M and 595k images): a Q-Former between frozen EVA and Vicuna-7B, pixels",
        ((Files("WebVid", 2_500_000, 1_800_000, 8), 100.0), (Files("CC3M-595k", 595_375, 90_000, 1), 24.0)),
        tokens=100,
        decode_ms=45,
        overrides=("model.projection_from=none",),
    ),
    Case(
        "vit_llama.ssv2_b",
        "ViT-B on SSv2: the whole model trains, pixels",
        ((Files("SSv2", 168_913, 88_000, 16), None),),
        tokens=0,
        decode_ms=45,
        overrides=("model.init_from=none",),
    ),
    Case(
        "video_chatgpt.breakfast",
        "Video-ChatGPT's variant for Breakfast: the most trained numbers of all recipes, 51 MB of features a record",
        ((Files("Breakfast", 1_460, 2 * 1000 * 25 * 1024, 1000, parts=43_800), None),),
        tokens=300,
        decode_ms=1,
        overrides=("model.init_from=none", "model.projection_from=none"),
    ),
)


# The page -------------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """With so many digits that mean something, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


def amount(nbytes: float) -> str:
    """Bytes in the unit that fits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{number(nbytes / size)} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1000)} ms"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *[list(map(str, row)) for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def data_section(case: Case, about: Assumptions, simulated: dict[int, Reads]) -> str:
    a_second = case.per_gpu / case.step_seconds(about)  # samples, a GPU
    told = (
        f"{number(case.flops / 1e12)} TFLOP a sample: a GPU takes at most {number(a_second)} samples/s, "
        f"{case.per_gpu} a step of {duration(case.step_seconds(about))}. Decoding them keeps "
        f"{number(a_second * case.decode_ms / 1000)} cores a GPU busy.\n\n"
    )
    rows = [
        [
            f"{n:,}",
            f"{case.per_gpu * n:,}",
            number(len(case.stream) / (case.per_gpu * n)),
            number(n * a_second),
            f"{amount(n * a_second * reads.nbytes)}/s",
            f"{number(reads.shards)} of {reads.of:,}",
            f"{reads.most:,}",
            f"{reads.idle:,}",
        ]
        for n, reads in simulated.items()
    ]
    head = ["GPUs", "samples a step", "steps an epoch", "reads/s", "bytes read", "shards a step touches"]
    most = max(simulated.values(), key=lambda reads: reads.positions)
    processes = about.gpus_per_node * (1 + case.recipe.data.workers)
    held = max(reads.held for reads in simulated.values())
    memory = f"; the order holds {amount(held)} in each of its {processes} processes.\n"
    told += reading(case, about, most.nbytes) + memory + "\n"
    return told + table([*head, "reads of the busiest shard", "GPUs idle with the recipe's own batch"], rows)


def reading(case: Case, about: Assumptions, nbytes: float) -> str:
    """Whether the file system keeps up, and what the index takes."""
    whole, count = sum(files.nbytes * files.records for files, _ in case.sets), sum(f.records for f, _ in case.sets)
    rate = case.per_gpu / case.step_seconds(about) * nbytes
    node = about.node_gb_per_s * 1e9 / about.gpus_per_node
    fed = math.floor(about.files_gb_per_s * 1e9 / rate)
    if whole <= about.node_memory_gb * 1e9:
        said = (
            f"fits in a node's memory ({amount(whole)}), but each of n nodes reads a random n-th of it an epoch. Until "
            "it is there, the file system"
        )
    else:
        said = f"does not fit in a node's memory ({amount(whole)}), so the file system"
    short = f", and a node reads too slowly for its GPUs by a factor of {number(rate / node)}" if rate > node else ""
    return (
        f"The set {said} feeds {fed:,} GPUs at most{short}. Index: {count:,} rows of {case.row_bytes} bytes,\n"
        f"{amount(count * case.row_bytes)} mapped once a node, on any number of GPUs"
    )


def save_section(case: Case, gpus: Sequence[int], about: Assumptions) -> str:
    alone = duration(save(case, gpus[0], about).waiting)
    told = (
        f"Checkpoint: {case.trained:,} trained numbers, {amount(case.checkpoint)} of weights and moments. All weights "
        f"together are {amount(case.whole_bytes)} as they are stored; frozen ones are in no checkpoint. If one process "
        f"wrote it while all waited, training would stand still for {alone}.\n\n"
    )
    rows = []
    for n in gpus:
        cost, plan = save(case, n, about), run(case, n, about)
        shares = (plan.effective, plan.simulated, plan.stated, plan.waiting, plan.tenfold)
        rows.append(
            [
                f"{n:,}",
                amount(case.checkpoint / n),
                duration(cost.stall),
                duration(cost.written),
                f"{duration(plan.interval)} ({plan.steps:,} steps)",
                *(f"{share:.2%}" for share in shares),
            ]
        )
    stated = f"every {case.recipe.checkpoint_every:,} steps"
    head = [
        "GPUs",
        "a GPU copies",
        "stall",
        "on disk, read back after",
        "best interval",
        "training (Daly)",
        "simulated",
    ]
    return told + table([*head, stated, "one process writes", "ten times the failures"], rows)


def failure_section(gpus: Sequence[int], about: Assumptions) -> str:
    rows = []
    for n in gpus:
        mean_time = failures.mean_time_between(n, about.failures_per_gpu_hour)
        a_week = failures.WEEK / mean_time
        rows.append([f"{n:,}", duration(mean_time), number(a_week), number(10 * a_week)])
    return table(["GPUs", "between two failures", "failures a week", "at ten times the rate"], rows)


def assumed(about: Assumptions) -> str:
    lines = inspect.getsource(Assumptions).splitlines()
    rows = []
    for field in dataclasses.fields(about):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        rows.append([f"`{field.name}`", f"{getattr(about, field.name):,.4g}", lines[at + 1].strip().strip('"')])
    return table(["name", "value", "what"], rows)


HEADER = """# Scale, on paper and by simulation

Nothing on this page was run on so many GPUs. `python tools/scaling.py` wrote it; each figure is one of three kinds:

- **computed** from the recipes: numbers that train, operations and bytes of a checkpoint, by the models themselves,
  built without memory for weights; rows of the index, by the format;
- **simulated**: which rank reads what, by the code that plans training (`vlm.data.stream`, `plan_step`), for all ranks
  and at least {positions:,} positions; each was on exactly one rank, and no sample came twice in an epoch. "simulated"
  in the tables of checkpoints is a run through 200,000 drawn failures, in which a checkpoint counts once it is on disk;
- **assumed**: the [last table](#assumed), and the sizes of data sets. Give others on the command line:
  `python tools/scaling.py --out mine.md copy_gb_per_s=25 restart_seconds=600`.

A GPU's share of the batch stays what it is on 8 GPUs, so the batch grows with them. Whether a recipe learns the same
then is another question; with its own batch many GPUs have nothing to do, and the tables say how many.

## Failures

{failures}
On few GPUs it is not machines that end runs, but data, hangs and settings ([what a run does then](training.md)). On
{most:,} a run ends by itself after {between} on average, so it has to go on by itself.

## How to read the tables

*stall*: how long training stands still at a save. Each rank copies its part to host memory; then it is written, read
back and compared while training goes on. *best interval*: Daly's, but no shorter than that writing. Then the share of
time that is training and not lost again, with {restart} for each restart: by Daly's formula; simulated; at the
recipe's `checkpoint_every`; if one process wrote everything while all waited, at the best interval for that; and with
ten times the failures. Bytes are decimal.

## What follows

- **Reading comes first.** Frozen towers and small heads take samples faster than a shared file system gives them, long
  before checkpoints or failures matter. The page cache of one node has a set that fits from the second epoch on; each
  of 64 nodes still reads 63 of 64 samples for the first time then. So copy shards to memory or disks of the nodes
  before, or read features computed before, if they are smaller (the 51 MB of Breakfast's are not).
- **A small set in few shards** is read by all GPUs from the same files: write more and smaller ones
  (`tools/make_shards.py --shard-size`). Nothing else needs as many shards as there are readers: the plan is over
  samples, not over shards.
- **Adapters save for nothing.** What trains is small and shared out, so a checkpoint every few minutes costs less than
  what a failure would lose. On many GPUs set `checkpoint_every` to the best interval.
- **The rest of what is lost is restarts**: at thousands of GPUs they take more than saves and repeated steps together.
"""


def page(gpus: Sequence[int], about: Assumptions) -> str:
    """The whole page."""
    parts = [
        HEADER.format(
            positions=SIMULATED,
            failures=failure_section(gpus, about),
            restart=duration(about.restart_seconds),
            most=max(gpus),
            between=duration(failures.mean_time_between(max(gpus), about.failures_per_gpu_hour)),
        )
    ]
    for case in CASES:
        simulated = {n: simulate(case, n) for n in gpus}
        sets = ", ".join(f"{files.name}: {amount(files.nbytes)} a read" for files, _ in case.sets)
        parts += [
            f"## `{case.recipe_name}`\n\n{case.title}. {sets}.\n\n",
            data_section(case, about, simulated),
            save_section(case, gpus, about),
        ]
    sizes = ", ".join(f"{len(files):,} records of {files.name}" for case in CASES for files, _ in case.sets)
    parts.append(f"## Assumed\n\n{assumed(about)}\nData: {sizes}, in shards of {amount(DEFAULT_SHARD_SIZE)}.\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (default: docs/scaling.md)")
    parser.add_argument("--gpus", default="", metavar="N,N", help="numbers of GPUs (default: 8,64,512,4096)")
    parser.add_argument("assumptions", nargs="*", metavar="name=value", help="other assumptions")
    args = parser.parse_args(arguments)
    try:
        if args.out is None and (args.gpus or args.assumptions):
            raise UserError(
                "docs/scaling.md holds the figures of the stated assumptions: give others another --out FILE"
            )
        gpus = [_count(text) for text in args.gpus.split(",")] if args.gpus else GPUS
        text = page(gpus, _possible(override(Assumptions(), args.assumptions)))
        write_text(args.out or PAGE, text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out or PAGE}")
    return 0


def _possible(about: Assumptions) -> Assumptions:
    """The same, where no value is impossible."""
    for field in dataclasses.fields(about):
        value, may_be_none = getattr(about, field.name), field.name in ("agree_seconds", "restart_seconds")
        if value < 0 or (value == 0 and not may_be_none):
            raise UserError(f"{field.name}={value:g}: give a number {'from 0 on' if may_be_none else 'above 0'}")
    return about


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"--gpus: {text!r} is no number of GPUs; for example --gpus 16,128")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
