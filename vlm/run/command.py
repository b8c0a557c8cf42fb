"""The command lines of launch/train.py, evaluate.py and chat.py: what is wrong with them is told in one line, at once.

Only what a step needs is imported, so that a wrong name or file is told before torch, the models and DeepSpeed load.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from vlm.config import describe, to_dict
from vlm.data.mix import is_elsewhere, parse_mix
from vlm.errors import HUNG, PREEMPTED, DamagedMemory, NoRendezvous, Preempted, Stuck, UserError, is_of_the_machine
from vlm.recipe import Recipe, TrainData, as_continued, check_files, check_inputs, check_name, families, load, names

_TRAIN_PAGE = """\
key=value changes a field of the recipe: steps=N seed=N run_dir=DIR optim.lr=X
The same command again continues the run from its last checkpoint.

examples:
  deepspeed --num_gpus 2 launch/train.py --recipe vit_llama.demo \\
      --deepspeed_config ds_configs/cpu.json steps=20 run_dir=runs/try
  deepspeed launch/train.py --deepspeed_config ds_configs/zero2.json \\
      --recipe vit_llama.ssv2_s_llama model.llama.path=pretrained/llama/7B
"""
_EVALUATE_PAGE = """\
key=value changes a field of the recipe: eval.shards=DIR run_dir=DIR

examples:
  python launch/evaluate.py --recipe vit_llama.demo \\
      --checkpoint runs/demo/vit_llama run_dir=runs/demo/again
  deepspeed --num_gpus 2 launch/evaluate.py --recipe vit_llama.ssv2_s \\
      --checkpoint DIR run_dir=DIR2
"""
_CHAT_PAGE = """\
key=value changes a field of the recipe: inputs.max_length=N

examples:
  python launch/chat.py --recipe video_llama.demo \\
      --checkpoint runs/demo/video_llama \\
      --encoder data/demo/features/train.encoder.safetensors
  python launch/chat.py --recipe video_chatgpt.instruct --checkpoint FILE.bin \\
      --encoder pretrained/clip-vit-large-patch14 --video clip.mp4
"""
# Variables of deepspeed and torchrun, mpirun, srun: rank, number of processes.
_PLACES = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # before Slurm's, which mpirun's daemons pass on
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("PMI_RANK", "PMI_SIZE"),
)
# How long a process waits with an error: the launcher ends it before, where the first process had the same error.
GRACE_SECONDS = 5.0


Job = Callable[[argparse.Namespace, ExitStack], None]


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows examples)")


def _parser(script: str, what: str, page: str, starter: str = "deepspeed [--num_gpus N]") -> _Parser:
    parser = _Parser(
        usage=f"{starter} launch/{script} OPTIONS [key=value …]",
        description=what,
        epilog=page,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="this page")
    parser.add_argument("--help-all", action="store_true", help="every field of the chosen recipe")
    parser.add_argument("--recipe", metavar="NAME", help="for example vit_llama.demo")
    if starter != "python":
        parser.add_argument("--deepspeed_config", metavar="FILE", help="hardware settings, see ds_configs/")
    parser.add_argument("--dry-run", action="store_true", help="print all settings as JSON, then stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    return parser


def train_main(arguments: list[str] | None = None) -> int:
    """launch/train.py. Returns the exit status."""
    return _guarded(_train, _parser("train.py", "Train a recipe with DeepSpeed.", _TRAIN_PAGE), arguments)


def evaluate_main(arguments: list[str] | None = None) -> int:
    """launch/evaluate.py. Returns the exit status."""
    what = "Evaluate a checkpoint; writes predictions.jsonl, metrics.json, report.html."
    parser = _parser("evaluate.py", what, _EVALUATE_PAGE)
    parser.add_argument(
        "--checkpoint", metavar="DIR", type=Path, help="a checkpoint, a run folder (its latest); FILE.bin"
    )
    parser.add_argument("--untrained", action="store_true", help="the weights that training would begin with, instead")
    return _guarded(_evaluate, parser, arguments)


def chat_main(open_encoder: Any, arguments: list[str] | None = None) -> int:
    """launch/chat.py. Returns the exit status.

    Args:
        open_encoder: see vlm.run.chat_command.OpenEncoder.
    """
    what = "Talk with a model about a video: on a page, or in the terminal (--video FILE)."
    parser = _parser("chat.py", what, _CHAT_PAGE, "python")
    add = parser.add_argument
    add("--checkpoint", metavar="RUN|FILE", type=Path, help="a checkpoint, a run folder, or a file of a projection")
    add("--encoder", metavar="DIR|FILE", type=Path, help="CLIP, or a demo's FILE: makes the features that are read")
    add("--fps", type=float, help="of features at a rate: frames a second (default: as the recipe's shards say)")
    add("--video", metavar="FILE", type=Path, help="talk about it in the terminal")
    add("--examples", metavar="DIR", help="videos, or a shard set, to choose from (default: the recipe's test shards)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights (default: bfloat16 on a GPU)")
    add("--host", default="127.0.0.1", help="address that the page is served at (default: %(default)s, this machine)")
    add("--port", type=int, default=7860, help="its port; 0: any (default: %(default)s)")
    add("--max-upload", metavar="MB", type=float, default=512.0, help="largest file (default: %(default)g)")
    add("--max-seconds", metavar="S", type=float, default=1200.0, help="longest video (default: %(default)g)")

    def job(options: argparse.Namespace, at_exit: ExitStack) -> None:
        _check_chat(options)
        recipe = load(options.recipe, options.overrides)
        if options.dry_run:
            _print_plan(options, recipe, checkpoint=None if options.checkpoint is None else str(options.checkpoint))
            return
        from vlm.run import chat_command

        chat_command.chat(options, recipe, open_encoder)

    return _guarded(job, parser, arguments)


def finish(status: int) -> NoReturn:
    """End the process with what `train_main` or `evaluate_main` returned."""
    if "vlm.distributed" not in sys.modules:  # no process group was joined
        sys.exit(status)
    from vlm.distributed import end

    end(status)


def _guarded(job: Job, parser: _Parser, arguments: list[str] | None) -> int:
    """Run `job`; what a user can mend is printed as one message, without a traceback."""
    _quiet_warnings()
    with ExitStack() as at_exit:
        try:
            options = _parse(parser, arguments)
            if options.help or options.help_all or not options.recipe:
                return _help(parser, options)
            check_name(options.recipe)
            job(options, at_exit)
        except UserError as error:
            _tell(f"error: {error}")
            return HUNG if isinstance(error, NoRendezvous | Stuck) else 2
        except Preempted as stopped:
            for number in (signal.SIGUSR1, signal.SIGTERM):  # a second one changes nothing
                signal.signal(number, signal.SIG_IGN)
            if place()[0] == 0:
                sys.stderr.write(f"stopped: {stopped}; the same command goes on\n")
            return PREEMPTED
        except FloatingPointError as error:
            _tell(f"stopped: {error}")
            return HUNG if isinstance(error, DamagedMemory) else 3
        except OSError as error:
            if error.filename is None or error.strerror is None:
                return _crashed()  # no file of the user's: a connection, a queue
            _tell(f"error: {error.filename}: {error.strerror}")
            return 2
        except Exception as error:
            status = _crashed()
            return HUNG if is_of_the_machine(error) else status
    return 0


def _crashed() -> int:
    """Print the traceback of what nobody foresaw; the exit status. Now, and not when the process group has been left:
    then others fail too, and a launcher may end this process before it has told."""
    traceback.print_exc()
    sys.stderr.flush()
    return 1


def _help(parser: _Parser, options: argparse.Namespace) -> int:
    """The page of --help or --help-all, from one process. Returns the exit status."""
    if options.help_all and not options.help:
        if not options.recipe:
            raise UserError(
                f"--help-all lists the fields of one recipe: add --recipe NAME, one of {', '.join(names())}"
            )
        check_name(options.recipe)
        page = _fields(options.recipe, load(options.recipe, options.overrides))
    else:
        page = f"{parser.format_help()}\n{_recipes_in_short()}"
    if place()[0] == 0:
        print(page)
    return 0 if options.help or options.help_all else 2


def _parse(parser: _Parser, arguments: list[str] | None) -> argparse.Namespace:
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(_unknown_option(unknown[0], parser))
    return options


def _unknown_option(argument: str, parser: _Parser) -> str:
    name, _, value = argument.partition("=")
    known = [text for action in parser._actions for text in action.option_strings if action.help != argparse.SUPPRESS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f" (did you mean {close[0]}?)" if close else ""
    field = f"{name.lstrip('-')}={value or 'VALUE'}"
    return f"{argument}: there is no such option{hint}; fields of the recipe are given without dashes: {field}"


def _recipes_in_short() -> str:
    """Modules of recipes with the number of each, and how to see more."""
    known = families()
    counts = ", ".join(f"{module}\N{NO-BREAK SPACE}({len(functions)})" for module, functions in known.items())
    listed = textwrap.fill(f"recipes: {counts}", 80, subsequent_indent="  ").replace("\N{NO-BREAK SPACE}", " ")
    return f"{listed}\n(--recipe {next(iter(known))} names those of one; --help-all names all)"


def place() -> tuple[int, int]:
    """(rank, number of processes) as the launcher's variables tell, before any group is joined."""
    for rank, size in _PLACES:
        if os.environ.get(rank, "").isdecimal() and (rank != "SLURM_PROCID" or "SLURM_STEP_ID" in os.environ):
            return int(os.environ[rank]), int(os.environ.get(size) or 1)
    return 0, int(os.environ.get("WORLD_SIZE") or 1)


def _tell(message: str) -> None:
    """Print an error once for all processes that have it: rank 0 at once; another only if it is still there after a
    while, for then rank 0 did not stop. One write, so that lines of several processes do not mix."""
    rank, _ = place()
    if rank:
        time.sleep(GRACE_SECONDS)
        message = f"rank {rank}: {message}"
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _quiet_warnings() -> None:
    """One process tells, not all; what a user cannot mend (libraries among themselves) is not told at all; and ours are
    plain sentences."""
    if place()[0]:
        warnings.simplefilter("ignore")
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    package = str(Path(__file__).resolve().parents[1])
    as_usual = warnings.formatwarning

    def plain(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if filename.startswith(package):
            return f"warning: {message}\n"
        return as_usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain


def _fields(name: str, recipe: Recipe) -> str:
    lines = [f"{name}: every field, its value here and what it means\n"]
    for path, kind, value, document in describe(recipe):
        lines.append(f"  {path} = {value!s}  ({kind})" + (f"\n      {document}" if document else ""))
    return "\n".join(lines)


def _train(options: argparse.Namespace, at_exit: ExitStack) -> None:
    from vlm.run.hardware import check_sections, read_json

    if not options.deepspeed_config:
        raise UserError("--deepspeed_config FILE is missing; on a laptop: --deepspeed_config ds_configs/cpu.json")
    hardware = read_json(options.deepspeed_config)
    _check_given_folder("data.shards", options)
    recipe = load(options.recipe, options.overrides)
    check_inputs(recipe)
    check_sections(hardware, options.deepspeed_config)
    if options.dry_run:
        from vlm.run.engine import derive

        _print_plan(options, recipe, deepspeed=derive(hardware, recipe, place()[1]))
        return
    check_files(recipe)
    _check_shards("data.shards", recipe.data.shards, recipe.data)
    if recipe.eval is not None and recipe.eval.in_training:
        _check_shards("eval.shards", recipe.eval.shards, recipe.data)
    from vlm.distributed import join, leave
    from vlm.run.train import train

    at_exit.callback(leave)
    train(recipe, options.recipe, options.overrides, hardware, join())


def _evaluate(options: argparse.Namespace, at_exit: ExitStack) -> None:
    from vlm.run.hardware import check_sections, read_json

    if (options.checkpoint is None) != options.untrained:
        raise UserError(
            "give either --checkpoint DIR (a checkpoint folder, or a run folder, whose latest is taken) or --untrained"
        )
    if options.checkpoint is not None and not options.dry_run and not options.checkpoint.exists():
        raise UserError(f"--checkpoint {options.checkpoint}: there is no such file or folder")
    hardware = read_json(options.deepspeed_config) if options.deepspeed_config else {}
    _check_given_folder("eval.shards", options)
    recipe = load(options.recipe, options.overrides)
    if options.checkpoint is not None:
        recipe = as_continued(recipe)
    if recipe.eval is None:
        raise UserError(f"{options.recipe} has no test (eval is none); evaluate a recipe that fine-tunes from it")
    check_inputs(recipe)
    check_sections(hardware, options.deepspeed_config)
    if options.dry_run:
        checkpoint = None if options.untrained else str(options.checkpoint)
        _print_plan(options, recipe, checkpoint=checkpoint, deepspeed=hardware)
        return
    check_files(recipe)
    _check_shards("eval.shards", recipe.eval.shards, recipe.data)
    from vlm.distributed import join, leave
    from vlm.run.standalone import evaluate_checkpoint

    at_exit.callback(leave)
    evaluate_checkpoint(recipe, options.recipe, options.overrides, hardware, options.checkpoint, join())


def _check_chat(options: argparse.Namespace) -> None:
    """What cannot be, before anything is loaded."""
    if not 0 < options.max_upload <= 1e9 or not options.max_seconds > 0:  # neither is true of nan
        raise UserError(
            f"--max-upload {options.max_upload:g} and --max-seconds {options.max_seconds:g} must be above 0, and at "
            "most 1e9 MB"
        )
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: ports are from 0 (any that is free) to 65535")
    if options.video is not None and not options.video.is_file():
        raise UserError(f"--video {options.video}: there is no such file")
    if options.video is not None and options.examples is not None:
        raise UserError("--examples are chosen on the page; with --video FILE there is none: leave one of them out")
    for name in ("checkpoint", "encoder"):
        value = getattr(options, name)
        if value is not None and not value.exists():
            raise UserError(f"--{name} {value}: there is no such file or folder")


def _check_given_folder(name: str, options: argparse.Namespace) -> None:
    """Whether a folder of shards that stands on the command line is there: told before the recipe is imported."""
    given = [text for text in options.overrides if text.startswith(f"{name}=")]
    for path, _ in parse_mix(given[-1].partition("=")[2]) if given and not options.dry_run else ():
        if not is_elsewhere(path) and not Path(path.removeprefix("file://")).is_dir():
            raise UserError(f"{given[-1]}: there is no such folder; make the shards with tools/make_shards.py")


def _check_shards(name: str, mix: str, data: TrainData) -> None:
    """Open the index of each shard set, for the error that it may give."""
    from vlm.run.streams import open_shards

    try:
        for path, _ in parse_mix(mix):
            open_shards(data, path)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _print_plan(options: argparse.Namespace, recipe: Recipe, **more: Any) -> None:
    rank, size = place()
    if rank == 0:
        print(json.dumps({"recipe": options.recipe, "config": to_dict(recipe), "world_size": size, **more}, indent=2))
