"""Groups hold each trained parameter once, with its rate and decay; the schedule's ends and corners."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.models.video_mae import VideoMAEConfig
from vlm.models.vit_llama import LlamaLayerConfig, ViTLlama, ViTLlamaConfig
from vlm.run.optim import parameter_groups, warmup_cosine
from vlm.types import UserError


def make() -> ViTLlama:
    with torch.device("meta"):
        return ViTLlamaConfig(
            dim=24, depth=2, heads=2, image_size=16, patch_size=8, num_frames=4, llama=LlamaLayerConfig(dim=16, heads=2)
        ).build()


def test_each_trained_parameter_stands_in_one_group() -> None:
    model = make()
    groups = parameter_groups(model, lr=2.0, weight_decay=0.1, layer_decay=0.5)
    named = dict(model.named_parameters())
    for group in groups:
        assert [id(named[name]) for name in group["names"]] == [id(p) for p in group["params"]]
        assert group["lr"] == 2.0 * group["lr_scale"]
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in named.items() if p.requires_grad)
    assert not any(name.startswith("llama.") for name in names)


def test_rates_and_decay() -> None:
    groups = parameter_groups(make(), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    of = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert of["patch_embed.proj.weight"] == (0.125, 0.1)
    assert of["patch_embed.proj.bias"] == (0.125, 0.0)
    assert of["blocks.0.attn.q_bias"] == (0.25, 0.0)
    assert of["blocks.1.mlp.fc2.weight"] == (0.5, 0.1)
    for name in ("fc_norm.weight", "head.bias"):
        assert of[name] == (1.0, 0.0)
    for name in ("head.weight", "llama_dim_mapper1.weight", "llama_dim_mapper2.weight"):
        assert of[name] == (1.0, 0.1)
    assert len(groups) == 2 * 4  # ids 0 … 3, with and without weight decay


def test_without_layer_decay_there_are_two_groups() -> None:
    groups = parameter_groups(make(), lr=1.0, weight_decay=0.1)
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1.0, 0.1), (1.0, 0.0)]


def test_what_has_moments_of_other_ages_is_in_groups_of_its_own() -> None:
    model = make()
    ages = {name: 5 if name.startswith("head.") else 7 for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, adam_steps=ages)
    assert sorted(sorted({ages[name] for name in group["names"]}) for group in groups) == [[5], [5], [7], [7]]
    same = parameter_groups(model, lr=1.0, weight_decay=0.1, adam_steps=dict.fromkeys(ages, 5))
    alone = parameter_groups(model, lr=1.0, weight_decay=0.1)
    assert [group["names"] for group in same] == [group["names"] for group in alone]


def test_layer_decay_needs_layers() -> None:
    model = VideoMAEConfig(
        dim=24, depth=1, heads=2, decoder_dim=12, decoder_depth=1, decoder_heads=2, image_size=16, patch_size=8
    ).build()
    assert len(parameter_groups(model, lr=1.0, weight_decay=0.1)) == 2
    with pytest.raises(UserError, match=r"optim\.layer_decay.*VideoMAE"):
        parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.7)


def schedule(total: int, warmup: int) -> list[float]:
    return [warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=1.0, final=0.2) for step in range(total)]


def test_warmup_starts_at_zero_and_repeats_the_peak() -> None:
    values = schedule(10, 4)
    assert values[:5] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    assert values[3] == values[4] == 1.0
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[-1] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 5 / 6)))
    assert values[-1] > 0.2


def test_corners() -> None:
    assert schedule(3, 0)[0] == 1.0
    assert schedule(3, 1)[:2] == [0.0, 1.0]
    assert schedule(3, 3) == [0.0, 0.5, 1.0]
    assert schedule(1, 1) == [0.0]


def test_steps_outside_the_run_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="step 5 of 5"):
        warmup_cosine(5, total_steps=5, warmup_steps=1, peak=1.0, final=0.0)
    with pytest.raises(AssertionError, match="6 warmup steps of 5"):
        warmup_cosine(0, total_steps=5, warmup_steps=6, peak=1.0, final=0.0)
