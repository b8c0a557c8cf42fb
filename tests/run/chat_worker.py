"""Started by test_chat_zero.py in two processes: Video-ChatGPT's variant, with parts of the LLaMA that train, at every
ZeRO stage.

Rows with and without video, so that some micro-batches are text alone. "3_bf16" is stage 3 of a bf16 engine, "2_stored"
has what is frozen of the LLaMA in bf16 under an fp32 engine. The result, one JSON line, holds for each stage the losses
and gradient norms, which trained tensors did not move, which frozen ones did, dtypes, the names in a
checkpoint, and whether ranks write what one process writes with it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from torch import nn

from vlm.data.chats import ChatConfig
from vlm.data.loader import MicroBatch, plan_step
from vlm.data.packing import Row, pack
from vlm.distributed import end, gather_objects, join, share_object
from vlm.models.generation import GenerationConfig, generate
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.video_chatgpt import VideoChatGpt, breakfast_variant
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.run import checkpoint, restore
from vlm.run.engine import Engine, derive
from vlm.types import IGNORE, Batch

STEPS, GLOBAL_BATCH, MICRO_BATCH, LR, PLACES, DIM, STATES = 6, 5, 2, 3e-3, 4, 12, 2


def recipe(dtype: str = "float32") -> Recipe:
    inputs = ChatConfig(num_video_tokens=PLACES, frame_tokens=STATES, frame_dim=DIM)
    words = inputs.vocab_size - 3
    llama = LlamaBaseConfig(dim=32, layers=3, heads=4, hidden=48, vocab_size=words, dtype=dtype)  # type: ignore[arg-type]
    model = breakfast_variant(
        llama=llama, num_video_tokens=PLACES, frame_tokens=STATES, frame_dim=DIM, activation_checkpointing=True
    )
    model.check_inputs(inputs)
    return Recipe(
        model=model,
        inputs=inputs,
        data=TrainData(shards="none"),
        optim=OptimConfig(lr=LR, betas=(0.9, 0.95), weight_decay=0.1),
        views={"dialogue": 1.0},
        global_batch_size=GLOBAL_BATCH,
        steps=STEPS,
    )


def build(dtype: str = "float32") -> VideoChatGpt:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
        return recipe(dtype).model.build()


def batch_of(positions: Any) -> Batch:
    """Samples of the endless order, every third one text alone, one in seven with nothing to be learnt."""
    words = recipe().model.llama.vocab_size
    rows, states = [], []
    for position in positions:
        draw = torch.Generator().manual_seed(1000 + position)
        length, learnt = 6 + (7 * position) % 9, 0 if position % 7 == 4 else 2 + position % 4
        ids = torch.randint(3, words, (length,), generator=draw).tolist()
        labels = [*[IGNORE] * (length - learnt), *ids[length - learnt :]]
        if position % 3 == 0:
            rows.append(Row(tuple(ids), tuple(labels)))
            continue
        ids[1:1] = [words + 1, *[0] * PLACES, words + 2]
        labels[1:1] = [IGNORE] * (PLACES + 2)
        rows.append(Row(tuple(ids), tuple(labels), (2, 2 + PLACES), len(states)))
        states.append(torch.randn(PLACES, STATES, DIM, generator=draw).half())
    return Batch(
        keys=tuple(map(str, positions)),
        frame_tokens=torch.cat(states) if states else None,
        frame_counts=(PLACES,) * len(states),
        views={"dialogue": pack(rows, PLACES)},
    )


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, put together where ZeRO 3 has cut them."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def written(model: VideoChatGpt, rank: int) -> list[list[int]]:
    """What a rank's prompts go on with; each rank has rows, and a number of them, of its own."""
    batch = batch_of(range(1 + 3 * rank, 4 + 4 * rank))
    asked = Batch(
        keys=batch.keys,
        frame_tokens=batch.frame_tokens,
        frame_counts=batch.frame_counts,
        prompts=replace(batch.views["dialogue"], predictors=torch.empty(0, dtype=torch.int64)),
    )
    model.eval()
    return generate(model, asked, GenerationConfig(max_new_tokens=6), ends=[[2], [7, 7]])


def run(stage: str, world: Any, folder: Path) -> dict[str, Any]:
    number, _, form = stage.partition("_")
    hardware: dict[str, Any] = {"train_micro_batch_size_per_gpu": MICRO_BATCH}
    # nothing is too small to be cut
    hardware["zero_optimization"] = {"stage": int(number), "stage3_param_persistence_threshold": 0}
    if form == "bf16":
        hardware["bf16"] = {"enabled": True}
    dtype = "bfloat16" if form == "stored" else "float32"
    model, settings = build(dtype), recipe(dtype)
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
    moved = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    texts = written(engine.model, world.rank)
    folder_of_it = checkpoint.save(folder / stage, engine, checkpoint.Progress(step=STEPS), {}, keep=1, is_best=False)
    with safe_open(folder_of_it / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    again = build(dtype)
    restore.load_weights(folder_of_it, again)
    same = [n for n, p in again.named_parameters() if torch.allclose(p.float(), after[n].float(), rtol=1e-2, atol=1e-3)]
    return {
        "losses": losses,
        "still": sorted(trained - moved),
        "moved": sorted(moved - trained),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for n, t in after.items() if n not in trained}),
        "trained_dtypes": sorted({str(after[name].dtype).removeprefix("torch.") for name in trained}),
        "checkpoint": names,
        "other_when_loaded": sorted(set(after) - set(same)),
        "other_texts": sum(gather_objects(texts != written(again, world.rank)) or []),
        "texts": len({tuple(text) for text in texts}),
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
