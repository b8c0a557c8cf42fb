"""A tensor of fp32 among tensors of fewer bits: each module computes in the precision of its own weights.

What trains is fp32, also where it is one matrix of a block that is stored in bf16. Modules of one precision among
modules of another refuse what the others hand them, so each casts what comes in, and hands back what it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def adapt(module: nn.Module) -> None:
    """Have every layer inside `module` that owns weights take inputs of any precision. A second call changes nothing.

    A layer's outputs have the precision of its inputs; of ids (embeddings), that of its weights. Where all weights and
    inputs are of one precision nothing is cast.
    """
    layer: Any
    for layer in module.modules():
        if any(True for _ in layer.children()) or _precision(layer) is None or hasattr(layer, "_adapted"):
            continue
        layer.register_forward_pre_hook(_cast_in, with_kwargs=True)
        layer.register_forward_hook(_cast_out, with_kwargs=True)
        layer._adapted = None  # the precision of the input that is being worked on


def _precision(layer: nn.Module) -> torch.dtype | None:
    """That of a layer's weights; None: it has none, or quantised ones, which see to it themselves."""
    weights = list(layer.parameters(recurse=False))
    if not weights or any(not p.is_floating_point() or not isinstance(p, nn.Parameter) for p in weights):
        return None
    return None if type(layer).__module__.startswith("bitsandbytes.") else weights[0].dtype


def _cast_in(layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    own = _precision(layer)
    assert own is not None
    layer._adapted = next((x.dtype for x in (*given, *named.values()) if _is_float(x)), None)
    return tuple(x.to(own) if _is_float(x) else x for x in given), {
        name: x.to(own) if _is_float(x) else x for name, x in named.items()
    }


def _cast_out(layer: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
    return out.to(layer._adapted) if _is_float(out) and layer._adapted is not None else out


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
