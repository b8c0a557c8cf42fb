"""Vamos with a token bottleneck in two real processes: the same steps at every ZeRO stage; the selector moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run


def test_every_stage_makes_the_same_steps() -> None:
    """Micro-batches without any caption are among them: the selector runs for those too."""
    printed = run([str(Path(__file__).with_name("selector_worker.py")), "0,2,3,3_bf16"], processes=2)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    results = json.loads(line.removeprefix("RESULT "))
    first = results["0"]
    assert {name.split(".")[0] for name in first["checkpoint"]} == {"adapter_query", "layers", "selector"}
    for stage, result in results.items():
        for step, (got, want) in enumerate(zip(result["losses"], first["losses"], strict=True)):
            if stage.endswith("_bf16"):
                assert got[0] == pytest.approx(want[0], rel=0.2), f"stage {stage}, step {step}"
            else:
                assert got == pytest.approx(want, rel=2e-5), f"stage {stage}, step {step}"
        assert result["still"] == [], f"stage {stage}: trained, but did not move"
        assert result["checkpoint"] == first["checkpoint"]
        assert result["hash_kept"]
