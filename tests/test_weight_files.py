"""Opening files: nested dictionaries, what is refused, Hugging Face and Meta folders, damaged files."""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.types import UserError
from vlm.weights import iter_tensors, open_tensors, read_checkpoint, read_state_dict

WEIGHTS = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = [torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one]
    return list(one) == list(other) and all(same)


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_nested_dictionary(tmp_path: Path, container: str | None, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    content = {container: WEIGHTS, "epoch": 3} if container else WEIGHTS
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert found.container == container
    assert equal(found.tensors, WEIGHTS)
    assert found.rest == ({"epoch": 3} if container else {})
    assert equal(read_state_dict(path), WEIGHTS)


def test_named_container(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    other = {"b.weight": torch.zeros(2, 3)}
    torch.save({"model": WEIGHTS, "model_ema": other}, path)
    assert equal(read_state_dict(path, "model_ema"), other)
    with pytest.raises(UserError, match=r"no dictionary under the key 'ema'.*'model', 'model_ema'"):
        read_state_dict(path, "ema")


@pytest.mark.parametrize("zipped", [True, False])
def test_args_and_numpy_numbers_are_allowed(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    args = argparse.Namespace(lr=np.float32(0.5), model="vit", betas=(0.9, 0.95))
    rest = {"args": args, "best": np.float64(71.25), "count": np.int64(4), "good": np.bool_(True)}
    torch.save({"model": WEIGHTS, **rest}, path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path).rest == rest


def test_numpy_one_pickles_are_allowed(tmp_path: Path) -> None:
    """numpy 1 wrote `numpy.core`, numpy 2 `numpy._core`; both name the same function."""
    path = tmp_path / "x.pth"
    torch.save({"model": WEIGHTS, "best": np.float64(71.25)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != path.read_bytes()
    path.write_bytes(old)
    assert read_checkpoint(path).rest == {"best": 71.25}


class Payload:
    """Unpickling this runs code: it makes the file `ran`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Harmless:
    """Not dangerous, but not on the list."""


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "x.pth", tmp_path / "ran"
    torch.save({"model": WEIGHTS, "args": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    pickle.loads(pickle.dumps(Payload(marker)))  # it would run
    assert marker.exists()
    marker.unlink()
    with pytest.raises(UserError, match=r"x\.pth: its pickle asks for .*(getattr|pathlib)"):
        read_state_dict(path)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_refused_class_is_named(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": WEIGHTS, "args": Harmless()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"test_weight_files\.Harmless.*safetensors") as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


def test_other_content(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"config": 1, "weights": WEIGHTS}, path)
    with pytest.raises(UserError, match=r"'config' \(int\), 'weights' \(dict\).*not a state dict"):
        read_state_dict(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list"):
        read_state_dict(path)
    torch.save({}, path)
    with pytest.raises(UserError, match="is empty"):
        read_state_dict(path)


def damaged(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "html": b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "half": whole[: len(whole) // 2],
        "tail": whole[:-5],
        "noise": b"\x00\x01noise" * 50,
    }
    path.write_bytes(contents[kind])


@pytest.mark.parametrize("form", ["zip.pth", "old.pth", "x.safetensors"])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "empty file.*download it again"),
        ("html", "a web page, not weights.*download it again"),
        ("lfs", "Git LFS pointer.*git lfs pull"),
        ("half", "(truncated|damaged).*download it again"),
        ("tail", "(truncated|damaged).*download it again"),
        ("noise", "(truncated|damaged).*download it again"),
    ],
)
def test_damaged_files(tmp_path: Path, form: str, kind: str, says: str) -> None:
    path = tmp_path / form
    if form.endswith("safetensors"):
        save_file(WEIGHTS, path)
    else:
        torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=form == "zip.pth")
    damaged(path, kind)
    with pytest.raises(UserError, match=rf"(?s){form}: .*{says}"):
        read_state_dict(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bare_pickle_is_called_by_its_name(tmp_path: Path, protocol: int) -> None:
    path, marker = tmp_path / "x.pth", tmp_path / "ran"
    for content in ({"a": [1, 2]}, [1, 2], {"a": Payload(marker)}, np.zeros(3), {"w": WEIGHTS}):
        path.write_bytes(pickle.dumps(content, protocol))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match=r"x\.pth: a bare pickle, not a torch file.*safetensors"):
                read_state_dict(path)
    assert not marker.exists()


def test_reason_is_the_librarys_and_ends_with_its_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False, pickle_protocol=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"\(UnpicklingError: Unsupported operand 149\)"):
            read_state_dict(path)
    torch.save({"model": WEIGHTS}, path)
    damaged(path, "half")
    with pytest.raises(UserError, match=r"zip archive: failed finding central directory\)\. Mend"):
        read_state_dict(path)


def test_missing_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        read_state_dict(tmp_path / "gone.pth")
    with pytest.raises(UserError, match="no such file or folder"):
        read_state_dict(tmp_path / "gone")
    (tmp_path / "x.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown kind of file"):
        read_state_dict(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"no weights in this folder.*Found: x\.npz"):
        read_state_dict(tmp_path)


# ---------------------------------------------------------------------------------------------- folders


def write_sharded(folder: Path, suffix: str, weight_map: dict[str, str], files: dict[str, dict[str, Tensor]]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name) if suffix == "safetensors" else torch.save(tensors, folder / name)
    index = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hugging_face_shards(tmp_path: Path, suffix: str) -> None:
    one, two = f"m-1.{suffix}", f"m-2.{suffix}"
    files = {one: {"b.weight": WEIGHTS["b.weight"]}, two: {"a.bias": WEIGHTS["a.bias"]}}
    write_sharded(tmp_path, suffix, {"b.weight": one, "a.bias": two}, files)
    assert equal(read_state_dict(tmp_path), WEIGHTS)
    assert equal(dict(iter_tensors(tmp_path)), WEIGHTS)


def test_hugging_face_single_files(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert equal(read_state_dict(tmp_path), WEIGHTS)
    save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_state_dict(tmp_path)) == ["c"]  # as transformers, which prefers it


def test_hugging_face_index_errors(tmp_path: Path) -> None:
    files = {"m-1.safetensors": {"b.weight": WEIGHTS["b.weight"]}, "m-2.safetensors": {"a.bias": WEIGHTS["a.bias"]}}
    write_sharded(tmp_path, "safetensors", {"b.weight": "m-1.safetensors", "c": "m-1.safetensors"}, files)
    with pytest.raises(UserError, match=r"1 tensors are not in their files: c \(in m-1\.safetensors\)"):
        read_state_dict(tmp_path)
    write_sharded(tmp_path, "safetensors", {"b.weight": "m-3.safetensors"}, files)
    with pytest.raises(UserError, match=r"m-3\.safetensors: no such file"):
        read_state_dict(tmp_path)
    write_sharded(tmp_path, "safetensors", {"b.weight": "../m-1.safetensors"}, files)
    with pytest.raises(UserError, match="points outside its folder"):
        read_state_dict(tmp_path)
    files["m-2.safetensors"] = dict(files["m-1.safetensors"])
    write_sharded(tmp_path, "safetensors", {"b.weight": "m-1.safetensors", "a.bias": "m-2.safetensors"}, files)
    with pytest.raises(UserError, match=r"b\.weight is in two files"):
        read_state_dict(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="not an index of weight files"):
        read_state_dict(tmp_path)


def llama(width: int = 8, hidden: int = 12, vocabulary: int = 16, layers: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocabulary, width)}
    for n in range(layers):
        shapes |= {f"layers.{n}.attention.w{part}.weight": (width, width) for part in "qkvo"}
        shapes |= {f"layers.{n}.feed_forward.w{part}.weight": (hidden, width) for part in (1, 3)}
        shapes |= {f"layers.{n}.feed_forward.w2.weight": (width, hidden)}
        shapes |= {f"layers.{n}.{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
    shapes |= {"norm.weight": (width,), "output.weight": (vocabulary, width), "rope.freqs": (4,)}
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


def cut(state: dict[str, Tensor], number: int, count: int, *, embedding: int) -> dict[str, Tensor]:
    """Shard `number` of `count`, cut as Meta's model parallelism does."""
    shard = {}
    for name, tensor in state.items():
        if name == "tok_embeddings.weight":
            shard[name] = tensor.chunk(count, embedding)[number].clone()
        elif name.endswith(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")):
            shard[name] = tensor.chunk(count, 0)[number].clone()
        elif name.endswith(("wo.weight", "w2.weight")):
            shard[name] = tensor.chunk(count, 1)[number].clone()
        else:
            shard[name] = tensor.clone()
    return shard


def write_meta(folder: Path, count: int, embedding: int = 1) -> dict[str, Tensor]:
    state = llama()
    for number in range(count):
        torch.save(cut(state, number, count, embedding=embedding), folder / f"consolidated.{number:02d}.pth")
    return state


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("embedding", [1, 0], ids=["llama1", "llama3"])
def test_meta_shards_merge(tmp_path: Path, count: int, embedding: int) -> None:
    state = write_meta(tmp_path, count, embedding)
    assert equal(read_state_dict(tmp_path), state)


def test_meta_lost_shard(tmp_path: Path) -> None:
    write_meta(tmp_path, 2)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"expected consolidated\.00\.pth; one is missing"):
        open_tensors(tmp_path)
    (tmp_path / "away").rename(tmp_path / "consolidated.00.pth")
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"1 shard\(s\) give layers\.0\.attention\.wo\.weight 4 of its 8 columns"):
        open_tensors(tmp_path)


def test_meta_shards_of_two_models(tmp_path: Path) -> None:
    write_meta(tmp_path, 2)
    second = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    torch.save({**second, "norm.weight": second["norm.weight"] + 1}, tmp_path / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"norm\.weight differs between shards"):
        read_state_dict(tmp_path)
    torch.save({**second, "layers.0.bonus": torch.ones(2)}, tmp_path / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"holds other tensors than consolidated\.00\.pth \(layers\.0\.bonus\)"):
        read_state_dict(tmp_path)
