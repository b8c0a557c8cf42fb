"""Renders the moving-shapes corpus as H.264 mp4 files with annotations (vlm/sources/common_shapes.py says what it is).

    python tools/render_shapes.py --out data/demo/corpus
    python tools/render_shapes.py --out data/demo/corpus --train 1600 --test 192 --sequences 400 --workers 2

A second call with the same arguments returns at once; one after a kill keeps the files that are finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vlm.sources.common_shapes import NUM_CLASSES
from vlm.sources.shapes import render
from vlm.types import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--train", type=int, default=1600, metavar="N", help=f"clips, a multiple of {NUM_CLASSES}")
    parser.add_argument("--test", type=int, default=192, metavar="N", help=f"clips, a multiple of {NUM_CLASSES}")
    parser.add_argument("--sequences", type=int, default=0, metavar="N", help="training videos of several actions")
    parser.add_argument("--sequences-test", type=int, default=None, metavar="N", help="default: a quarter of those")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other videos")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes")
    return parser.parse_args(arguments)


def show(done: int, total: int, *, start: float = time.monotonic()) -> None:
    """One line, rewritten on a terminal; elsewhere ten lines in all."""
    step = max(1, total // 10)
    if sys.stderr.isatty() or done == total or done % step == 0:
        end = "\n" if done == total or not sys.stderr.isatty() else ""
        line = f"\rrendered {done}/{total} videos, {time.monotonic() - start:.0f} s"
        print(line if sys.stderr.isatty() else line.strip(), end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.workers < 1:
        print(f"error: --workers {args.workers}: at least one process renders", file=sys.stderr)
        return 2
    sequences_test = args.sequences // 4 if args.sequences_test is None else args.sequences_test
    try:
        render(
            args.out,
            num_train=args.train,
            num_test=args.test,
            num_sequences_train=args.sequences,
            num_sequences_test=sequences_test,
            seed=args.seed,
            workers=args.workers,
            progress=show,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"moving shapes are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
