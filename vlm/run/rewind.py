"""Back to a checkpoint within a running engine: what trains, Adam's moments and counts, and buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vlm.models import trained
from vlm.run import checkpoint, restore


def rewind(folder: Path, engine: Any) -> dict[str, Any]:
    """Give `engine` (vlm.run.engine.Engine) the state of a verified checkpoint of its own run. Collective.

    Returns:
        the checkpoint's state.json.
    """
    state = json.loads((folder / checkpoint.STATE).read_text())
    restore.load_optimizer(folder, engine, state)
    _publish(engine.optimizer)
    buffers = trained.persistent_buffers(engine.model)
    if buffers:
        with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
            for name, value in buffers.items():
                value.data.copy_(file.get_tensor(name))
    return state


def _publish(wrapper: Any) -> None:
    """Copy the masters, which were written behind DeepSpeed's back, into the weights that compute, as after a step."""
    if hasattr(wrapper, "update_lp_params"):  # stages 1 and 2
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3
        wrapper._partition_all_parameters()
        for number in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        wrapper.invalidate_secondary_tensor()
    elif hasattr(wrapper, "fp32_groups"):  # stage 0 in bf16; in fp32 the masters are the weights
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups):
            for parameter, master in zip(low, high):
                parameter.data.copy_(master.data)
