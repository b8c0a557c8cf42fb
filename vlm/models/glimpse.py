"""An encoder of frames for the demo: a glimpse of the most striking thing, its place and how far that has gone.

It sees pixels alone and is fitted without labels, in seconds. Striking is what differs in colour from the median of
the frame. Features of a frame:

- form (24): principal components of the contrast in a window around its centre of mass, standardised;
- colour (8): those of the colours at that centre, standardised;
- place (2): the centre of mass, down and across;
- change (4): how far that went down, right, up and left since the frame before of the same video; 0 in its first.

    encoder = fit(frames)                       # uint8 (n, 64, 80, 3) of training videos
    features = encoder.join(encoder(frames))    # (n, 34), and of the frames of one video (n, 38)
    save(encoder, Path("train.encoder.safetensors"))
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm.data.frame_pixels import Stretch
from vlm.types import UserError
from vlm.weights import diff_keys, open_tensors, write_safetensors

WIDTH, HEIGHT = 80, 64  # pixels
WINDOW = 24  # pixels of the glimpse's side, and …
COLOUR_WINDOW = 8  # … of the part of it where colours are looked at
PARTS = {"form": 24, "colour": 8}  # components of each
FAINT = 0.1  # squared contrast, of the frame's strongest, that counts as background
UNIT = 16.0  # pixels: the unit of `place`
FEW = 2.0  # pixels: changes well beyond it count alike, and …
STEEP = 6.0  # … for so much: a projector must find these four numbers among 34 others
FRAMES_TO_FIT = 4096  # enough, and more cost time


class GlimpseEncoder(nn.Module):
    """`forward`: uint8 (n, 64, 80, 3) -> (n, 34) float32. Counted in float64: the same for any batch."""

    frame_width = sum(PARTS.values()) + 2
    width = frame_width + 4
    prepare = Stretch(width=WIDTH, height=HEIGHT)

    def __init__(self) -> None:
        super().__init__()
        lengths = {"form": WINDOW**2, "colour": 3 * COLOUR_WINDOW**2}
        for part, components in PARTS.items():
            self.register_buffer(f"{part}_mean", torch.zeros(lengths[part], dtype=torch.float64))
            self.register_buffer(f"{part}_basis", torch.zeros(lengths[part], components, dtype=torch.float64))

    def forward(self, frames: Tensor) -> Tensor:
        state = dict(self.named_buffers())
        maps = look(frames)
        parts = [(maps[part] - state[f"{part}_mean"]) @ state[f"{part}_basis"] for part in PARTS]
        return torch.cat([*parts, maps["place"]], dim=1).float()

    def join(self, features: Tensor) -> Tensor:
        """The features of one video's frames in their order, (n, 34) -> (n, 38): each with its change.

        Changes beyond a few pixels count alike, and each direction has a number of its own.
        """
        place = features[:, -2:]
        gone = (place.diff(dim=0, prepend=place[:1]).float() * UNIT / FEW).tanh() * STEEP
        return torch.cat([features, gone.clamp_min(0).to(place.dtype), (-gone).clamp_min(0).to(place.dtype)], dim=1)


def look(frames: Tensor) -> dict[str, Tensor]:
    """uint8 frames (n, H, W, 3) -> float64 form (n, pixels), colour (n, 3 * pixels), place (n, 2)."""
    pixels = frames.to(torch.float64) / 255
    some = pixels[:, 2::4, 2::4].flatten(1, 2)  # every sixteenth is enough for a median
    contrast = (pixels - some.median(dim=1).values[:, None, None]).norm(dim=-1)
    contrast = contrast / (contrast.amax((1, 2), keepdim=True) + 1e-6)
    weight = (contrast.square() - FAINT).clamp_min(0) + 1e-9  # an empty frame: the same everywhere
    weight = weight / weight.sum((1, 2), keepdim=True)
    rows, columns = (torch.arange(n, dtype=torch.float64, device=frames.device) for n in weight.shape[1:])
    down, across = (weight.sum(2) * rows).sum(1), (weight.sum(1) * columns).sum(1)
    form = _window(contrast[:, None], down, across, WINDOW)
    colour = _window(pixels.permute(0, 3, 1, 2), down, across, COLOUR_WINDOW)
    place = torch.stack([down - len(rows) / 2, across - len(columns) / 2], dim=1) / UNIT
    return {"form": form.flatten(1), "colour": colour.flatten(1), "place": place}


def _window(maps: Tensor, down: Tensor, across: Tensor, side: int) -> Tensor:
    """(n, C, side, side) of maps (n, C, H, W) around a place each, between pixels bilinearly; the border goes on."""
    offsets = torch.arange(side, dtype=maps.dtype, device=maps.device) - (side - 1) / 2
    height, width = maps.shape[2:]
    y = (down[:, None] + offsets) * 2 / (height - 1) - 1
    x = (across[:, None] + offsets) * 2 / (width - 1) - 1
    places = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
    return functional.grid_sample(maps, places, padding_mode="border", align_corners=True)


def fit(frames: Tensor) -> GlimpseEncoder:
    """The encoder whose components explain most of these frames, uint8 (n, 64, 80, 3). The same frames, the same."""
    if len(frames) < 2 * max(PARTS.values()):
        raise UserError(f"{len(frames)} frames are too few to fit the demo's encoder: give {2 * max(PARTS.values())}")
    encoder = GlimpseEncoder()
    seen = [look(part) for part in frames.split(256)]
    for part, components in PARTS.items():
        values = torch.cat([maps[part] for maps in seen])
        mean = values.mean(0)
        centred = values - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
        basis = directions[:, -components:].flip(1)
        strongest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        deviations = variances[-components:].flip(0).clamp_min(1e-12).sqrt()
        getattr(encoder, f"{part}_mean").copy_(mean)
        getattr(encoder, f"{part}_basis").copy_(basis * strongest.sign() / deviations)
    return encoder


def save(encoder: GlimpseEncoder, file: Path) -> None:
    """Writes it whole or not at all; the same encoder, the same bytes."""
    write_safetensors(file, dict(encoder.named_buffers()), {"kind": "glimpse encoder"})


def load(file: Path) -> GlimpseEncoder:
    """An encoder that `save` wrote. UserError: the file is another one."""
    encoder = GlimpseEncoder()
    tensors = {name: read() for name, read in open_tensors(file).items()}
    diff_keys(tensors, encoder.state_dict()).require(f"{file} as an encoder that `--encoder demo` fitted")
    encoder.load_state_dict(tensors)
    return encoder
