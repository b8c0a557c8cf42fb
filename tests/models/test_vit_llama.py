"""ViT-LLaMA beside the recorded numbers: settings, pooling, losses, cost, frozen sources, starting from pretraining."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.config import override, to_dict
from vlm.models.trained import MANIFEST, WEIGHTS
from vlm.models.video_mae import VideoMAEConfig
from vlm.models.vit_llama import (
    LlamaLayerConfig,
    ViTLlama,
    ViTLlamaConfig,
    load_pretrained,
    vit_base,
    vit_huge,
    vit_large,
    vit_small,
)
from vlm.nn.llama_block import FrozenLlama
from vlm.types import Batch, UserError
from vlm.weights import file_hash, write_safetensors

TINY: dict[str, Any] = {
    "dim": 24, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 8, "num_frames": 4, "num_classes": 5,
}  # fmt: skip
LLAMA: dict[str, Any] = {"dim": 16, "heads": 2, "multiple_of": 8}
random_is_meant = pytest.mark.filterwarnings("ignore:the frozen LLaMA layer has RANDOM weights")


def clips(count: int = 2, **labels: Tensor) -> Batch:
    video = torch.randn(count, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(keys=tuple(f"clip{i}" for i in range(count)), video=video, **labels)


def lively(config: ViTLlamaConfig) -> ViTLlama:
    """A model whose head is not near zero."""
    torch.manual_seed(0)
    return override(config, ["init_scale=1.0"]).build()


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dim", 25, "model.dim=25 is not a multiple of model.heads=2"),
        ("image_size", 20, "model.image_size=20 is not a multiple of model.patch_size=8"),
        ("num_frames", 5, "model.num_frames=5 is not a multiple of model.tubelet_size=2"),
        ("depth", 0, "model.depth is 0"),
        ("drop_path", 1.0, r"model.drop_path is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ViTLlamaConfig(**{**TINY, field: value})


def test_wrong_llama_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of even width"):
        LlamaLayerConfig(dim=16, heads=3)
    with pytest.raises(ValueError, match="counted from 0"):
        LlamaLayerConfig(layer=-1)
    with pytest.raises(ValueError, match=r"final_norm=llama needs model\.llama\.path"):
        LlamaLayerConfig(final_norm="llama")


def test_published_settings_are_the_defaults() -> None:
    config, llama = vit_small(), LlamaLayerConfig()
    assert (config.norm_eps, llama.norm_eps) == (1e-6, 1e-6)
    assert (config.drop_path, config.init_scale, config.label_smoothing, config.pooling) == (0.1, 0.001, 0.1, "mean")
    assert (config.num_frames, config.image_size, config.patch_size, config.tubelet_size) == (16, 224, 16, 2)
    assert (llama.dim, llama.heads, llama.layer, llama.num_layers, llama.final_norm) == (4096, 32, 15, 1, "ones")


def test_config_can_be_overridden_and_stored() -> None:
    config = override(vit_small(llama=LlamaLayerConfig()), ["llama.layer=31", "llama.path=/weights/7B", "pooling=cls"])
    assert (config.llama.layer, config.llama.path, config.pooling) == (31, Path("/weights/7B"), "cls")
    assert json.loads(json.dumps(to_dict(config)))["llama"]["layer"] == 31


@pytest.mark.parametrize(
    ("size", "millions"), [(vit_small, 21.946926), (vit_base, 86.361006), (vit_large, 303.7), (vit_huge, 631.3)]
)
def test_sizes(size: Any, millions: float) -> None:
    with torch.device("meta"):
        model = size().build()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)


# ---------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling(pooling: str) -> None:
    model = lively(ViTLlamaConfig(**TINY, pooling=pooling, drop_path=0.0)).eval()
    names = set(model.state_dict())
    assert ("fc_norm.weight" in names, "norm.weight" in names) == (
        (True, False) if pooling == "mean" else (False, True)
    )
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model.predict(clips())
    last = seen[0]
    pooled = model.fc_norm(last.mean(1)) if pooling == "mean" else model.norm(last)[:, 0]
    torch.testing.assert_close(logits, model.head(pooled))


@random_is_meant
@pytest.mark.parametrize("llama", [None, LlamaLayerConfig(**LLAMA)])
def test_checkpointed_activations_change_nothing(llama: LlamaLayerConfig | None) -> None:
    results = []
    for recompute in (False, True):
        model = lively(ViTLlamaConfig(**TINY, llama=llama, drop_path=0.3, activation_checkpointing=recompute))
        torch.manual_seed(1)
        term = model(clips(label=torch.tensor([0, 3])))["label"]
        term.total.backward()
        results.append((term.total.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    assert all(bool(g.abs().max() > 0) for g in results[1][1])


@random_is_meant
def test_bfloat16() -> None:
    model = lively(ViTLlamaConfig(**TINY, llama=LlamaLayerConfig(**LLAMA)))
    exact = model.eval().predict(clips())
    half = model.bfloat16().predict(clips())  # clips may stay fp32
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.05)
    model.train()(clips(label=torch.tensor([0, 3])))["label"].total.backward()


def test_losses() -> None:
    model = lively(ViTLlamaConfig(**TINY, drop_path=0.0, label_smoothing=0.1))
    label = torch.tensor([0, 3])
    smooth = torch.nn.functional.one_hot(label, 5) * 0.9 + 0.1 / 5
    from_labels = model(clips(label=label))["label"]
    from_targets = model(clips(label=label, target=smooth))["label"]
    assert from_labels.count == from_targets.count == model.counts(clips())["label"] == 2
    torch.testing.assert_close(from_labels.total, from_targets.total)
    # a sum over clips: the batch in two parts gives the same
    whole = clips(label=label)
    parts = [Batch(keys=("x",), video=whole.video[i : i + 1], label=label[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(model(part)["label"].total for part in parts), from_labels.total)
    with pytest.raises(UserError, match=r"clip0, clip1: clips without a label"):
        model(clips())


def test_head_starts_small() -> None:
    torch.manual_seed(0)
    model = ViTLlamaConfig(**TINY).build()
    assert model.head.weight.abs().max() < 0.02 * 0.001 * 6
    assert model.predict(clips()).abs().max() < 0.01


# ---------------------------------------------------------------------------------------------- the frozen part


def test_random_layers_are_said_loudly_and_repeatable() -> None:
    with pytest.warns(UserWarning, match=r"RANDOM weights \(model.llama.path is none\)"):
        model = ViTLlamaConfig(**TINY, llama=LlamaLayerConfig(**LLAMA)).build()
    torch.manual_seed(99)
    with pytest.warns(UserWarning, match="RANDOM"):
        again = ViTLlamaConfig(**TINY, llama=LlamaLayerConfig(**LLAMA)).build()
    assert model.frozen_hash() == again.frozen_hash()
    with pytest.warns(UserWarning, match="RANDOM"):
        other = ViTLlamaConfig(**TINY, llama=LlamaLayerConfig(**LLAMA, random_seed=1)).build()
    assert model.frozen_hash() != other.frozen_hash()


@random_is_meant
def test_what_trains() -> None:
    model = ViTLlamaConfig(**TINY, llama=LlamaLayerConfig(**LLAMA, num_layers=2)).build()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"llama.{name}" for name in model.llama.state_dict()}
    assert len(frozen) == 2 * 9 + 1
    assert all(p.ndim > 0 for p in model.parameters())


def test_layers_come_from_a_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=48, num_attention_heads=2, num_hidden_layers=3,
    )  # fmt: skip
    source = LlamaForCausalLM(config)
    torch.nn.init.normal_(source.model.norm.weight)
    source.save_pretrained(tmp_path)
    for norm in ("ones", "llama"):
        llama = LlamaLayerConfig(**LLAMA, path=tmp_path, layer=1, num_layers=2, final_norm=norm, dtype="bfloat16")
        block = llama.build()
        for j in range(2):
            want = source.model.layers[1 + j].state_dict()
            have = block.layers[j].state_dict()
            assert have.keys() == want.keys()
            assert all(torch.equal(have[name], want[name].bfloat16()) for name in want)
        weight = torch.ones(16) if norm == "ones" else source.model.norm.weight.detach()
        assert torch.equal(block.norm.weight, weight.bfloat16())
    with pytest.raises(UserError, match=r"layer 15 .*layers 0 to 2"):
        LlamaLayerConfig(**LLAMA, path=tmp_path).build()


def test_same_as_transformers_own_layers_without_rotary_and_mask() -> None:
    """Independent of our kernel: transformers' eager attention on the same weights."""
    block = FrozenLlama(dim=16, heads=2, num_layers=1, multiple_of=8, norm_eps=1e-6, dtype=torch.float32)
    block.randomize(0)
    x = torch.randn(2, 7, 16)
    ours = block(x)
    block.layers[0].self_attn.config._attn_implementation = "eager"
    torch.testing.assert_close(block(x), ours)


# ---------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(("size", "vit", "maps"), [(vit_small, 56.9, 4.9), (vit_base, 180.3, 9.9)])
def test_cost_of_published_sizes(size: Any, vit: float, maps: float) -> None:
    """Giga multiply-adds a clip of 16 x 224 x 224: ViT-S 56.9, ViT-B 180.3, LLaMA 337.5, its two maps 4.9 and 9.9."""
    batch = Batch(keys=("a", "b"), video=torch.empty(2, 3, 16, 224, 224, device="meta"))
    with torch.device("meta"):
        plain, full = size().build(), size(llama=LlamaLayerConfig()).build()
    cost = plain.cost(batch)
    assert cost.tokens == 2 * 1568
    assert cost.frozen_flops == 0
    assert cost.trained_flops / 2 / 2e9 == pytest.approx(vit, abs=0.06)
    with_llama = full.cost(batch)
    added = (with_llama.trained_flops + with_llama.frozen_flops - cost.trained_flops) / 2 / 2e9
    assert added == pytest.approx(337.5 + maps, abs=0.1)
    assert with_llama.frozen_flops / 2 / 2e9 == pytest.approx(202_375_168 * 1568 / 1e9, rel=1e-6)


@random_is_meant
def test_cost_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = ViTLlamaConfig(**TINY, llama=LlamaLayerConfig(**LLAMA)).build().eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.predict(clips())
    cost = model.cost(clips())
    assert cost.trained_flops + cost.frozen_flops == counter.get_total_flops()


# ---------------------------------------------------------------------------------------------- starting weights


def pretrained_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if name != "num_classes"}
    return VideoMAEConfig(**sizes, decoder_dim=12, decoder_depth=1, decoder_heads=2).build().state_dict()


@random_is_meant
def test_init_from_a_pretraining_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = pretrained_state()
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    with caplog.at_level(logging.INFO):
        config = ViTLlamaConfig(**TINY, llama=LlamaLayerConfig(**LLAMA), init_from=tmp_path / "checkpoint.pth")
        model = config.build()
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["encoder.blocks.1.mlp.fc1.weight"])
    assert "left as initialised: fc_norm.weight, fc_norm.bias, head.weight, head.bias, llama_dim_mapper1" in caplog.text


def test_init_from_a_run_of_ours(tmp_path: Path) -> None:
    """A folder of pretraining, as slurm/chain.sh names it: its latest checkpoint, compared with its manifest."""
    state, folder = pretrained_state(), tmp_path / "run" / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    write_safetensors(folder / WEIGHTS, state)
    files = {WEIGHTS: {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": file_hash(folder / WEIGHTS)}}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    for path in (tmp_path / "run", folder):
        model = ViTLlamaConfig(**TINY, init_from=path).build()
        assert torch.equal(model.blocks[1].mlp.fc1.weight, state["encoder.blocks.1.mlp.fc1.weight"])
    (folder.parent / "latest").write_text("step-00000004\n")
    (folder.parent / "step-00000004").mkdir()  # half-written
    with pytest.warns(UserWarning, match=rf"{folder} is taken instead \(.*step-00000004/{MANIFEST}: is missing"):
        model = ViTLlamaConfig(**TINY, init_from=tmp_path / "run").build()
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["encoder.blocks.1.mlp.fc1.weight"])
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=WEIGHTS):
        ViTLlamaConfig(**TINY, init_from=tmp_path / "run").build()


def test_prefix_backbone_and_first_token_pooling() -> None:
    state = {f"backbone.{name}": t for name, t in pretrained_state().items()}
    state = {name.replace("backbone.encoder.", "backbone."): t for name, t in state.items()}
    model = ViTLlamaConfig(**TINY, pooling="cls").build()
    report = load_pretrained(model, state)
    assert "norm.weight" in report.loaded  # with a final norm of its own the encoder's has a place
    assert report.kept == ("head.weight", "head.bias")


def test_a_finetuned_classifier_gives_its_head_where_it_fits() -> None:
    torch.manual_seed(0)
    donor = ViTLlamaConfig(**TINY).build().state_dict()
    model = ViTLlamaConfig(**TINY).build()
    assert load_pretrained(model, donor).kept == ()
    assert torch.equal(model.head.weight, donor["head.weight"])
    other = ViTLlamaConfig(**{**TINY, "num_classes": 7}).build()
    report = load_pretrained(other, donor)
    assert report.kept == report.dropped == ("head.weight", "head.bias")


def test_what_does_not_fit_is_refused() -> None:
    model, state = ViTLlamaConfig(**TINY).build(), pretrained_state()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lost = {name: t for name, t in state.items() if name != "encoder.blocks.1.attn.q_bias"}
    with pytest.raises(UserError, match=r"mae\.pth(.|\n)*1 missing(.|\n)*blocks\.1\.attn\.q_bias"):
        load_pretrained(model, lost, "mae.pth")
    with pytest.raises(UserError, match=r"1 unexpected(.|\n)*something\.new"):
        load_pretrained(model, {**state, "encoder.something.new": torch.zeros(1)})
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight.*\[24, 3, 2, 4, 4\].*\[24, 3, 2, 8, 8\]"):
        load_pretrained(model, {**state, "encoder.patch_embed.proj.weight": torch.zeros(24, 3, 2, 4, 4)})
    with pytest.raises(UserError, match="one tensor under two names"):
        load_pretrained(model, {**state, "patch_embed.proj.bias": torch.zeros(24)})
    with pytest.raises(UserError, match=r"fine-tuned ViT-LLaMA.*convert_ckpt"):
        load_pretrained(model, {**state, "llama.norm.weight": torch.zeros(16)})
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())  # all or nothing
