"""Young's and Daly's formulas beside what is counted over drawn failures."""

from __future__ import annotations

import math

import pytest

from vlm.run.failures import HOUR, best_interval, effective_share, mean_time_between, simulated_share

RATE = 419 / (16_384 * 54 * 24)  # Llama 3 405B


def test_the_published_failures_come_out_again() -> None:
    """54 days on 16,384 GPUs: 419 failures."""
    assert 54 * 24 * HOUR / mean_time_between(16_384, RATE) == pytest.approx(419)
    assert mean_time_between(1024, RATE) / HOUR == pytest.approx(49.5, abs=0.1)


def test_the_interval_is_youngs_where_saves_are_short() -> None:
    assert best_interval(0.2, 1e6) == pytest.approx(math.sqrt(2 * 0.2 * 1e6), rel=1e-3)
    assert best_interval(50.0, 20.0) == 20.0


@pytest.mark.parametrize(("stall", "mean_time", "restart"), [(1.0, 1e4, 300.0), (150.0, 2.8e4, 300.0), (0.1, 4e4, 0.0)])
def test_no_other_interval_is_better(stall: float, mean_time: float, restart: float) -> None:
    best = best_interval(stall, mean_time)
    shares = {factor: effective_share(best * factor, stall, mean_time, restart) for factor in (0.5, 0.9, 1, 1.1, 2)}
    assert max(shares, key=lambda factor: shares[factor]) == 1
    assert shares[1] < math.exp(-restart / mean_time)


@pytest.mark.parametrize("interval", [100.0, 1000.0, 5000.0])
def test_formula_and_drawn_failures_agree(interval: float) -> None:
    formula = effective_share(interval, 20.0, 1e4, 300.0)
    assert simulated_share(interval, 20.0, 1e4, 300.0) == pytest.approx(formula, abs=3e-3)


def test_a_slow_write_costs_what_it_makes_a_failure_lose() -> None:
    """Work of `written` seconds more is lost at each failure."""
    fast, slow = (simulated_share(500.0, 1.0, 2e4, 300.0, written) for written in (0.0, 200.0))
    assert fast - slow == pytest.approx(200.0 / 2e4, rel=0.1)
