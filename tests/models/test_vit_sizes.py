"""Sizes from tensors and back: exactly the tensors that our models and the published ones have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models.test_published import GOLDEN_KINDS, TINY, model
from vlm.models.published import FINETUNE, PRETRAIN, VIT_LLAMA, to_ours
from vlm.models.vit_llama import ViTLlamaConfig
from vlm.models.vit_sizes import (
    Settings,
    expected_shapes,
    hf_config,
    sizes_of,
    standard_heads,
    unusual_depth,
)
from vlm.types import UserError


@pytest.mark.parametrize("kind", [PRETRAIN, FINETUNE, VIT_LLAMA])
def test_sizes_of_our_models(kind: str) -> None:
    state = model(kind).state_dict()
    sizes = sizes_of(state, kind)
    assert (sizes.width, sizes.depth, sizes.mlp_width, sizes.tubelet, sizes.patch) == (12, 11, 48, 2, 16)
    assert expected_shapes(sizes, kind) == {name: tuple(t.shape) for name, t in state.items()}


@pytest.mark.parametrize("settings", [{"pooling": "cls"}, {"qkv_bias": False}, {"init_values": 0.1}], ids=str)
def test_sizes_of_variants(settings: dict[str, object]) -> None:
    with torch.device("meta"):
        state = ViTLlamaConfig(**{**TINY, **settings}).build().state_dict()
    assert expected_shapes(sizes_of(state, FINETUNE), FINETUNE) == {n: tuple(t.shape) for n, t in state.items()}


@pytest.mark.parametrize("name", GOLDEN_KINDS)
def test_sizes_of_the_published_models(golden: Callable[[str], Path], name: str) -> None:
    family, kind = GOLDEN_KINDS[name]
    stated = json.loads(golden("vitllama_state_dict_shapes.json").read_text())[name]
    theirs = {key: torch.empty(shape, device="meta") for key, shape in stated["state_dict"].items()}
    ours = to_ours(theirs, family, kind)
    sizes = sizes_of(ours, kind)
    want = expected_shapes(sizes, kind)
    assert want == {key: tuple(t.shape) for key, t in ours.items()}
    assert sum(torch.Size(shape).numel() for shape in want.values()) == stated["n_params"]
    assert unusual_depth(sizes) is None
    heads, decoder_heads = standard_heads(sizes)
    assert heads == {384: 6, 768: 12}[sizes.width]
    assert decoder_heads == ({384: 3, 768: 6}[sizes.width] if kind == PRETRAIN else None)


def test_a_file_cut_between_blocks_is_noticed() -> None:
    sizes = replace(sizes_of(model(FINETUNE).state_dict(), FINETUNE), width=768, depth=11)
    assert unusual_depth(sizes) == "11 blocks, where every published model of width 768 has 12"


def test_missing_anchor() -> None:
    state = dict(model(FINETUNE).state_dict())
    state["head.weight"] = torch.zeros(5)
    with pytest.raises(UserError, match=r"head\.weight: has shape \[5\]; it tells the sizes"):
        sizes_of(state, FINETUNE)
    del state["patch_embed.proj.weight"]
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight: missing; it tells the sizes"):
        sizes_of(state, FINETUNE)


def test_config_of_vit_llama_claims_no_transformers_class() -> None:
    sizes = sizes_of(model(VIT_LLAMA).state_dict(), VIT_LLAMA)
    config = hf_config(sizes, VIT_LLAMA, Settings(num_heads=3))
    assert config["model_type"] == "vit_llama"
    assert (config["llama_hidden_size"], config["llama_num_layers"]) == (16, 2)
    assert config["llama_intermediate_size"] == sizes.llama_hidden
