"""Full fp32 weights and Adam moments of every trainable tensor, whatever DeepSpeed made of them.

Tensors are known by name and by place within the whole tensor, which makes checkpoints universal: no file knows the
ZeRO stage or the number of processes. `fragments` asks no other rank for anything; what else reads or writes is
collective (every rank calls it in the same order).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.distributed import share

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("param", *MOMENTS)


@dataclass(frozen=True, slots=True)
class Fragment:
    """What this rank holds of one parameter: the elements from `start` on, of the flattened tensor."""

    name: str
    start: int
    values: dict[str, Tensor]  # kind -> (n,), where training itself reads and writes


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor that the engine was built to train, and its whole shape."""
    parameters = dict(engine.model.named_parameters())
    built = {name: parameters[name] for name in engine.names.values()}
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in built.items()}


def fragments(engine: Any, *, all_held: bool = False) -> list[Fragment]:
    """This rank's part of master weights and moments, as views: nothing is copied, no other rank is asked.

    Args:
        all_held: all that this rank holds, also where every rank holds the same (stage 0); else each rank has a share
            of it, so that together they name every element (some twice where ZeRO keeps copies).
    """
    prime(engine)
    found = []
    total = sum(math.prod(shape) for shape in shapes(engine).values())
    world = engine.world
    begin, end = (0, total) if all_held else share(total, world.size, world.rank)
    passed = 0  # elements of the parameters before this one
    for name, parameter in _trainable(engine):
        size = math.prod(getattr(parameter, "ds_shape", parameter.shape))
        first, last = max(begin - passed, 0), min(end - passed, size)
        passed += size
        held = _held(engine, parameter, size, first, last)
        if held is not None:
            found.append(Fragment(name, *held))
    return found


def _held(
    engine: Any, parameter: nn.Parameter, size: int, first: int, last: int
) -> tuple[int, dict[str, Tensor]] | None:
    """Where this rank's part of a parameter of `size` elements begins, and its values; None: it has no part.

    Where nothing is partitioned the part is [first, last).
    """
    if hasattr(parameter, "ds_id"):
        parts = {kind: _partition(engine, parameter, kind) for kind in KINDS}
        length = parts["param"].numel()
        start = engine.optimizer._get_param_partition_rank(parameter) * length
        length = min(length, size - start)  # the last rank's part may end in padding
        return (start, {kind: part[:length] for kind, part in parts.items()}) if length > 0 else None
    if hasattr(parameter, "_hp_mapping"):
        mapping: Any = parameter._hp_mapping
        if mapping is None:
            return None
        values = {kind: mapping.get_hp_fragment(_key(kind)).detach() for kind in KINDS}
        return mapping.lp_fragment_address.start, values
    if first >= last:
        return None
    master = _master_of(engine, parameter)
    whole = {"param": master, **{kind: _inner(engine).state[master][kind] for kind in MOMENTS}}
    return first, {kind: value.detach().view(-1)[first:last] for kind, value in whole.items()}


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


def step_counts(engine: Any) -> dict[str, int]:
    """How many optimizer steps the moments of each trainable tensor have seen. Not collective."""
    state = _inner(engine).state
    found = {}
    for name, master in _masters_by_name(engine).items():
        step = state[master].get("step", 0) if master in state else 0
        found[name] = int(step)
    return found


def set_step_counts(engine: Any, counts: Mapping[str, int]) -> None:
    """Tell Adam (bias correction) how many steps the moments of each trainable tensor have seen. Not collective.

    Tensors that Adam steps as one (a group, cut by ZeRO) must have the same count.
    """
    told: dict[int, int] = {}
    for name, master in _masters_by_name(engine).items():
        count = counts[name]
        assert told.setdefault(id(master), count) == count, f"{name}: two step counts in one group of the optimizer"
        state = _inner(engine).state[master]
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


def _masters_by_name(engine: Any) -> dict[str, Tensor]:
    """Trainable tensor -> what Adam steps for it (for many together, where ZeRO flattens a group)."""
    wrapper = engine.optimizer
    for masters, groups in (
        ("fp32_partitioned_groups_flat", "fp16_groups"),
        ("single_partition_of_fp32_groups", "bit16_groups"),
        ("fp32_groups_flat_partition", "bf16_groups"),
    ):
        if hasattr(wrapper, masters):
            pairs = zip(getattr(wrapper, masters), getattr(wrapper, groups), strict=True)
            flat = {id(parameter): master for master, group in pairs for parameter in group}
            return {name: flat[id(parameter)] for name, parameter in _trainable(engine)}
    return {name: _master_of(engine, parameter) for name, parameter in _trainable(engine)}


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


def _key(kind: str) -> str | None:
    """DeepSpeed's name of a kind of value."""
    return None if kind == "param" else kind


def _partition(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    """Stage 3: this rank's part of one kind of value, with padding."""
    part, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=_key(kind))
    return part.detach()


def _read_one(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    key = _key(kind)
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
    key = _key(kind)
    if hasattr(parameter, "ds_id"):
        part = _partition(engine, parameter, kind)
        rank = engine.optimizer._get_param_partition_rank(parameter)
        mine = value.flatten()[rank * part.numel() : (rank + 1) * part.numel()]
        part.data[: mine.numel()].copy_(mine)  # the last rank's part may end in padding
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value.to(parameter.device), key)  # type: ignore[attr-defined]
    else:
        master = _master_of(engine, parameter)
        (master if key is None else _inner(engine).state[master][key]).data.copy_(value)
