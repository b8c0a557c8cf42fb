"""Frozen LLaMA layers from a base: the right layer is found by content or hash, the wrong base is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.models.test_published import values
from tests.test_weight_files import cut, llama
from vlm.models.formats import Model
from vlm.models.frozen_base import compare_with_base, fill_from_base, starts
from vlm.models.published import VIT_LLAMA
from vlm.nn.llama_block import norm_tensor, select_layers
from vlm.types import UserError
from vlm.weights import open_tensors, read_state_dict, state_hash, write_safetensors

LAYERS, COUNT = 4, 2  # layers of the base, layers of the model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    state = llama(width=16, hidden=48, layers=LAYERS)
    folder = tmp_path / "base"
    folder.mkdir()
    for number in range(2):
        torch.save(cut(state, number, 2, embedding=1), folder / f"consolidated.{number:02d}.pth")
    return folder


def model(base: Path, first: int, dtype: torch.dtype, *, own_norm: bool = False) -> Model:
    """A ViT-LLaMA with the layers that the model code itself would take from the base."""
    loaders = open_tensors(base)
    layers = select_layers(loaders, first, COUNT, str(base))
    norm = norm_tensor(loaders, str(base)) if own_norm else torch.ones(16)
    frozen = {f"llama.{name}": t.to(dtype) for name, t in {**layers, "norm.weight": norm}.items()}
    trained = {name: t for name, t in values(VIT_LLAMA).items() if not name.startswith("llama.")}
    return Model(kind=VIT_LLAMA, tensors={**trained, **frozen})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_norm", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_found_by_content_and_by_hash(base: Path, dtype: torch.dtype, own_norm: bool, first: int) -> None:
    whole = model(base, first, dtype, own_norm=own_norm)
    assert compare_with_base(whole, base, None) == first
    trained = Model(kind=VIT_LLAMA, tensors=whole.trainable(), frozen_hash=state_hash(whole.frozen()))
    assert fill_from_base(trained, base, None, None, COUNT) == first
    assert state_hash(trained.tensors) == state_hash(whole.tensors)


def test_layer_by_number_where_no_hash_tells_it(base: Path) -> None:
    whole = model(base, 1, torch.float32)
    trained = Model(kind=VIT_LLAMA, tensors=whole.trainable())
    with pytest.raises(UserError, match=r"does not say which of its layers.*--layer N"):
        fill_from_base(trained, base, None, None, COUNT)
    assert fill_from_base(trained, base, 1, None, COUNT) == 1
    assert state_hash(trained.tensors) == state_hash(whole.tensors)


def test_another_llama_of_the_same_size(base: Path, tmp_path: Path) -> None:
    whole = model(base, 0, torch.float32)
    trained = Model(kind=VIT_LLAMA, tensors=whole.trainable(), frozen_hash=state_hash(whole.frozen()))
    other = tmp_path / "other"
    other.mkdir()
    write_safetensors(other / "model.safetensors", {n: t + 1 for n, t in read_state_dict(base).items()})
    assert compare_with_base(whole, other, None) is None
    with pytest.raises(UserError, match=rf"other: not what .*frozen_hash is {trained.frozen_hash}.*layer\(s\) 0, 1, 2"):
        fill_from_base(trained, other, None, None, COUNT)
    assert trained.frozen() == {}


def test_another_width(base: Path) -> None:
    whole = model(base, 0, torch.float32)
    trained = Model(kind=VIT_LLAMA, tensors=whole.trainable(), frozen_hash=state_hash(whole.frozen()))
    shutil.rmtree(base)
    base.mkdir()
    torch.save(llama(width=8, hidden=24, layers=LAYERS), base / "consolidated.00.pth")
    with pytest.raises(UserError, match="layers are 8 wide, this checkpoint's mappers 16"):
        fill_from_base(trained, base, None, None, COUNT)
    with pytest.raises(UserError, match=r"(?s)is not the LLaMA of this checkpoint.*has \[8, 8\], wanted \[16, 16\]"):
        compare_with_base(whole, base, None)


def test_likely_layers_come_first(tmp_path: Path) -> None:
    torch.save(llama(width=8, layers=33), tmp_path / "consolidated.00.pth")
    assert starts(tmp_path, None, 7, 1)[:4] == [7, 15, 31, 0]
    assert starts(tmp_path, None, None, 2)[:3] == [15, 31, 0]
    assert 32 not in starts(tmp_path, None, None, 2)
    assert starts(tmp_path, 4, None, 1) == [4]
    with pytest.raises(UserError, match="holds no 40 LLaMA layers in a row"):
        starts(tmp_path, None, None, 40)
