"""bench/features.py: both ways give the same features, the figures have their names. No timings."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vlm.models.encoders import STATES, open_layout, states_layout
from vlm.run.encode_one import encode_video_file

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("features")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def place(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    bench.tiny_clip(folder / "clip")
    bench.draw(folder / "a.mp4", 20)
    return folder


def test_both_ways_give_the_same(bench: ModuleType, place: Path) -> None:
    runs = bench.ways(place / "clip")
    pooled = [runs["pooled", way](place / "a.mp4") for way in ("published", "ours")]
    assert pooled[0].shape == pooled[1].shape == (356, 64)
    np.testing.assert_allclose(pooled[1], pooled[0], atol=bench.TOLERANCE)
    theirs = bench.Rival(place / "clip").states(place / "a.mp4", 30)
    layout = states_layout({STATES: (0, 1, 2, 3)}, 30)
    ours = encode_video_file(place / "a.mp4", open_layout(place / "clip", layout), apart=False)[STATES]
    assert theirs.shape == (30, 4, 64)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=bench.TOLERANCE)


def test_memory_of_a_way(bench: ModuleType, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--peak", str(place / "clip"), "pooled", "ours", str(place / "a.mp4")]) == 0
    assert float(capsys.readouterr().out.splitlines()[-1]) >= 0


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_figures_have_their_names(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, off: float
) -> None:
    """Features that differ are an error."""
    made = {(layout, way): np.full((2, 3), off if way == "ours" else 0.0, np.float16)
            for layout in bench.ROUNDS for way in ("published", "ours")}  # fmt: skip
    monkeypatch.setattr(bench, "ways", lambda folder: {name: lambda file, a=array: a for name, array in made.items()})
    monkeypatch.setattr(bench, "_peak", lambda *rest: 1.0)
    monkeypatch.setattr(bench, "draw", lambda file, count: None)
    clock = iter(range(1000))
    monkeypatch.setattr(bench.time, "process_time", lambda: float(next(clock)))
    code = bench.main(["--json", str(tmp_path / "f.json")])
    figures = json.loads((tmp_path / "f.json").read_text())["features"]
    assert code == (1 if off else 0)
    assert figures["difference"] == off
    assert figures["states, peak MB"] == {"published": 1.0, "ours": 1.0}
    assert figures["pooled, 600 frames"] == {"published": 1.0, "ours": 1.0}
