r"""Compute what a frozen encoder makes of videos, once: for Vamos and its like, Video-LLaMA, LLMVA-GEBC.

Into one file that tools/make_shards.py puts beside the questions of a dataset:

    python tools/extract_features.py nextqa --root data/nextqa --split train --out data/nextqa/train.safetensors
    python tools/make_shards.py nextqa --root data/nextqa --split train --out data/nextqa/shards/train \
        --annotations data/nextqa/train.csv data/nextqa/train.safetensors

or from a shard set into another, of the same records with the features in the place of their videos:

    python tools/extract_features.py --shards data/webvid/shards --out data/webvid/tokens --encoder eva-qformer \
        --tower path=blip2_pretrained_flant5xxl.pth vision_path=eva_vit_g.pth

Under torchrun, deepspeed, srun or mpirun each process takes its share, on its GPU. Killed at any moment, the same
command goes on, also with another number of processes. Videos that cannot be read are in FILE.rejected.json, or in the
new set's manifest.json, with their reasons.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm import recipe as recipes
from vlm.config import override
from vlm.data.feature_files import FEATURES, FeatureFiles, beside, write_published
from vlm.data.frame_readers import RateReader
from vlm.data.frames import CLIP_COLOURS
from vlm.data.look_reader import LookReader
from vlm.data.shards import ShardSet
from vlm.distributed import World, from_main, join, leave
from vlm.models import frame_encoders, glimpse
from vlm.models.eva import TowerConfig
from vlm.models.tower_frames import TowerFrames
from vlm.run.encode import Work
from vlm.run.extract import Listing, extract, list_videos, sample_frames
from vlm.run.extract_shards import extract_shards
from vlm.run.progress import ProgressLine
from vlm.sources.common_loading import available_sources, load_source
from vlm.types import UserError
from vlm.weights import state_hash

DEMO, CLIP, TOWER = "demo", "clip-vit-l14", "eva-qformer"
CLIP_FOLDER = "pretrained/clip-vit-large-patch14"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TOWER_SIZES = ("dim=", "layers=", "query_dim=", "query_layers=")  # who states them wants no published weights
_STARTED_TOGETHER = ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help=f"one of: {', '.join(available_sources())}")
    add("--root", type=Path, help="of SOURCE: folder of the dataset or of its videos")
    add("--split", help="of SOURCE: train, val, test, …: as the dataset names it")
    add("--annotations", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="of SOURCE: annotation files (default: looked for under --root by published names)")  # fmt: skip
    add("--shards", metavar="DIR", help="a shard set with the videos, in the place of SOURCE")
    add("--out", type=Path, required=True, metavar="FILE|DIR",
        help="the .safetensors file to write; with --shards, the folder of the new set")  # fmt: skip
    add("--keep-video", action="store_true", help="with --shards: the new set has the videos too")
    _add_encoders(parser)
    add("--batch-size", type=int, default=64, metavar="N", help="frames, of several videos (default: %(default)s)")
    add("--workers", type=int, default=None, metavar="N",
        help="decoding processes of each process; 0: none (default: its share of the cores)")  # fmt: skip
    add("--save-every", type=float, default=60.0, metavar="SECONDS",
        help="what a kill costs (default: %(default)s); with --shards: the shard that is made")  # fmt: skip
    add("--max-failed", type=float, default=0.05, metavar="SHARE",
        help="share of items without features beyond which nothing is finished (default: %(default)s)")  # fmt: skip
    add("--pth", type=Path, default=None, metavar="FILE", help="also write the layout of published files")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    options = parser.parse_args(arguments)
    if options.workers is None:
        together = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        options.workers = max(1, len(os.sched_getaffinity(0)) // together)
    return options


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("encoder").add_argument
    add("--encoder", default=CLIP, metavar="NAME|DIR|FILE",
        help=f"{CLIP} (in {CLIP_FOLDER}), or a folder of any CLIP as transformers saves it; {TOWER}; or {DEMO}: one "
        "fitted here on the frames themselves, kept as FILE.encoder.safetensors, which is given as FILE for other "
        "splits (default: %(default)s)")  # fmt: skip
    add("--states", metavar="WHICH:LAYER",
        help="of CLIP, in the place of its image_embeds: states of the class token (cls) or of the patches (patches) "
        "in a layer (0 … , or -1 the last, -2 …): patches:-2")  # fmt: skip
    add(
        "--recipe", metavar="NAME", help=f"of {TOWER}: its model.tower, inputs.num_frames, inputs.size, inputs.features"
    )
    add("--tower", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help=f"of {TOWER}: fields of model.tower, such as path=… and vision_path=…")  # fmt: skip
    add("--name", help="what the features are called (default: features; q_former, the recipe's inputs.features; "
        "clip_cls, clip_patches)")  # fmt: skip
    add("--fps", type=float, default=None,
        help="frames a second, not of the tower (default: as published, 1; TVQA 3; shapes 4)")  # fmt: skip
    add("--frames", type=int, default=None, metavar="N",
        help=f"of {TOWER}: frames of a video, evenly spread (default: the recipe's, 8)")  # fmt: skip
    add(
        "--precision",
        choices=_DTYPES,
        default=None,
        help="the encoder computes in (default: float32; with --recipe, its model.tower.dtype)",
    )
    add("--dtype", choices=_DTYPES, default=None,
        help=f"the features are stored in (default: float16; {TOWER}: bfloat16)")  # fmt: skip


def start() -> World:
    """This process among those that a starter made; one alone needs no process group."""
    if any(name in os.environ for name in _STARTED_TOGETHER):
        return join(timeout_minutes=7 * 24 * 60)  # the first waits for the last at the end
    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return World(0, 1, 0, torch.device("cuda", 0) if on_cuda else torch.device("cpu"), "single")


def check(options: argparse.Namespace) -> None:
    """UserError for what cannot be, or does not go together."""
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise UserError(f"--fps {options.fps}: frames a second are more than 0 and at most 1000")
    if options.batch_size < 1 or options.workers < 0 or options.save_every < 0:
        raise UserError(
            f"--batch-size {options.batch_size} must be at least 1, --workers {options.workers} and --save-every "
            f"{options.save_every} at least 0"
        )
    if not 0 <= options.max_failed <= 1:
        raise UserError(f"--max-failed {options.max_failed} is not a share between 0 and 1")
    if options.frames is not None and options.frames < 1:
        raise UserError(f"--frames {options.frames} must be at least 1")
    given = {"SOURCE": options.source, "--root": options.root, "--split": options.split}
    if options.shards is None and not all(given.values()):
        missing = " and ".join(name for name, value in given.items() if not value)
        raise UserError(f"{missing} must be given, or --shards DIR: where are the videos?")
    other = "" if options.encoder == TOWER else f"--encoder {options.encoder}"
    wrong = _first(
        options,
        **dict.fromkeys(("source", "root", "split", "annotations", "pth"), "--shards" if options.shards else ""),
        keep_video="" if options.shards else "a SOURCE",
        **dict.fromkeys(("recipe", "tower", "frames"), other),
        fps="" if other else f"--encoder {TOWER}",
        states="" if _is_clip(options) else f"--encoder {options.encoder}",
    )
    if wrong:
        raise UserError(wrong)


def _first(options: argparse.Namespace, **hindrances: str) -> str:
    """The first option that is given though something that is given too leaves it without meaning."""
    for name, other in hindrances.items():
        if other and getattr(options, name):
            shown = "SOURCE" if name == "source" else f"--{name.replace('_', '-')}"
            return f"{shown} says nothing beside {other}: leave one of them out"
    return ""


def _is_clip(options: argparse.Namespace) -> bool:
    return options.encoder not in (DEMO, TOWER) and not options.encoder.endswith(".safetensors")


def list_source(options: argparse.Namespace) -> Listing:
    items = load_source(options.source).read(options.root, options.split, options.annotations)
    listing = list_videos(items)
    if not listing.videos:
        reasons = "; ".join(row.reason for row in listing.rejected[:3])
        raise UserError(
            f"{options.source}, split {options.split}: no video is found ({reasons or 'nothing is listed'})"
        )
    return listing


# Encoders ------------------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """An encoder, what it is given, and what is said of both."""

    encoder: nn.Module
    reader: RateReader | LookReader
    names: tuple[str, ...]
    dtype: str
    said: dict[str, Any]  # what decides over a frame's features

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Of each tensor, what decides over it."""
        return {
            name: {"encoder": self.said, "frames": self.reader.described(), "dtype": self.dtype} for name in self.names
        }


def open_encoder(options: argparse.Namespace, listing: Listing | None, shards: ShardSet | None, world: World) -> Chosen:
    if options.encoder == TOWER:
        return _open_tower(options, shards)
    source = options.source if shards is None else shards.manifest.get("source")
    known = load_source(source) if source in available_sources() else None
    fps = options.fps or getattr(known, "FEATURE_FPS", 1.0)
    names: tuple[str, ...] = (options.name or FEATURES[0],)
    if options.encoder == DEMO:
        if listing is None:
            raise UserError("--encoder demo is fitted on the videos of a SOURCE; give its FILE with --shards")
        encoder: nn.Module = demo_encoder(options, listing, fps, world)
    elif options.encoder.endswith(".safetensors"):
        encoder = glimpse.load(Path(options.encoder))
    else:
        states = _states(options)
        names = tuple(states) or names
        folder = Path(CLIP_FOLDER if options.encoder == CLIP else options.encoder)
        encoder = frame_encoders.load_clip(folder, states).to(_DTYPES[options.precision or "float32"])
    reader = RateReader(fps=fps, prepare=encoder.prepare, shards=shards)  # type: ignore[arg-type]
    return Chosen(encoder, reader, names, options.dtype or "float16", describe(encoder, options))


def _open_tower(options: argparse.Namespace, shards: ShardSet | None) -> Chosen:
    config, frames, size, name = TowerConfig(), 8, None, "q_former"
    if options.recipe:
        found = recipes.load(options.recipe)
        tower = getattr(found.model, "tower", None)
        if not isinstance(tower, TowerConfig):
            raise UserError(f"--recipe {options.recipe} has no model.tower: give the tower with --tower path=…")
        config, frames, name = tower, found.inputs.num_frames, found.inputs.features
        size = found.inputs.size
    if not options.recipe and not any(field.startswith(("path=", *_TOWER_SIZES)) for field in options.tower):
        raise UserError(
            f"--encoder {TOWER}: neither --recipe NAME nor --tower path=FILE is given, so its weights would be random "
            "and the features worth nothing. Give the files: --tower path=blip2_pretrained_flant5xxl.pth "
            "vision_path=eva_vit_g.pth"
        )
    config = override(config, options.tower)
    if options.precision:
        config = override(config, [f"dtype={options.precision}"])
    for field in ("path", "vision_path"):
        value = getattr(config, field)
        if value is not None and not value.exists():
            raise UserError(f"--tower {field}={value}: there is no such file or folder")
    name = options.name or name
    reader = LookReader(num_frames=options.frames or frames, size=size or config.image_size, shards=shards)
    encoder = TowerFrames(config, name, CLIP_COLOURS)
    return Chosen(encoder, reader, (name,), options.dtype or "bfloat16", encoder.described())


def _states(options: argparse.Namespace) -> dict[str, frame_encoders.States]:
    if not options.states:
        return {}
    which, _, layer = options.states.partition(":")
    if which not in ("cls", "patches") or not layer.removeprefix("-").isdigit():
        raise UserError(f"--states {options.states}: expected cls:LAYER or patches:LAYER, such as patches:-2")
    return {options.name or f"clip_{which}": frame_encoders.States(int(layer), which)}


def demo_encoder(options: argparse.Namespace, listing: Listing, fps: float, world: World) -> nn.Module:
    """The encoder kept beside the output, fitted and written first where it is not there."""
    file = beside(options.out, "encoder.safetensors")

    def fit() -> None:
        if not file.exists():
            options.out.parent.mkdir(parents=True, exist_ok=True)
            reader = RateReader(fps=fps, prepare=glimpse.GlimpseEncoder.prepare)
            paths = list(listing.videos.values())
            glimpse.save(glimpse.fit(sample_frames(paths, reader, options.workers, glimpse.FRAMES_TO_FIT)), file)

    from_main(world, fit)
    return glimpse.load(file)


def describe(encoder: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """What an encoder does to a frame, by its content: the folder's name does not matter."""
    said: dict[str, Any] = {
        "kind": type(encoder).__name__,
        "sha256": state_hash(encoder.state_dict()),
        "width": encoder.width,
    }
    if isinstance(encoder, frame_encoders.ClipFrames):
        said |= {"precision": options.precision or "float32", "mean": encoder.mean, "std": encoder.std}
        said |= {"states": {name: list(which) for name, which in encoder.states.items()}} if encoder.states else {}
    return said


# The two ways --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, world: World, line: ProgressLine) -> str:
    """Do what is asked for; returns what to say of it."""
    check(options)
    return (_to_shards if options.shards else _to_file)(options, world, line)


def _work(options: argparse.Namespace, chosen: Chosen, world: World) -> Work:
    return Work(
        encoder=chosen.encoder.to(world.device),
        reader=chosen.reader,
        dtype=_DTYPES[chosen.dtype],
        batch_size=options.batch_size,
        workers=options.workers,
    )


def _to_file(options: argparse.Namespace, world: World, line: ProgressLine) -> str:
    listing = from_main(world, partial(list_source, options))
    chosen = open_encoder(options, listing, None, world)
    if options.pth is not None and chosen.names != FEATURES:
        raise UserError(f"--pth {options.pth}: published files hold features of frames alone, not {chosen.names[0]}")
    settings = {
        "source": options.source,
        "split": options.split,
        "root": str(options.root),
        "annotations": [str(file) for file in options.annotations],
        "tensors": chosen.tensors,
    }
    counts = extract(
        listing,
        FeatureFiles(options.out, settings, chosen.names),
        _work(options, chosen, world),
        save_every=options.save_every,
        world=world,
        max_failed=options.max_failed,
        progress=_shown(world, line),
    )
    if options.pth is not None and world.is_main:
        write_published(options.out, options.pth)
    return (
        f"{options.out}: features of {counts['kept']} videos, {counts['frames']} frames; {counts['rejected']} of "
        f"{counts['listed']} items rejected, {counts['warnings']} videos with warnings: see "
        f"{beside(options.out, 'rejected.json')}"
    )


def _to_shards(options: argparse.Namespace, world: World, line: ProgressLine) -> str:
    shards = ShardSet(options.shards)
    chosen = open_encoder(options, None, shards, world)
    kept = [name for name in shards.members if name != "video" or options.keep_video]
    manifest = extract_shards(
        shards,
        options.out,
        _work(options, chosen, world),
        tensors=chosen.tensors,
        keep=kept,
        world=world,
        max_failed=options.max_failed,
        progress=_shown(world, line),
    )
    counts, shards_written = manifest["counts"], len(manifest["shards"])
    return (
        f"{options.out}: {counts['records']} records with {', '.join(chosen.names)} in {shards_written} shards, "
        f"{manifest['bytes'] / 2**20:.1f} MiB; {counts['rejected']} of {counts['listed']} rejected, "
        f"{counts['warnings']} warnings: see {options.out / 'manifest.json'}"
    )


def _shown(world: World, line: ProgressLine) -> Any:
    note = f" (process 1 of {world.size})" if world.size > 1 else ""

    def show(done: int, total: int, frames: int) -> None:
        if world.is_main and total:
            line("encode", done, total, frames, "frames", note)

    return show


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    line = ProgressLine("videos")
    world: World | None = None
    try:
        world = start()
        said = run(options, world, line)
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
        print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
