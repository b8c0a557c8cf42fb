"""Tokens a second, peak memory and model FLOPs utilisation of one step."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from vlm.data.loader import MicroBatch
from vlm.distributed import World
from vlm.models.system import System

# Dense bf16 peak, FLOP/s, from the makers' data sheets (without sparsity).
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
}


class Throughput:
    """Turns a step's micro-batches and its duration into figures.

    MFU counts what the maths needs: forward and backward of trained layers (3 forwards), and of frozen layers forward
    and the gradient of their input (2 forwards), since their weights get no gradient.
    """

    def __init__(self, model: System, world: World) -> None:
        self._model, self._world = model, world
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self._peak = next((peak for part, peak in PEAK_BF16.items() if part in name), None)

    def row(self, micro_batches: Sequence[MicroBatch], seconds: float) -> dict[str, Any]:
        """tokens_per_s (over all ranks), tflops (this rank), peak_memory (bytes), mfu (None: peak unknown)."""
        tokens, flops = 0, 0.0
        for item in micro_batches:
            cost = self._model.chosen_cost(item.batch)
            tokens += cost.tokens * item.weight
            flops += 3 * cost.trained_flops + 2 * cost.frozen_flops + cost.unlearned_flops
        return {
            "tokens_per_s": tokens * self._world.size / seconds,
            "tflops": flops / seconds / 1e12,
            "peak_memory": self._peak_memory(),
            "mfu": flops / seconds / self._peak if self._peak else None,
        }

    def _peak_memory(self) -> int:
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
