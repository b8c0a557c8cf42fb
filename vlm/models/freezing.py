"""Which parameters of a model train, where a recipe chooses otherwise than the model's nature: `freeze`, `unfreeze`.

    freeze=patch_embed,blocks.0       these modules do not train
    freeze=* unfreeze=head            the head alone trains
    unfreeze=llm.model.layers.31      a block of the frozen language model trains too

First what `freeze` names stops, then what `unfreeze` names trains.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from vlm.models.system import System
from vlm.types import UserError


def choose(model: System, freeze: Sequence[str], unfreeze: Sequence[str]) -> list[str]:
    """Have `model` train what a recipe wants; a sentence on each of the two, for a person.

    Args:
        freeze, unfreeze: names of modules or parameters, or patterns of such names (`*`, `?`, `[ab]`; a `*` stands for
            dots too). A module's name means all its parameters.
    Raises:
        UserError: a name or pattern that means nothing in this model (with the nearest names), a parameter that cannot
            train, or nothing is left that trains.
    """
    if not (freeze or unfreeze):
        return []
    parameters = dict(model.named_parameters())
    stopped, started = matching(parameters, freeze, "freeze"), matching(parameters, unfreeze, "unfreeze")
    trains = ({name for name in parameters if model.trainable(name)} - stopped) | started
    if not trains:
        raise UserError(
            f"freeze={','.join(freeze)} leaves nothing of {type(model).__name__} that trains. Mend: freeze less, or "
            "name what is to train with unfreeze"
        )
    check_can_train(model, trains, "unfreeze:")
    model.train_only(trains)
    more = {name for name in trains if not model.trainable(name)}
    less = {name for name in parameters if model.trainable(name)} - trains
    sentences = [f"freeze: {listed(model, less)} kept from training; checkpoints hold them"] if freeze else []
    return sentences + ([f"unfreeze: {listed(model, more)} of the frozen base trained too"] if unfreeze else [])


def matching(names: Collection[str], patterns: Sequence[str], field: str) -> set[str]:
    """The parameters that names or patterns mean. UserError where one of them means none; `field` gave them."""
    found: set[str] = set()
    prefixes = {name: _prefixes(name) for name in names}
    for pattern in patterns:
        meant = {name for name in names if any(fnmatchcase(part, pattern) for part in prefixes[name])}
        if not meant:
            every = sorted({part for parts in prefixes.values() for part in parts})
            close = difflib.get_close_matches(pattern, every, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(_tops(names))}"
            raise UserError(f"{field}={pattern}: the model has no module or parameter of this name or pattern; {hint}")
        found |= meant
    return found


def listed(model: nn.Module, names: Collection[str]) -> str:
    """`3 tensors (a, b, …; 1,234 parameters)` for a line; under ZeRO-3 call it before the engine is built."""
    if not names:
        return "no tensors"
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shown = [name for name in sizes if name in names]
    first = ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")
    count = f"{len(shown)} tensor{'s' * (len(shown) != 1)}"
    return f"{count} ({first}; {sum(sizes[name] for name in shown):,} parameters)"


def check_can_train(model: System, names: Collection[str], subject: str) -> None:
    """UserError for parameters of so few bits that no gradient has a meaning, and for such as cannot be kept in fp32
    alone; `subject` begins the sentence."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if name not in names:
                continue
            few = type(module).__module__.startswith("bitsandbytes.") and name.endswith(".weight")
            if few or not parameter.is_floating_point():
                raise UserError(
                    f"{subject} {name} is stored in 8 or 4 bits and cannot train. Mend: quantise=none for its language "
                    "model, or unfreeze other modules"
                )
            if parameter.dtype != torch.float32 and any(True for _ in module.children()):
                stored = str(parameter.dtype).removeprefix("torch.")
                raise UserError(
                    f"{subject} {name} is stored as {stored} and is no layer of its own, so it cannot be kept in fp32 "
                    "alone, as what trains is. Mend: dtype=float32 for the part of the model that it is in, or "
                    "unfreeze other modules"
                )


def _prefixes(name: str) -> list[str]:
    """The parameter's name and those of all modules that it is in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _tops(names: Collection[str]) -> list[str]:
    """The modules at the top, in order."""
    return list(dict.fromkeys(name.split(".")[0] for name in names))
