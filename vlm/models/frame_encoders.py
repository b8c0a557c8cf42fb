"""CLIP's image encoder (Radford et al. 2021, https://arxiv.org/abs/2103.00020) as an encoder of frames.

The published features of NExT-QA, STAR, TVQA and their like are its `image_embeds`, not normalised: ViT-L/14, 768 wide.
What its layers hold (`States`) is what other systems read. An encoder of frames is a module with `prepare` (a picture
-> the uint8 picture that it wants) and a `forward` from uint8 pictures to a tensor called `features`, or to several by
name; vlm/models/glimpse.py and vlm/models/tower_frames.py are others. More of the contract: vlm/run/encode.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlm.data.frame_pixels import CentreCrop
from vlm.models import frame_pools
from vlm.types import UserError
from vlm.weights import diff_keys, open_tensors

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

_PARTS = ("vision_model.", "visual_projection.")  # the rest of a CLIP folder reads text
_PROJECTION = _PARTS[1]
_CONSTANT = "vision_model.embeddings.position_ids"  # stored by older versions
_BICUBIC = 3  # Pillow's number


class States(NamedTuple):
    """What layers of CLIP hold."""

    layers: int | tuple[int, ...]  # 0: the embeddings; 1 … the number of layers; -1: the last, -2: the one before it
    tokens: Literal["cls", "patches"]
    normed: bool = False  # through the norm that CLIP has behind its last layer

    def described(self) -> list[Any]:
        """JSON-able."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        return [layers, self.tokens, *(["normed"] if self.normed else [])]


class ClipFrames(nn.Module):
    """`forward`: uint8 (n, crop, crop, 3) -> `image_embeds` (n, width) float32, not normalised to length 1.

    With `states` it gives {name: states of that layer} in their place: of the class token, (n, D), or of all patches,
    (n, patches, D), without the class token; of several layers (n, layers, …). Layers above those are not computed.
    `pools`: of patches, what is kept of a video, instead of the states of all its frames (vlm.models.frame_pools).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        width: int,
        prepare: CentreCrop,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        states: Mapping[str, States] | None = None,
        pools: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.states = dict(states or {})
        self.pools = dict(pools or {})
        self.model = model
        self.width = width
        self.prepare = prepare
        self.mean, self.std = mean, std

    def normalised(self, frames: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) -> (n, 3, H, W) float32 as CLIP reads it."""
        mean, std = (torch.tensor(values, device=frames.device) for values in (self.mean, self.std))
        return ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def forward(self, frames: Tensor) -> Tensor | dict[str, Tensor]:
        pixels = self.normalised(frames).to(next(self.model.parameters()).dtype)
        if not self.states:
            return self.model(pixel_values=pixels).image_embeds.float()
        return self._layers(pixels)

    def _layers(self, pixels: Tensor) -> dict[str, Tensor]:
        """What `states` asks for, and nothing else: of 25 layers all patches would be kept else."""
        vision: Any = self.model.vision_model
        total = len(vision.encoder.layers)
        wanted = {name: _numbers(which.layers, total) for name, which in self.states.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        held = vision.pre_layrnorm(vision.embeddings(pixels))
        last = max(max(numbers) for numbers in wanted.values())
        for number in range(last + 1):
            if number:
                held = vision.encoder.layers[number - 1](held, None)
            for name, which in self.states.items():
                if number in wanted[name]:
                    rows = held[:, 0] if which.tokens == "cls" else held[:, 1:]
                    found[name].append((vision.post_layernorm(rows) if which.normed else rows).float())
        return {
            name: rows[0] if isinstance(self.states[name].layers, int) else torch.stack(rows, 1)
            for name, rows in found.items()
        }

    def pool(self) -> frame_pools.Pool:
        """What takes in the rows of one video (vlm/run/encode.py)."""
        return frame_pools.Pools({name: frame_pools.SpatioTemporal(places) for name, places in self.pools.items()})


def _numbers(layers: int | tuple[int, ...], total: int) -> list[int]:
    """Numbers from 0 of layers that may count from behind."""
    return [layer % (total + 1) for layer in ((layers,) if isinstance(layers, int) else layers)]


def load_clip(
    folder: Path, states: Mapping[str, States] | None = None, pools: Mapping[str, int] | None = None
) -> ClipFrames:
    """The image encoder of a Hugging Face folder of CLIP, on the CPU in float32; with `states`, `pools` see ClipFrames.

    Pictures are resized, cut and normalised as its preprocessor_config.json says, else as CLIP's own. UserError: the
    folder is absent, of another model, lacks a tensor (none is left at random), or asks for what is not done here.
    """
    # Here, since the processes that decode import this file and have no use for it.
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = _read(folder / "config.json")
    if config.get("model_type") == "clip":
        settings = config.get("vision_config") or {}
        settings = settings | {"projection_dim": config.get("projection_dim", settings.get("projection_dim", 512))}
    elif config.get("model_type") == "clip_vision_model":
        settings = config
    else:
        raise UserError(f"{folder}: config.json is of a {config.get('model_type')!r}, not of CLIP (clip-vit-…)")
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings)).eval().requires_grad_(False)
    stored = open_tensors(folder)
    if not any(name.startswith(_PARTS) for name in stored):  # of the image encoder alone, by newer versions
        stored = {f"{_PARTS[0]}{name}": read for name, read in stored.items()}
    stored = {name: read for name, read in stored.items() if name.startswith(_PARTS)}
    stored.pop(_CONSTANT, None)
    state = {name: read() for name, read in stored.items()}
    if states and not any(name.startswith(_PROJECTION) for name in state):
        model.visual_projection = nn.Identity()  # a folder of the image encoder alone has none, and states need none
    diff_keys(state, model.state_dict()).require(f"{folder} as CLIP's image encoder")
    model.load_state_dict(state)
    file = folder / "preprocessor_config.json"
    size = int(model.config.image_size)
    prepare, mean, std = _preprocessing(_read(file) if file.is_file() else {}, size, file)
    total = int(model.config.num_hidden_layers)
    for name, which in (states or {}).items():
        for layer in (which.layers,) if isinstance(which.layers, int) else which.layers:
            if not -1 - total <= layer <= total:
                raise UserError(f"{name}: layer {layer} of an encoder of {total} layers ({folder})")
    width = int(model.config.projection_dim)
    return ClipFrames(model, width=width, prepare=prepare, mean=mean, std=std, states=states, pools=pools)


class Sizes(NamedTuple):
    """Of an image encoder."""

    layers: int
    width: int  # of their states
    patches: int  # of a picture


def clip_sizes(folder: Path) -> Sizes:
    """What the config.json of a folder of CLIP says. UserError: see `load_clip`."""
    config = _read(folder / "config.json")
    config = config.get("vision_config") or config
    usual = {"num_hidden_layers": 12, "hidden_size": 768, "image_size": 224, "patch_size": 32}  # transformers' own
    said = {name: config.get(name, value) for name, value in usual.items()}
    if not all(isinstance(size, int) and size > 0 for size in said.values()):
        raise UserError(f"{folder}: config.json says {said}, which are not all numbers above 0")
    layers, width, image, patch = said.values()
    return Sizes(layers, width, (image // patch) ** 2)


def _read(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise UserError(
            f"{file.parent}: no such folder of an encoder; CLIP's can be had by `hf download "
            "openai/clip-vit-large-patch14 --local-dir pretrained/clip-vit-large-patch14`"
        )
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): an encoder is a folder of CLIP as transformers saves it"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object")
    return content


def _preprocessing(
    said: dict[str, Any], size: int, file: Path
) -> tuple[CentreCrop, tuple[float, ...], tuple[float, ...]]:
    """What a preprocessor_config.json says, else CLIP's for pictures of `size`; UserError where it differs."""
    short, crop = said.get("size", size), said.get("crop_size", size)
    short = short.get("shortest_edge") if isinstance(short, dict) else short
    crops = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
    done = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if (
        not isinstance(short, int)
        or crops != (size, size)
        or short < size
        or said.get("resample", _BICUBIC) != _BICUBIC
        or not all(said.get(step, True) for step in done)
        or abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6
    ):
        raise UserError(
            f"{file} asks for other steps than CLIP's (short side, bicubic; centre crop of {size} pixels; normalise): "
            "features of it would not be what its model expects; mend it, or take it away to get CLIP's steps"
        )
    prepare = CentreCrop(short_side=short, crop=size)
    return prepare, tuple(said.get("image_mean", MEAN)), tuple(said.get("image_std", STD))
