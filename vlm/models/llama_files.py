"""Folders that hold a whole LLaMA: Meta's (consolidated.*.pth, params.json), Hugging Face's, and ours.

In memory all of them are a `Model` of kind `LLAMA` under transformers' names, its tensors read one at a time, so that a
LLaMA larger than memory can be converted. q and k are numbered as transformers has them: Meta rotates neighbouring
rows of a head, transformers rows half a head apart (`vlm.weights.pairs_to_halves`). Ours is a Hugging Face folder with
a manifest, so all three can be a recipe's `model.llama.path`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.models.formats import Model
from vlm.models.llama_base import LlamaBaseConfig, read_llama
from vlm.models.llama_facts import expected_shapes, hf_config, is_llama3, llama_config, meta_params, read_json
from vlm.models.published import LLAMA
from vlm.types import UserError
from vlm.weights import (
    META_LAYER_TABLE,
    Loader,
    atomic_file,
    diff_keys,
    halves_to_pairs,
    open_tensors,
    read_checkpoint,
    write_safetensors,
)

HF_SHARD_BYTES = 5_000_000_000
"""Largest file of a Hugging Face folder, as the hub has them; what is more goes into further files."""
_CONSTANTS = re.compile(r".*rope\.freqs|.*rotary_emb\.inv_freq")
_META_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_META_LAYER = {new: old.replace("\\", "") for old, new in META_LAYER_TABLE}
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.weight")


class Tensors(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for, and not kept."""

    def __init__(self, loaders: Mapping[str, Loader]) -> None:
        self.loaders = dict(loaders)

    def __getitem__(self, name: str) -> Tensor:
        return self.loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaders)

    def __len__(self) -> int:
        return len(self.loaders)


# ------------------------------------------------------------------------------------------ reading


def read_meta(path: Path, key: str | None) -> Model:
    """Meta's folder. UserError: as `llama_config`, or tensors that are not a LLaMA's."""
    if not (path / "params.json").is_file() or not any(path.glob("consolidated.*.pth")):
        raise UserError(f"{path}: Meta's folder has consolidated.00.pth (and further) and params.json; this has not.")
    return _read(path, "meta_llama", {"params.json", *(p.name for p in path.glob("consolidated.*.pth"))})


def read_hf(path: Path) -> Model:
    """A Hugging Face folder whose config.json says model_type "llama", or ours."""
    return _read(path, "hf", {"config.json", "manifest.json", *_weight_files(path)})


def _weight_files(path: Path) -> set[str]:
    pattern = r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    return {p.name for p in path.iterdir() if re.fullmatch(pattern, p.name)}


def _read(path: Path, form: str, known: set[str]) -> Model:
    config = llama_config(path)
    stored = open_tensors(path)
    loaders = read_llama(stored, config.heads, config.num_kv_heads, str(path))
    shapes = {name: tuple(load().shape) for name, load in loaders.items()}
    diff_keys(shapes, expected_shapes(config)).require(f"{path} (whole LLaMA)")
    constants = {name: load() for name, load in stored.items() if _CONSTANTS.fullmatch(name)}
    source: dict[str, Any] = {
        "format": form,
        "file": path.name,
        "order": list(stored),
        "constants": {name: _as_json(tensor) for name, tensor in constants.items()},
        "tied": len(loaders) > len(stored) - len(constants),
    }
    if form == "hf":
        source["config"] = read_json(path / "config.json")
    else:
        source["params"] = (path / "params.json").read_text()
        files = sorted(path.glob("consolidated.*.pth"))
        source["shards"] = len(files)
        first = read_checkpoint(files[0]).tensors["tok_embeddings.weight"]
        source["words_cut"] = first.shape[0] != config.vocab_size
    dropped = sorted(p.name for p in path.iterdir() if p.name not in known)
    return Model(kind=LLAMA, tensors=Tensors(loaders), source=source, dropped=dropped, llama=config)


def _as_json(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.double().tolist()}


def _constants(model: Model, form: str) -> dict[str, Tensor]:
    """The tables of the rotary embedding that the source had, for a target of its form; others work them out."""
    if model.source.get("format") != form:
        return {}
    stored = model.source.get("constants", {})
    return {name: torch.tensor(c["values"], dtype=getattr(torch, c["dtype"])) for name, c in stored.items()}


# ------------------------------------------------------------------------------------------ writing


def write_hf(path: Path, model: Model, *, constants: bool = True) -> None:
    """config.json and model.safetensors, in files of at most `HF_SHARD_BYTES`, one of them in memory at a time.

    `constants`: also the tables of the rotary embedding, where the source was such a folder and had them.
    """
    assert model.llama is not None
    path.mkdir()
    from_hf = model.source.get("format") == "hf"
    shapes = expected_shapes(model.llama)
    if from_hf and model.source["tied"]:
        del shapes["lm_head.weight"]
    dtype = model.tensors["model.embed_tokens.weight"].dtype
    config = model.source["config"] if from_hf else hf_config(model.llama, dtype)
    _write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
    parts = shared_out({name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()})
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors = {name: model.tensors[name] for name in names}
        if number == 1 and constants:
            tensors |= _constants(model, "hf")
        write_safetensors(path / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(path / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def shared_out(sizes: Mapping[str, int], limit: int | None = None) -> list[list[str]]:
    """Names of tensors of such sizes (bytes) in files of at most `limit` (none: `HF_SHARD_BYTES`), in order; a larger
    tensor has a file of its own."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, count in sizes.items():
        if parts[-1] and size + count > (limit or HF_SHARD_BYTES):
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += count
    return parts


def write_meta(path: Path, model: Model, shards: int | None = None) -> None:
    """params.json and consolidated.*.pth, one file in memory at a time.

    Args:
        shards: number of files; none: as many as the source had where it was such a folder, else one.
    UserError: a dimension does not divide by the number of files.
    """
    config = model.llama
    assert config is not None
    from_meta = model.source.get("format") == "meta_llama"
    count = shards or (model.source["shards"] if from_meta else 1)
    text = model.source["params"] if from_meta else json.dumps(meta_params(config)) + "\n"
    path.mkdir()
    _write_text(path / "params.json", text)
    loaders = to_meta(model.tensors, config)
    constants = _constants(model, "meta_llama")
    # LLaMA 3 cuts the vocabulary, 1 and 2 the width
    words_cut = model.source["words_cut"] if from_meta and count > 1 and shards is None else is_llama3(config)
    order = model.source["order"] if from_meta else list(loaders)
    for number in range(count):
        shard = {}
        for name in order:
            whole = constants[name] if name in constants else loaders[name]()
            part = _cut(name, whole, number, count, words_cut)
            # a tensor cut from a larger storage would drag the whole storage into the file
            shard[name] = part.clone() if part.untyped_storage().nbytes() != part.nbytes else part
        with atomic_file(path / f"consolidated.{number:02d}.pth") as file:
            torch.save(shard, file)


def to_meta(tensors: Mapping[str, Tensor], config: LlamaBaseConfig) -> dict[str, Loader]:
    """The same LLaMA under Meta's names, q and k numbered as Meta has them."""
    return {_meta_name(name): _Meta(tensors, name, config) for name in tensors}


def _meta_name(name: str) -> str:
    match = re.fullmatch(r"model\.(layers\.\d+\.)(.+)", name)
    return _META_NAMES[name] if match is None else match[1] + _META_LAYER[match[2]]


@dataclass(frozen=True, slots=True)
class _Meta:
    tensors: Mapping[str, Tensor]
    name: str
    config: LlamaBaseConfig

    def __call__(self) -> Tensor:
        tensor, match = self.tensors[self.name], _ROTATED.fullmatch(self.name)
        if match is None:
            return tensor
        return halves_to_pairs(tensor, self.config.heads if match[1] == "q" else self.config.num_kv_heads)


def _cut(name: str, tensor: Tensor, number: int, count: int, words_cut: bool) -> Tensor:
    """File `number`'s part of a tensor, as Meta's model parallelism cuts it."""
    if count == 1 or tensor.ndim < 2:
        return tensor
    if name == "tok_embeddings.weight":
        dimension = 0 if words_cut else 1
    else:
        dimension = 1 if name.endswith((".attention.wo.weight", ".feed_forward.w2.weight")) else 0
    if tensor.shape[dimension] % count:
        raise UserError(
            f"{name}: {tensor.shape[dimension]} {'columns' if dimension else 'rows'} cannot be cut into {count} equal "
            "parts. Mend: another --shards."
        )
    return tensor.chunk(count, dimension)[number]


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
