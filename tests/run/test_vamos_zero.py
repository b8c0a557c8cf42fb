"""LLaMA-VQA in two real processes: ten steps at every ZeRO stage equal plain PyTorch; the frozen LLaMA stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vamos_worker as w
from launching import run

from vlm.run.optim import parameter_groups


def plain() -> list[tuple[float, float]]:
    """An ordinary loop over the whole global batch, without recomputed activations."""
    settings = w.recipe()
    model = w.build()
    model.llm.gradient_checkpointing_disable()
    groups = parameter_groups(model, lr=w.LR, weight_decay=settings.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=settings.optim.betas, eps=settings.optim.eps)
    losses = []
    model.train()
    for step in range(w.STEPS):
        terms = model(w.batch_of(range(step * w.GLOBAL_BATCH, (step + 1) * w.GLOBAL_BATCH)))
        loss = sum(w.VIEWS[name] * term.total / term.count for name, term in terms.items())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        losses.append((float(loss.detach()), float(norm)))
    return losses


def test_every_stage_makes_the_same_steps() -> None:
    """Packed rows of unequal lengths, accumulation, three views, activation checkpointing."""
    printed = run([str(Path(w.__file__)), "0,1,2,3,2_bf16,3_bf16"], processes=2)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    results = json.loads(line.removeprefix("RESULT "))
    expected = plain()
    assert expected[-1][0] != pytest.approx(expected[0][0], rel=1e-2)
    model = w.build()
    kept = {n for n, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}
    for stage, result in results.items():
        for step, (got, want) in enumerate(zip(result["losses"], expected, strict=True)):
            if stage.endswith("_bf16"):
                assert got[0] == pytest.approx(want[0], rel=2e-2), f"stage {stage}, step {step}"
            else:
                assert got == pytest.approx(want, rel=2e-5), f"stage {stage}, step {step}"
        assert result["still"] == [], f"stage {stage}: trained, but did not move"
        assert result["moved"] == [] or stage.endswith("_bf16"), f"stage {stage}: frozen, but moved"
        assert set(result["checkpoint"]) == kept
        assert not any(name.startswith("llm.") for name in result["checkpoint"])
        assert result["hash_kept"]
