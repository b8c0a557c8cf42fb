"""Teach the demo's tiny LLaMA to read, on stories in words alone (vlm/models/text_base.py says how).

    python tools/pretrain_text.py --out data/demo/llama                               # of systems that choose
    python tools/pretrain_text.py --out data/demo/llama_dialogues --speech dialogues  # of systems that write

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

from vlm.models.text_base import TextBaseConfig, dialogue_base, pretrain
from vlm.run.progress import ProgressLine
from vlm.types import UserError


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    default = TextBaseConfig()
    less = dialogue_base()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the model, not there yet")
    parser.add_argument("--speech", choices=("questions", "dialogues"), default="questions",
                        help="what it reads beside videos' words (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tell-steps", type=int,
                        help=f"at most (default: {default.tell_steps}; dialogues: {less.tell_steps})")  # fmt: skip
    parser.add_argument("--choose-steps", type=int,
                        help=f"default: {default.choose_steps}; dialogues: {less.choose_steps}")  # fmt: skip
    parser.add_argument("--stories", type=int, default=default.stories, help="to learn from (default: %(default)s)")
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
        config = dialogue_base() if options.speech == "dialogues" else TextBaseConfig()
        steps = {name: getattr(options, name) for name in ("tell_steps", "choose_steps")}
        given = {name: number for name, number in steps.items() if number is not None}
        config = replace(config, stories=options.stories, seed=options.seed, **given)
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
