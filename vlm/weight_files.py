"""Opening any published weight file: .pth/.pt/.bin, safetensors, Hugging Face folders, Meta LLaMA folders.

Used through `vlm.weights`, which has all its public names.

Pickles go through torch's restricted unpickler with a short allow-list and nothing else, so opening a file from a
stranger runs none of its code. What is wrong with a file is said in a `UserError` that names it and the mend.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm.types import UserError

CONTAINERS = ("model", "module", "state_dict")  # keys under which published files nest their tensors, first found wins
_AGAIN = "Mend: download it again and compare its size and checksum with the published ones."
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

# What a released checkpoint holds besides tensors and plain containers: its command line, and numpy numbers
# (best accuracy). Both names of `scalar` occur: numpy 2 moved the module.
_scalar = np.float64(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
]


_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # in the first pickle of every file of torch before 1.6
# the first bytes of a pickle: of protocol 2 and later; of a dictionary, list or class in the earlier ones
_BARE_PICKLE = re.compile(rb"\x80[\x02-\x05]|\(?[dl]p\d+\n|[}\]]q\x00|c[\w.]+\n")


class Checkpoint(NamedTuple):
    """One torch file: its tensors and everything else in it."""

    tensors: dict[str, Tensor]  # in the file's order
    container: str | None  # the key they were nested under; None: the file is the state dict itself
    rest: dict[str, Any]  # epoch, args (an argparse.Namespace), optimizer, ...


Loader = Callable[[], Tensor]


# ---------------------------------------------------------------------------------------------- one torch file


def read_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Read a .pth/.pt/.bin file whole: its tensors (memory-mapped where the format allows) and the rest.

    `key` names the nested dictionary (`model_ema`, ...); without it the first of `CONTAINERS` that holds tensors is
    taken, else the file itself. UserError: not a torch file, truncated, a class outside the allow-list, no tensors.
    """
    path = Path(path)
    content = _load_torch(path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, not a dictionary of tensors; nothing can be read from it."
        )
    container = key if key is not None else _container(content)
    if container is None:
        return Checkpoint(_tensors_only(content, path, "the file"), None, {})
    nested = content.get(container)
    if not isinstance(nested, Mapping):
        names = ", ".join(repr(k) for k, v in content.items() if isinstance(v, Mapping)) or "none"
        raise UserError(f"{path}: no dictionary under the key {container!r}. Dictionaries in this file: {names}.")
    rest = {str(k): v for k, v in content.items() if k != container}
    return Checkpoint(_tensors_only(nested, path, repr(container)), container, rest)


def _container(content: Mapping[Any, Any]) -> str | None:
    for name in CONTAINERS:
        nested = content.get(name)
        if isinstance(nested, Mapping) and any(isinstance(v, Tensor) for v in nested.values()):
            return name
    return None


def _tensors_only(state: Mapping[Any, Any], path: Path, where: str) -> dict[str, Tensor]:
    others = [f"{k!r} ({type(v).__name__})" for k, v in state.items() if not isinstance(v, Tensor)]
    if others or not state:
        found = f"holds besides tensors {', '.join(others[:8])}" if others else "is empty"
        raise UserError(
            f"{path}: {where} {found}, so it is not a state dict. Mend: name the nested dictionary of the weights "
            f"(looked for {', '.join(CONTAINERS)})."
        )
    return {str(k): v for k, v in state.items()}


def _load_torch(path: Path) -> Any:
    head = _check_file(path)
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip:
        _refuse_unknown_classes(path)
    elif _BARE_PICKLE.match(head) and _TORCH_MAGIC not in head[:64]:
        raise UserError(
            f"{path}: a bare pickle, not a torch file. Opening it could run code from it, so it is not opened. Mend: "
            "get the weights as safetensors; or, where you trust the author, unpickle it in a sandbox and save its "
            "tensors with torch.save."
        )
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it also raises
            # the format before torch 1.6 is no zip and cannot be memory-mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        refused = re.findall(r"(?:GLOBAL |got <class '|function <?)([\w.]+)", str(error))
        if refused:
            raise _refusal(path, refused[:1]) from None
        raise UserError(f"{path}: not a torch checkpoint, or a damaged one ({_reason(error)}). {_AGAIN}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: truncated or damaged ({_reason(error)}). {_AGAIN}") from error


def _refuse_unknown_classes(path: Path) -> None:
    """Name every class of a zip checkpoint that is outside the allow-list (the pickle is scanned, not run)."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:
        raise UserError(f"{path}: truncated or damaged ({_reason(error)}). {_AGAIN}") from error
    if unknown:
        raise _refusal(path, sorted(unknown))


def _refusal(path: Path, classes: Sequence[str]) -> UserError:
    return UserError(
        f"{path}: its pickle asks for {', '.join(classes)}. Building such objects can run code from the file, so only "
        "tensors, plain containers, argparse.Namespace and numpy numbers are read. Mend: get the weights as "
        "safetensors; or, where you trust the author, load the file in a sandbox and save its tensors alone."
    )


def _reason(error: BaseException) -> str:
    """What a library says of a file: the sentence of its unpickler, or the first of its last line."""
    text = str(error).strip() or "no detail"
    found = re.search(r"WeightsUnpickler error:\s*(\S.*)", text)
    line = found[1] if found else text.splitlines()[-1]
    sentence = re.split(r"(?<=[.!?]) ", line)[0].rstrip(".")
    shortened = sentence if len(sentence) <= 160 else sentence[:160].rpartition(" ")[0] + " …"
    return f"{type(error).__name__}: {shortened}"


def _check_file(path: Path) -> bytes:
    """First bytes of a file that exists, is not empty and is no stand-in for the real thing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path}: empty file (0 bytes). {_AGAIN}")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            f"{path}: a web page, not weights: the download got the site's page instead of the file. {_AGAIN}"
        )
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the weights. Mend: run `git lfs pull` in its repository.")
    return head


# ---------------------------------------------------------------------------------------------- any path, lazily


def open_tensors(path: str | Path, key: str | None = None) -> dict[str, Loader]:
    """Name -> a function that reads that tensor, for a file or a folder; nothing but headers is read before a call.

    Files: .safetensors, .pth/.pt/.bin (memory-mapped). Folders: Hugging Face (`model.safetensors`,
    `pytorch_model.bin`, or their `.index.json`), Meta (`consolidated.*.pth`; shards are merged tensor by tensor).
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return {name: _Constant(tensor) for name, tensor in read_checkpoint(path, key).tensors.items()}
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    raise UserError(
        f"{path}: unknown kind of file; weights are {', '.join(('.safetensors', *_TORCH_SUFFIXES))} or a folder."
    )


def read_state_dict(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """All tensors of a file or folder (see `open_tensors`), on the CPU, dtypes as stored, in the file's order."""
    return {name: load() for name, load in open_tensors(path, key).items()}


def iter_tensors(path: str | Path, key: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, so that a file larger than memory can be read (all formats but pre-1.6 .pth)."""
    for name, load in open_tensors(path, key).items():
        yield name, load()


@dataclass(frozen=True, slots=True)
class _Constant:
    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class _FromSafetensors:
    handle: Any
    name: str

    def __call__(self) -> Tensor:
        return self.handle.get_tensor(self.name)


def _open_safetensors(path: Path) -> dict[str, Loader]:
    _check_file(path)
    try:
        manager: AbstractContextManager[Any] = safe_open(path, framework="pt", device="cpu")
        handle = manager.__enter__()  # stays open as long as a loader lives; closed when the last one goes
        return {name: _FromSafetensors(handle, name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not safetensors ({_reason(error)}). {_AGAIN}") from error


def _open_folder(folder: Path) -> dict[str, Loader]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_index(index)
        if (folder / name).is_file():
            return open_tensors(folder / name)
    shards = sorted(folder.glob("consolidated.*.pth"))
    if shards:
        return _open_meta(folder, shards)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder}: no weights in this folder. Expected model.safetensors or pytorch_model.bin (or their .index.json) "
        f"as Hugging Face writes them, or Meta's consolidated.00.pth. Found: {found}."
    )


def _open_index(index: Path) -> dict[str, Loader]:
    _check_file(index)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = dict.fromkeys(str(name) for name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weight files ({_reason(error)}). {_AGAIN}") from error
    tensors: dict[str, Loader] = {}
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{index}: points outside its folder ({name!r}), which no published index does.")
        part = open_tensors(index.parent / name)
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise UserError(f"{index}: {twice[0]} is in two files, {name} among them; which one counts cannot be told.")
        tensors.update(part)
    lost = [f"{name} (in {weight_map[name]})" for name in weight_map if name not in tensors]
    if lost:
        raise UserError(f"{index}: {len(lost)} tensors are not in their files: {', '.join(lost[:6])}. {_AGAIN}")
    return tensors


# ---------------------------------------------------------------------------------------------- Meta's LLaMA folders

# How fairscale's model parallelism cut each matrix: the dimension to concatenate along, None = a copy in each shard.
_META_SPLIT: tuple[tuple[str, int | None], ...] = (
    (r".*\.attention\.w[qkv]\.weight|.*\.feed_forward\.w[13]\.weight|output\.weight", 0),  # column parallel
    (r".*\.attention\.wo\.weight|.*\.feed_forward\.w2\.weight", 1),  # row parallel
    (r".*norm\.weight|.*rope\.freqs", None),
)


@dataclass(frozen=True, slots=True)
class _Merged:
    name: str
    parts: tuple[Tensor, ...]
    dimension: int | None
    folder: Path

    def __call__(self) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0]
        if self.dimension is not None:
            return torch.cat(self.parts, dim=self.dimension)
        if any(not torch.equal(part, self.parts[0]) for part in self.parts[1:]):
            raise UserError(
                f"{self.folder}: {self.name} differs between shards, so they are not of one model. {_AGAIN}"
            )
        return self.parts[0]


def _open_meta(folder: Path, shards: Sequence[Path]) -> dict[str, Loader]:
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(shards))]
    if [shard.name for shard in shards] != expected:
        found = ", ".join(shard.name for shard in shards)
        raise UserError(f"{folder}: shards are {found}, expected {', '.join(expected)}; one is missing. {_AGAIN}")
    states = [read_checkpoint(shard).tensors for shard in shards]
    for shard, state in zip(shards, states):
        odd = sorted(state.keys() ^ states[0].keys())
        if odd:
            raise UserError(
                f"{shard}: holds other tensors than {shards[0].name} ({odd[0]}): not of one model. {_AGAIN}"
            )
    tensors: dict[str, Loader] = {}
    for name in states[0]:
        parts = tuple(state[name] for state in states)
        dimension = _meta_dimension(name, states[0], folder) if len(parts) > 1 else None
        tensors[name] = _Merged(name, parts, dimension, folder)
    _refuse_lost_shard(folder, states)
    return tensors


def _meta_dimension(name: str, state: Mapping[str, Tensor], folder: Path) -> int | None:
    if name == "tok_embeddings.weight":
        # LLaMA 1 and 2 cut the width, LLaMA 3 the vocabulary: the uncut side tells which
        return 0 if state[name].shape[1] == state["norm.weight"].shape[0] else 1
    for pattern, dimension in _META_SPLIT:
        if re.fullmatch(pattern, name):
            return dimension
    raise UserError(
        f"{folder}: {name} is no tensor of LLaMA's, so how its shards join is unknown. Mend: merge them first."
    )


def _refuse_lost_shard(folder: Path, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Attention's output is square in LLaMA (heads x head width = width): a lost shard shows in it."""
    name = next((name for name in states[0] if name.endswith(".attention.wo.weight")), None)
    if name is None:
        return
    width, joined = states[0][name].shape[0], sum(state[name].shape[1] for state in states)
    if joined != width:
        raise UserError(
            f"{folder}: {len(states)} shard(s) give {name} {joined} of its {width} columns; shards are missing. "
            "Mend: put all consolidated.*.pth of the model into the folder."
        )
