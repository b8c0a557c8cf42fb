"""Frozen encoders of frames, opened by what a user says or a recipe needs: with the frames that they are given.

    chosen = open_for(recipe.model, recipe.inputs, Path("pretrained/clip-vit-large-patch14"))
    encode_video_file(Path("a.mp4"), chosen)  # vlm/run/encode_one.py: what tools/extract_features.py stores of a.mp4

The layouts of Video-ChatGPT (arXiv 2306.05424) and its variant for Breakfast are `pooled_layout` and `states_layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlm.config import override
from vlm.data.frame_pixels import Nearest
from vlm.data.frame_readers import Prepare, RateReader
from vlm.data.frame_variants import VARIANTS
from vlm.data.frames import CLIP_COLOURS
from vlm.data.look_reader import LookReader
from vlm.data.shard_set import ShardSet
from vlm.data.spread_reader import SpreadReader
from vlm.models import glimpse
from vlm.models.eva import TowerConfig
from vlm.models.frame_encoders import ClipFrames, States, clip_sizes, load_clip
from vlm.models.tower_frames import TowerFrames
from vlm.models.variant_frames import VariantFrames, variant_name
from vlm.types import UserError
from vlm.weights import state_hash

POOLED, STATES, CLS = "clip_pooled", "clip_states", "clip_cls"
POOLED_FRAMES, STATES_FRAMES = 100, 1000

Resize = Literal["nearest", "clip"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Chosen(NamedTuple):
    """An encoder, what it is given, and what is said of both."""

    encoder: nn.Module
    reader: RateReader | LookReader | SpreadReader
    names: tuple[str, ...]  # of the tensors that it gives
    dtype: str  # they are stored in
    said: dict[str, Any]  # what decides over a frame's features
    variants: Mapping[str, str] = {}  # name of a tensor of altered copies -> which copies

    @property
    def copies(self) -> int:
        """Pictures that a frame becomes: itself and its altered copies."""
        return 1 + len(set(self.variants.values()))

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Of each tensor, what decides over it."""
        frames = self.reader.described()
        return {
            name: {
                "encoder": self.said,
                "frames": frames | ({"altered": self.variants[name]} if name in self.variants else {}),
                "dtype": self.dtype,
            }
            for name in self.names
        }


class Layout(NamedTuple):
    """Which frames of a video CLIP is given, and what is stored of them."""

    num_frames: int
    fill: bool  # shorter videos give frames several times
    states: dict[str, States]
    pools: Mapping[str, int] = {}


def pooled_layout(name: str = POOLED, num_frames: int = POOLED_FRAMES) -> Layout:
    """Video-ChatGPT's: patches of the layer before the last, means over space and over time, (frames + patches, D)."""
    return Layout(num_frames, False, {name: States(-2, "patches")}, {name: num_frames})


def states_layout(layers: Mapping[str, int | tuple[int, ...]], num_frames: int = STATES_FRAMES) -> Layout:
    """The variant's: class tokens of layers, behind CLIP's last norm, (frames, D); of several, (frames, layers, D)."""
    return Layout(num_frames, True, {name: States(which, "cls", normed=True) for name, which in layers.items()})


# Opened by what they are ---------------------------------------------------------------------------------------------


def open_clip(
    folder: Path,
    *,
    fps: float = 1.0,
    frames: int | None = None,
    states: Mapping[str, States] | None = None,
    name: str = "features",
    resize: Resize = "clip",
    precision: str = "float32",
    dtype: str = "float16",
    shards: ShardSet | None = None,
) -> Chosen:
    """CLIP's `image_embeds`, or `states`, of frames at a rate, or of so many."""
    encoder = load_clip(folder, states).to(DTYPES[precision])
    prepare = _prepare(encoder, resize)
    reader, said = _reader(prepare, fps, frames, shards), _described(encoder, precision)
    if states:
        return Chosen(encoder, reader, tuple(states), dtype, said)
    return Chosen(_called(encoder, name), reader, (name,), dtype, said)


def open_layout(
    folder: Path,
    layout: Layout,
    *,
    resize: Resize = "nearest",
    augment: Sequence[str] = (),
    precision: str = "float32",
    dtype: str = "float16",
    shards: ShardSet | None = None,
) -> Chosen:
    """CLIP in a layout.

    Args:
        resize: nearest: the whole picture stretched to CLIP's square, each pixel the nearest, as published: released
            projectors were trained on features of such pictures. clip: as CLIP's own pictures were.
        augment: altered copies (vlm.data.frame_variants) whose tensors are stored too, `NAME_flip` …
    """
    encoder = load_clip(folder, layout.states, layout.pools).to(DTYPES[precision])
    reader = SpreadReader(
        num_frames=layout.num_frames,
        fill=layout.fill,
        prepare=_prepare(encoder, resize),
        augment=tuple(augment),
        shards=shards,
    )
    variants = {variant_name(name, variant): variant for name in layout.states for variant in augment}
    names = (*layout.states, *variants)
    opened = VariantFrames(encoder, augment) if augment else encoder
    return Chosen(opened, reader, names, dtype, _described(encoder, precision), variants)


def open_glimpse(
    file: Path, *, name: str = "features", fps: float = 1.0, frames: int | None = None, dtype: str = "float16",
    shards: ShardSet | None = None,
) -> Chosen:  # fmt: skip
    """The demo's encoder, of frames at a rate, or of so many."""
    encoder = glimpse.load(file)
    reader, said = _reader(encoder.prepare, fps, frames, shards), _described(encoder)
    return Chosen(_called(encoder, name), reader, (name,), dtype, said)


def open_tower(
    config: TowerConfig, *, name: str = "q_former", frames: int = 8, size: int | None = None, dtype: str = "bfloat16",
    shards: ShardSet | None = None,
) -> Chosen:  # fmt: skip
    """Video-LLaMA's tower."""
    for field in ("path", "vision_path"):
        value = getattr(config, field)
        if value is not None and not value.exists():
            raise UserError(f"--tower {field}={value}: there is no such file or folder")
    reader = LookReader(num_frames=frames, size=size or config.image_size, shards=shards)
    encoder = TowerFrames(config, name, CLIP_COLOURS)
    return Chosen(encoder, reader, (name,), dtype, encoder.described())


# Opened for a recipe -------------------------------------------------------------------------------------------------


def open_for(
    model: Any,
    inputs: Any,
    encoder: Path | None = None,
    *,
    fps: float = 1.0,
    tower: Sequence[str] = (),
    shards: ShardSet | None = None,
    **changes: Any,
) -> Chosen:
    """What makes of a video what a recipe's inputs read as stored features.

    Args:
        model, inputs: the recipe's.
        encoder: a folder of CLIP, or a file of `--encoder demo`; None: Video-LLaMA's tower, from `model.tower`.
        fps: where the recipe reads features at a rate (Vamos, Video-LLaMA's demo): frames a second.
        tower: KEY=VALUE, fields of model.tower that are to be others.
        changes: arguments of the function that opens it, that are to be others (precision, resize, augment, dtype, …).
    """
    config = getattr(model, "tower", None)
    if encoder is None:
        if not isinstance(config, TowerConfig):
            raise UserError(
                "this recipe has no model.tower, so its encoder must be said: --encoder, a folder of CLIP or a file "
                "NAME.encoder.safetensors"
            )
        said = {"name": inputs.features, "frames": inputs.num_frames, "size": inputs.size}
        return open_tower(override(config, list(tower)), shards=shards, **{**said, **changes})
    at_rate = not hasattr(inputs, "num_video_tokens") or hasattr(inputs, "num_frames")  # their videos differ in frames
    places = None if at_rate else inputs.num_video_tokens
    name = getattr(inputs, "features", "features")
    if encoder.suffix == ".safetensors":
        chosen = open_glimpse(encoder, shards=shards, **{"name": name, "fps": fps, "frames": places, **changes})
        _check_width(inputs, glimpse.GlimpseEncoder.width, encoder)
    elif places is None:
        if changes.pop("augment", ()):
            raise UserError("these inputs read features of frames at a rate; altered copies are of layouts alone")
        chosen = open_clip(encoder, shards=shards, **{"name": name, "fps": fps, **changes})
    else:
        frames = changes.pop("frames", None)
        chosen = open_layout(encoder, layout_for(inputs, encoder, frames), shards=shards, **changes)
        _check_width(inputs, clip_sizes(encoder).width, encoder)
    return chosen


def layout_for(inputs: Any, folder: Path, frames: int | None = None) -> Layout:
    """The layout that fills `inputs.num_video_tokens` places of `inputs.frame_tokens` vectors each.

    Features called clip_pooled… are the pooled ones; all others are class tokens: of the last layer, or of all.
    UserError: neither fits.
    """
    name, places, vectors, sizes = inputs.features, inputs.num_video_tokens, inputs.frame_tokens, clip_sizes(folder)
    if name.startswith(POOLED):
        if places <= sizes.patches or vectors != 1:
            raise UserError(
                f"{name} has a place for each frame and each of the {sizes.patches} patches of CLIP in {folder}, one "
                f"vector each: inputs.num_video_tokens is {places}, inputs.frame_tokens {vectors}"
            )
        return pooled_layout(name, frames or places - sizes.patches)
    if vectors not in (1, sizes.layers + 1):
        raise UserError(
            f"inputs.frame_tokens is {vectors}, but CLIP in {folder} has {sizes.layers + 1} states a frame: 1 (of the "
            f"last) or {sizes.layers + 1}"
        )
    which = -1 if vectors == 1 else tuple(range(sizes.layers + 1))
    return states_layout({name: which}, frames or places)


def augmented_of(inputs: Any) -> tuple[str, ...]:
    """The altered copies whose features a recipe's inputs read. UserError: there is no such copy."""
    names = getattr(inputs, "augmented", ())
    variants = tuple(name.removeprefix(f"{inputs.features}_") for name in names)
    for name, variant in zip(names, variants, strict=True):
        if variant not in VARIANTS or name == variant:
            raise UserError(f"inputs.augmented: {name} is not {inputs.features}_ and one of {', '.join(VARIANTS)}")
    return variants


def _check_width(inputs: Any, width: int, place: Path) -> None:
    wanted = getattr(inputs, "frame_dim", None)
    if wanted is not None and wanted != width:
        raise UserError(f"{place} gives vectors of {width} numbers, inputs.frame_dim is {wanted}: is it the right one?")


# Parts ---------------------------------------------------------------------------------------------------------------


class _Called(nn.Module):
    """An encoder of one tensor, which gets a name."""

    def __init__(self, encoder: nn.Module, name: str) -> None:
        super().__init__()
        self.encoder, self.name = encoder, name

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        return {self.name: self.encoder(frames)}

    def join(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        join = getattr(self.encoder, "join", None)
        return rows if join is None else {self.name: join(rows[self.name])}


def _called(encoder: nn.Module, name: str) -> nn.Module:
    return encoder if name == "features" else _Called(encoder, name)


def _prepare(encoder: ClipFrames, resize: Resize) -> Prepare:
    side = encoder.prepare.crop
    return Nearest(width=side, height=side) if resize == "nearest" else encoder.prepare


def _reader(prepare: Prepare, fps: float, frames: int | None, shards: ShardSet | None) -> RateReader | SpreadReader:
    if frames is None:
        return RateReader(fps=fps, prepare=prepare, shards=shards)
    return SpreadReader(num_frames=frames, fill=True, prepare=prepare, shards=shards)


def _described(encoder: Any, precision: str = "float32") -> dict[str, Any]:
    """What an encoder does to a frame, by its content: the folder's name does not matter."""
    said: dict[str, Any] = {
        "kind": type(encoder).__name__,
        "sha256": state_hash(encoder.state_dict()),
        "width": encoder.width,
    }
    if isinstance(encoder, ClipFrames):
        said |= {"precision": precision, "mean": encoder.mean, "std": encoder.std}
        states = {name: which.described() for name, which in encoder.states.items()}
        said |= {"states": states} if states else {}
        said |= {"pools": encoder.pools} if encoder.pools else {}
    return said
