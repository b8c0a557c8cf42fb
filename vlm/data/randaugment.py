"""RandAugment (arXiv 1909.13719): the policy, its draws, and its operations on one image, which are Pillow's.

All frames of a clip get the same operations with the same arguments (frame_operations.py). Operations, arguments and
the order of the draws are those of timm's "increasing" set, which VideoMAE and ViT-LLaMA train with.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageOps

from vlm.data.rng import SampleRng

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
"""The operations of `rand-…-inc1`, in the order in which the original numbers them for its draws."""

WARPS = frozenset({"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"})
"""Those that move pixels."""

FILL = (128,) * 3
"""Colour of the pixels that a rotation, shear or translation uncovers."""

APPLY_PROBABILITY = 0.5


class Step(NamedTuple):
    """One operation to apply, with its drawn argument (None where the operation takes none)."""

    operation: str
    argument: float | None


class RandAugment(NamedTuple):
    """The policy `rand-m<magnitude>-n<num_operations>-mstd<magnitude_std>-inc1`."""

    magnitude: float
    num_operations: int
    magnitude_std: float

    def draw(self, rng: SampleRng) -> list[Step]:
        """The operations of one clip: `num_operations` choices with replacement, each applied with probability 1/2."""
        steps = []
        for index in rng.numpy.randint(0, len(OPERATIONS), size=self.num_operations):
            if rng.python.random() > APPLY_PROBABILITY:
                continue
            magnitude = self.magnitude
            if self.magnitude_std > 0:
                magnitude = min(10.0, max(0.0, rng.python.gauss(magnitude, self.magnitude_std)))
            operation = OPERATIONS[index]
            sign = -1.0 if operation in _SIGNED and rng.python.random() > 0.5 else 1.0
            steps.append(Step(operation, operation_argument(operation, magnitude, sign)))
        return steps


@functools.cache
def parse_randaugment(text: str) -> RandAugment:
    """The policy that a string like "rand-m7-n4-mstd0.5-inc1" names (`mstd` may be left out: 0).

    Raises:
        ValueError: any part that is not understood. `inc1` must be there: only the increasing operations exist here
            (timm, which named these strings, takes any text after `inc`, even `inc0`, for on).
    """
    match = re.fullmatch(r"rand-m(\d+(?:\.\d+)?)-n(\d+)(?:-mstd(\d+(?:\.\d+)?))?-inc1", text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a RandAugment policy of the form rand-m<0..10>-n<count>[-mstd<std>]-inc1, "
            "for example rand-m7-n4-mstd0.5-inc1"
        )
    policy = RandAugment(float(match[1]), int(match[2]), float(match[3] or 0))
    if policy.magnitude > 10 or policy.num_operations < 1:
        raise ValueError(f"{text!r}: the magnitude (m) must be at most 10 and the count (n) at least 1")
    return policy


_ENHANCE = frozenset({"Color", "Contrast", "Brightness", "Sharpness"})
_SIGNED = _ENHANCE | {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


def operation_argument(operation: str, magnitude: float, sign: float = 1.0) -> float | None:
    """What a magnitude (0 … 10) means to an operation; `sign` (±1) matters to the signed ones only.

    Rotate: degrees. Posterize: bits kept. Solarize: threshold. SolarizeAdd: levels added. Color, Contrast, Brightness,
    Sharpness: factor. Shear: slope. Translate: share of the width or height.
    """
    level = magnitude / 10
    match operation:
        case "AutoContrast" | "Equalize" | "Invert":
            return None
        case "Rotate":
            return sign * level * 30.0
        case "Posterize":
            return 4 - int(level * 4)
        case "Solarize":
            return 256 - int(level * 256)
        case "SolarizeAdd":
            return int(level * 110)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return 1.0 + sign * level * 0.9
        case "ShearX" | "ShearY":
            return sign * level * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return sign * level * 0.45
    raise AssertionError(operation)


def apply_operation(image: Image.Image, step: Step) -> Image.Image:
    """One operation on one RGB image, of the same size after it."""
    argument = 0.0 if step.argument is None else step.argument
    match step.operation:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return image.rotate(argument, resample=Image.Resampling.BICUBIC, fillcolor=FILL)
        case "Posterize":
            # Keeping no bit is black; Pillow refuses to be asked for it.
            return ImageOps.posterize(image, int(argument)) if argument else Image.new("RGB", image.size)
        case "Solarize":
            return ImageOps.solarize(image, int(argument))
        case "SolarizeAdd":
            levels = [min(255, level + int(argument)) if level < 128 else level for level in range(256)]
            return image.point(levels * 3)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            enhancer: ImageEnhance._Enhance = getattr(ImageEnhance, step.operation)(image)
            return enhancer.enhance(argument)
        case "ShearX" | "ShearY" | "TranslateXRel" | "TranslateYRel":
            bicubic = Image.Resampling.BICUBIC
            return image.transform(
                image.size, Image.Transform.AFFINE, matrix(image.size, step), bicubic, fillcolor=FILL
            )
    raise AssertionError(step.operation)


def matrix(size: tuple[int, int], step: Step) -> tuple[float, float, float, float, float, float]:
    """The numbers a to f of one of `WARPS` of an image of this (width, height).

    The pixel with its centre at x, y comes from a x + b y + c, d x + e y + f.
    """
    assert step.argument is not None
    match step.operation:
        case "ShearX":
            return 1, step.argument, 0, 0, 1, 0
        case "ShearY":
            return 1, 0, 0, step.argument, 1, 0
        case "TranslateXRel":
            return 1, 0, step.argument * size[0], 0, 1, 0
        case "TranslateYRel":
            return 1, 0, 0, 0, 1, step.argument * size[1]
    assert step.operation == "Rotate"
    angle = -math.radians(step.argument % 360)  # rounded as in Image.rotate, around the centre
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sine = round(-math.sin(angle), 15)
    x, y = size[0] / 2, size[1] / 2
    return cosine, sine, cosine * -x + sine * -y + x, minus_sine, cosine, minus_sine * -x + cosine * -y + y
