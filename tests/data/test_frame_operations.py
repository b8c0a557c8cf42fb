"""RandAugment's operations on all frames of a clip: to the bit those of Pillow on each whole frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from vlm.data import warps
from vlm.data.box import Box
from vlm.data.frame_operations import apply_operations
from vlm.data.randaugment import (
    FILL,
    OPERATIONS,
    WARPS,
    Step,
    apply_operation,
    operation_argument,
    parse_randaugment,
)
from vlm.data.rng import SampleRng

HEIGHT, WIDTH = 20, 28
WHOLE = Box(0, 0, HEIGHT, WIDTH)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (3, HEIGHT, WIDTH, 3)).astype(np.uint8)


@pytest.fixture
def picture() -> np.ndarray:
    """Frames with few levels, a flat part, and black and white."""
    frames = np.random.RandomState(1).randint(40, 190, (2, HEIGHT, WIDTH, 3)).astype(np.uint8)
    frames[:, 3:15, 4:16] = (90, 128, 60)
    frames[:, :, 20:23] = 255
    frames[:, 16:18] = 0
    return frames


def by_pillow(frames: np.ndarray, steps: Sequence[Step], box: Box = WHOLE) -> np.ndarray:
    made = []
    for frame in frames:
        image = Image.fromarray(frame)
        for step in steps:
            image = apply_operation(image, step)
        made.append(np.asarray(image)[box.rows, box.columns])
    return np.stack(made)


def random_box(rng: np.random.Generator) -> Box:
    height, width = int(rng.integers(1, HEIGHT + 1)), int(rng.integers(1, WIDTH + 1))
    return Box(int(rng.integers(HEIGHT - height + 1)), int(rng.integers(WIDTH - width + 1)), height, width)


def test_no_steps_leave_the_frames_alone(frames: np.ndarray) -> None:
    cut = apply_operations(frames, [], Box(2, 3, 4, 5))
    assert cut.base is not None
    np.testing.assert_array_equal(cut, frames[:, 2:6, 3:8])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_on_a_box(frames: np.ndarray, picture: np.ndarray, operation: str) -> None:
    rng = np.random.default_rng(0)
    before = picture.copy()
    for draw in range(40):
        source = frames if draw % 4 == 0 else picture
        step = Step(operation, operation_argument(operation, rng.uniform(0, 10), rng.choice([-1.0, 1.0])))
        box = WHOLE if draw < 4 else random_box(rng)
        ours = apply_operations(source, [step], box)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, by_pillow(source, [step], box), err_msg=f"{step} {box}")
    assert (picture == before).all(), "the input is not written to"


def test_chains_of_operations_on_a_box(picture: np.ndarray) -> None:
    policy = parse_randaugment("rand-m7-n4-mstd0.5-inc1")
    rng = np.random.default_rng(0)
    for seed in range(300):
        steps = policy.draw(SampleRng(seed))
        box = random_box(rng)
        expected = by_pillow(picture, steps, box)
        np.testing.assert_array_equal(apply_operations(picture, steps, box), expected, err_msg=f"{steps} {box}")


@pytest.mark.parametrize("operation", sorted(WARPS))
def test_doubtful_sums_are_worked_out_again(
    picture: np.ndarray, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so much slack that a quarter of all sums is doubtful, and none let go as flat, the levels are the same."""
    monkeypatch.setattr(warps, "_SLACK", 0.12)
    monkeypatch.setattr(warps, "_MANY", 2)
    step = Step(operation, operation_argument(operation, 6.3))
    np.testing.assert_array_equal(apply_operations(picture, [step], WHOLE), by_pillow(picture, [step]))


def test_a_rotation_is_pillows(frames: np.ndarray) -> None:
    for degrees in (-30.0, -0.3, 0.0, 12.34, 21.0, 90.0, 180.0):
        rotated = Image.fromarray(frames[0]).rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL)
        ours = apply_operations(frames[:1], [Step("Rotate", degrees)], WHOLE)
        np.testing.assert_array_equal(ours[0], np.asarray(rotated), err_msg=str(degrees))


def test_a_box_that_a_warp_fills_from_outside(frames: np.ndarray) -> None:
    steps = [Step("AutoContrast", None), Step("TranslateXRel", 0.5), Step("Sharpness", 1.4)]
    ours = apply_operations(frames, steps, Box(0, 20, 20, 8))
    np.testing.assert_array_equal(ours, by_pillow(frames, steps)[:, :, 20:])
    assert (ours == FILL[0]).all()


@pytest.mark.parametrize("magnitude", [0.0, 0.4, 9.6, 10.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ends_of_the_scale(frames: np.ndarray, magnitude: float, sign: float) -> None:
    neutral = {"Rotate", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY"}
    neutral |= {"TranslateXRel", "TranslateYRel", "Solarize", "SolarizeAdd"}
    for operation in OPERATIONS:
        step = Step(operation, operation_argument(operation, magnitude, sign))
        augmented = apply_operations(frames, [step], WHOLE)
        np.testing.assert_array_equal(augmented, by_pillow(frames, [step]), err_msg=operation)
        if operation == "Posterize" and magnitude == 10.0:
            assert not augmented.any(), "no bit is kept"
        if operation in neutral and magnitude == 0.0:
            np.testing.assert_array_equal(augmented, frames, err_msg=operation)


def test_frames_of_one_colour_and_of_one_pixel() -> None:
    for frames in (np.full((2, 5, 6, 3), 77, np.uint8), np.full((1, 1, 1, 3), 9, np.uint8)):
        box = Box(0, 0, *frames.shape[1:3])
        for operation in OPERATIONS:
            step = Step(operation, operation_argument(operation, 7.0))
            expected = by_pillow(frames, [step], box)
            np.testing.assert_array_equal(apply_operations(frames, [step], box), expected, err_msg=operation)
