"""Teach the demo's tiny LLaMA to read, on stories in words alone (vlm/models/text_base.py says how).

    python tools/pretrain_text.py --out data/demo/llama                               # of systems that choose
    python tools/pretrain_text.py --out data/demo/llama_dialogues --speech dialogues  # of systems that write
    python tools/pretrain_text.py --out data/demo/llama_segments --speech segments    # … what happens when

Writes a Hugging Face folder with its tokenizer.model, whole or not at all; a finished one of the same settings is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlm.models.text_base import TextBaseConfig, dialogue_base, pretrain, segment_base
from vlm.run.progress import ProgressLine
from vlm.types import UserError

SPEECHES = {"questions": TextBaseConfig(), "dialogues": dialogue_base(), "segments": segment_base()}


def _defaults(name: str) -> str:
    return ", ".join(f"{speech} {getattr(config, name)}" for speech, config in SPEECHES.items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the model, not there yet")
    parser.add_argument("--speech", choices=tuple(SPEECHES), default="questions",
                        help="what it reads beside videos' words (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tell-steps", type=int, help=f"at most (default: {_defaults('tell_steps')})")
    parser.add_argument("--choose-steps", type=int, help=f"default: {_defaults('choose_steps')}")
    parser.add_argument("--stories", type=int, help=f"to learn from (default: {_defaults('stories')})")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other stories and weights")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    line = ProgressLine("steps")
    try:
        if options.threads < 1:
            raise UserError(f"--threads {options.threads}: it must be at least 1")
        torch.set_num_threads(options.threads)
        numbers = {name: getattr(options, name) for name in ("tell_steps", "choose_steps", "stories")}
        given = {name: number for name, number in numbers.items() if number is not None}
        config = replace(SPEECHES[options.speech], seed=options.seed, **given)
        accuracy = pretrain(config, options.out, lambda done, total, how: line("read", done, total, note=f"; {how}"))
    except (UserError, OSError) as error:
        line.close()
        print(f"pretrain_text: {error}", file=sys.stderr)
        return 2
    line.close()
    told = ", ".join(f"{form} {share:.3f}" for form, share in accuracy.items())
    print(f"{options.out}: a LLaMA that has read stories; right on held-out ones: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
