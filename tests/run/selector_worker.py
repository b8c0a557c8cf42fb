"""Started by test_selector_zero.py in two processes: the same steps of Vamos with a token bottleneck at ZeRO stages.

What it prints is as in vamos_worker.py. The noise of the choice is seeded by the micro-batch: the same at every stage.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import vamos_worker as w

from vlm.data.packing import Row, pack
from vlm.data.passages import Picks, gather_passages
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.vamos import SelectorConfig, Vamos, vamos
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.types import IGNORE, Batch, Passage

KEEP = 3


def recipe() -> Recipe:
    return Recipe(
        model=vamos(
            llama=LlamaBaseConfig(dim=32, layers=2, heads=4, hidden=48, vocab_size=w.WORDS),
            use_video=False,
            adapter_len=4,
            selector=SelectorConfig(keep=KEEP, width=16, heads=2),
            activation_checkpointing=True,
        ),
        inputs=None,
        data=TrainData(shards="none"),
        optim=OptimConfig(lr=w.LR, betas=(0.9, 0.95), weight_decay=0.14),
        views={"answer": 1.0},
        global_batch_size=w.GLOBAL_BATCH,
        steps=w.STEPS,
    )


def build() -> Vamos:
    torch.manual_seed(0)
    model = recipe().model.build()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.gate.fill_(0.5)
    return model


def batch_of(positions: Any) -> Batch:
    """Captions of unequal lengths; every seventh sample has none, so some micro-batches have nothing to choose."""
    picks, rows = Picks(KEEP), []
    for position in positions:
        draw = torch.Generator().manual_seed(1000 + position)
        ids = torch.randint(1, w.WORDS, (8,), generator=draw).tolist()
        caption = torch.randint(1, w.WORDS, (position % 7 * 2,), generator=draw).tolist()
        first, count = picks.add(Passage(tuple(caption), (5, 6))) if caption else (0, 0)
        whole = (*ids[:3], *[0] * count, *ids[3:])
        labels = (*[IGNORE] * (len(whole) - 2), *whole[-2:])
        rows.append(Row(whole, labels, picks=(3, 3 + count) if count else (0, 0), first_pick=first))
    torch.manual_seed(positions[0])
    passages = gather_passages(picks.passages, KEEP)
    return Batch(keys=tuple(map(str, positions)), views={"answer": pack(rows, 0)}, passages=passages)


if __name__ == "__main__":
    w.recipe, w.build, w.batch_of = recipe, build, batch_of
    w.main(sys.argv[1].split(","))
