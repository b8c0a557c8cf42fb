"""Full fp32 weights and Adam moments of every trainable tensor, whatever DeepSpeed made of them.

Reading and writing whole tensors by name makes checkpoints universal: no file knows the ZeRO stage or the number of
processes. Each call below is collective (every rank calls it in the same order).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def read(engine: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, {"param", "exp_avg", "exp_avg_sq"}) in fp32 on CPU, parameter by parameter. All ranks get all tensors."""
    prime(engine)
    for name, parameter in _trainable(engine):
        yield name, {kind: _read_one(engine, parameter, kind) for kind in ("param", *MOMENTS)}


def without_gradient(engine: Any, names: Collection[str]) -> list[str]:
    """Those of the trainable tensors `names` whose first moment is all zero: Adam never had a gradient of them."""
    prime(engine)
    return [n for n, p in _trainable(engine) if n in names and not bool(_read_one(engine, p, "exp_avg").any())]


def write(engine: Any, name: str, values: dict[str, Tensor]) -> None:
    """Set the fp32 master weights and moments of one parameter (after `prime`)."""
    parameter = dict(_trainable(engine))[name]
    for kind, value in values.items():
        _write_one(engine, parameter, kind, value.to(torch.float32))


def step_count(engine: Any) -> int:
    """How many optimizer steps the moments have seen."""
    counts = {int(state["step"]) for state in _inner(engine).state.values() if "step" in state}
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def set_step_count(engine: Any, count: int) -> None:
    """Tell Adam (bias correction) how many steps the moments have seen."""
    for state in _inner(engine).state.values():
        state["step"] = torch.full_like(state["step"], float(count)) if torch.is_tensor(state["step"]) else count


def prime(engine: Any) -> None:
    """Create zero moments where Adam has made no step yet, and let DeepSpeed link them to the parameters."""
    inner = _inner(engine)
    for master in _masters(engine):
        if not inner.state.get(master):
            step: Any = 0 if type(inner).__name__ == "DeepSpeedCPUAdam" else torch.zeros((), dtype=torch.float32)
            if torch.is_tensor(step) and inner.defaults.get("fused"):
                step = step.to(master.device)
            inner.state[master] = {"step": step, **{kind: torch.zeros_like(master) for kind in MOMENTS}}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        # DeepSpeed links once, after the first group's first step, when the other groups have no state yet.
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def forget_warm_up(engine: Any) -> None:
    """Undo the step that DeepSpeed's stage-0 bf16 wrapper makes at construction to create Adam's state.

    It steps with zero gradients at the full learning rate, which decays the master weights and puts Adam's bias
    correction one step ahead of every other stage.
    """
    wrapper = engine.optimizer
    if not hasattr(wrapper, "fp32_groups"):
        return
    for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups):
        for parameter, master in zip(low, high):
            master.data.copy_(parameter.data)
    wrapper.optimizer.state.clear()


def _trainable(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in engine.model.named_parameters() if p.requires_grad]


def _inner(engine: Any) -> torch.optim.Optimizer:
    """The Adam that DeepSpeed's wrapper (if any) steps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine: Any) -> list[Tensor]:
    """The tensors that Adam steps on this rank."""
    wrapper = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(wrapper, attribute):
            return list(getattr(wrapper, attribute))
    return [p for group in wrapper.param_groups for p in group["params"]]


def _master_of(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Where nothing is partitioned (stage 0): the fp32 tensor that stands for `parameter`."""
    wrapper = engine.optimizer
    if not hasattr(wrapper, "fp32_groups"):
        return parameter
    for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups):
        for candidate, master in zip(low, high):
            if candidate is parameter:
                return master
    raise AssertionError("a trainable parameter is in no group of the optimizer")


def _read_one(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    key = None if kind == "param" else kind
    if hasattr(parameter, "ds_id"):
        value = engine.optimizer.get_full_hp_param(parameter, key)
    elif hasattr(parameter, "_hp_mapping"):
        value = parameter.get_full_hp_param(key)  # type: ignore[attr-defined]
    else:
        master = _master_of(engine, parameter)
        value = master if key is None else _inner(engine).state[master][key]
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return value.detach().reshape(shape).to("cpu", torch.float32, copy=True)


def _write_one(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    key = None if kind == "param" else kind
    if hasattr(parameter, "ds_id"):
        part, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)
        rank = engine.optimizer._get_param_partition_rank(parameter)
        mine = value.flatten()[rank * part.numel() : (rank + 1) * part.numel()]
        part.data[: mine.numel()].copy_(mine)  # the last rank's part may end in padding
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value.to(parameter.device), key)  # type: ignore[attr-defined]
    else:
        master = _master_of(engine, parameter)
        (master if key is None else _inner(engine).state[master][key]).data.copy_(value)
