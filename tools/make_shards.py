r"""Make WebDataset shards, with an index, from a published dataset.

    python tools/make_shards.py ssv2 --root data/ssv2/videos --split train --out data/ssv2/shards/train \
        --annotations data/ssv2/train.json data/ssv2/labels.json

Every clip is decoded: what does not decode goes into manifest.json with its reason, and the index says how many
frames a clip really has and which decoders return the right ones. Killed at any moment, the same command continues.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.data.shards import DEFAULT_SHARD_SIZE, write_shards
from vlm.run.progress import ProgressLine
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
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="processes, each building whole shards (default: all cores, %(default)s)")  # fmt: skip
    parser.add_argument("--no-check", action="store_true",
                        help="do not decode: quicker, but broken clips are only met in training")  # fmt: skip
    parser.add_argument("--shard-size", type=parse_size, default=DEFAULT_SHARD_SIZE, metavar="BYTES",
                        help="media bytes after which a new shard begins, such as 512M (default: 1G)")  # fmt: skip
    parser.add_argument("--shard-samples", type=int, default=None, metavar="N",
                        help="clips after which a new shard begins (default: no limit)")  # fmt: skip
    return parser.parse_args(arguments)


def parse_size(text: str) -> int:
    """Bytes from a number with an optional K, M or G (powers of 1024)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 1G")
    return int(float(found[1]) * _UNITS[found[2]])


def _elsewhere(count: int) -> str:
    return f", {count} of the records from outside --root" if count else ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    progress = ProgressLine()
    try:
        source = load_source(options.source)
        written = write_shards(
            source.read(options.root, options.split, options.annotations),
            options.out,
            arguments={
                "source": options.source,
                "split": options.split,
                "root": str(options.root),
                "annotations": [str(file) for file in options.annotations],
            },
            check=not options.no_check,
            shard_size=options.shard_size,
            shard_samples=options.shard_samples,
            root=options.root,
            workers=options.workers,
            progress=progress,
        )
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
    counts = written.manifest["counts"]
    hours = written.manifest["hours"]
    print(
        f"{'already complete, nothing written: ' if written.already_complete else ''}{counts['records']} records"
        f"{'' if hours is None else f' ({hours:.2f} h)'} in {len(written.manifest['shards'])} shards, "
        f"{written.manifest['bytes'] / 2**20:.1f} MiB; {counts['rejected']} of {counts['listed']} items rejected, "
        f"{counts['warnings']} warnings{_elsewhere(counts.get('outside_root', 0))}: see {written.path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
