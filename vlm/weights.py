"""Weights: read any published file safely, rename by table, compare two key sets, hash, write safetensors.

    state = read_state_dict("checkpoint-799.pth")             # the nested `model` | `module` | `state_dict`, or itself
    layer = layer_tensors("llama/7B", 15)                      # one frozen layer; the other 12 GB are never read
    diff_keys(state, model.state_dict()).require("checkpoint-799.pth")

Which files and folders can be read: `open_tensors`. How they are kept from running code: `vlm/weight_files.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlm.files import atomic_file
from vlm.tensor_files import layout_of
from vlm.types import UserError
from vlm.weight_files import (
    CONTAINERS,
    Checkpoint,
    Loader,
    iter_tensors,
    open_tensors,
    read_checkpoint,
    read_state_dict,
)

__all__ = [
    "CONTAINERS",
    "META_LAYER_TABLE",
    "Checkpoint",
    "KeyDiff",
    "Loader",
    "Table",
    "atomic_file",
    "diff_keys",
    "file_hash",
    "halves_to_pairs",
    "hash_of_hashes",
    "iter_tensors",
    "layer_tensors",
    "open_tensors",
    "pairs_to_halves",
    "read_checkpoint",
    "read_state_dict",
    "rename",
    "shapes",
    "state_hash",
    "stream_safetensors",
    "tensor_hash",
    "write_safetensors",
]

Table = Sequence[tuple[str, str]]  # (pattern matched against the whole key, replacement), the first match wins
Shape = tuple[int, ...]

# ---------------------------------------------------------------------------------------------- names


def rename(keys: Iterable[str], table: Table) -> dict[str, str]:
    """Old name -> new name by an ordered regex table; strict.

    UserError: a key that no row matches (all of them are listed), or two keys that would get one name.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    unknown: list[str] = []
    for key in keys:
        match, replacement = next(((m, r) for p, r in table if (m := re.fullmatch(p, key))), (None, ""))
        if match is None:
            unknown.append(key)
            continue
        names[key] = new = match.expand(replacement)
        if taken.setdefault(new, key) != key:
            raise UserError(f"{taken[new]} and {key} would both become {new}: two spellings of one tensor in one file.")
    if unknown:
        patterns = [re.sub(r"\\(.)|\(\\d\+\)", lambda m: m[1] or "0", p) for p, _ in table]
        lines = _listing(unknown, patterns)
        raise UserError(f"{len(unknown)} tensors have names that this format does not know:\n{lines}")
    return names


@dataclass(frozen=True, slots=True)
class KeyDiff:
    """How the tensors one has differ from those one wants. True when they differ."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: dict[str, tuple[Shape, Shape]]  # name -> (have, want)
    have: frozenset[str]
    want: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        """Every difference by kind, with the nearest name on the other side; long lists are cut and say so."""
        parts = []
        if self.missing:
            near = self.unexpected or sorted(self.have)
            parts.append(f"{len(self.missing)} missing:\n{_listing(self.missing, near)}")
        if self.unexpected:
            near = self.missing or sorted(self.want)
            parts.append(f"{len(self.unexpected)} unexpected:\n{_listing(self.unexpected, near)}")
        if self.wrong_shape:
            lines = [
                f"  {name}: has {list(have)}, wanted {list(want)}" for name, (have, want) in self.wrong_shape.items()
            ]
            parts.append(f"{len(self.wrong_shape)} of another shape:\n" + _cut(lines))
        return "\n".join(parts)

    def require(self, subject: str) -> None:
        """UserError that begins with `subject` (file and what it was compared with) unless nothing differs."""
        if self:
            raise UserError(f"{subject}: the tensors do not fit.\n{self}")


def shapes(state: Mapping[str, Tensor | Sequence[int]]) -> dict[str, Shape]:
    """Name -> shape, of tensors or of what are shapes already."""
    return {name: tuple(value.shape) if isinstance(value, Tensor) else tuple(value) for name, value in state.items()}


def diff_keys(have: Mapping[str, Tensor | Sequence[int]], want: Mapping[str, Tensor | Sequence[int]]) -> KeyDiff:
    """Compare names and shapes of what there is with what is needed; each side maps names to tensors or to shapes."""
    has, needs = shapes(have), shapes(want)
    wrong = {name: (has[name], needs[name]) for name in needs if name in has and has[name] != needs[name]}
    missing = tuple(name for name in needs if name not in has)
    unexpected = tuple(name for name in has if name not in needs)
    return KeyDiff(missing, unexpected, wrong, frozenset(has), frozenset(needs))


_SHOWN = 12


def _cut(lines: Sequence[str]) -> str:
    more = [f"  … and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([*lines[:_SHOWN], *more])


def _listing(names: Sequence[str], others: Sequence[str]) -> str:
    def nearest(name: str) -> str:
        found = difflib.get_close_matches(name, others, n=2, cutoff=0.5)
        return f"  (nearest: {', '.join(found)})" if found else ""

    return _cut([f"  {name}{nearest(name) if i < _SHOWN else ''}" for i, name in enumerate(names)])


# ---------------------------------------------------------------------------------------------- LLaMA layers

META_LAYER_TABLE: Table = (
    (r"attention\.wq\.weight", "self_attn.q_proj.weight"),
    (r"attention\.wk\.weight", "self_attn.k_proj.weight"),
    (r"attention\.wv\.weight", "self_attn.v_proj.weight"),
    (r"attention\.wo\.weight", "self_attn.o_proj.weight"),
    (r"feed_forward\.w1\.weight", "mlp.gate_proj.weight"),
    (r"feed_forward\.w2\.weight", "mlp.down_proj.weight"),
    (r"feed_forward\.w3\.weight", "mlp.up_proj.weight"),
    (r"attention_norm\.weight", "input_layernorm.weight"),
    (r"ffn_norm\.weight", "post_attention_layernorm.weight"),
)
_LAYER_NAMES = tuple(new for _, new in META_LAYER_TABLE)
_LAYER_KEY = re.compile(r"(?:model\.|llama\.)?layers\.(\d+)\.(.+)")
_ROTARY_BUFFER = re.compile(r"attention\.inner_attention\.rope\.freqs|self_attn\.rotary_emb\.inv_freq")


def layer_tensors(source: str | Path | Mapping[str, Loader], layer: int) -> dict[str, Tensor]:
    """One LLaMA layer of a Meta or Hugging Face file or folder, by `LlamaDecoderLayer`'s names; the rest is not read.

    Also of our own `frozen.safetensors` (tools/convert_ckpt.py), whose layers count from 0. `source` may be what
    `open_tensors` gave. Dtypes as stored. The rows of q and k stay in the file's own order (Meta: rotary pairs; HF:
    halves, see `pairs_to_halves`), which makes no difference where no rotary embedding follows. Rotary tables in the
    layer are constants and are left out. UserError: no such layer, or a layer that is not LLaMA's nine tensors.
    """
    named = "the weights" if isinstance(source, Mapping) else str(source)
    numbers: set[int] = set()
    found: dict[str, Loader] = {}
    for name, load in (source if isinstance(source, Mapping) else open_tensors(source)).items():
        match = _LAYER_KEY.fullmatch(name)
        if not match:
            continue
        numbers.add(int(match[1]))
        if int(match[1]) == layer and not _ROTARY_BUFFER.fullmatch(match[2]):
            found[match[2]] = load
    if not found:
        held = f"layers {min(numbers)} to {max(numbers)}" if numbers else "no LLaMA layers"
        raise UserError(f"{named}: layer {layer} was asked for, counted from 0; there are {held}.")
    new = rename(found, (*META_LAYER_TABLE, *((re.escape(n), n) for n in _LAYER_NAMES)))
    diff_keys(dict.fromkeys(new.values(), ()), dict.fromkeys(_LAYER_NAMES, ())).require(f"{named}, layer {layer}")
    by_new = {new[name]: load for name, load in found.items()}
    return {name: by_new[name]() for name in _LAYER_NAMES}


def pairs_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k from Meta's order to Hugging Face's: (num_heads * head_dim, D) -> same shape.

    Meta rotates neighbours (2i, 2i+1) of a head, transformers i and i + head_dim/2: same maths, rows renumbered.
    `num_heads` is the number of key heads for k of a grouped-query model.
    """
    rows, width = weight.shape
    _check_heads(rows, num_heads)
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def halves_to_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `pairs_to_halves`, to the bit."""
    rows, width = weight.shape
    _check_heads(rows, num_heads)
    return weight.reshape(num_heads, 2, rows // num_heads // 2, width).transpose(1, 2).reshape(rows, width)


def _check_heads(rows: int, num_heads: int) -> None:
    if num_heads < 1 or rows % (2 * num_heads):
        raise UserError(
            f"{rows} rows do not divide into {num_heads} heads of even width: the number of heads is wrong."
        )


# ---------------------------------------------------------------------------------------------- hashes


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes: equal exactly when two tensors are equal to the bit."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names and `tensor_hash`es, whatever the order of the dictionary."""
    return hash_of_hashes({name: tensor_hash(state[name]) for name in state})


def hash_of_hashes(hashes: Mapping[str, str]) -> str:
    """`state_hash` of tensors of which the `tensor_hash`es are known."""
    lines = (f"{name}\n{hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


# ---------------------------------------------------------------------------------------------- writing


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time; same input, same bytes.

    Format: https://github.com/huggingface/safetensors#format. The library's own writer orders several metadata
    keys at random and copies all tensors first. UserError: a dtype that the format lacks.
    """
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_safetensors(path, described, tensors.__getitem__, metadata)


def stream_safetensors(
    path: str | Path,
    described: Mapping[str, tuple[torch.dtype, Shape]],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write_safetensors` for tensors that are made when it is their turn: `load` is called once for each name.

    Args:
        described: name -> dtype and shape of what `load` will give.
    """
    layout = layout_of(described, metadata, path)
    with atomic_file(path) as file:
        file.write(layout.header)
        for name in layout.places:
            tensor = load(name)
            assert (tensor.dtype, tuple(tensor.shape)) == described[name], f"{name} is not as described"
            file.write(_bytes(tensor))
