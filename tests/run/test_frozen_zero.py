"""A big frozen language model in two real processes: stored in bf16 (or 8 and 4 bits), in no checkpoint, at every ZeRO
stage, whatever the engine's precision."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import frozen_worker as w
import pytest
import torch
from launching import run

from vlm.run.optim import parameter_groups


def results_of(stages: str) -> dict[str, dict[str, Any]]:
    printed = run([str(Path(w.__file__)), stages], processes=2)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def plain(bits: str | None = None) -> list[float]:
    """An ordinary loop over the whole global batch."""
    settings, model = w.recipe(), w.build(bits).to("cpu")
    model.llm.gradient_checkpointing_disable()
    groups = parameter_groups(model, lr=w.LR, weight_decay=settings.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=settings.optim.betas, eps=settings.optim.eps)
    losses = []
    model.train()
    for _ in range(w.STEPS):
        term = model(w.batch_of(range(w.GLOBAL_BATCH)))["caption"]
        loss = term.total / term.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check(stage: str, result: dict[str, Any], expected: list[float], frozen: list[str]) -> None:
    trained = {n: p.numel() for n, p in w.build().named_parameters() if p.requires_grad}
    assert result["losses"] == pytest.approx(expected, rel=2e-2), stage
    assert result["frozen"] == frozen, stage
    assert result["masters"] <= sum(trained.values()) + 1024, stage  # what ZeRO fills up; the OPT has 60,000 weights
    assert set(result["checkpoint"]) == set(trained), stage
    assert result["hash_kept"], stage


@pytest.mark.parametrize("stages", ["3", pytest.param("0,2,2_bf16,3_bf16", marks=pytest.mark.slow)])
def test_frozen_weights_stay_in_bf16_and_out_of_checkpoints(stages: str) -> None:
    expected = plain()
    assert expected[-1] < expected[0]
    for stage, result in results_of(stages).items():
        check(stage, result, expected, ["bfloat16"])


if find_spec("bitsandbytes") is not None:

    def test_frozen_weights_in_few_bits() -> None:
        results = results_of("0_8bit,2_4bit,3_8bit")
        for stage in ("0_8bit", "2_4bit"):
            kind = "int8" if stage.endswith("8bit") else "uint8"
            check(stage, results[stage], plain(stage[2:]), ["bfloat16", kind])
        assert "quantise" in results["3_8bit"]["refused"]
