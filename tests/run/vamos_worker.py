"""Started by test_vamos_zero.py in two processes: the same ten steps of LLaMA-VQA at every ZeRO stage.

Each rank has rows of its own lengths; "2_bf16" is stage 2 in bf16. The result, one JSON line, holds for each stage the
losses and gradient norms, which trained tensors did not move, which frozen ones did, and the names in a checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from torch import nn

from vlm.data.loader import MicroBatch, plan_step
from vlm.data.packing import Row, pack
from vlm.data.questions import QuestionConfig
from vlm.distributed import end, join, share_object
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.vamos import Vamos, llama_vqa
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.run import checkpoint
from vlm.run.engine import Engine, derive
from vlm.types import IGNORE, Batch

STEPS, GLOBAL_BATCH, MICRO_BATCH, LR, WORDS, FRAMES = 10, 5, 2, 3e-3, 40, 3
VIEWS = {"answer": 1.0, "question": 0.5, "video_order": 1.0}


def recipe() -> Recipe:
    llama = LlamaBaseConfig(dim=32, layers=3, heads=4, kv_heads=2, hidden=48, vocab_size=WORDS)
    model = llama_vqa(
        llama=llama,
        feature_dim=12,
        num_frames=FRAMES,
        adapter_len=4,
        adapter_layer=2,
        tau=1.0,
        activation_checkpointing=True,
    )
    return Recipe(
        model=model,
        inputs=QuestionConfig(num_frames=FRAMES, feature_dim=12),
        data=TrainData(shards="none"),
        optim=OptimConfig(lr=LR, betas=(0.9, 0.95), weight_decay=0.14),
        views=VIEWS,
        global_batch_size=GLOBAL_BATCH,
        steps=STEPS,
    )


def build() -> Vamos:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
        model = recipe().model.build()
    with torch.no_grad():  # open gates, or the prompts would get no gradient at the first step
        for layer in model.layers:
            layer.attention.gate1.fill_(0.5)
    return model


def batch_of(positions: Any) -> Batch:
    """Samples of the endless order: rows of unequal lengths, one sample in three without a question view's label."""
    views: dict[str, list[Row]] = {name: [] for name in VIEWS}
    features = []
    for place, position in enumerate(positions):
        draw = torch.Generator().manual_seed(1000 + position)
        features.append(torch.randn(FRAMES, 12, generator=draw))
        for number, name in enumerate(VIEWS):
            length, learnt = 8 + (7 * position + number) % 9, 0 if name == "video_order" else 1 + position % 4
            ids = tuple(torch.randint(1, WORDS, (length,), generator=draw).tolist())
            labels = (*[IGNORE] * (length - learnt), *ids[length - learnt :])
            views[name].append(Row(ids, labels, (2, 2 + FRAMES), place))
    packed = {name: pack(rows, FRAMES) for name, rows in views.items()}
    return Batch(keys=tuple(map(str, positions)), features=torch.stack(features), views=packed)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, put together where ZeRO 3 has cut them."""
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return {name: p.detach().float().cpu().clone() for name, p in model.named_parameters()}


def run(stage: str, world: Any, folder: Path) -> dict[str, Any]:
    hardware: dict[str, Any] = {"train_micro_batch_size_per_gpu": MICRO_BATCH}
    hardware["zero_optimization"] = {"stage": int(stage[0])}
    if stage.endswith("_bf16"):
        hardware["bf16"] = {"enabled": True}
    model, settings = build(), recipe()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen_hash = model.frozen_hash()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(model, settings, derive(hardware, settings, world.size), world)
    losses = []
    for step in range(STEPS):
        plans = plan_step(step, GLOBAL_BATCH, world.size, world.rank, MICRO_BATCH)
        result = engine.step([MicroBatch(batch_of(plan.positions), plan.weight) for plan in plans], lr=LR)
        losses.append([result.loss, result.grad_norm])
    after = whole(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    written = checkpoint.save(folder / stage, engine, checkpoint.Progress(step=STEPS), {}, keep=1, is_best=False)
    with safe_open(written / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    return {
        "losses": losses,
        "still": sorted(trained - moved),
        "moved": sorted(moved - trained),
        "checkpoint": names,
        "hash_kept": model.frozen_hash() == frozen_hash,
    }


def main(stages: list[str]) -> None:
    world = join()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(share_object(scratch))
        results = {stage: run(stage, world, folder) for stage in stages}
        if world.is_main:
            print("RESULT " + json.dumps(results), flush=True)
    end()


if __name__ == "__main__":
    main(sys.argv[1].split(","))
