r"""Make WebDataset shards, with an index, from a published dataset.

    python tools/make_shards.py ssv2 --root data/ssv2/videos --split train --out data/ssv2/shards/train \
        --annotations data/ssv2/train.json data/ssv2/labels.json

Every clip is decoded: what does not decode goes into manifest.json with its reason, and the index says how many
frames a clip really has and which decoders return the right ones. Killed at any moment, the same command continues.

On several machines, with the same bytes out: under `mpirun -n 16` (a process a rank), or as a Slurm array
(slurm/make_shards.sbatch), whose tasks build a share of the shards each.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from vlm.data.shard_ranks import count_ranks, mpi_ranks
from vlm.data.shards import DEFAULT_SHARD_SIZE, Reencode, Task, Written, write_shards
from vlm.run.progress import ProgressLine
from vlm.sources.common_features import open_tensor_files, with_tensors
from vlm.sources.common_loading import available_sources, load_source
from vlm.types import UserError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help=f"one of: {', '.join(available_sources())}")
    parser.add_argument("--root", type=Path, required=True, help="folder of the videos")
    parser.add_argument("--split", required=True, help="train, val, test, …: as the dataset names it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--annotations", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
                        help="annotation files (default: looked for under --root by published names)")  # fmt: skip
    parser.add_argument("--features", nargs="+", action="extend", default=[], metavar="FILE|NAME=FOLDER",
                        help="tensors that go beside the records of any source: a file of tools/extract_features.py, "
                             "or a folder of files KEY.npy")  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, metavar="N",
                        help="processes, each building whole shards (default: cores; mpirun: one a rank)")  # fmt: skip
    parser.add_argument("--no-check", action="store_true",
                        help="do not decode: quicker, but broken clips are only met in training")  # fmt: skip
    parser.add_argument("--shard-size", type=parse_size, default=DEFAULT_SHARD_SIZE, metavar="BYTES",
                        help="media bytes after which a new shard begins, such as 512M (default: 1G)")  # fmt: skip
    parser.add_argument("--shard-samples", type=int, default=None, metavar="N",
                        help="clips after which a new shard begins (default: no limit)")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, default=None, metavar="FILE",
                        help="count the tokens of annotation text by this tokenizer.model or Hugging Face folder, "
                             "into the index")  # fmt: skip
    _add_reencoding(parser)
    _add_tasks(parser)
    options = parser.parse_args(arguments)
    if not options.reencode:
        given = [name for name in _REENCODING if getattr(options, name) is not None]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} says how to --reencode, which is not asked for")
    return options


_REENCODING = ("short_side", "gop", "fps", "crf")


def _add_reencoding(parser: argparse.ArgumentParser) -> None:
    default = Reencode()
    group = parser.add_argument_group("encoding again", "H.264 in mp4, without sound; still pictures stay as they are")
    group.add_argument("--reencode", action="store_true", help="encode clips again, for quick access to any frame")
    group.add_argument("--short-side", type=int, metavar="PIXELS",
                       help=f"smaller clips are kept; 0: all are (default: {default.short_side})")  # fmt: skip
    group.add_argument("--gop", type=int, metavar="FRAMES",
                       help=f"from one key frame to the next (default: {default.gop})")  # fmt: skip
    group.add_argument("--fps", type=float, metavar="RATE",
                       help="at most so many frames a second (default: all frames)")  # fmt: skip
    group.add_argument("--crf", type=int, help=f"quality, lower is better and larger (default: {default.crf})")


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "one of several jobs", "in a Slurm array its variables say so; the task that finishes last writes the index"
    )
    group.add_argument("--task", type=int, metavar="I", help="build the I-th share of the shards alone, from 0")
    group.add_argument("--tasks", type=int, metavar="N", help="how many shares; 1: the whole set, in an array too")


def find_task(options: argparse.Namespace) -> Task | None:
    """The share of this call: by --task and --tasks, else by the variables of a Slurm array; None: the whole set."""
    index, count = options.task, options.tasks
    if count == 1 and not index:
        return None
    if (index is None) != (count is None):
        raise UserError("--task I and --tasks N belong together: which share of how many")
    if index is None:
        given = os.environ
        if "SLURM_ARRAY_TASK_ID" not in given:
            return None
        first, step = int(given.get("SLURM_ARRAY_TASK_MIN", 0)), int(given.get("SLURM_ARRAY_TASK_STEP", 1))
        count = int(given["SLURM_ARRAY_TASK_COUNT"])
        index, rest = divmod(int(given["SLURM_ARRAY_TASK_ID"]) - first, step)
        if rest or not 0 <= index < count:
            raise UserError(
                f"task {given['SLURM_ARRAY_TASK_ID']} of a Slurm array of {count} tasks from {first} in steps of "
                f"{step}: its numbers have gaps, so it is not known which share this is; use --array=0-{count - 1}, or "
                "--task and --tasks"
            )
    if not 0 <= index < count:
        raise UserError(f"--task {index} --tasks {count}: tasks are counted from 0 to {count - 1}")
    return None if count == 1 else Task(index, count)


def parse_size(text: str) -> int:
    """Bytes from a number with an optional K, M or G (powers of 1024)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 1G")
    return int(float(found[1]) * _UNITS[found[2]])


def _elsewhere(count: int) -> str:
    return f", {count} of the records from outside --root" if count else ""


def write(options: argparse.Namespace, progress: ProgressLine, ranks: Executor | None) -> Written:
    """The call of write_shards that the command line asks for."""
    changes = {name: getattr(options, name) for name in _REENCODING if getattr(options, name) is not None}
    arguments: dict[str, Any] = {
        "source": options.source,
        "split": options.split,
        "root": str(options.root),
        "annotations": [str(file) for file in options.annotations],
    }
    source = load_source(options.source)
    items = source.read(options.root, options.split, options.annotations)
    if notes := source_notes(options):
        arguments["notes"] = notes
    if options.features:
        files = open_tensor_files(options.features)
        items = with_tensors(items, files)
        arguments["tensors"] = {name: said for file in files for name, said in file.tensors.items()}
    return write_shards(
        items,
        options.out,
        arguments=arguments,
        check=not options.no_check,
        shard_size=options.shard_size,
        shard_samples=options.shard_samples,
        root=options.root,
        reencode=Reencode(**changes) if options.reencode else None,
        tokenizer=options.tokenizer,
        workers=options.workers if options.workers is not None else len(os.sched_getaffinity(0)),
        ranks=ranks,
        task=find_task(options),
        progress=progress,
    )


def source_notes(options: argparse.Namespace) -> dict[str, Any]:
    """What a source says of the split as a whole, for the manifest: name -> facts, with a `warning` for the user."""
    say = getattr(load_source(options.source), "notes", None)
    return say(options.root, options.split, options.annotations) if say is not None else {}


def _write_with_ranks(options: argparse.Namespace, progress: ProgressLine) -> Written | None:
    """None: this rank has served rank 0, which reports."""
    if options.workers is not None:
        raise UserError("--workers is for one machine; under mpirun each rank is a process: start more ranks")
    with mpi_ranks() as ranks:
        return write(options, progress, ranks) if ranks is not None else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    progress = ProgressLine()
    try:
        written = write(options, progress, None) if count_ranks() == 1 else _write_with_ranks(options, progress)
    except UserError as error:
        progress.close()
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress.close()
        print(
            f"make_shards: stopped; finished shards stay in {options.out}, the same command continues", file=sys.stderr
        )
        return 130
    progress.close()
    if written is not None:
        for note in written.manifest.get("arguments", {}).get("notes", {}).values():
            print(f"make_shards: {note['warning']}", file=sys.stderr)
        print(summary(written))
    return 0


def summary(written: Written) -> str:
    """What was done, in one line."""
    if written.missing:
        return (
            f"this share is done; {written.missing} shards are for other tasks to build, and the last of them to "
            f"finish writes {written.path}. Should one have failed, submit the same again"
        )
    counts, hours = written.manifest["counts"], written.manifest["hours"]
    return (
        f"{'already complete, nothing written: ' if written.already_complete else ''}{counts['records']} records"
        f"{'' if hours is None else f' ({hours:.2f} h)'} in {len(written.manifest['shards'])} shards, "
        f"{written.manifest['bytes'] / 2**20:.1f} MiB; {counts['rejected']} of {counts['listed']} items rejected, "
        f"{counts['warnings']} warnings{_elsewhere(counts.get('outside_root', 0))}: see {written.path}"
    )


if __name__ == "__main__":
    sys.exit(main())
