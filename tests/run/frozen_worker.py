"""Started by test_frozen_zero.py in two processes: LLMVA-GEBC with its frozen OPT in bf16, at every ZeRO stage.

"2_bf16" is stage 2 of a bf16 engine, "2_8bit" has the OPT's matrices in 8 bits. The result, one JSON line, holds for
each stage the losses, the dtypes of what is frozen, the weights in the optimizer and the names in a checkpoint; or what
was refused.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlm.data.loader import MicroBatch, plan_step
from vlm.data.packing import Row, pack
from vlm.distributed import end, join, share_object
from vlm.models.llmva import Llmva, LlmvaConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.nn.qformer import QFormerConfig
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.run import checkpoint, zero_state
from vlm.run.engine import Engine, derive
from vlm.types import IGNORE, Batch, UserError

STEPS, GLOBAL_BATCH, MICRO_BATCH, LR, WORDS, PLACES, DIM = 4, 5, 2, 3e-3, 40, 5, 16


def recipe(bits: str | None = None) -> Recipe:
    llm = OptBaseConfig(dim=64, layers=2, heads=4, hidden=96, vocab_size=WORDS, max_positions=64, dtype="bfloat16")
    llm.quantise = bits  # type: ignore[assignment]
    return Recipe(
        model=LlmvaConfig(
            opt=llm,
            frame_tokens=2,
            frame_dim=DIM,
            num_video_tokens=PLACES - 2,
            max_frames=4,
            qformer=QFormerConfig(dim=DIM, heads=2, hidden=24, dropout=0.0),
            other_tokens=2,
            other_dim=6,
            max_other=4,
            activation_checkpointing=True,
        ),
        inputs=None,
        data=TrainData(shards="none"),
        optim=OptimConfig(lr=LR),
        views={"caption": 1.0},
        global_batch_size=GLOBAL_BATCH,
        steps=STEPS,
    )


def build(bits: str | None = None) -> Llmva:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen OPT has RANDOM weights")
        return recipe(bits).model.build()


def batch_of(positions: Any) -> Batch:
    """Boundaries in videos of 1 to 4 frames, captions of unequal lengths."""
    rows, frames, counts, boundary, other = [], [], [], [], []
    for place, position in enumerate(positions):
        draw = torch.Generator().manual_seed(1000 + position)
        length, learnt = 9 + (7 * position) % 9, 1 + position % 4
        ids = tuple(torch.randint(2, WORDS, (length,), generator=draw).tolist())
        labels = (*[IGNORE] * (length - learnt), *ids[length - learnt :])
        rows.append(Row(ids, labels, (2, 2 + PLACES), place))
        counts.append(1 + position % 4)
        frames.append(torch.randn(counts[-1], 2, DIM, generator=draw))
        boundary.append(torch.rand(2, generator=draw))
        other.append(torch.randn(3, 6, generator=draw))
    return Batch(
        keys=tuple(map(str, positions)),
        frame_tokens=torch.cat(frames),
        frame_counts=tuple(counts),
        extra={"boundary": torch.stack(boundary), "other": torch.stack(other)},
        views={"caption": pack(rows, PLACES)},
    )


def run(stage: str, world: Any, folder: Path) -> dict[str, Any]:
    number, _, form = stage.partition("_")
    hardware: dict[str, Any] = {"train_micro_batch_size_per_gpu": MICRO_BATCH}
    hardware["zero_optimization"] = {"stage": int(number)}
    if form == "bf16":
        hardware["bf16"] = {"enabled": True}
    bits = form if form.endswith("bit") else None
    model, settings = build(bits), recipe(bits)
    frozen_hash = model.frozen_hash()
    try:
        engine = Engine(model, settings, derive(hardware, settings, world.size), world)
    except UserError as error:
        return {"refused": str(error)}
    losses = []
    for _ in range(STEPS):  # the same samples each time, so that the loss falls
        plans = plan_step(0, GLOBAL_BATCH, world.size, world.rank, MICRO_BATCH)
        result = engine.step([MicroBatch(batch_of(plan.positions), plan.weight) for plan in plans], lr=LR)
        losses.append(result.loss)
    written = checkpoint.save(folder / stage, engine, checkpoint.Progress(step=STEPS), {}, keep=1, is_best=False)
    with safe_open(written / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    frozen = [getattr(p, "ds_tensor", p) for p in model.parameters() if not p.requires_grad]
    return {
        "losses": losses,
        "frozen": sorted({str(p.dtype).removeprefix("torch.") for p in frozen}),
        "masters": sum(p.numel() for p in zero_state._masters(engine)),
        "checkpoint": names,
        "hash_kept": model.frozen_hash() == frozen_hash == build().frozen_hash(),
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
