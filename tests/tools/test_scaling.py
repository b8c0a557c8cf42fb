"""docs/scaling.md is what tools/scaling.py writes, and what it simulates is the plan that training follows."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlm.data.loader import MicroPlan, plan_step
from vlm.run import scale
from vlm.run.scale import Assumptions, Case, Files, run, save, simulate

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    try:
        return importlib.import_module("scaling")
    finally:
        sys.path.remove(str(REPOSITORY / "tools"))


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("vit_llama.debug", "tiny", ((Files("shapes", 100_000, 2_000_000, 8), None),), tokens=0, decode_ms=1)


def test_the_page_is_what_the_tool_writes(tool: ModuleType, tmp_path: Path) -> None:
    written = tool.page(tool.GPUS, Assumptions())
    assert written == (REPOSITORY / "docs/scaling.md").read_text(), "write it again: python tools/scaling.py"


def test_other_assumptions_go_to_another_page(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["restart_seconds=600"]) == 2
    assert "--out FILE" in capsys.readouterr().err
    assert tool.main(["--out", str(tmp_path / "a.md"), "restart_second=600"]) == 2
    assert "restart_seconds" in capsys.readouterr().err
    assert tool.main(["--out", str(tmp_path / "a.md"), "--gpus", "8,none"]) == 2
    assert "'none'" in capsys.readouterr().err
    for impossible in ("copy_gb_per_s=0", "gpus_per_node=-1", "restart_seconds=-1"):
        assert tool.main(["--out", str(tmp_path / "a.md"), impossible]) == 2
        assert impossible in capsys.readouterr().err
    assert tool.main(["--out", str(tmp_path / "a.md"), "--gpus", "16", "restart_seconds=600"]) == 0
    page = (tmp_path / "a.md").read_text()
    assert "| `restart_seconds` | 600 |" in page
    assert "\n| 16 | 132 d | 0.0530 | 0.530 |\n" in page
    assert "4,096 |" not in page


def test_sizes_are_the_models(case: Case) -> None:
    """Weights and two moments in fp32 of what trains; a row of the index as shards have it."""
    real = case.recipe.model.build()
    assert case.trained == sum(p.numel() for n, p in real.named_parameters() if real.trainable(n))
    assert case.trained < sum(p.numel() for p in real.parameters())
    assert case.checkpoint == 12 * case.trained
    assert case.per_gpu == 1
    assert case.row_bytes == 24 + 4 + 8 + 8 + 4 + 8 + 8 + 4 + 4 + 4 + 1 + 2 * 16


@pytest.mark.parametrize("gpus", [8, 64])
def test_every_position_is_planned_once(case: Case, gpus: int) -> None:
    reads = simulate(case, gpus)
    assert reads.positions == scale.SIMULATED
    assert reads.of == 187  # 536 records of 2 MB are a shard
    assert 1 <= reads.shards <= min(gpus, reads.of)
    assert reads.idle == max(0, gpus - case.recipe.global_batch_size)


def test_a_plan_that_repeats_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(step: int, batch: int, world: int, rank: int, micro: int) -> list[MicroPlan]:
        return plan_step(step, batch, world, max(rank, 1), micro)

    monkeypatch.setattr(scale, "plan_step", twice)
    with pytest.raises(AssertionError, match="on two ranks"):
        simulate(case, 8)


def test_saves_are_shared_out(case: Case) -> None:
    """A GPU copies its part; nodes write together until the file system is the limit."""
    about = Assumptions(agree_seconds=0.0)
    costs: list[Any] = [save(case, n, about) for n in (8, 80, 800, 8000)]
    assert costs[0].stall == pytest.approx(10 * costs[1].stall) == pytest.approx(100 * costs[2].stall)
    assert costs[0].stall == pytest.approx(1.3 * case.checkpoint / 8 / 10e9)
    assert costs[0].written == pytest.approx(10 * costs[1].written)
    assert costs[1].written == costs[2].written == costs[3].written


def test_more_gpus_save_more_often_and_lose_more(case: Case) -> None:
    plans = [run(case, n, Assumptions()) for n in (8, 64, 512, 4096)]
    assert all(a.interval > b.interval and a.effective > b.effective for a, b in itertools.pairwise(plans))
    assert all(plan.effective == pytest.approx(plan.simulated, abs=2e-3) for plan in plans)
    assert all(plan.tenfold < plan.effective for plan in plans)
    assert all(plan.stated <= plan.effective + 1e-12 for plan in plans)
