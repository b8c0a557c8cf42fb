"""Video-ChatGPT's variant in two real processes: the same steps at every ZeRO stage, text and video mixed; parts of the
LLaMA train in fp32 among frozen ones, which are in no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import chat_worker as w
import pytest
import torch
from launching import run

from vlm.run.optim import parameter_groups


def plain() -> list[tuple[float, float]]:
    """An ordinary loop over the whole global batch."""
    settings, model = w.recipe(), w.build()
    groups = parameter_groups(model, lr=w.LR, weight_decay=settings.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=settings.optim.betas, eps=settings.optim.eps)
    losses = []
    model.train()
    for step in range(w.STEPS):
        term = model(w.batch_of(range(step * w.GLOBAL_BATCH, (step + 1) * w.GLOBAL_BATCH)))["dialogue"]
        loss = term.total / term.count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        losses.append((float(loss.detach()), float(norm)))
    return losses


def test_every_stage_makes_the_same_steps() -> None:
    printed = run([str(Path(w.__file__)), "0,2,3,2_stored,3_bf16"], processes=2)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    results = json.loads(line.removeprefix("RESULT "))
    expected = plain()
    trained = {name for name, p in w.build().named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} > {"llm", "video_marks", "pes", "reducers", "projecters"}
    for stage, result in results.items():
        loose = stage.endswith(("_bf16", "_stored"))
        for step, (got, want) in enumerate(zip(result["losses"], expected, strict=True)):
            if loose:
                assert got[0] == pytest.approx(want[0], rel=3e-2), f"stage {stage}, step {step}"
            else:
                assert got == pytest.approx(want, rel=3e-5), f"stage {stage}, step {step}"
        assert result["still"] == [], f"stage {stage}: trained, but did not move"
        assert result["moved"] == [] or stage.endswith("_bf16"), f"stage {stage}: frozen, but moved"
        assert set(result["checkpoint"]) == trained
        assert result["other_when_loaded"] == [], f"stage {stage}: not what was saved"
        assert result["hash_kept"]
        assert result["texts"] > 1
        assert result["other_texts"] == 0 or stage.endswith("_bf16"), f"stage {stage}: ranks write something else"
        assert result["dtypes"] == ["bfloat16" if loose else "float32"]
        assert result["trained_dtypes"] == ["bfloat16" if stage.endswith("_bf16") else "float32"]
