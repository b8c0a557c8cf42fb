"""Reading and writing whole published checkpoints: .pth files of the originals, Hugging Face folders.

Both sides are a `Model`: tensors by our names and what else the file said. Names: `vlm/models/published.py`; the tool
over it, with our own checkpoints as a further format: `tools/convert_ckpt.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.published import FROZEN, PRETRAIN, from_ours, kind_of, to_ours
from vlm.models.system import System
from vlm.models.video_mae import VideoMAEConfig
from vlm.models.vit_llama import LlamaLayerConfig, ViTLlamaConfig
from vlm.models.vit_sizes import Settings, Sizes, expected_shapes, hf_config, sizes_of, standard_heads
from vlm.types import UserError
from vlm.weights import Checkpoint, atomic_file, file_hash, read_checkpoint, read_state_dict, write_safetensors


@dataclass(slots=True, kw_only=True)
class Model:
    """A checkpoint on its way: tensors by our names, and what else is known of it."""

    kind: str
    tensors: Mapping[str, Tensor]  # of a whole LLaMA: read one at a time
    source: dict[str, Any] = field(default_factory=dict)  # JSON-able: file, container, order of names, args, config
    dropped: list[str] = field(default_factory=list)  # what the source had and the conversion leaves behind
    frozen_hash: str | None = None  # of the frozen tensors it was trained with, where they are not in `tensors`
    step: int = 0
    settings: dict[str, Any] | None = None  # `recipe.model` of one of our training checkpoints
    run: dict[str, Any] = field(default_factory=dict)  # the whole recipe of such a checkpoint
    learnt: Mapping[str, Tensor] = field(default_factory=dict)  # of the frozen base, as a run trained it (`unfreeze`)
    unused: frozenset[str] = frozenset()  # tensors that the recipe's model has no use for, kept for the way back
    llama: LlamaBaseConfig | None = None  # of a whole LLaMA: its sizes
    hf_config: dict[str, Any] | None = None  # of EVA and a Q-Former: config.json for a Hugging Face folder
    notes: list[str] = field(default_factory=list)  # what a person should know of the conversion

    def whole(self) -> dict[str, Tensor]:
        """All tensors, those of the base that a run trained among them."""
        return {**self.tensors, **self.learnt}

    def frozen(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if re.fullmatch(FROZEN[self.kind], name)}

    def trainable(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if not re.fullmatch(FROZEN[self.kind], name)}


def model_config(kind: str, fields: Mapping[str, Any]) -> VideoMAEConfig | ViTLlamaConfig:
    """The config dataclass that stored settings are of."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    try:
        if kind == PRETRAIN:
            return VideoMAEConfig(**values)
        llama = LlamaLayerConfig(**values["llama"]) if values.get("llama") else None
        return ViTLlamaConfig(**{**values, "llama": llama, "init_from": None})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint's own settings cannot be read ({error}). Mend: name its recipe (--recipe)."
        ) from error


# ------------------------------------------------------------------------------------------ .pth files


def read_pth(family: str, path: Path, key: str | None) -> Model:
    found = read_checkpoint(path, key)
    kind = kind_of(found.tensors)
    tensors = to_ours(found.tensors, family, kind)
    source, dropped = source_of(family, path, found, list(tensors))
    return Model(kind=kind, tensors=tensors, source=source, dropped=dropped)


def source_of(
    family: str, path: Path, found: Checkpoint, order: list[str], constants: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """(what a checkpoint of ours remembers of a published file, so that it returns whole; what it cannot hold).

    Args:
        order: names of its tensors as they stood.
        constants: buffers that are worked out anew, kept as numbers.
    """
    rest, dropped = {}, []
    for name, value in found.rest.items():
        try:
            rest[name] = plain(value)
        except TypeError as error:
            dropped.append(f"{name} ({error})")
    source = {
        "format": family,
        "file": path.name,
        "sha256": file_hash(path),
        "container": found.container,
        "order": order,
        "rest": rest,
    }
    if constants is not None:
        source["constants"] = {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.double().tolist()}
            for name, tensor in constants.items()
        }
    return source, dropped


def write_pth(family: str, path: Path, model: Model, recipe: System | None) -> None:
    save_published(path, from_ours(in_order(model), family, model.kind), model, family)


def save_published(
    path: Path, named: Mapping[str, Tensor], model: Model, family: str, container: str | None = "model"
) -> None:
    """A file of torch with tensors by a family's names, in their order: with the container, buffers and further entries
    of the source where it was of the same family, else in `container`. With buffers comes the order of the source."""
    same = model.source.get("format") == family
    state = dict(named)
    if same and "constants" in model.source:  # its `order` is of published names
        state |= {
            name: torch.tensor(kept["values"], dtype=getattr(torch, kept["dtype"]))
            for name, kept in model.source["constants"].items()
        }
        order = [name for name in model.source.get("order", ()) if name in state]
        state = {name: state[name] for name in [*order, *(name for name in state if name not in set(order))]}
    # a tensor cut from a larger storage would drag the whole storage into the file
    tensors = {n: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t.detach() for n, t in state.items()}
    container = model.source["container"] if same else container
    rest = model.source["rest"] if same else {}
    with atomic_file(path) as file:
        torch.save(tensors if container is None else {container: tensors, **rest}, file)


def plain(value: Any) -> Any:
    """`value` as JSON holds it (a Namespace becomes a dictionary). TypeError: it has tensors or other objects in it."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        plain_values = {key: plain(item) for key, item in value.items()}
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            raise TypeError(f"has the key {odd!r}, JSON keys are text")
        return plain_values
    raise TypeError("tensors" if isinstance(value, Tensor) else f"holds a {type(value).__name__}")


def in_order(model: Model) -> dict[str, Tensor]:
    """The tensors in the source's order where it is known, else in the model's own."""
    order = model.source.get("order", [])
    if set(order) != set(model.tensors):
        order = [n for n in expected_shapes(sizes_of(model.tensors, model.kind), model.kind) if n in model.tensors]
    return {name: model.tensors[name] for name in order}


# ------------------------------------------------------------------------------------------ Hugging Face folders


def read_hf(path: Path, key: str | None) -> Model:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UserError(f"{path}: no config.json, so not a Hugging Face folder.")
    config = json.loads(config_path.read_text())
    if config.get("model_type") not in ("videomae", "vit_llama"):
        raise UserError(
            f"{config_path}: model_type is {config.get('model_type')!r}; read here: 'videomae', 'vit_llama', 'llama'."
        )
    state = read_state_dict(path)
    kind = kind_of(state)
    model = Model(kind=kind, tensors=to_ours(state, "hf", kind))
    sizes = sizes_of(model.tensors, kind)
    stated = hf_config(sizes, kind, Settings(num_heads=0))
    for name in ("hidden_size", "num_hidden_layers", "patch_size", "tubelet_size", "num_channels", "intermediate_size"):
        if name in config and config[name] not in (stated[name], [stated[name]] * 2):
            raise UserError(f"{config_path}: {name} is {config[name]}, but the tensors say {stated[name]}.")
    weights = {"model.safetensors", "pytorch_model.bin"}
    others = [
        p.name for p in sorted(path.iterdir()) if p.name != "config.json" and p.name.split(".index")[0] not in weights
    ]
    model.dropped = [name for name in others if not re.fullmatch(r"(model|pytorch_model)-\d+-of-\d+\.\w+", name)]
    model.source = {"format": "hf", "file": path.name, "config": config}
    if any(name.endswith("attention.query.bias") for name in state):
        model.source["spelling"] = "query.bias"
    return model


def write_hf(path: Path, model: Model, recipe: System | None) -> None:
    path.mkdir()
    config = model.source.get("config") if model.source.get("format") == "hf" else None
    if config is None:
        sizes = sizes_of(model.tensors, model.kind)
        config = hf_config(sizes, model.kind, settings_of(model, sizes, recipe))
        dtypes = {str(t.dtype).removeprefix("torch.") for t in model.tensors.values()}
        config |= {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    with atomic_file(path / "config.json") as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    named = from_ours(model.tensors, "hf", model.kind)
    if model.source.get("spelling") == "query.bias":
        named = {n.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias"): t for n, t in named.items()}
    write_safetensors(path / "model.safetensors", named, {"format": "pt"})


def settings_of(model: Model, sizes: Sizes, recipe: System | None) -> Settings:
    """Heads, picture size, frames: from the recipe's model, else the source's arguments, else the published models."""
    if recipe is not None:
        config: Any = recipe.config
        return Settings(
            num_heads=config.heads,
            decoder_heads=getattr(config, "decoder_heads", None),
            image_size=config.image_size,
            num_frames=config.num_frames,
            norm_pix_loss=getattr(config, "normalize_target", True),
        )
    num_heads, decoder_heads = standard_heads(sizes)
    if num_heads is None or (model.kind == PRETRAIN and decoder_heads is None):
        raise UserError(
            f"the number of attention heads is not in the tensors, and width {sizes.width} (decoder "
            f"{sizes.decoder_width}) is no published model's. Mend: name the recipe it belongs to (--recipe)."
        )
    stated = model.source.get("rest", {}).get("args", {})
    known = {ours: stated[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in stated}
    model.notes.append(
        f"heads as in the published model of width {sizes.width}; "
        + ", ".join(f"{name} {known.get(name, default)}" for name, default in _PUBLISHED.items())
        + (" from the source's args" if known else " as in the published models (--recipe names others)")
    )
    return Settings(num_heads=num_heads, decoder_heads=decoder_heads, **{**_PUBLISHED, **known})


_ARGUMENTS = {"input_size": "image_size", "num_frames": "num_frames", "normlize_target": "norm_pix_loss"}
_PUBLISHED = {"image_size": 224, "num_frames": 16, "norm_pix_loss": True}
