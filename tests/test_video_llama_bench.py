"""bench/video_llama.py: the ways compute the same, the figures have their names. No timings."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
TINY = {
    "dim": 32, "layers": 2, "heads": 2, "hidden": 64, "words": 300, "image": 28, "tower_dim": 48, "tower_layers": 2,
    "frame_dim": 48, "query_layers": 2, "queries": 4, "frames": 3, "batch": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("video_llama")
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize("kind", ["caption", "dialogue"])
def test_all_ways_step_alike(bench: ModuleType, kind: str) -> None:
    seconds, apart, padding = bench.steps_of(bench.Size(**TINY), kind, steps=2)
    assert {way: len(times) for way, times in seconds.items()} == dict.fromkeys(bench.WAYS, 2)
    assert apart < 1e-5
    assert 0 < padding < 1


def test_figures_have_their_names(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda kind, way, threads: 1.0)
    results = bench.measure(bench.Size(**TINY), steps=1, threads=1)
    for kind in ("caption", "dialogue"):
        assert {f"{kind}_features", f"{kind}_pixels", f"memory_{kind}_features", f"padding_{kind}"} <= set(results)
        assert {f"cpu_{kind}_{way}" for way in bench.WAYS} <= set(results)
    assert results["max_loss_diff"] < bench.TOLERANCE


def test_memory_of_a_way(bench: ModuleType) -> None:
    assert isinstance(bench.memory_of(bench.Size(**TINY), "caption", "plain"), float)
