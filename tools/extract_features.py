r"""Compute features of the frames of a dataset's videos, for tools/make_shards.py to put beside its questions.

    python tools/extract_features.py nextqa --root data/nextqa --split train --out data/nextqa/train.safetensors
    python tools/make_shards.py nextqa --root data/nextqa --split train --out data/nextqa/shards/train \
        --annotations data/nextqa/train.csv data/nextqa/train.safetensors

Under torchrun, deepspeed or srun each process takes its share, on its GPU. Killed at any moment, the same command goes
on, also with another number of processes. Videos that cannot be read are in FILE.rejected.json with their reasons.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.data.feature_files import FeatureFiles, beside, write_published
from vlm.distributed import World, from_main, join, leave
from vlm.models import frame_encoders, glimpse
from vlm.run.extract import Listing, Work, extract, list_videos, sample_frames
from vlm.run.progress import ProgressLine
from vlm.sources.common_loading import available_sources, load_source
from vlm.types import UserError
from vlm.weights import state_hash

DEMO = "demo"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STARTED_TOGETHER = ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=f"one of: {', '.join(available_sources())}")
    add("--root", type=Path, required=True, help="folder of the dataset or of its videos")
    add("--split", required=True, help="train, val, test, …: as the dataset names it")
    add("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    add("--annotations", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="annotation files (default: looked for under --root by published names)")  # fmt: skip
    add("--encoder", default="pretrained/clip-vit-large-patch14", metavar="DIR|FILE|demo",
        help="folder of CLIP as transformers saves it (default: %(default)s); or demo: one fitted here on the frames "
        "themselves, kept as FILE.encoder.safetensors, which is given as FILE for other splits")  # fmt: skip
    add("--fps", type=float, default=None, help="frames a second (default: as published, 1; TVQA 3; shapes 4)")
    add("--batch-size", type=int, default=64, metavar="N", help="frames, of several videos (default: %(default)s)")
    add("--workers", type=int, default=None, metavar="N",
        help="decoding processes of each process; 0: none (default: its share of the cores)")  # fmt: skip
    add("--dtype", choices=_DTYPES, default="float32", help="CLIP computes in (default: %(default)s)")
    add("--save-every", type=float, default=60.0, metavar="SECONDS", help="what a kill costs (default: %(default)s)")
    add("--max-failed", type=float, default=0.05, metavar="SHARE",
        help="share of items without features beyond which FILE is not written (default: %(default)s)")  # fmt: skip
    add("--pth", type=Path, default=None, metavar="FILE", help="also write the layout of published files")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    options = parser.parse_args(arguments)
    if options.workers is None:
        together = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        options.workers = max(1, len(os.sched_getaffinity(0)) // together)
    return options


def start() -> World:
    """This process among those that a starter made; one alone needs no process group."""
    if any(name in os.environ for name in _STARTED_TOGETHER):
        return join(timeout_minutes=7 * 24 * 60)  # the first waits for the last at the end
    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return World(0, 1, 0, torch.device("cuda", 0) if on_cuda else torch.device("cpu"), "single")


def check(options: argparse.Namespace) -> None:
    """UserError for numbers that cannot be."""
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise UserError(f"--fps {options.fps}: frames a second are more than 0 and at most 1000")
    if options.batch_size < 1 or options.workers < 0 or options.save_every < 0:
        raise UserError(
            f"--batch-size {options.batch_size} must be at least 1, --workers {options.workers} and --save-every "
            f"{options.save_every} at least 0"
        )
    if not 0 <= options.max_failed <= 1:
        raise UserError(f"--max-failed {options.max_failed} is not a share between 0 and 1")


def list_source(options: argparse.Namespace) -> Listing:
    items = load_source(options.source).read(options.root, options.split, options.annotations)
    listing = list_videos(items)
    if not listing.videos:
        reasons = "; ".join(row.reason for row in listing.rejected[:3])
        raise UserError(
            f"{options.source}, split {options.split}: no video is found ({reasons or 'nothing is listed'})"
        )
    return listing


def demo_encoder(options: argparse.Namespace, listing: Listing, fps: float, world: World) -> nn.Module:
    """The encoder kept beside the output, fitted and written first where it is not there."""
    file = beside(options.out, "encoder.safetensors")

    def fit() -> None:
        if not file.exists():
            options.out.parent.mkdir(parents=True, exist_ok=True)
            prepare = glimpse.GlimpseEncoder.prepare
            paths = list(listing.videos.values())
            glimpse.save(glimpse.fit(sample_frames(paths, fps, prepare, options.workers, glimpse.FRAMES_TO_FIT)), file)

    from_main(world, fit)
    return glimpse.load(file)


def open_encoder(options: argparse.Namespace, listing: Listing, fps: float, world: World) -> nn.Module:
    if options.encoder == DEMO:
        return demo_encoder(options, listing, fps, world)
    if options.encoder.endswith(".safetensors"):
        return glimpse.load(Path(options.encoder))
    return frame_encoders.load_clip(Path(options.encoder)).to(_DTYPES[options.dtype])


def describe(encoder: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """What an encoder does to a frame, by its content: the folder's name does not matter."""
    said: dict[str, Any] = {
        "kind": type(encoder).__name__,
        "sha256": state_hash(encoder.state_dict()),
        "width": encoder.width,
    }
    if isinstance(encoder, frame_encoders.ClipFrames):
        said |= {"dtype": options.dtype, "mean": encoder.mean, "std": encoder.std}
    return said | {"pictures": {type(encoder.prepare).__name__: dataclasses.asdict(encoder.prepare)}}  # type: ignore[call-overload]


def run(options: argparse.Namespace, world: World, line: ProgressLine) -> dict[str, int]:
    check(options)
    listing = from_main(world, partial(list_source, options))
    fps = options.fps or getattr(load_source(options.source), "FEATURE_FPS", 1.0)
    encoder = open_encoder(options, listing, fps, world)
    settings = {
        "source": options.source,
        "split": options.split,
        "root": str(options.root),
        "annotations": [str(file) for file in options.annotations],
        "fps": fps,
        "encoder": describe(encoder, options),
    }
    work = Work(
        encoder=encoder.to(world.device),
        prepare=encoder.prepare,  # type: ignore[arg-type]
        fps=fps,
        batch_size=options.batch_size,
        workers=options.workers,
        save_every=options.save_every,
    )
    note = f" (process 1 of {world.size})" if world.size > 1 else ""

    def show(done: int, total: int, frames: int) -> None:
        if world.is_main and total:
            line("encode", done, total, frames, "frames", note)

    counts = extract(
        listing,
        FeatureFiles(options.out, settings),
        work,
        world=world,
        max_failed=options.max_failed,
        progress=show,
    )
    if options.pth is not None and world.is_main:
        write_published(options.out, options.pth)
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    line = ProgressLine("videos")
    world: World | None = None
    try:
        world = start()
        counts = run(options, world, line)
    except UserError as error:
        line.close()
        if world is None or world.is_main:
            print(f"extract_features: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        line.close()
        print("extract_features: stopped; what is done stays, the same command continues", file=sys.stderr)
        return 130
    finally:
        leave()
    line.close()
    if world.is_main:
        print(
            f"{options.out}: features of {counts['kept']} videos, {counts['frames']} frames; {counts['rejected']} of "
            f"{counts['listed']} items rejected, {counts['warnings']} videos with warnings: see "
            f"{beside(options.out, 'rejected.json')}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
