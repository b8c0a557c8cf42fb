"""bench/reencode.py: it compares the same frames, its figures have their names. No timings."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vlm.data.shard_reencode import Reencode
from vlm.data.video import check_decoders, inspect

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("reencode")
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize("how", [Reencode(short_side=96), Reencode(fps=10), Reencode(fps=60)])
def test_the_same_frames_are_compared(bench: ModuleType, how: Reencode) -> None:
    """A frame off would cost 6 dB and more on a picture that moves by whole pixels a frame."""
    data = bench.draw(480, 192, frames=60)
    info = inspect(data)
    clip = bench.Clip("drawn", data, info, check_decoders(data, info))
    measured = bench.measure(clip, how, repeats=1)
    assert measured.psnr > 33
    assert measured.bytes_before == len(data)
    assert min(measured.before, measured.after, measured.cost) > 0


def test_figures(bench: ModuleType) -> None:
    rows = [bench.Measured(str(n), 2.0 * n, 1.0, 100, 150, 30.0 + n, 1.0, 10.0) for n in (1, 2, 3)]
    found = bench.summarise(rows)
    assert (found["clips"], found["gain"], found["gain_median"], found["bytes"]) == (3, 4.0, 4.0, 1.5)
    assert found["gain_interval"] == [2.0, 6.0]
    assert (found["psnr_median"], found["psnr_worst"], found["cost"]) == (32.0, 31.0, 0.1)


def test_runs_without_real_clips(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLM_REALDATA", str(tmp_path / "nowhere"))
    draw = bench.draw
    monkeypatch.setattr(bench, "draw", lambda width, height: draw(width // 8 * 2, height // 8 * 2, frames=40))
    (tmp_path / "figures.json").write_text('{"score": 3}')
    assert bench.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["score"] == 3
    figures = figures["reencode"]
    assert figures["default"]["clips"] == 2
    assert [row["name"] for row in figures["clips"]] == ["drawn 854x480", "drawn 320x240"]
    assert "gop 4" in capsys.readouterr().out
