r"""Write the Chat JSON that the published converters of Video-ChatGPT and its fork write, their faults kept.

    python tools/fork_chat.py breakfast --root LLM/Breakfast --frames vid_frames_breakfast.json --without valid.txt \
        --out video_chatgpt_training.json

To compare with, or to go on with the fork's own code. For training here `tools/make_shards.py breakfast` reads the same
files, on one axis of time, and repeats are a setting (`inputs.repeats`); a Chat JSON that is there already is read by
`tools/make_shards.py video_instruct`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.files import replace_file
from vlm.sources import common_fork_chat as fork
from vlm.sources.common import read_text
from vlm.sources.common_fork import SALADS_TEST
from vlm.sources.common_json import read_items
from vlm.types import Rejected, UserError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("form", choices=("breakfast", "salads", "instruct"))
    parser.add_argument("--root", type=Path, required=True, metavar="PATH",
                        help="LLM/Breakfast of the fork; a folder of files rgb-01-1; VideoInstruct's JSON")  # fmt: skip
    parser.add_argument("--frames", type=Path, metavar="FILE", help="vid_frames_breakfast.json or vid_frames.json")
    parser.add_argument("--without", type=Path, metavar="FILE",
                        help="videos to leave out: Breakfast's valid.txt (default: none), or for 50Salads a list of "
                             "names (default: the fork's ten)")  # fmt: skip
    parser.add_argument("--repeats", type=int, nargs=2, metavar="N",
                        help="of a video's first question, each other (default: 12 2; 50Salads: 150 90)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.repeats is not None and min(options.repeats) < 0:
        parser.error("--repeats: a number of copies is 0 or more")
    if options.form == "instruct":
        given = [name for name in ("frames", "without", "repeats") if getattr(options, name) is not None]
        if given:
            parser.error(f"--{given[0]} says nothing of the form instruct")
    elif options.frames is None:
        parser.error("--frames FILE is needed: numbers are divided by the frames of a video")
    return options


def exchanges(options: argparse.Namespace) -> Iterator[fork.Exchange]:
    """What is asked and answered, in the order of the rows."""
    if options.form == "instruct":
        return fork.instruct_exchanges(_instruct_rows(options.root))
    frames = fork.read_frames(options.frames)
    without = None if options.without is None else set(read_text(options.without).split())
    repeats = None if options.repeats is None else tuple(options.repeats)
    if options.form == "breakfast":
        return fork.breakfast_exchanges(options.root, frames, without or (), repeats or fork.BREAKFAST_REPEATS)
    chosen = SALADS_TEST if without is None else without
    return fork.salads_exchanges(options.root, frames, chosen, repeats or fork.SALADS_REPEATS)


def _instruct_rows(file: Path) -> Iterator[dict]:
    for item in read_items(file):
        if isinstance(item, Rejected):
            raise UserError(item.reason)
        where, row = item
        lacking = [name for name in ("video_id", "q", "a") if name not in row]
        if lacking:
            raise UserError(f"{where}: there is no {lacking[0]!r}; rows are {{video_id, q, a}}")
        yield row


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        rows = list(fork.chat_json(exchanges(options)))
        replace_file(options.out, json.dumps(rows).encode())
    except (UserError, OSError) as error:
        print(f"fork_chat: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows)} rows about {len({row['id'] for row in rows})} videos: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
