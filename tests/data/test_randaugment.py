"""RandAugment: the policy string and the draws."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.data.randaugment import (
    OPERATIONS,
    RandAugment,
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
