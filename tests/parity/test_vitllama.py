"""ViT-LLaMA against the originals' numbers: forward to optimizer steps, schedules, groups, names, checkpoint rules.

Frame indices, mixup, spatial maths and the merge of views: test_vitllama_data.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import LOGITS, ClassifierParity, our_name

from vlm.models import video_mae, vit_llama
from vlm.models.system import System
from vlm.models.vit_llama import LlamaLayerConfig, ViTLlama, ViTLlamaConfig, load_pretrained
from vlm.nn import attention as attention_module
from vlm.run.optim import parameter_groups, warmup_cosine
from vlm.types import Batch
from vlm.weights import pairs_to_halves


class TestClassifier(ClassifierParity):
    file = "vitllama_tiny.pt"

    def test_order_of_rows_in_a_head_is_free(self, model: ViTLlama, batch: Batch) -> None:
        """Meta's and Hugging Face's files hold q and k in different order; without rotary both give the same."""
        # seen: 3.0e-7
        model.eval()
        with torch.no_grad():
            before = model.predict(batch)
            for layer in model.llama.layers:
                heads = layer.self_attn.config.num_attention_heads
                for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    permuted = pairs_to_halves(matrix.weight, heads)
                    assert not torch.equal(permuted, matrix.weight)
                    matrix.weight.copy_(permuted)
            torch.testing.assert_close(model.predict(batch), before, rtol=0.0, atol=2.4e-6)

    def test_every_kernel_gives_the_recorded_logits(
        self, golden_values: Any, model: ViTLlama, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attention_module, "_refused", {("sdpa", torch.float32)})
        calls = []
        monkeypatch.setitem(attention_module.KERNELS, "reference", _counted(attention_module.reference, calls))
        with torch.no_grad():
            logits = model.eval().predict(batch)
        assert len(calls) == len(model.blocks) + len(model.llama.layers)
        torch.testing.assert_close(logits, golden_values["logits"], **LOGITS)

    def test_bf16_storage_is_near(self, golden_values: Any, model: ViTLlama, batch: Batch) -> None:
        """Frozen weights in bf16, all else in fp32."""
        # seen: 3e-3
        model.llama.to(torch.bfloat16)
        with torch.no_grad():
            logits = model.eval().predict(batch)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, golden_values["logits"], rtol=0.0, atol=0.03)


def _counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return call


# ---------------------------------------------------------------------------------------------- full-size models


def full_size(name: str, names: list[str], shapes: dict[str, list[int]] | None = None) -> System:
    """The model that the original registers as `name`, without weights; what the name leaves open is read elsewhere."""
    match = re.match(r"(vit|vit_llama|pretrain_videomae)_(small|base|large|huge)_patch(\d+)_(\d+)", name)
    assert match, name
    family, size, patch, image = match[1], match[2], int(match[3]), int(match[4])
    settings: dict[str, Any] = {"patch_size": patch, "image_size": image}
    with torch.device("meta"):
        if family == "pretrain_videomae":
            settings["decoder_depth"] = _depth(names, "decoder.blocks.")
            return getattr(video_mae, f"video_mae_{size}")(**settings).build()
        if family == "vit_llama":
            settings["llama"] = LlamaLayerConfig(num_layers=_depth(names, "llama.layers."))
        if shapes is not None:
            settings["num_classes"] = shapes["head.weight"][0]
        return getattr(vit_llama, f"vit_{size}")(**settings).build()


def _depth(names: list[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def test_names_and_shapes_of_full_size_models(load_golden: Callable[[str], Any]) -> None:
    for name, want in load_golden("vitllama_state_dict_shapes.json").items():
        model = full_size(name, list(want["state_dict"]), want["state_dict"])
        have = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        assert have == {our_name(key): shape for key, shape in want["state_dict"].items()}, name
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in model.parameters()) == want["n_params"], name
        assert sum(p.numel() for p in trained) == want["n_trainable"], name


def test_parameter_groups(load_golden: Callable[[str], Any]) -> None:
    for name, want in load_golden("vitllama_param_groups.json").items():
        frozen = want.get("frozen_excluded", [])
        model = full_size(name, [*(row["name"] for row in want["params"]), *frozen])
        groups = parameter_groups(
            model, lr=1.0, weight_decay=want["weight_decay"], layer_decay=want["layer_decay"] or 1.0
        )
        rows = [
            (n, group["lr_scale"], group["weight_decay"], group["layer_id"]) for group in groups for n in group["names"]
        ]
        assert rows == [
            (row["name"], row["lr_scale"], row["weight_decay"], row.get("layer_id")) for row in want["params"]
        ], name
        if "group_order" in want:
            have = [{**{k: g[k] for k in ("lr_scale", "weight_decay")}, "n": len(g["params"])} for g in groups]
            assert have == want["group_order"], name
        grouped = {n for group in groups for n in group["names"]}
        assert {n for n, _ in model.named_parameters()} - grouped == {our_name(n) for n in frozen}, name


def test_schedules(load_golden: Callable[[str], Any]) -> None:
    # seen: equal to the bit
    for case in load_golden("vitllama_lr_schedule.json")["cases"]:
        total = case["epochs"] * case["niter_per_ep"]
        warmup = case.get("warmup_steps", -1)
        if warmup <= 0:
            warmup = case.get("warmup_epochs", 0) * case["niter_per_ep"]
        values = [
            warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=case["base"], final=case["final"])
            for step in range(total)
        ]
        assert values == pytest.approx(case["values"], rel=1e-14, abs=1e-20), case["name"]


# ---------------------------------------------------------------------------------------------- checkpoint rules


def test_what_a_pretraining_checkpoint_fills(load_golden: Callable[[str], Any]) -> None:
    rules = load_golden("vitllama_checkpoint_rules.json")
    sizes = {"dim": 24, "heads": 2, "image_size": 16, "patch_size": 8, "num_frames": 4}
    pretrained = video_mae.VideoMAEConfig(
        depth=_depth(rules["pretrain_keys"], "encoder.blocks."),
        decoder_depth=_depth(rules["pretrain_keys"], "decoder.blocks."),
        decoder_dim=12,
        decoder_heads=2,
        **sizes,
    ).build()
    model = ViTLlamaConfig(depth=_depth(rules["finetune_keys"], "blocks."), num_classes=3, **sizes).build()
    assert list(pretrained.state_dict()) == rules["pretrain_keys"]
    assert list(model.state_dict()) == rules["finetune_keys"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    report = load_pretrained(model, pretrained.state_dict())

    assert list(report.loaded) == rules["loaded"]
    assert list(report.kept) == rules["kept_at_init"]
    assert sorted(report.dropped) == sorted(rules["dropped_from_checkpoint"])
    after = model.state_dict()
    assert all(torch.equal(after[name], pretrained.state_dict()[f"encoder.{name}"]) for name in report.loaded)
    assert all(torch.equal(after[name], before[name]) for name in report.kept)


def test_meta_layer_fills_the_frozen_part(load_golden: Callable[[str], Any], tmp_path: Path) -> None:
    rules = load_golden("vitllama_checkpoint_rules.json")["meta_llama"]
    generator = torch.Generator().manual_seed(0)
    file = {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in rules["consolidated_keys"].items()
    }
    torch.save(file, tmp_path / "consolidated.00.pth")
    sources = {ours: theirs for ours, theirs in rules["mapping"].items() if theirs is not None}
    first = min(int(theirs.split(".")[1]) for theirs in sources.values())
    width = rules["module_keys"]["norm.weight"][0][0]
    block = LlamaLayerConfig(
        path=tmp_path, layer=first, num_layers=_depth(list(sources), "layers."), dim=width, heads=2
    ).build()

    state = {f"llama.{name}": tensor for name, tensor in block.state_dict().items()}
    assert state.keys() == {our_name(f"llama.{name}") for name in rules["module_keys"]}
    for ours, theirs in sources.items():
        tensor = state[our_name(f"llama.{ours}")]
        assert [list(tensor.shape), str(tensor.dtype)] == rules["module_keys"][ours]
        assert torch.equal(tensor, file[theirs].float()) == rules["equal_to_float_of_half"][ours]
    assert not rules["final_norm_loaded"]
    assert rules["final_norm_value"] == "ones"
    assert torch.equal(state["llama.norm.weight"], torch.ones(width))
