"""bench/checkpoint.py: what it saves is what was held, the figures have their names, adapters are small. No timings."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("checkpoint")
    finally:
        sys.path.remove(str(BENCH))


def test_it_runs_and_adapters_weigh_what_they_have_to(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        code = bench.main(["--quick", "--json", str(tmp_path / "f.json"), "--folder", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "f.json").read_text())["checkpoint"]
    assert code == 0
    assert figures["same bits"] is True
    assert 1 < figures["adapters / needed"] <= 1.02
    assert figures["frozen parameters"] > 10_000_000
    assert {*bench.MOST, *bench.LEAST, "memcpy", "blocking", "torch.save", "on disk", "bytes"} <= figures.keys()
    assert "wanted: at most 1.3" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize(("right", "size"), [(True, 1.01), (False, 1.01), (True, 1.03)])
def test_other_bits_or_a_large_file_are_an_error(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, right: bool, size: float
) -> None:
    names = ("memcpy", "blocking", "torch.save", "on disk", "bytes", "blocking / memcpy", "torch.save / blocking")
    monkeypatch.setattr(bench, "stalls", lambda *rest: (dict.fromkeys(names, 1.0), True))
    monkeypatch.setattr(bench, "adapters", lambda *rest: ({"adapters / needed": size}, right))
    assert bench.main(["--quick"]) == int(not (right and size <= 1.02))


def test_a_checkpoint_that_differs_is_seen(bench: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"exp_avg/a": torch.zeros(2)}, tmp_path / "optimizer.safetensors")
    wanted = {"a": torch.ones(2), "exp_avg/a": torch.zeros(2)}
    assert bench.same(tmp_path, wanted)
    assert not bench.same(tmp_path, wanted | {"a": torch.tensor([1.0, 2.0])})
    assert not bench.same(tmp_path, {"a": torch.ones(2)})
