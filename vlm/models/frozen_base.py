"""The frozen LLaMA layers of a ViT-LLaMA checkpoint: found in a LLaMA folder, compared with it, filled in from it.

A base is a Meta or Hugging Face folder (or file); layers are read one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.models.formats import Model
from vlm.models.published import FROZEN, HAS_FROZEN, KIND_TITLES, kind_of
from vlm.models.system import System
from vlm.models.vit_sizes import expected_shapes, sizes_of, unusual_depth
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
                    model.tensors = {**model.tensors, **tensors}
                    return first
    tried = ", ".join(map(str, sorted(numbers)))
    raise UserError(
        f"{base}: not what this checkpoint was trained with; its frozen_hash is {model.frozen_hash}, and layer(s) "
        f"{tried} have others. Mend: give the base that training used."
    )


# ------------------------------------------------------------------------------------------ a conversion's view of it


def settle_frozen(
    model: Model, config: Any, base: Path | None, layer: int | None, subject: str, holding: str | None
) -> None:
    """Make the frozen layers what the target needs: in its files, or (our checkpoints with a base) known by hash.

    Args:
        config: settings of the recipe's model, if one is known.
        base: LLaMA folder that a person named; `layer`: first of its layers.
        subject: names the source in messages.
        holding: name of the target's format where its files hold the frozen tensors; none: they do not.
    """
    if model.kind not in HAS_FROZEN:
        if base is not None:
            raise UserError(f"--base {base}: a {KIND_TITLES[model.kind]} has no frozen layers; leave it out.")
        return
    if base is None:
        if not model.frozen() and holding is not None:
            _fill_from_recipe(model, config, subject, holding)
        return
    found: int | None
    if model.frozen():
        found = compare_with_base(model, base, layer)
    else:
        llama = getattr(config, "llama", None)
        likely, count = (llama.layer, llama.num_layers) if llama is not None else (None, 1)
        found = fill_from_base(model, base, layer, likely, count)
    if found is None:
        model.notes.append(f"no layer of {base} equals the source's frozen ones: the target keeps them")
        return
    model.frozen_hash = state_hash(model.frozen())
    model.notes.append(f"the frozen layers are {base}'s, from layer {found} on")
    if holding is None:
        model.tensors = model.trainable()


def _fill_from_recipe(model: Model, config: Any, subject: str, holding: str) -> None:
    """Add the frozen layers from where the recipe takes them, if they are what the checkpoint was trained with."""
    advice = "Mend: --base with the LLaMA folder (Meta or Hugging Face) that training used."
    if config is None or model.frozen_hash is None:
        raise UserError(
            f"{subject}: has the trained tensors alone; {holding} also holds the frozen LLaMA layers. "
            f"{advice} Or --recipe, where training took them from the recipe."
        )
    built = config.build()
    if built.frozen_hash() != model.frozen_hash:
        raise UserError(
            f"{subject}: its frozen_hash is {model.frozen_hash}, the recipe loads frozen layers of hash "
            f"{built.frozen_hash()}: not those it was trained with. {advice}"
        )
    frozen = {name: p.detach() for name, p in built.named_parameters() if not built.trainable(name)}
    model.tensors = {**model.tensors, **frozen}
    model.notes.append(f"the frozen layers are those that the recipe loads ({config.llama.path or 'random'})")


def require_tensors(model: Model, recipe: System | None, subject: str, named: str) -> None:
    """Names and shapes against the sizes that the tensors tell of and, if there is one, against the recipe's model.

    Args:
        recipe: the model of the recipe called `named`; it needs no memory for its tensors.
    """
    sizes = sizes_of(model.tensors, model.kind)
    diff_keys(model.tensors, expected_shapes(sizes, model.kind)).require(f"{subject} ({KIND_TITLES[model.kind]})")
    if (odd := unusual_depth(sizes)) is not None:
        model.notes.append(odd)
    if recipe is None:
        return
    want = recipe.state_dict()
    if kind_of(want) != model.kind:
        raise UserError(
            f"{subject} is a {KIND_TITLES[model.kind]}; recipe {named} builds a {KIND_TITLES[kind_of(want)]}."
        )
    if not model.frozen():
        want = {name: t for name, t in want.items() if not re.fullmatch(FROZEN[model.kind], name)}
    diff_keys(model.tensors, want).require(f"{subject} and recipe {named}")
