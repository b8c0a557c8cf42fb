r"""Compute what a frozen encoder makes of videos, once: for Vamos and its like, Video-LLaMA, LLMVA-GEBC, Video-ChatGPT.

Into one file that tools/make_shards.py puts beside the questions of a dataset:

    python tools/extract_features.py nextqa --root data/nextqa --split train --out data/nextqa/train.safetensors
    python tools/make_shards.py nextqa --root data/nextqa --split train --out data/nextqa/shards/train \
        --annotations data/nextqa/train.csv data/nextqa/train.safetensors

or from a shard set into another, of the same records with the features in the place of their videos:

    python tools/extract_features.py --shards data/webvid/shards --out data/webvid/tokens --encoder eva-qformer \
        --tower path=blip2_pretrained_flant5xxl.pth vision_path=eva_vit_g.pth

or what Video-ChatGPT reads, here as its variant for Breakfast does, with altered copies of each video:

    python tools/extract_features.py breakfast --root data/breakfast --split all --out data/breakfast/clip.safetensors \
        --encoder clip-vit-l14 --layout breakfast --augment flip bright

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
from typing import Any

from vlm import recipe as recipes
from vlm.config import override
from vlm.data.feature_files import FEATURES, FeatureFiles, beside, write_published
from vlm.data.frame_readers import RateReader
from vlm.data.frame_variants import VARIANTS
from vlm.data.shards import ShardSet
from vlm.distributed import World, alone, from_main, join, leave
from vlm.models import encoders, glimpse
from vlm.models.encoders import Chosen
from vlm.models.eva import TowerConfig
from vlm.models.frame_encoders import States, clip_sizes
from vlm.run.encode import Work
from vlm.run.extract import Listing, extract, list_source, sample_frames
from vlm.run.extract_shards import extract_shards
from vlm.run.progress import ProgressLine
from vlm.sources.common_loading import available_sources, load_source
from vlm.types import UserError

DEMO, CLIP, TOWER = "demo", "clip-vit-l14", "eva-qformer"
CLIP_FOLDER = "pretrained/clip-vit-large-patch14"
POOLED, STATES = "video-chatgpt", "breakfast"  # layouts
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
    add("--layout", choices=(POOLED, STATES),
        help="of CLIP: clip_pooled, means over space and over time of at most 100 frames' patches; or the class tokens "
        "of 1000 frames, clip_states of several layers, clip_cls of one")  # fmt: skip
    add("--layers", nargs="+", default=[], metavar="A-B|N",
        help=f"of --layout {STATES}: which states, 0 the embeddings (default: all)")  # fmt: skip
    add("--resize", choices=("nearest", "clip"), default=None,
        help="of CLIP: the whole picture stretched to its square, as published for the layouts, or its own short side "
        "and centre crop (default: nearest with a layout, else clip)")  # fmt: skip
    add("--augment", nargs="+", default=[], choices=(*VARIANTS, "all"), metavar="NAME",
        help=f"of a layout: altered copies too, as NAME_flip and its like: {', '.join(VARIANTS)}; all")  # fmt: skip
    add("--recipe", metavar="NAME",
        help="whose inputs say which features: names, layout, numbers; of the tower also model.tower")  # fmt: skip
    add("--tower", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help=f"of {TOWER}: fields of model.tower, such as path=… and vision_path=…")  # fmt: skip
    add("--name", help="what the features are called (default: features; q_former, the recipe's inputs.features; "
        "clip_cls, clip_patches, clip_pooled, clip_states)")  # fmt: skip
    add("--fps", type=float, default=None,
        help="frames a second, not of the tower (default: as published, 1; TVQA 3; shapes 4)")  # fmt: skip
    add("--frames", type=int, default=None, metavar="N",
        help="frames of a video, evenly spread, in the place of --fps (default: the recipe's, the layout's; "
        f"of {TOWER} 8)")  # fmt: skip
    add("--precision", choices=encoders.DTYPES, default=None,
        help="the encoder computes in (default: float32; with --recipe, its model.tower.dtype)")  # fmt: skip
    add("--dtype", choices=encoders.DTYPES, default=None,
        help=f"the features are stored in (default: float16; {TOWER}: bfloat16)")  # fmt: skip


def start() -> World:
    """This process among those that a starter made; one alone needs no process group."""
    if any(name in os.environ for name in _STARTED_TOGETHER):
        return join(timeout_minutes=7 * 24 * 60)  # the first waits for the last at the end
    return alone()


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
    other = f"--encoder {options.encoder}"
    layout = options.layout and f"--layout {options.layout}"
    recipe = options.recipe and f"--recipe {options.recipe}"
    of_clip = "" if _is_clip(options) else other
    wrong = _first(
        options,
        **dict.fromkeys(("source", "root", "split", "annotations", "pth"), "--shards" if options.shards else ""),
        keep_video="" if options.shards else "a SOURCE",
        tower="" if options.encoder == TOWER else other,
        fps=(other if options.encoder == TOWER else "") or layout or ("--frames" if options.frames else ""),
        states=of_clip or layout or recipe,
        layout=of_clip or recipe,
        layers="" if options.layout == STATES else layout or recipe or other,
        resize=of_clip,
        augment=of_clip or ("" if layout or recipe else f"{other} without a layout"),
    )
    if wrong:
        raise UserError(wrong)


def _first(options: argparse.Namespace, **hindrances: str | None) -> str:
    """The first option that is given though something that is given too leaves it without meaning."""
    for name, other in hindrances.items():
        if other and getattr(options, name):
            shown = "SOURCE" if name == "source" else f"--{name.replace('_', '-')}"
            return f"{shown} says nothing beside {other}: leave one of them out"
    return ""


def _is_clip(options: argparse.Namespace) -> bool:
    return options.encoder not in (DEMO, TOWER) and not options.encoder.endswith(".safetensors")


# Encoders ------------------------------------------------------------------------------------------------------------


def open_encoder(options: argparse.Namespace, listing: Listing | None, shards: ShardSet | None, world: World) -> Chosen:
    if options.encoder == TOWER:
        return _open_tower(options, shards)
    source = options.source if shards is None else shards.manifest.get("source")
    known = load_source(source) if source in available_sources() else None
    fps = options.fps or getattr(known, "FEATURE_FPS", 1.0)
    given: dict[str, Any] = {"name": options.name, "dtype": options.dtype, "frames": options.frames}
    if options.encoder == DEMO:
        if listing is None:
            raise UserError("--encoder demo is fitted on the videos of a SOURCE; give its FILE with --shards")
        file = demo_encoder(options, listing, fps, world)
    else:
        file = Path(CLIP_FOLDER if options.encoder == CLIP else options.encoder)
    if _is_clip(options):
        augment = VARIANTS if "all" in options.augment else tuple(dict.fromkeys(options.augment))
        given |= {"precision": options.precision, "resize": options.resize, "augment": augment or None}
    given = {name: value for name, value in given.items() if value is not None}
    if options.recipe:
        found = recipes.load(options.recipe)
        copies = encoders.augmented_of(found.inputs) if _is_clip(options) else ()
        given = ({"augment": copies} if copies else {}) | given
        return encoders.open_for(found.model, found.inputs, file, fps=fps, shards=shards, **given)
    if options.layout:
        name, frames = given.pop("name", None), given.pop("frames", None)
        return encoders.open_layout(file, _layout(options.layout, options.layers, file, name, frames), shards=shards,
                                    **given)  # fmt: skip
    if _is_clip(options):
        return encoders.open_clip(file, fps=fps, states=_states(options), shards=shards, **given)
    return encoders.open_glimpse(file, fps=fps, shards=shards, **given)


def _open_tower(options: argparse.Namespace, shards: ShardSet | None) -> Chosen:
    changes = {"name": options.name, "frames": options.frames, "dtype": options.dtype}
    changes = {name: value for name, value in changes.items() if value is not None}
    fields = [*options.tower, *([f"dtype={options.precision}"] if options.precision else [])]
    if options.recipe:
        found = recipes.load(options.recipe)
        if not isinstance(getattr(found.model, "tower", None), TowerConfig):
            raise UserError(f"--recipe {options.recipe} has no model.tower: give the tower with --tower path=…")
        return encoders.open_for(found.model, found.inputs, tower=fields, shards=shards, **changes)
    if not any(field.startswith(("path=", *_TOWER_SIZES)) for field in options.tower):
        raise UserError(
            f"--encoder {TOWER}: neither --recipe NAME nor --tower path=FILE is given, so its weights would be random "
            "and the features worth nothing. Give the files: --tower path=blip2_pretrained_flant5xxl.pth "
            "vision_path=eva_vit_g.pth"
        )
    return encoders.open_tower(override(TowerConfig(), fields), shards=shards, **changes)


def _layout(layout: str, groups: Sequence[str], folder: Path, name: str | None, frames: int | None) -> encoders.Layout:
    if layout == POOLED:
        return encoders.pooled_layout(name or encoders.POOLED, frames or encoders.POOLED_FRAMES)
    last = clip_sizes(folder).layers
    layers: dict[str, int | tuple[int, ...]] = {}
    for group in groups or (f"0-{last}",):
        first, dash, end = group.partition("-")
        if not first.isdigit() or (dash and not end.isdigit()) or (dash and not int(first) < int(end)):
            raise UserError(f"--layers {group}: expected one layer, such as {last}, or some, such as 0-{last}")
        which = tuple(range(int(first), int(end) + 1)) if dash else int(first)
        called = name or (encoders.STATES if dash else encoders.CLS)
        if called in layers:
            raise UserError(
                f"--layers {' '.join(groups)}: {called} would be two tensors; --name them in calls of their own"
            )
        layers[called] = which
    return encoders.states_layout(layers, frames or encoders.STATES_FRAMES)


def _states(options: argparse.Namespace) -> dict[str, States]:
    if not options.states:
        return {}
    which, _, layer = options.states.partition(":")
    if which not in ("cls", "patches") or not layer.removeprefix("-").isdigit():
        raise UserError(f"--states {options.states}: expected cls:LAYER or patches:LAYER, such as patches:-2")
    return {options.name or f"clip_{which}": States(int(layer), which)}


def demo_encoder(options: argparse.Namespace, listing: Listing, fps: float, world: World) -> Path:
    """The file of the encoder kept beside the output, fitted and written first where it is not there."""
    file = beside(options.out, "encoder.safetensors")

    def fit() -> None:
        if not file.exists():
            options.out.parent.mkdir(parents=True, exist_ok=True)
            reader = RateReader(fps=fps, prepare=glimpse.GlimpseEncoder.prepare)
            paths = list(listing.videos.values())
            glimpse.save(glimpse.fit(sample_frames(paths, reader, options.workers, glimpse.FRAMES_TO_FIT)), file)

    from_main(world, fit)
    return file


# The two ways --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, world: World, line: ProgressLine) -> str:
    """Do what is asked for; returns what to say of it."""
    check(options)
    return (_to_shards if options.shards else _to_file)(options, world, line)


def _work(options: argparse.Namespace, chosen: Chosen, world: World) -> Work:
    return Work(
        encoder=chosen.encoder.to(world.device),
        reader=chosen.reader,
        dtype=encoders.DTYPES[chosen.dtype],
        batch_size=max(1, options.batch_size // chosen.copies),
        workers=options.workers,
    )


def _to_file(options: argparse.Namespace, world: World, line: ProgressLine) -> str:
    listing = from_main(world, partial(list_source, options.source, options.root, options.split, options.annotations))
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
