"""The frozen LLaMA layers of a ViT-LLaMA checkpoint: found in a LLaMA folder, compared with it, filled in from it.

A base is a Meta or Hugging Face folder (or file); layers are read one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlm.models.formats import Model
from vlm.models.vit_sizes import sizes_of
from vlm.nn.llama_block import norm_tensor
from vlm.types import UserError
from vlm.weights import diff_keys, layer_tensors, open_tensors, state_hash


def starts(base: Path, layer: int | None, likely: int | None, count: int) -> list[int]:
    """First layers that `count` layers of a LLaMA folder can begin at: `layer`, or all of them, likely ones first."""
    if layer is not None:
        return [layer]
    found = {int(m[1]) for name in open_tensors(base) if (m := re.match(r"(?:model\.|llama\.)?layers\.(\d+)\.", name))}
    whole = [number for number in found if {number + n for n in range(count)} <= found]
    if not whole:
        raise UserError(f"{base}: holds no {count} LLaMA layers in a row.")
    order = (likely, 15, 31)  # the released video code's choice, the paper's
    return sorted(whole, key=lambda number: (order.index(number) if number in order else len(order), number))


def read_base(base: Path, first: int, count: int) -> Iterator[dict[str, Tensor]]:
    """`count` layers as the frozen tensors of a ViT-LLaMA: with a last norm of ones, then with LLaMA's own."""
    tensors: dict[str, Tensor] = {}
    for number in range(count):
        layer = layer_tensors(base, first + number)
        tensors |= {f"llama.layers.{number}.{name}": t for name, t in layer.items()}
    yield tensors | {"llama.norm.weight": torch.ones_like(tensors["llama.layers.0.input_layernorm.weight"])}
    loaders = open_tensors(base)
    if any(name in loaders for name in ("norm.weight", "model.norm.weight")):
        yield tensors | {"llama.norm.weight": norm_tensor(loaders, str(base))}


def compare_with_base(model: Model, base: Path, layer: int | None) -> int | None:
    """The first layer of `base` whose tensors equal the model's frozen ones to the bit; None: no layer does."""
    frozen = model.frozen()
    count = sizes_of(model.tensors, model.kind).llama_layers
    for first in starts(base, layer, None, count):
        for found in read_base(base, first, count):
            diff = diff_keys(found, frozen)
            if diff:
                raise UserError(f"{base} is not the LLaMA of this checkpoint:\n{diff}")
            if all(torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in frozen.items()):
                return first
    return None


def fill_from_base(model: Model, base: Path, layer: int | None, likely: int | None, count: int) -> int:
    """Add the frozen tensors that the checkpoint lacks; returns the layer they came from.

    UserError: of another width, not what the checkpoint was trained with (by its hash), or it cannot tell the layer.
    """
    width = model.tensors["llama_dim_mapper1.weight"].shape[0]
    if layer is None and model.frozen_hash is None:
        raise UserError(
            f"{base}: the checkpoint does not say which of its layers it was trained with (no frozen_hash). "
            "Mend: --layer N (31: the paper's last block; 15: the released video code)."
        )
    numbers = starts(base, layer, likely, count)
    for first in numbers:
        for stored in read_base(base, first, count):
            held = stored["llama.norm.weight"].shape[0]
            if held != width:
                raise UserError(
                    f"{base}: its layers are {held} wide, this checkpoint's mappers {width}: another LLaMA was used. "
                    "Mend: give the base that training used."
                )
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                tensors = {name: t.to(dtype) for name, t in stored.items()}
                if model.frozen_hash in (None, state_hash(tensors)):
                    model.tensors |= tensors
                    return first
    tried = ", ".join(map(str, sorted(numbers)))
    raise UserError(
        f"{base}: not what this checkpoint was trained with; its frozen_hash is {model.frozen_hash}, and layer(s) "
        f"{tried} have others. Mend: give the base that training used."
    )
