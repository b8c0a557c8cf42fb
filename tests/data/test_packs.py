"""Plans of packs: every sample once, never above the capacity, full."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlm.data.packs import LOOK_AHEAD, plan_packs

HISTOGRAMS = Path(__file__).resolve().parents[2] / "bench" / "data"


def webvid(count: int, seed: int) -> np.ndarray:
    """Tokens of WebVid-like captions (a dozen words, few very long) behind 32 video tokens and a prompt of 20."""
    draw = np.random.default_rng(seed)
    return 52 + np.minimum(77, 4 + draw.negative_binomial(4, 0.22, count))


def nextqa(count: int, seed: int) -> np.ndarray:
    """Tokens of NExT-QA questions, from the histogram of its validation questions, with a caption each of 400 to 1,050
    tokens."""
    lengths = json.loads((HISTOGRAMS / "nextqa_lengths.json").read_text())["row_lengths"]
    values, weights = zip(*((int(length), number) for length, number in lengths.items()))
    draw = np.random.default_rng(seed)
    rows = draw.choice(values, count, p=np.array(weights) / sum(weights))
    return rows + draw.integers(400, 1051, count)


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
@pytest.mark.parametrize("look_ahead", [1, 10, LOOK_AHEAD])
def test_every_sample_once_and_none_too_full(capacity: int, look_ahead: int) -> None:
    lengths = np.random.default_rng(capacity).integers(0, 80, 700)
    packs = plan_packs(lengths, capacity, look_ahead)
    assert sorted(packs.members.tolist()) == list(range(700))
    totals = [int(lengths[packs[number]].sum()) for number in range(len(packs))]
    longer = [number for number in range(len(packs)) if totals[number] > capacity]
    assert all(len(packs[number]) == 1 for number in longer)
    assert len(longer) == packs.too_long == int((lengths > capacity).sum())
    assert packs.used == int(lengths[lengths <= capacity].sum())


def test_a_plan_is_a_function_of_the_lengths() -> None:
    lengths = webvid(30_000, 0)
    first, again = plan_packs(lengths, 2048), plan_packs(lengths.copy(), 2048)
    assert np.array_equal(first.members, again.members)
    assert np.array_equal(first.starts, again.starts)


@pytest.mark.parametrize(
    ("lengths", "capacity"), [(nextqa(34_132, 0), 4096), (nextqa(34_132, 1), 8192), (webvid(200_000, 0), 2048)]
)
def test_packs_are_full_and_their_samples_near_one_another(lengths: np.ndarray, capacity: int) -> None:
    packs = plan_packs(lengths, capacity)
    assert packs.fill >= 0.97
    assert max(int(np.ptp(packs[number])) for number in range(len(packs))) < 2 * LOOK_AHEAD


def test_nothing_and_nonsense() -> None:
    assert len(plan_packs(np.zeros(0, np.int64), 10)) == 0
    with pytest.raises(ValueError, match="capacity 0"):
        plan_packs(np.ones(3), 0)
    with pytest.raises(ValueError, match="sample 1 has the length -2"):
        plan_packs(np.array([1, -2]), 5)
