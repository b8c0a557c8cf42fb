"""Trained tensors of a checkpoint of ours in a model that they fit: to go on, to be tested, or to start from.

A checkpoint holds what trains; on another frozen base, or under settings that decide what its tensors compute, it would
load without complaint and answer at chance. So both are compared, and what contradicts is refused with both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoint_folders import MANIFEST as MANIFEST
from vlm.checkpoint_folders import WEIGHTS as WEIGHTS
from vlm.checkpoint_folders import meant, read_manifest
from vlm.config import differences, to_dict
from vlm.models.freezing import check_can_train
from vlm.models.system import System
from vlm.tensor_files import check_file
from vlm.types import UserError
from vlm.weights import diff_keys, read_state_dict


def tensors_of(model: System) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of `model` holds, by name: what trains, what is carried, persistent buffers.

    What trains are the parameters themselves, which an engine may have cut or cast: their fp32 values are the
    optimizer's. What is carried (`System.carried`, whole, fp32, on the CPU) and the buffers are the same on every rank.
    """
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trains | model.carried | persistent_buffers(model)


def put(model: System, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], subject: str) -> None:
    """Set everything of `model` that a checkpoint holds.

    A checkpoint holds at least what the model trains by its nature. What it holds besides, because a recipe had it
    trained (`unfreeze`), is set too and carried on.

    Args:
        manifest: the checkpoint's: hashes of the frozen weights, and the recipe where it says it.
        subject: names the checkpoint in messages.
    Raises:
        UserError: names or shapes differ from the model's, or it was trained on other frozen weights, or with other
            decisive settings.
    """
    parameters = dict(model.named_parameters())
    besides = tensors.keys() & {name for name in parameters if not model.trainable(name)}
    want: dict[str, Tensor] = {n: p for n, p in parameters.items() if model.trainable(n) or n in besides}
    want |= persistent_buffers(model)
    difference = diff_keys(tensors, want)
    other, contradictions = _other_settings(manifest, model)
    settings = f"\nSettings, the checkpoint's -> this recipe's: {', '.join(other)}" if other else ""
    if difference:
        raise UserError(f"{subject}: does not fit this recipe's model: {difference}{settings}")
    _check_base(model, manifest, tensors.keys(), subject, settings)
    if contradictions:
        raise UserError(
            f"{subject}: was trained with other settings (the checkpoint's -> this recipe's): "
            f"{', '.join(contradictions)}. With these its weights compute something else; give the recipe the "
            "checkpoint's values"
        )
    check_can_train(model, besides, f"{subject} holds what was trained of the frozen base, but")
    model.keep_wide(besides)
    with torch.no_grad():
        for name, target in want.items():
            target.copy_(tensors[name])
    model.carry({name for name in parameters.keys() & tensors.keys() if not parameters[name].requires_grad})


def _check_base(model: System, manifest: Mapping[str, Any], held: Collection[str], subject: str, settings: str) -> None:
    """UserError where the frozen weights that a checkpoint was trained on are not this model's, but for those that it
    holds itself."""
    if model.frozen_fits(manifest["frozen_hash"]):
        return
    stated, which = manifest.get("frozen"), ""
    if stated and model.frozen_hashes():
        differing = model.frozen_misfits(stated, held)
        if not differing:
            return
        which = f": {', '.join(differing[:3])}{', …' if len(differing) > 3 else ''}"
    raise UserError(
        f"{subject}: was trained on other frozen weights (hash {manifest['frozen_hash']}) than this recipe loads "
        f"({model.frozen_hash()}){which}; give the same frozen base, or the result is noise{settings}"
    )


def read_sealed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a checkpoint of ours. UserError: it is damaged."""
    manifest = read_manifest(folder)
    tensors = read_state_dict(folder / WEIGHTS)
    check_file(folder / WEIGHTS, manifest)
    return tensors, manifest


def start_from(model: System, folder: Path, shared: Sequence[str] = ()) -> None:
    """Give a fresh model the trained tensors of a checkpoint folder, or of a run folder (`meant`): `model.init_from`.

    Args:
        shared: beginnings of the names that a checkpoint of another system has in common with this model; where there
            are some, such a checkpoint will do, and gives these. Its language model may be another.
    Raises:
        UserError: no such checkpoint, a damaged one, or one that does not fit (`put`).
    """
    folder = meant(folder) or folder
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"model.init_from={folder}: is no checkpoint of ours (a folder with {MANIFEST}) and no run folder. A "
            f"published file is converted first: python tools/convert_ckpt.py {folder} FOLDER --from FORMAT --to vlm"
        )
    tensors, manifest = read_sealed(folder)
    if shared and not tensors.keys() <= model.state_dict().keys():
        _put_shared(model, tensors, manifest, str(folder), tuple(shared))
    else:
        put(model, tensors, manifest, str(folder))


def _put_shared(
    model: System, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], subject: str, shared: tuple[str, ...]
) -> None:
    """Set what has names that begin with `shared`; as `put`, but for frozen weights."""
    want = {name: p for name, p in model.named_parameters() if p.requires_grad and name.startswith(shared)}
    have = {name: tensor for name, tensor in tensors.items() if name.startswith(shared)}
    diff_keys(have, want).require(f"{subject}, of which this model takes {', '.join(shared)}…")
    stored = (manifest.get("recipe") or {}).get("model")
    if stored:
        told, own = model.shared_settings(stored), model.shared_settings(to_dict(model.config))
        if told != own:
            raise UserError(
                f"{subject}: was trained with other settings (the checkpoint's -> this recipe's): "
                f"{', '.join(differences(told, own, 'model'))}. Give the recipe the checkpoint's values"
            )
    with torch.no_grad():
        for name, target in want.items():
            target.copy_(have[name])


def other_rows(folder: Path, inputs: Any) -> str:
    """What of a recipe's `inputs` is not what the released file was trained with that this checkpoint was converted
    from, with the mend; "" where nothing is, or where nothing is known of it."""
    stated = read_manifest(folder).get("inputs") or {}
    own = to_dict(inputs)
    other = {name: value for name, value in stated.items() if name in own and own[name] != value}
    if not other:
        return ""
    told = ", ".join(differences(other, {name: own[name] for name in other}, "inputs"))
    mend = " ".join(f"inputs.{name}={_text(value)}" for name, value in other.items())
    return f"{folder} was trained on rows made otherwise (its -> this recipe's): {told}. To run it as it was: {mend}"


def _text(value: Any) -> str:
    """A value as the command line has it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def persistent_buffers(model: System) -> dict[str, Tensor]:
    """Buffers that belong to the state dict (running statistics, queues): neither tied parameters under their second
    name, nor what quantised matrices add to it."""
    buffers = {id(b) for b in model.buffers()}
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) in buffers}


def _other_settings(manifest: Mapping[str, Any], model: System) -> tuple[list[str], list[str]]:
    """How the model settings stored in a checkpoint differ from the model's own: all, and those that are decisive."""
    stored = (manifest.get("recipe") or {}).get("model")
    config = getattr(model, "config", None)
    if not stored or config is None:
        return [], []
    own = to_dict(config)
    try:
        decisive = differences(model.decisive(stored), model.decisive(own), "model")
    except (KeyError, TypeError):  # stored by a version with other settings
        decisive = []
    return differences(stored, own, "model"), decisive
