"""From a checkpoint back into a model and its engine; and what becomes of weights and moments where another choice of
what trains (`freeze`, `unfreeze`) than the checkpoint's is made.

    state = load_weights(folder, model)            # whole tensors, before an engine cuts them
    chosen = choose(model, recipe, folder, state)
    engine = Engine(model, ..., adam_steps=chosen.adam_steps)
    load_optimizer(folder, engine, state)          # each rank its own fragments

A parameter that newly trains begins with the value that it had, frozen or carried, and with moments of 0; Adam counts
its steps from 0, apart from the others', so that the bias correction is right. One that trains no more keeps its value
and is carried on in checkpoints; its moments are left behind.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.distributed import barrier
from vlm.models import freezing, trained
from vlm.models.system import System
from vlm.recipe import Recipe
from vlm.run import zero_state
from vlm.run.checkpoint import OPTIMIZER, STATE, WEIGHTS, verify
from vlm.tensor_files import DTYPES
from vlm.types import UserError
from vlm.weights import read_state_dict

_FIRST = "exp_avg/"
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Chosen:
    """What trains, as far as it is not simply the model's nature."""

    adam_steps: dict[str, int] = field(default_factory=dict)  # of what trains: steps that its moments have seen
    sentences: list[str] = field(default_factory=list)  # for a person


def load_weights(folder: Path, model: System, *, verified: bool = False) -> dict[str, Any]:
    """Load a checkpoint's tensors into an unwrapped model, checking names, shapes and the frozen base.

    Args:
        verified: all its files have just been compared with its manifest (vlm.run.checkpoint.newest).
    Returns:
        the checkpoint's state.json.
    Raises:
        UserError: damaged, names or shapes differ from the model, or the frozen weights are not those it was
            trained with.
    """
    manifest = json.loads((folder / "manifest.json").read_text()) if verified else verify(folder, (WEIGHTS,))
    trained.put(model, read_state_dict(folder / WEIGHTS), manifest, str(folder))
    state = folder / STATE
    return json.loads(state.read_text()) if state.is_file() else {}


def choose(model: System, recipe: Recipe, folder: Path | None, state: dict[str, Any]) -> Chosen:
    """Have an unwrapped model, whose weights are loaded, train what the recipe wants.

    Args:
        folder, state: the checkpoint that the run goes on from, and its state.json; none: it begins.
    Raises:
        UserError: `freeze` or `unfreeze` means nothing in this model, or something that cannot train.
    """
    sentences = freezing.choose(model, recipe.freeze, recipe.unfreeze)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    learnt = {name for name in model.carried if not model.trainable(name)}
    if folder is None:
        if learnt:
            told = freezing.listed(model, learnt)
            sentences.append(f"init_from: {told} of the base as they were trained there; they train no more")
        return Chosen(dict.fromkeys(trains, 0), sentences)
    before = {name.removeprefix(_FIRST) for name in Tensors(folder / OPTIMIZER).names() if name.startswith(_FIRST)}
    new, gone = trains - before, before - trains
    if new:
        told = freezing.listed(model, new)
        sentences.append(f"newly trains: {told}, from the values they had, with optimizer state that begins anew")
    if gone:
        told = freezing.listed(model, gone)
        sentences.append(f"trains no more: {told}, kept as trained and carried on; its optimizer state is left behind")
    return Chosen(adam_steps_of(state, trains, before), sentences)


def adam_steps_of(state: dict[str, Any], names: Collection[str], held: Collection[str]) -> dict[str, int]:
    """How many steps Adam's moments of tensors have seen, by a checkpoint's state.json; 0 of those it does not hold."""
    common, others = state["adam_steps"], state.get("adam_steps_of", {})
    return {name: others.get(name, common) if name in held else 0 for name in names}


def load_optimizer(folder: Path, engine: Any, state: dict[str, Any]) -> None:
    """Set master weights, moments and step counts of a wrapped engine from a verified checkpoint. Collective.

    Each rank reads the bytes of its own fragments alone. What newly trains keeps its value and has moments of 0.
    """
    weights, moments = Tensors(folder / WEIGHTS), Tensors(folder / OPTIMIZER)
    held = {name.removeprefix(_FIRST) for name in moments.names() if name.startswith(_FIRST)}
    for fragment in zero_state.fragments(engine, all_held=True):
        for kind, target in fragment.values.items():
            source, name = (weights, fragment.name) if kind == "param" else (moments, f"{kind}/{fragment.name}")
            if name in source.names():
                target.copy_(source.part(name, fragment.start, target.numel()))
            elif kind != "param":
                target.zero_()
    zero_state.set_step_counts(engine, adam_steps_of(state, engine.names.values(), held))
    barrier()


class Tensors:
    """The tensors of a safetensors file, of which elements are read where they stand.

    Raises:
        UserError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                # private pages: torch wants memory that could be written
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(self._bytes[:8], "little")
            header = json.loads(self._bytes[8 : 8 + length])
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from error
        self._start = 8 + length
        self._places: dict[str, Any] = {name: place for name, place in header.items() if name != "__metadata__"}

    def names(self) -> Collection[str]:
        """Of all its tensors."""
        return self._places.keys()

    def part(self, name: str, start: int, count: int) -> Tensor:
        """(count,) elements from `start` on of the flattened tensor, in the file's precision."""
        dtype = _TORCH_DTYPES[self._places[name]["dtype"]]
        begin, end = self._places[name]["data_offsets"]
        assert 0 <= start * dtype.itemsize <= (start + count) * dtype.itemsize <= end - begin, name
        if not count:
            return torch.empty(0, dtype=dtype)
        offset = self._start + begin + start * dtype.itemsize
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset)
