"""Recipe and JSON meet once; the same step at every ZeRO stage, in two real processes, equals plain PyTorch."""

import json
from pathlib import Path

import pytest
import torch
import zero_worker
from launching import ROOT, run
from torch.utils.cpp_extension import _get_build_directory

from vlm.config import override
from vlm.recipe import load
from vlm.run.engine import derive
from vlm.run.hardware import read_hardware
from vlm.run.optim import parameter_groups

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def plain_losses():
    """Ten steps of an ordinary single-process PyTorch loop over the whole global batch."""
    settings = zero_worker.recipe()
    torch.manual_seed(0)
    model = settings.model.build()
    video, label = zero_worker.data(model)
    groups = parameter_groups(model, lr=zero_worker.LR, weight_decay=settings.optim.weight_decay, layer_decay=0.7)
    optimizer = torch.optim.AdamW(groups, betas=settings.optim.betas, eps=settings.optim.eps)
    losses = []
    for step in range(zero_worker.STEPS):
        positions = range(step * zero_worker.GLOBAL_BATCH, (step + 1) * zero_worker.GLOBAL_BATCH)
        model.train()
        term = model(zero_worker.batch_of(positions, video, label))["label"]
        loss = term.total / term.count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append((float(loss), float(norm)))
    return losses


def worker(stages, precisions):
    printed = run([str(Path(zero_worker.__file__)), stages, precisions], processes=2)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def test_losses_agree_with_plain_pytorch_over_zero_stages():
    """Uneven micro-batches (5 samples a rank as 3 + 2), accumulation, clipping, layer decay, checkpointing."""
    expected = plain_losses()
    results = worker("0,1,2,3", "fp32,bf16")
    first = results["fp32/0"]
    for stage in "0123":
        for got, want in zip(results[f"fp32/{stage}"], expected):
            assert got == pytest.approx(want, rel=2e-5)
        for got, want in zip(results[f"fp32/{stage}"], first):
            assert got[0] == pytest.approx(want[0], rel=1e-6)
        for got, want in zip(results[f"bf16/{stage}"], expected):
            assert got[0] == pytest.approx(want[0], rel=2e-2)
    assert expected[0][0] != pytest.approx(expected[-1][0], rel=1e-3)


@pytest.mark.slow
def test_offload_agrees_too():
    """Compiles DeepSpeed's CPU Adam on a fresh machine (one to two minutes)."""
    (Path(_get_build_directory("cpu_adam", verbose=False)) / "lock").touch()  # stale
    results = worker("3,3_offload", "fp32")
    for got, want in zip(results["fp32/3_offload"], results["fp32/3"]):
        assert got[0] == pytest.approx(want[0], rel=1e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_json_is_accepted(path):
    hardware = read_hardware(path)
    derived = derive(hardware, load("vit_llama.demo"), world_size=2)
    product = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 2
    assert derived["train_batch_size"] == product == 64


def test_accumulation_is_derived_for_any_world_size():
    recipe = override(load("vit_llama.demo"), ["global_batch_size=13"])
    for world_size in (1, 2, 3, 5, 13, 17):
        derived = derive({"train_micro_batch_size_per_gpu": 4}, recipe, world_size)
        share = -(-13 // world_size)
        assert derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] >= share
