"""Parameter groups with layer-wise learning-rate decay, and the schedules: pure functions of names and steps.

As published with VideoMAE (arXiv 2203.12602) after BEiT (arXiv 2106.08254, layer-wise decay), LLaMA-Adapter
(2303.16199) and Video-LLaMA (2306.02858).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm.models.system import System
from vlm.types import UserError


def parameter_groups(
    model: System,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    adam_steps: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters of `model` by learning rate and weight decay, for an optimizer of torch's form.

    A group's rate is `lr * lr_scale`, where lr_scale = layer_decay ** (num_layers + 1 - layer_id), 1 for what stands
    above the last layer. Groups stand in the order in which their first parameter does; frozen parameters are in none.

    Args:
        adam_steps: steps that the moments of each have seen, where these differ: each number has groups of its own,
            since an engine may have Adam step (and count) a group as one tensor.
    Returns:
        dicts with params, names (of the same order), lr, lr_scale, weight_decay, layer_id.
    Raises:
        UserError: layer_decay below 1 for a system that has no order of layers.
    """
    groups: dict[tuple[int | None, bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_id(model, name) if layer_decay != 1.0 else None
        decays = not model.no_decay(name, parameter)
        key = (layer, decays, 0 if adam_steps is None else adam_steps[name])
        group = groups.get(key)
        if group is None:
            scale = 1.0 if layer is None else layer_decay ** ((model.num_layers or 0) + 1 - layer)
            group = groups[key] = {
                "params": [],
                "names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
                "layer_id": layer,
            }
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_id(model: System, name: str) -> int:
    layer = model.layer_id(name)
    if layer is None or model.num_layers is None:
        raise UserError(f"optim.layer_decay is below 1, but {type(model).__name__} has no order of layers; set it to 1")
    return layer


def warmup_cosine(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    final: float,
    peak_twice: bool = True,
    start: float = 0.0,
    restart: int = 0,
    from_start: bool = False,
) -> float:
    """The value of a schedule at one optimizer step: linear warmup, then half a cosine from `peak` to `final`.

    W = warmup_steps values evenly spaced over [start, peak], both ends included (so step 0 is exactly `start` where
    there is a warmup, and `peak` comes twice), or without `peak_twice` start + (peak - start) k / W at step k < W; then
    for i = 0 … R - 1, R = total_steps - W: final + (peak - final) / 2 * (1 + cos(pi i / R)), which stops one short of
    `final`.

    Args:
        step: 0 … total_steps - 1.
        warmup_steps: 0 … total_steps.
        peak_twice: as VideoMAE's schedule has it; without, as MAE's and LLaMA-Adapter's.
        restart: steps after which warmup begins anew while it is on; 0: it does not.
        from_start: i is the step itself and R total_steps, as in Video-LLaMA's schedule.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    assert 0 <= warmup_steps <= total_steps, f"{warmup_steps} warmup steps of {total_steps}"
    if step < warmup_steps:
        done = step % restart if restart else step
        if not peak_twice:
            return start + (peak - start) * done / warmup_steps
        return peak if done == warmup_steps - 1 > 0 else start + done * ((peak - start) / max(warmup_steps - 1, 1))
    before = 0 if from_start else warmup_steps
    turn = math.cos(math.pi * (step - before) / (total_steps - before))
    return final + 0.5 * (peak - final) * (1 + turn)
