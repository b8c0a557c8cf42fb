"""Masked pretraining beside the recorded numbers: settings, the target's layout, masks, cost, the mask token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm.models.video_mae import (
    VideoMAE,
    VideoMAEConfig,
    video_mae_base,
    video_mae_huge,
    video_mae_large,
    video_mae_small,
)
from vlm.types import Batch, UserError

TINY: dict[str, Any] = {
    "dim": 24, "depth": 2, "heads": 2, "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2,
    "image_size": 16, "patch_size": 8, "num_frames": 4,
}  # fmt: skip
MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]]).repeat(1, 2).bool()  # 2 clips, 2 time slices of 4 positions


def make(**settings: Any) -> VideoMAE:
    torch.manual_seed(0)
    return VideoMAEConfig(**{**TINY, **settings}).build()


def clips() -> Batch:
    video = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return Batch(keys=("a", "b"), video=video, mask=MASK)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("decoder_dim", 13, "model.decoder_dim=13 is not a multiple of model.decoder_heads=2"),
        ("num_frames", 3, "model.num_frames=3 is not a multiple of model.tubelet_size=2"),
        ("decoder_depth", 0, "model.decoder_depth is 0"),
        ("drop_path", -0.1, "model.drop_path is -0.1"),
    ],
)
def test_wrong_settings_are_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(**{field: value})


@pytest.mark.parametrize(
    ("size", "dim", "decoder_depth"),
    [(video_mae_small, 384, 4), (video_mae_base, 768, 4), (video_mae_large, 1024, 12), (video_mae_huge, 1280, 12)],
)
def test_sizes(size: Any, dim: int, decoder_depth: int) -> None:
    with torch.device("meta"):
        model = size().build()
    assert model.encoder.patch_embed.proj.weight.shape == (dim, 3, 2, 16, 16)
    assert len(model.decoder.blocks) == decoder_depth
    assert model.mask_token.shape == (1, 1, dim // 2)


def test_target_is_each_cube_over_its_own_deviation_colour_last() -> None:
    model, batch = make(), clips()
    target = model.target(batch.video, batch.mask)
    assert target.shape == (2, 6, 2 * 8 * 8 * 3)
    assert not target.requires_grad
    mean, std = torch.tensor(model.config.mean), torch.tensor(model.config.std)
    pixels = batch.video * std.view(3, 1, 1, 1) + mean.view(3, 1, 1, 1)
    # clip 1 hides positions 1 2 3 of each slice: its 4th hidden cube is slice 1, position 1 = row 0, column 1
    cube = pixels[1, :, 2:4, 0:8, 8:16]
    flat = cube.flatten(1)
    want = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(target[1, 3].view(-1, 3), want.T)
    model.config.normalize_target = False
    torch.testing.assert_close(model.target(batch.video, batch.mask)[1, 3].view(2, 8, 8, 3), cube.permute(1, 2, 3, 0))


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    model, batch = make().eval(), clips()
    changed = batch.video.clone()
    changed[1, :, 2:4, 0:8, 8:16] += 1.0  # a hidden cube of clip 1
    same = model.rebuild(changed, batch.mask)
    torch.testing.assert_close(same, model.rebuild(batch.video, batch.mask), rtol=0, atol=0)
    changed[1, :, 2:4, 0:8, 0:8] += 1.0  # its visible neighbour
    difference = (model.rebuild(changed, batch.mask) - same).abs().amax((1, 2))
    assert difference[0] == 0 < difference[1]


def test_loss_is_a_sum_and_its_count_is_known_before() -> None:
    model, batch = make(), clips()
    term = model(batch)["pixels"]
    assert term.count == model.counts(batch)["pixels"] == 2 * 6 * 384
    mean = (model.rebuild(batch.video, batch.mask) - model.target(batch.video, batch.mask)).pow(2).mean()
    torch.testing.assert_close(term.total / term.count, mean)


def test_every_parameter_gets_a_gradient_also_when_recomputing() -> None:
    gradients = []
    for recompute in (False, True):
        model = make(activation_checkpointing=recompute).train()
        model(clips())["pixels"].total.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(g is not None and bool(g.abs().max() > 0) for g in gradients[-1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_mask_token_is_spared_from_weight_decay() -> None:
    model = make()
    spared = {name for name, p in model.named_parameters() if model.no_decay(name, p)}
    assert "mask_token" in spared
    assert "encoder_to_decoder.weight" not in spared
    assert float(model.mask_token.detach().abs().max()) <= 0.02


def test_bfloat16() -> None:
    model, batch = make(), clips()
    exact = model(batch)["pixels"].total.detach()
    half = model.bfloat16()(batch)["pixels"].total
    torch.testing.assert_close(half.detach(), exact, rtol=0.03, atol=0.0)
    half.backward()


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 0]]).bool(),  # not the same number
        torch.ones(2, 8).bool(),
        torch.zeros(2, 8).bool(),
        MASK[:, :4],  # of another length
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="every clip must hide the same number"):
        make().rebuild(clips().video, mask)


def test_clips_without_a_mask_and_evaluation_are_refused() -> None:
    model = make()
    with pytest.raises(UserError, match="MaskedClipConfig"):
        model(Batch(keys=("a", "b"), video=clips().video))
    with pytest.raises(UserError, match="VideoMAE predicts no classes"):
        model.predict(clips())


def test_cost_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, counter = make().eval(), FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(clips())
    cost = model.cost(clips())
    assert cost.trained_flops == counter.get_total_flops()
    assert (cost.frozen_flops, cost.tokens) == (0.0, 2 * 2)
