"""The command lines of launch/train.py and launch/evaluate.py: what is wrong with them is told in one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from vlm.config import describe, to_dict
from vlm.recipe import Recipe, load, names
from vlm.types import UserError

_TRAIN_EXAMPLES = """\
examples:
  deepspeed --num_gpus 2 launch/train.py --deepspeed_config ds_configs/cpu.json --recipe vit_llama.demo
  deepspeed launch/train.py --deepspeed_config ds_configs/zero2.json --recipe vit_llama.ssv2_s_llama \\
      data.shards=data/ssv2/train eval.shards=data/ssv2/val model.llama.path=pretrained/llama/7B
  python launch/train.py --deepspeed_config ds_configs/cpu.json --recipe vit_llama.demo steps=20 run_dir=runs/try

key=value changes any field of the recipe (steps=N seed=N run_dir=DIR checkpoint_every=N optim.lr=1e-4 …).
The same command again continues the run from its last checkpoint."""


def _parser(what: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=what, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="this page")
    parser.add_argument("--help-all", action="store_true", help="every field of the chosen recipe")
    parser.add_argument("--recipe", metavar="NAME", help="for example vit_llama.demo")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="hardware settings, see ds_configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the recipe and the DeepSpeed dict, then stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    return parser


def train_main(arguments: list[str] | None = None) -> int:
    """launch/train.py. Returns the exit status."""
    parser = _parser("Train a recipe with DeepSpeed.", _TRAIN_EXAMPLES)
    return _guarded(_train, parser, arguments)


def evaluate_main(arguments: list[str] | None = None) -> int:
    """launch/evaluate.py. Returns the exit status."""
    parser = _parser(
        "Evaluate a checkpoint of a recipe; writes predictions.jsonl, metrics.json and report.html.",
        "examples:\n"
        "  python launch/evaluate.py --recipe vit_llama.demo --checkpoint runs/demo/vit_llama run_dir=runs/demo/again\n"
        "  deepspeed --num_gpus 2 launch/evaluate.py --recipe vit_llama.ssv2_s --checkpoint DIR run_dir=DIR2",
    )
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="a checkpoint, or a run folder (its latest)")
    parser.add_argument(
        "--untrained", action="store_true", help="the weights that training would begin with, instead of a checkpoint"
    )
    return _guarded(_evaluate, parser, arguments)


def _guarded(job: Any, parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
    """Run `job`; what a user can mend is printed as one message, without a traceback."""
    from vlm.distributed import leave

    _quiet_warnings()
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.help or not options.recipe:
            parser.print_help()
            print(f"\nrecipes: {', '.join(names())}")
            return 0 if options.help else 2
        recipe = load(options.recipe, options.overrides)
        if options.help_all:
            _print_fields(options.recipe, recipe)
            return 0
        job(recipe, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 3
    finally:
        leave()
    return 0


def _quiet_warnings() -> None:
    """One process tells, not all; and what a user cannot mend (libraries among themselves) is not told at all."""
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def _print_fields(name: str, recipe: Recipe) -> None:
    print(f"{name}: every field, its value here and what it means\n")
    for path, kind, value, document in describe(recipe):
        print(f"  {path} = {value!s}  ({kind})" + (f"\n      {document}" if document else ""))


def _train(recipe: Recipe, options: argparse.Namespace) -> None:
    from vlm.run.engine import derive, read_hardware

    if not options.deepspeed_config:
        raise UserError("--deepspeed_config FILE is missing; on a laptop: --deepspeed_config ds_configs/cpu.json")
    hardware = read_hardware(options.deepspeed_config)
    if options.dry_run:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if int(os.environ.get("RANK", "0")) == 0:
            derived = derive(hardware, recipe, world_size)
            plan = {"recipe": options.recipe, "config": to_dict(recipe), "world_size": world_size, "deepspeed": derived}
            print(json.dumps(plan, indent=2))
        return
    from vlm.distributed import join
    from vlm.run.train import train

    train(recipe, options.recipe, options.overrides, hardware, join())


def _evaluate(recipe: Recipe, options: argparse.Namespace) -> None:
    from vlm.run.engine import read_hardware

    if (options.checkpoint is None) != options.untrained:
        raise UserError(
            "give either --checkpoint DIR (a checkpoint folder, or a run folder, whose latest is taken) or --untrained"
        )
    hardware = read_hardware(options.deepspeed_config) if options.deepspeed_config else {}
    from vlm.distributed import join
    from vlm.run.standalone import evaluate_checkpoint

    evaluate_checkpoint(recipe, options.recipe, options.overrides, hardware, options.checkpoint, join())
