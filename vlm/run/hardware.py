"""The DeepSpeed JSON: hardware settings, checked to the last nested key before anything is built.

DeepSpeed itself ignores unknown names at the top and in some sections without a word, and refuses others with a
traceback when the engine is made. Here a key that the recipe owns is refused with its owner's name, an unknown one with
the nearest name, and a wrong value with what was expected. `read_json` needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

from vlm.errors import UserError

# JSON keys that the recipe owns -> where the value stands instead.
OWNED_BY_RECIPE = {
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size (derived from it, the micro-batch and the number of processes)",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
    "wandb": "wandb",
    "activation_checkpointing": "model.activation_checkpointing",
    "steps_per_print": "log_every",
}
# Keys of DeepSpeed that would do nothing or harm here -> why.
NOT_SUPPORTED = {
    "fp16": "no loss scale is kept in checkpoints; use bf16, or neither for fp32",
    "comms_logger": "its summary is printed only where a script asks for it; wall_clock_breakdown tells of each step",
    "aio": "it serves offloading to nvme, which is not supported; offload to cpu",
}


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names)


_BOOL = Rule("true or false", _is_bool)
_COUNT = Rule("a whole number above 0", lambda value: _is_int(value) and value > 0)
_STAGE = Rule("0, 1, 2 or 3", lambda value: _is_int(value) and 0 <= value <= 3)

# Keys with a single value, and sections of which DeepSpeed has no schema of its own.
PLAIN = {
    "train_micro_batch_size_per_gpu": _COUNT,
    "communication_data_type": _one_of("fp32", "bf16", "fp16"),
    "prescale_gradients": _BOOL,
    "gradient_predivide_factor": Rule("a number above 0", lambda value: _is_number(value) and value > 0),
    "wall_clock_breakdown": _BOOL,
    "memory_breakdown": _BOOL,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
}
SECTIONS: dict[str, dict[str, Rule]] = {
    "data_types": {
        "grad_accum_dtype": _one_of("fp32", "bf16"),
        "buffer_dtype": _one_of("fp32", "bf16"),
        "keep_in_fp32_modules": Rule("a list of names", _is_names),
    },
    "flops_profiler": {
        "enabled": _BOOL,
        "profile_step": _COUNT,
        "module_depth": Rule("a whole number, -1 for all", lambda value: _is_int(value) and value >= -1),
        "top_modules": _COUNT,
        "detailed": _BOOL,
        "output_file": Rule("a path or null", lambda value: value is None or isinstance(value, str)),
        "recompute_fwd_factor": Rule("a number from 0", lambda value: _is_number(value) and value >= 0),
    },
}
# Sections that DeepSpeed describes by pydantic models.
MODELED = ("zero_optimization", "bf16", "csv_monitor", "tensorboard")
HARDWARE_KEYS = (*PLAIN, *SECTIONS, *MODELED)


def read_hardware(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed JSON at `path`, checked as a whole.

    Raises:
        UserError: no such file, not JSON, an unknown key anywhere, a key that the recipe owns, "auto" anywhere, or a
            value that DeepSpeed or this project cannot work with.
    """
    hardware = read_json(path)
    check_sections(hardware, path)
    return hardware


def read_json(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed JSON at `path`, checked as far as can be done without DeepSpeed (see `check_sections`)."""
    path = Path(path)
    try:
        hardware = json.loads(path.read_text(), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); ds_configs/ holds working examples") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from error
    except ValueError as error:  # UnicodeDecodeError, or a key that comes twice
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(hardware, dict):
        raise UserError(f"{path}: holds {type(hardware).__name__}, expected one JSON object")
    for key in hardware:
        if key in OWNED_BY_RECIPE:
            raise UserError(f"{path}: {key!r} belongs to the recipe ({OWNED_BY_RECIPE[key]}); remove it from the JSON")
        if key in NOT_SUPPORTED:
            raise UserError(f"{path}: {key!r} is not supported: {NOT_SUPPORTED[key]}")
        if key not in HARDWARE_KEYS:
            hint = _nearest(key, HARDWARE_KEYS, OWNED_BY_RECIPE)
            raise UserError(f"{path}: unknown key {key!r}, which DeepSpeed would ignore in silence{hint}")
    _refuse_auto(hardware, f"{path}: ")
    if "train_micro_batch_size_per_gpu" not in hardware:
        raise UserError(f"{path}: train_micro_batch_size_per_gpu is missing; it must be {_COUNT.expected}")
    _check_rules({key: value for key, value in hardware.items() if key in PLAIN}, PLAIN, f"{path}: ")
    for key in (*SECTIONS, *MODELED):
        if not isinstance(hardware.get(key, {}), dict):
            raise UserError(f'{path}: {key} is {hardware[key]!r}; it must be an object, {{"name": value, …}}')
    for key, rules in SECTIONS.items():
        _check_rules(hardware.get(key, {}), rules, f"{path}: {key}.")
    zero = hardware.get("zero_optimization", {})
    _check_rules({key: zero[key] for key in zero if key == "stage"}, {"stage": _STAGE}, f"{path}: zero_optimization.")
    return hardware


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the JSON, in which no key comes twice (json itself would keep the last in silence)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


def _refuse_auto(value: Any, path: str) -> None:
    if value == "auto":
        raise UserError(
            f'{path.rstrip(".")} is "auto", which only another trainer fills in; write the value or remove the key'
        )
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_auto(item, f"{path}{key}.")


def _check_rules(section: dict[str, Any], rules: dict[str, Rule], where: str) -> None:
    for key, value in section.items():
        if key not in rules:
            raise UserError(f"{where}{key}: DeepSpeed has no such setting{_nearest(key, rules)}")
        if not rules[key].holds(value):
            raise UserError(f"{where}{key} is {value!r}; it must be {rules[key].expected}")


def _nearest(name: str, names: Iterable[str], more: Iterable[str] = ()) -> str:
    """The end of a sentence that names the most similar of `names` and `more`, or else all `names`."""
    names = list(names)
    close = difflib.get_close_matches(name, [*names, *more], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def check_sections(hardware: dict[str, Any], path: str | Path) -> None:
    """Hold the sections of `read_json`'s result against DeepSpeed's own models, and against what is supported here.

    Raises:
        UserError: an unknown name, a wrong value, or a mode that this project cannot train or save with.
    """
    for key, model in _models().items():
        if key in hardware:
            _check_model(hardware[key], model, f"{path}: {key}")
    if hardware.get("tensorboard", {}).get("enabled") and find_spec("tensorboard") is None:
        raise UserError(
            f"{path}: tensorboard is enabled but not installed: pip install tensorboard; or use csv_monitor"
        )
    _check_zero(hardware.get("zero_optimization", {}), f"{path}: zero_optimization")
    _check_gradients(hardware, f"{path}: ")


def _check_zero(zero: dict[str, Any], where: str) -> None:
    """What DeepSpeed could do in `zero_optimization`, but not with this project's optimizer, checks or checkpoints."""
    stage = zero.get("stage", 0)
    if not zero.get("compute_grad_norm", True):
        raise UserError(
            f"{where}.compute_grad_norm is false, but every step is checked by its gradient norm; remove it"
        )
    offloaded = zero.get("offload_optimizer") or {}
    for name, section in (("zenflow", zero), ("offload_optimizer.super_offload", offloaded)):
        if section.get(name.rpartition(".")[2]):
            raise UserError(f"{where}.{name}: is not supported: it needs an optimizer of its own; remove it")
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(part) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(f'{where}.{part}.device is "nvme", which is not supported; use "cpu"')
        if device == "cpu" and stage < least:
            raise UserError(f"{where}.{part}: needs stage {least}{' or more' if least < 3 else ''}; stage is {stage}")


def _check_gradients(hardware: dict[str, Any], where: str) -> None:
    """Precisions and scales of gradients that go together in DeepSpeed."""
    zero, bf16 = hardware.get("zero_optimization", {}), hardware.get("bf16", {})
    stage, own = zero.get("stage", 0), "bf16" if bf16.get("enabled") else "fp32"
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if bf16.get(name):
            raise UserError(f"{where}bf16.{name}: is not supported: checkpoints keep weights and moments in fp32")
    kept = hardware.get("data_types", {}).get("grad_accum_dtype")
    if kept not in (None, own) and (stage == 0 or own == "fp32"):
        raise UserError(
            f"{where}data_types.grad_accum_dtype is {kept!r}, but at stage {stage} with {own} weights gradients are "
            f"{own} too; remove it, or use bf16 with stage 1 or more"
        )
    for name, off in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if stage and zero.get("reduce_scatter", True) and hardware.get(name, off) != off:
            raise UserError(
                f'{where}{name}: from stage 1 on it needs "reduce_scatter": false in zero_optimization; or remove it'
            )


def _models() -> dict[str, Any]:
    """DeepSpeed's own description of each section (imported late: it takes torch along)."""
    import torch

    if not torch.cuda.is_available():  # otherwise DeepSpeed prints that it has not found what nobody looks for
        os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = (DeepSpeedZeroConfig, DeepSpeedBF16Config, CSVConfig, TensorBoardConfig)
    return dict(zip(MODELED, models, strict=True))


def _check_model(section: dict[str, Any], model: Any, where: str) -> None:
    """A section against one of DeepSpeed's pydantic models: names, old names, values, and the kinds of values."""
    from pydantic import ValidationError

    old = [name for name in section if name in model.model_fields and _replacement(model, name)]
    if old:
        raise UserError(f"{where}.{old[0]}: is an old name of DeepSpeed's; use {_replacement(model, old[0])}")
    try:
        filled = model(**section)
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join([where, *map(str, fault["loc"])])
        if fault["type"] == "extra_forbidden":
            names = _names(_inner_model(model, fault["loc"][:-1]))
            raise UserError(f"{path}: DeepSpeed has no such setting{_nearest(str(fault['loc'][-1]), names)}") from None
        reason = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        value = f" is {json.dumps(fault['input'])}" if fault["loc"] else ""  # no place: the section as a whole
        raise UserError(f"{path}{value}: {reason.replace('Input', 'it', 1)}") from None
    _check_kinds(section, filled, where)


def _check_kinds(section: dict[str, Any], filled: Any, where: str) -> None:
    """Refuse what pydantic would quietly turn into something else: "yes" into true, true into 1, "5" into 5."""
    for key, value in section.items():
        name = next(n for n, field in type(filled).model_fields.items() if key in (n, field.alias))
        taken = getattr(filled, name)
        if isinstance(value, dict) and hasattr(taken, "model_fields_set"):
            _check_kinds(value, taken, f"{where}.{key}")
        elif value is not None and (
            isinstance(value, bool) != isinstance(taken, bool)
            or (isinstance(value, str) and isinstance(taken, (int, float)))
        ):
            expected = "true or false" if isinstance(taken, bool) else "a number"
            raise UserError(f"{where}.{key} is {json.dumps(value)}; it must be {expected}")


def _replacement(model: Any, name: str) -> str:
    """What stands for a setting that DeepSpeed calls deprecated; "" where it does not."""
    extra = model.model_fields[name].json_schema_extra or {}
    return extra.get("new_param", "another setting") if extra.get("deprecated") else ""


def _names(model: Any) -> list[str]:
    """Every name that a section may use, old ones apart."""
    return [field.alias or name for name, field in model.model_fields.items() if not _replacement(model, name)]


def _inner_model(model: Any, place: tuple[Any, ...]) -> Any:
    """The model of the section that lies at `place` (field names, from the outside in) in `model`."""
    for name in place:
        kind = next(field.annotation for n, field in model.model_fields.items() if name in (n, field.alias))
        model = next(part for part in (kind, *get_args(kind)) if hasattr(part, "model_fields"))
    return model
