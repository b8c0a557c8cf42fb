"""Batch mixing: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), one draw per batch, partners by flipping it.

Clip i is mixed with clip B - 1 - i, so B must be even; with one video twice in a batch of two, it mixes with itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from numpy.random import RandomState
from torch import Tensor

from vlm.types import Mixing, UserError


class Mix(NamedTuple):
    """One draw: the share of each clip that stays its own, and whether the rest comes as a box (CutMix)."""

    share: float
    cut: bool


class Cut(NamedTuple):
    """Rows top … bottom - 1 and columns left … right - 1 that come from the partner."""

    top: int
    bottom: int
    left: int
    right: int


def draw_mix(mixup: float, cutmix: float, probability: float, switch_probability: float, generator: RandomState) -> Mix:
    """Whether and how a batch is mixed: a share from Beta(mixup, mixup) or Beta(cutmix, cutmix).

    An alpha of 0 turns that kind off; with both on, CutMix is chosen with `switch_probability`.
    """
    if generator.rand() >= probability or (mixup == 0 and cutmix == 0):
        return Mix(1.0, False)
    cut = cutmix > 0 and (mixup == 0 or bool(generator.rand() < switch_probability))
    alpha = cutmix if cut else mixup
    return Mix(float(generator.beta(alpha, alpha)), cut)


def cut_around(height: int, width: int, share: float, row: int, column: int) -> Cut:
    """A box of sides int(side * sqrt(1 - share)), centred on (row, column) and clipped to the frame."""
    root = math.sqrt(1.0 - share)
    half_height, half_width = int(height * root) // 2, int(width * root) // 2
    return Cut(
        max(0, row - half_height),
        min(height, row + half_height),
        max(0, column - half_width),
        min(width, column + half_width),
    )


def kept_share(height: int, width: int, cut: Cut) -> float:
    """The share of a frame that a clipped box really leaves."""
    return 1.0 - (cut.bottom - cut.top) * (cut.right - cut.left) / (height * width)


def soft_targets(label: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels (B,) as float32 (B, K): smoothing / K everywhere, and 1 - smoothing more at the label."""
    target = torch.full((len(label), num_classes), smoothing / num_classes)
    return target.scatter_(1, label[:, None], 1.0 - smoothing + smoothing / num_classes)


def mixed_targets(label: Tensor, num_classes: int, smoothing: float, share: float) -> Tensor:
    """Targets (B, K) of a batch of which `share` of each clip is its own and the rest its partner's."""
    target = soft_targets(label, num_classes, smoothing)
    return target * share + target.flip(0) * (1.0 - share)


def draw_mixing(mix: Mix, height: int, width: int, generator: RandomState) -> Mixing | None:
    """What a draw means to clips of this size, and so the share that each keeps; None: nothing. Draws CutMix's box."""
    if mix.share == 1.0:
        return None
    if not mix.cut:
        return Mixing(mix.share, None)
    row = int(generator.randint(0, height))
    cut = cut_around(height, width, mix.share, row, int(generator.randint(0, width)))
    return Mixing(kept_share(height, width, cut), cut)


def apply_mixing(video: Tensor, mixing: Mixing) -> Tensor:
    """The batch (B, C, T, H, W) float, mixed in place."""
    return blend(video, mixing.share) if mixing.cut is None else paste(video, Cut(*mixing.cut))


def blend(video: Tensor, share: float) -> Tensor:
    """Mixup in place: share * clip + (1 - share) * partner."""
    _check_even(len(video))
    half = len(video) // 2
    first, second = video[:half], video[half:].flip(0)
    mixed = torch.lerp(second, first, share)
    video[half:] = torch.lerp(first, second, share).flip(0)
    video[:half] = mixed
    return video


def paste(video: Tensor, cut: Cut) -> Tensor:
    """CutMix in place: the box of every frame comes from the partner."""
    _check_even(len(video))
    box = video[..., cut.top : cut.bottom, cut.left : cut.right]
    box.copy_(box.flip(0))
    return video


def mix_batch(
    shape: tuple[int, ...],
    label: Tensor,
    *,
    num_classes: int,
    smoothing: float,
    mixup: float,
    cutmix: float,
    probability: float,
    switch_probability: float,
    generator: RandomState,
) -> tuple[Mixing | None, Tensor]:
    """How a batch of this shape (B, C, T, H, W), with labels (B,), is mixed, and its targets (B, K).

    Raises:
        UserError: B is odd.
    """
    _check_even(len(label))
    mix = draw_mix(mixup, cutmix, probability, switch_probability, generator)
    mixing = draw_mixing(mix, shape[-2], shape[-1], generator)
    return mixing, mixed_targets(label, num_classes, smoothing, 1.0 if mixing is None else mixing.share)


def _check_even(batch_size: int) -> None:
    if batch_size % 2:
        raise UserError(
            f"mixup and CutMix pair the clips of a micro-batch, but it has {batch_size} (an odd number): "
            "set inputs.repeats=2, choose an even micro-batch, or set inputs.mixup=0 inputs.cutmix=0"
        )
