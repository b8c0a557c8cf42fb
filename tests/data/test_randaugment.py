"""RandAugment: the policy string, the draws, and the operations on all frames of a clip."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm.data.randaugment import (
    FILL,
    OPERATIONS,
    POINT_OPERATIONS,
    WARPS,
    RandAugment,
    Step,
    apply_operations,
    operation_argument,
    parse_randaugment,
)
from vlm.data.rng import SampleRng

SIGNED = {
    "Rotate",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
}


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (3, 20, 28, 3)).astype(np.uint8)


def test_policy_strings() -> None:
    assert parse_randaugment("rand-m7-n4-mstd0.5-inc1") == RandAugment(7.0, 4, 0.5)
    assert parse_randaugment("rand-m9.5-n2-inc1") == RandAugment(9.5, 2, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rand",
        "rand-m7-n4-mstd0.5",  # without inc1 other operations are meant
        "rand-m7-n4-mstd0.5-inc0",
        "rand-m7-n4-mstd0.5-inc1-p0.5",
        "rand-n4-m7-inc1",
        "rand-m11-n4-inc1",
        "rand-m7-n0-inc1",
        "rand-m-7-n4-inc1",
        "augmix-m7-n4-inc1",
    ],
)
def test_other_strings_are_refused(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_randaugment(text)
    assert repr(text) in str(error.value)


def test_draws_come_from_the_rng_alone() -> None:
    policy = parse_randaugment("rand-m7-n4-mstd0.5-inc1")
    assert policy.draw(SampleRng(4)) == policy.draw(SampleRng(4))
    assert any(policy.draw(SampleRng(4)) != policy.draw(SampleRng(seed)) for seed in range(5, 8))


def test_draws_have_the_stated_distribution() -> None:
    policy = parse_randaugment("rand-m7-n4-mstd0.5-inc1")
    rng = SampleRng(0)
    steps = [step for _ in range(4000) for step in policy.draw(rng)]
    assert len(steps) == pytest.approx(4000 * 4 * 0.5, rel=0.03)
    counts = {name: sum(step.operation == name for step in steps) for name in OPERATIONS}
    assert min(counts.values()) > 0.8 * len(steps) / len(OPERATIONS)
    degrees = np.array([step.argument for step in steps if step.operation == "Rotate"])
    assert (degrees > 0).mean() == pytest.approx(0.5, abs=0.08)
    assert np.abs(degrees).mean() == pytest.approx(21.0, rel=0.02)
    assert np.abs(degrees).std() == pytest.approx(1.5, rel=0.15)


def test_without_spread_the_magnitude_is_fixed() -> None:
    rng = SampleRng(0)
    policy = parse_randaugment("rand-m10-n4-inc1")
    arguments = {(step.operation, step.argument) for _ in range(400) for step in policy.draw(rng)}
    expected = {(name, operation_argument(name, 10.0, sign)) for name in SIGNED for sign in (1.0, -1.0)}
    expected |= {(name, operation_argument(name, 10.0)) for name in set(OPERATIONS) - SIGNED}
    assert arguments == expected


def test_magnitudes_are_cut_at_ten() -> None:
    rng = SampleRng(0)
    policy = parse_randaugment("rand-m10-n4-mstd5-inc1")
    degrees = [abs(step.argument) for _ in range(400) for step in policy.draw(rng) if step.operation == "Rotate"]
    assert max(degrees) == 30.0
    assert 0 <= min(degrees) < 20.0


def test_no_steps_leave_the_frames_alone(frames: np.ndarray) -> None:
    assert apply_operations(frames, []) is frames


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_frame_gets_the_same_operation(frames: np.ndarray, operation: str) -> None:
    step = Step(operation, operation_argument(operation, 7.0, -1.0))
    before = frames.copy()
    together = apply_operations(frames, [step])
    assert together.shape == frames.shape
    assert together.dtype == np.uint8
    assert (frames == before).all(), "the input is not written to"
    alone = np.concatenate([apply_operations(frame[None], [step]) for frame in frames])
    np.testing.assert_array_equal(together, alone)
    if operation not in ("AutoContrast", "Equalize"):  # noise already spans all levels
        assert (together != frames).mean() > 0.2


@pytest.mark.parametrize("magnitude", [0.0, 0.4, 9.6, 10.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ends_of_the_scale(frames: np.ndarray, magnitude: float, sign: float) -> None:
    neutral = {"Rotate", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY"}
    neutral |= {"TranslateXRel", "TranslateYRel", "Solarize", "SolarizeAdd"}
    for operation in OPERATIONS:
        augmented = apply_operations(frames, [Step(operation, operation_argument(operation, magnitude, sign))])
        assert augmented.shape == frames.shape
        if operation == "Posterize" and magnitude == 10.0:
            assert not augmented.any(), "no bit is kept"
        if operation in neutral and magnitude == 0.0:
            np.testing.assert_array_equal(augmented, frames, err_msg=operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_point_operations_are_those_that_commute_with_a_crop(frames: np.ndarray, operation: str) -> None:
    frames = frames // 2 + 20  # so that stretching the histogram does something
    step = Step(operation, operation_argument(operation, 7.0))
    whole = apply_operations(frames, [step])[:, 5:15, 6:20]
    part = apply_operations(frames[:, 5:15, 6:20], [step])
    assert (operation in POINT_OPERATIONS) == bool((whole == part).all())


@pytest.mark.parametrize("operation", sorted(WARPS))
def test_the_box_of_a_warp_is_made_to_the_bit(frames: np.ndarray, operation: str) -> None:
    height, width = frames.shape[1:3]
    rng = np.random.default_rng(0)
    for _ in range(40):
        step = Step(operation, operation_argument(operation, rng.uniform(0, 10), rng.choice([-1.0, 1.0])))
        top, left = int(rng.integers(height)), int(rng.integers(width))
        box = (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
        whole = apply_operations(frames[:1], [step])
        expected = whole[:, top : top + box[2], left : left + box[3]]
        np.testing.assert_array_equal(apply_operations(frames[:1], [step], box), expected, err_msg=f"{step} {box}")


def test_a_rotation_is_pillows(frames: np.ndarray) -> None:
    for degrees in (-30.0, -0.3, 0.0, 12.34, 21.0):
        rotated = Image.fromarray(frames[0]).rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL)
        ours = apply_operations(frames[:1], [Step("Rotate", degrees)], (0, 0, *frames.shape[1:3]))
        np.testing.assert_array_equal(ours[0], np.asarray(rotated), err_msg=str(degrees))
