"""tools/convert_ckpt.py: round trips to the bit, what Hugging Face makes of the result, frozen layers, refusals."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

from tests.test_weight_files import llama
from tools import convert_ckpt
from vlm.config import to_dict
from vlm.models.formats import Model
from vlm.models.published import FINETUNE, PRETRAIN, VIT_LLAMA, from_ours
from vlm.models.system import System
from vlm.models.vit_llama import LlamaLayerConfig, ViTLlamaConfig
from vlm.recipe import load
from vlm.run import restore
from vlm.tensor_files import seal
from vlm.weights import state_hash, write_safetensors

SIZES = (  # stated here, so that the recipes stay free to change
    "model.dim=24", "model.depth=2", "model.heads=2", "model.image_size=32", "model.patch_size=8", "model.num_frames=8",
)  # fmt: skip
LLAMA = ("model.llama.dim=96", "model.llama.heads=4", "model.llama.multiple_of=64", "model.llama.num_layers=1")
RECIPES: dict[str, tuple[str, ...]] = {
    FINETUNE: ("vit_llama.debug", *SIZES, "model.num_classes=8", "model.llama=none"),
    PRETRAIN: ("video_mae.debug", *SIZES, "model.decoder_dim=12", "model.decoder_depth=2", "model.decoder_heads=3"),
    VIT_LLAMA: ("vit_llama.debug", *SIZES, "model.num_classes=8", *LLAMA),
}
FORMAT_OF = {FINETUNE: "videomae", PRETRAIN: "videomae", VIT_LLAMA: "vit_llama"}
KINDS = tuple(RECIPES)


def build(kind: str) -> System:
    """The recipe's model with other numbers in each trained tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(RECIPES[kind][0], RECIPES[kind][1:]).model.build().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    return model


def recipe_flags(kind: str) -> list[str]:
    return [*RECIPES[kind][1:], "--recipe", RECIPES[kind][0]]


def write_original(path: Path, kind: str, *, container: str = "model") -> dict[str, Any]:
    """A file as the originals save it: names and dtypes of theirs, an order of its own, a Namespace, an optimizer."""
    theirs = from_ours(dict(build(kind).state_dict()), FORMAT_OF[kind], kind)
    tensors = {name: t.half() if "norm1" in name else t for name, t in reversed(theirs.items())}
    args = argparse.Namespace(lr=1.5e-3, model="vit", opt_betas=[0.9, 0.95], input_size=32, num_frames=8, resume="")
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    content = {container: tensors, "optimizer": moments, "epoch": 799, "scaler": {"scale": 65536.0}, "args": args}
    torch.save(content, path)
    return content


def run(*arguments: str | Path) -> None:
    assert convert_ckpt.main([str(a) for a in arguments]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Message of a conversion that must fail."""
    capsys.readouterr()
    assert convert_ckpt.main([str(a) for a in arguments]) == 1
    return capsys.readouterr().err


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state_hash(one) == state_hash(other)


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", ["model", "module"])
def test_original_to_ours_and_back(
    tmp_path: Path, kind: str, container: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "checkpoint-799.pth"
    content = write_original(source, kind, container=container)
    run(source, tmp_path / "ours", "--from", FORMAT_OF[kind], "--to", "vlm", *recipe_flags(kind))
    said = capsys.readouterr().out
    assert "dropped optimizer (tensors)" in said
    assert "float32, float16" in said or "float16, float32" in said
    run(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", FORMAT_OF[kind])
    back = torch.load(tmp_path / "back.pth", weights_only=True)  # plain containers only
    assert list(back[container]) == list(content[container])
    assert same(back[container], content[container])
    assert back == {
        container: back[container],
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": vars(content["args"]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_file_stays_flat(tmp_path: Path, kind: str) -> None:
    tensors = write_original(tmp_path / "x.pth", kind)["model"]
    torch.save(tensors, tmp_path / "x.pth")
    run(tmp_path / "x.pth", tmp_path / "ours", "--from", FORMAT_OF[kind], "--to", "vlm")
    run(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", FORMAT_OF[kind])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(tensors)
    assert same(back, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["q_bias", "query.bias"])
def test_hugging_face_to_ours_and_back(tmp_path: Path, kind: str, spelling: str) -> None:
    write_original(tmp_path / "x.pth", kind)
    hf, back = tmp_path / "hf", tmp_path / "back"
    run(tmp_path / "x.pth", hf, "--from", FORMAT_OF[kind], "--to", "hf", *recipe_flags(kind))
    tensors = load_file(hf / "model.safetensors")
    if spelling == "query.bias":
        tensors = {n.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): t for n, t in tensors.items()}
        save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((hf / "config.json").read_text()), "id2label": {"0": "moving left"}, "transformers": "x"}
    (hf / "config.json").write_text(json.dumps(config))
    run(hf, tmp_path / "ours", "--from", "hf", "--to", "vlm")
    run(tmp_path / "ours", back, "--from", "vlm", "--to", "hf")
    assert same(load_file(back / "model.safetensors"), tensors)
    assert json.loads((back / "config.json").read_text()) == config


@pytest.mark.parametrize("kind", KINDS)
def test_through_every_format(tmp_path: Path, kind: str) -> None:
    content = write_original(tmp_path / "x.pth", kind)
    form = FORMAT_OF[kind]
    run(tmp_path / "x.pth", tmp_path / "hf", "--from", form, "--to", "hf", *recipe_flags(kind))
    run(tmp_path / "hf", tmp_path / "direct.pth", "--from", "hf", "--to", form)
    assert same(torch.load(tmp_path / "direct.pth", weights_only=True)["model"], content["model"])


def test_other_nested_dictionary(tmp_path: Path) -> None:
    content = write_original(tmp_path / "x.pth", FINETUNE)
    averaged = {name: t + 1 for name, t in content["model"].items()}
    torch.save({**content, "model_ema": averaged}, tmp_path / "x.pth")
    common = ["--from", "videomae", "--to", "vlm", "--key", "model_ema"]
    run(tmp_path / "x.pth", tmp_path / "ours", *common)
    run(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "videomae")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["model_ema"], averaged)


# ---------------------------------------------------------------------------------------------- Hugging Face


def from_pretrained(cls: Any, folder: Path) -> Any:
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_transformers_classifies_alike(tmp_path: Path) -> None:
    ours = build(FINETUNE)
    torch.save({"model": ours.state_dict()}, tmp_path / "x.pth")
    run(tmp_path / "x.pth", tmp_path / "hf", "--from", "videomae", "--to", "hf", *recipe_flags(FINETUNE))
    theirs = from_pretrained(VideoMAEForVideoClassification, tmp_path / "hf")
    video = torch.randn(2, *ours.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = ours.logits(video), theirs(video.transpose(1, 2)).logits
        assert want.std() > 0.03
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        theirs.fc_norm.eps = 1e-6  # theirs keeps 1e-5 there, whatever config.json says
        torch.testing.assert_close(theirs(video.transpose(1, 2)).logits, want, atol=2e-6, rtol=1e-5)


def test_transformers_rebuilds_alike(tmp_path: Path) -> None:
    ours = build(PRETRAIN)
    torch.save({"model": ours.state_dict()}, tmp_path / "x.pth")
    run(tmp_path / "x.pth", tmp_path / "hf", "--from", "videomae", "--to", "hf", *recipe_flags(PRETRAIN))
    theirs = from_pretrained(VideoMAEForPreTraining, tmp_path / "hf")
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, *ours.input_shape, generator=generator)
    mask = torch.zeros(2, ours.config.num_tokens, dtype=torch.bool)
    mask[:, torch.randperm(mask.shape[1], generator=generator)[: mask.shape[1] * 9 // 10]] = True
    theirs.decoder.norm.eps = 1e-6
    with torch.no_grad():
        want = ours.rebuild(video, mask)
        torch.testing.assert_close(theirs(video.transpose(1, 2), mask).logits, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [FINETUNE, PRETRAIN])
def test_golden_in_transformers(golden: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """The originals' recorded output, from their weights through our converter in transformers' classes."""
    file = "videomae_pretrain_tiny.pt" if kind == PRETRAIN else "videomae_vit_tiny.pt"
    recorded = torch.load(golden(file), weights_only=True)
    config = recorded["config"]
    torch.save({"model": recorded["state_dict"]}, tmp_path / "x.pth")
    names = {"heads": "num_heads", "dim": "embed_dim", "depth": "depth"}
    common = {
        "patch_size": config["patch_size"],
        "tubelet_size": config["tubelet_size"],
        "image_size": config["img_size"],
    }
    if kind == PRETRAIN:
        sizes = {ours: config[f"encoder_{theirs}"] for ours, theirs in names.items()}
        sizes |= {f"decoder_{ours}": config[f"decoder_{theirs}"] for ours, theirs in names.items()}
        sizes |= {**common, "num_frames": config["num_frames"]}
    else:
        sizes = {ours: config[theirs] for ours, theirs in names.items()}
        sizes |= {**common, "num_frames": config["all_frames"], "num_classes": config["num_classes"]}
    # overrides are checked one by one: divisors of 1 fit every size on the way
    ones = [f"model.{n}=1" for n in sizes if n.endswith(("heads", "patch_size", "tubelet_size"))]
    divisors_last = sorted(sizes, key=lambda n: n.endswith(("heads", "patch_size", "tubelet_size")))
    overrides = [*ones, *(f"model.{name}={sizes[name]}" for name in divisors_last)]
    flags = [*RECIPES[kind][1:], *overrides, "--recipe", RECIPES[kind][0]]
    run(tmp_path / "x.pth", tmp_path / "hf", "--from", "videomae", "--to", "hf", *flags)
    video = recorded["inputs"].transpose(1, 2)
    with torch.no_grad():
        if kind == PRETRAIN:
            theirs = from_pretrained(VideoMAEForPreTraining, tmp_path / "hf")
            theirs.decoder.norm.eps = 1e-6
            found = theirs(video, recorded["mask"])
            torch.testing.assert_close(found.logits, recorded["output"], atol=1.5e-5, rtol=0)
            assert abs(float(found.loss) - float(recorded["loss"])) < 2e-6
        else:
            theirs = from_pretrained(VideoMAEForVideoClassification, tmp_path / "hf")
            theirs.fc_norm.eps = 1e-6
            torch.testing.assert_close(theirs(video).logits, recorded["logits"], atol=1.5e-5, rtol=0)


def test_golden_vit_llama_in_ours(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """The original's recorded logits from its weights, frozen ones too, converted and loaded into our model."""
    recorded = torch.load(golden("vitllama_tiny.pt"), weights_only=True)
    config, block = recorded["config"], recorded["config"]["llama"]
    torch.save({"model": recorded["state_dict"], "epoch": 1}, tmp_path / "x.pth")
    run(tmp_path / "x.pth", tmp_path / "ours", "--from", "vit_llama", "--to", "vlm")
    sizes = ViTLlamaConfig(
        dim=config["embed_dim"], depth=config["depth"], heads=config["num_heads"], image_size=config["img_size"],
        patch_size=config["patch_size"], tubelet_size=config["tubelet_size"], num_frames=config["all_frames"],
        num_classes=config["num_classes"],
        llama=LlamaLayerConfig(dim=block["dim"], heads=block["n_heads"], multiple_of=block["multiple_of"]),
    )  # fmt: skip
    with torch.device("meta"):
        model = sizes.build().eval()
    tensors = {n: t for f in convert_ckpt.WEIGHT_FILES for n, t in load_file(tmp_path / "ours" / f).items()}
    model.load_state_dict(tensors, assign=True)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(recorded["inputs"]), recorded["logits"], atol=1.5e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_need_no_recipe(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Heads are not in the tensors: known for the published widths, asked for at others."""
    write_original(tmp_path / "x.pth", kind)
    if kind == FINETUNE:
        said = refused(capsys, tmp_path / "x.pth", tmp_path / "hf", "--from", "videomae", "--to", "hf")
        assert "number of attention heads is not in the tensors, and width 24" in said
        assert "--recipe" in said
        return
    published = load("video_mae.ssv2_s" if kind == PRETRAIN else "vit_llama.ssv2_s_llama", ["model.depth=1"]).model
    with torch.device("meta"):
        model = (published if kind == PRETRAIN else convert_ckpt.replace(published, init_from=None)).build()
    shapes = {n: t.shape for n, t in model.state_dict().items() if not n.startswith("llama.")}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if kind == PRETRAIN:
        args = argparse.Namespace(input_size=112)
        torch.save({"model": tensors, "args": args}, tmp_path / "x.pth")
        run(tmp_path / "x.pth", tmp_path / "hf", "--from", "videomae", "--to", "hf")
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert (config["num_attention_heads"], config["decoder_num_attention_heads"]) == (6, 3)
        assert (config["image_size"], config["num_frames"]) == (112, 16)
        said = capsys.readouterr().out
        assert "image_size 112, num_frames 16" in said
        assert "1 blocks, where every published model of width 384 has 12" in said


# ---------------------------------------------------------------------------------------------- our checkpoints


def write_trained(folder: Path, kind: str) -> System:
    """A checkpoint as training writes it: trained tensors, optimizer, state, the recipe's settings."""
    model = build(kind)
    folder.mkdir(parents=True)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    write_safetensors(folder / "model.safetensors", trained)
    write_safetensors(folder / "optimizer.safetensors", {"exp_avg/x": torch.ones(1)})
    (folder / "state.json").write_text("{}")
    files = {p.name: {"bytes": p.stat().st_size, "sha256": convert_ckpt.file_hash(p)} for p in folder.iterdir()}
    manifest = {
        "format": 1,
        "step": 40,
        "recipe": to_dict(load(RECIPES[kind][0], RECIPES[kind][1:])),
        "frozen_hash": model.frozen_hash(),
        "files": files,
        "tensors": {n: {"shape": list(t.shape), "dtype": "float32"} for n, t in trained.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:the frozen LLaMA layer has RANDOM weights")
def test_a_trained_run_needs_no_flags(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its manifest holds the model's settings: heads for config.json, and where the frozen layers come from."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000040"
    model = write_trained(folder, kind)
    (folder.parent / "latest").write_text("step-00000040\n")
    run(tmp_path / "run", tmp_path / "hf", "--from", "vlm", "--to", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_attention_heads"] == model.config.heads
    assert config["image_size"] == model.config.image_size
    assert "dropped optimizer.safetensors, state.json" in capsys.readouterr().out
    run(tmp_path / "hf", tmp_path / "x.pth", "--from", "hf", "--to", FORMAT_OF[kind])
    state = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert same(state, from_ours(dict(model.state_dict()), FORMAT_OF[kind], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_training_loads_a_converted_checkpoint(tmp_path: Path, kind: str) -> None:
    model = build(kind)
    theirs = from_ours(dict(model.state_dict()), FORMAT_OF[kind], kind)
    torch.save({"model": theirs}, tmp_path / "x.pth")
    run(tmp_path / "x.pth", tmp_path / "ours", "--from", FORMAT_OF[kind], "--to", "vlm")
    fresh = build(kind)
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    restore.load_weights(tmp_path / "ours", fresh)
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_manifest_guards_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_original(tmp_path / "x.pth", FINETUNE)
    ours = tmp_path / "ours"
    run(tmp_path / "x.pth", ours, "--from", "videomae", "--to", "vlm")
    common = (ours, tmp_path / "back.pth", "--from", "vlm", "--to", "videomae")
    manifest = json.loads((ours / "manifest.json").read_text())
    content = bytearray((ours / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (ours / "model.safetensors").write_bytes(content)
    assert "content differs from the manifest" in refused(capsys, *common)
    content[-1] ^= 1
    (ours / "model.safetensors").write_bytes(content)
    manifest["tensors"]["head.bias"]["shape"] = [7]
    (ours / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert "manifest.json says head.bias is ([7], 'float32'), the weight files have ([8], 'float32')" in refused(
        capsys, *common
    )
    (ours / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    assert "checkpoint format 3" in refused(capsys, *common)
    (ours / "manifest.json").unlink()
    assert "neither a checkpoint" in refused(capsys, *common)
    assert not (tmp_path / "back.pth").exists()


def test_source_and_provenance_are_in_the_manifest(tmp_path: Path) -> None:
    content = write_original(tmp_path / "x.pth", PRETRAIN)
    run(tmp_path / "x.pth", tmp_path / "ours", "--from", "videomae", "--to", "vlm")
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert manifest["kind"] == PRETRAIN
    assert manifest["frozen_hash"] == state_hash({})
    source = manifest["source"]
    assert source["sha256"] == convert_ckpt.file_hash(tmp_path / "x.pth")
    assert source["rest"] == {"epoch": 799, "scaler": {"scale": 65536.0}, "args": vars(content["args"])}
    assert manifest["tensors"]["encoder.blocks.0.norm1.weight"]["dtype"] == "float16"
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "ours").iterdir()} == {0o644}


# ---------------------------------------------------------------------------------------------- the frozen base


@pytest.fixture
def released(tmp_path: Path) -> dict[str, Any]:
    """A base of three layers, and a ViT-LLaMA file trained with its layer 1 in fp32."""
    state = llama(width=96, hidden=256, layers=3)
    (tmp_path / "base").mkdir()
    torch.save(state, tmp_path / "base" / "consolidated.00.pth")
    content = write_original(tmp_path / "x.pth", VIT_LLAMA)
    for name, tensor in content["model"].items():
        if name.startswith("llama.layers.0."):
            content["model"][name] = state[name.replace("llama.layers.0.", "layers.1.")].float()
            assert content["model"][name].shape == tensor.shape
    torch.save(content, tmp_path / "x.pth")
    return content


def test_frozen_layers_of_the_base_are_not_stored(
    tmp_path: Path, released: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--base", tmp_path / "base")
    run(tmp_path / "x.pth", tmp_path / "ours", "--from", "vit_llama", "--to", "vlm", *base)
    assert f"the frozen layers are {tmp_path / 'base'}'s, from layer 1 on" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["manifest.json", "model.safetensors"]
    back = (tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "vit_llama")
    assert "Mend: --base with the LLaMA folder" in refused(capsys, *back)
    run(*back, *base)
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], released["model"])
    assert list(torch.load(tmp_path / "back.pth", weights_only=True)["model"]) == list(released["model"])


def test_frozen_layers_are_kept_without_a_base(tmp_path: Path, released: dict[str, Any]) -> None:
    run(tmp_path / "x.pth", tmp_path / "ours", "--from", "vit_llama", "--to", "vlm")
    frozen = load_file(tmp_path / "ours" / "frozen.safetensors")
    assert set(frozen) == {n for n in load_file(tmp_path / "ours" / "frozen.safetensors") if n.startswith("llama.")}
    assert len(frozen) == 10
    assert json.loads((tmp_path / "ours" / "manifest.json").read_text())["frozen_hash"] == state_hash(frozen)


def test_another_base_is_noticed(tmp_path: Path, released: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    state = {name: t + 1 for name, t in llama(width=96, hidden=256, layers=3).items()}
    torch.save(state, other / "consolidated.00.pth")
    run(tmp_path / "x.pth", tmp_path / "kept", "--from", "vit_llama", "--to", "vlm", "--base", other)
    assert f"no layer of {other} equals the source's frozen ones" in capsys.readouterr().out
    assert (tmp_path / "kept" / "frozen.safetensors").exists()

    run(tmp_path / "x.pth", tmp_path / "ours", "--from", "vit_llama", "--to", "vlm", "--base", tmp_path / "base")
    back = (tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "vit_llama", "--base")
    assert "not what this checkpoint was trained with" in refused(capsys, *back, other)
    (other / "consolidated.00.pth").unlink()
    torch.save(llama(width=64, hidden=256, layers=3), other / "consolidated.00.pth")
    assert "layers are 64 wide, this checkpoint's mappers 96" in refused(capsys, *back, other)
    said = refused(capsys, *back, tmp_path / "base", "--layer", "2")
    assert "layer(s) 2 have others" in said
    assert not (tmp_path / "back.pth").exists()


def test_a_base_for_a_model_without_frozen_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_original(tmp_path / "x.pth", FINETUNE)
    common = (tmp_path / "x.pth", tmp_path / "ours", "--from", "videomae", "--to", "vlm")
    assert "has no frozen layers; leave it out" in refused(capsys, *common, "--base", tmp_path)


# ---------------------------------------------------------------------------------------------- refusals


def test_missing_unexpected_and_misshapen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = write_original(tmp_path / "x.pth", FINETUNE)
    whole = content["model"]
    arguments = (tmp_path / "x.pth", tmp_path / "ours", "--from", "videomae", "--to", "vlm")

    def refusal(tensors: dict[str, Tensor]) -> str:
        torch.save({"model": tensors}, tmp_path / "x.pth")
        return refused(capsys, *arguments)

    said = refusal({n: t for n, t in whole.items() if n != "blocks.1.norm2.bias"})
    assert "1 missing:\n  blocks.1.norm2.bias  (nearest: blocks.1.norm1.bias" in said
    assert "x.pth (ViT video classifier)" in said
    said = refusal({**whole, "blocks.1.norm3.bias": torch.ones(24)})
    assert "blocks.1.norm3.bias  (nearest: blocks.0.norm" in said
    said = refusal({**whole, "blocks.1.norm2.bias": torch.ones(25)})
    assert "blocks.1.norm2.bias: has [25], wanted [24]" in said
    said = refusal({n.replace("head.", "heads."): t for n, t in whole.items()})
    assert "no known kind of model" in said
    assert not (tmp_path / "ours").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]  # nothing half-made is left


def test_the_recipe_decides_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_original(tmp_path / "x.pth", FINETUNE)
    common = [tmp_path / "x.pth", tmp_path / "ours", "--from", "videomae", "--to", "vlm"]
    said = refused(capsys, *common, "--recipe", "vit_llama.debug", *RECIPES[FINETUNE][1:], "model.depth=3")
    assert "x.pth and recipe vit_llama.debug" in said
    assert "13 missing:\n  blocks.2." in said
    said = refused(capsys, *common, "--recipe", "vit_llama.debug")
    assert "is a ViT video classifier; recipe vit_llama.debug builds a ViT video classifier with frozen LLaMA" in said
    said = refused(capsys, *common, "--recipe", "video_mae.debug")
    assert "builds a VideoMAE masked pretraining" in said
    assert "did you mean" in refused(capsys, *common, "--recipe", "vit_llama.debugg")
    run(*common, *recipe_flags(FINETUNE))


def test_a_format_without_the_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_original(tmp_path / "x.pth", VIT_LLAMA)
    said = refused(capsys, tmp_path / "x.pth", tmp_path / "y", "--from", "videomae", "--to", "vlm")
    assert "VideoMAE's .pth has no form for a ViT video classifier with frozen LLaMA layers" in said
    run(tmp_path / "x.pth", tmp_path / "y", "--from", "vit_llama", "--to", "vlm")
    said = refused(capsys, tmp_path / "y", tmp_path / "z.pth", "--from", "vlm", "--to", "videomae")
    assert "has no form" in said


def test_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_original(tmp_path / "x.pth", FINETUNE)
    start = (tmp_path / "x.pth",)
    to_ours = ("--from", "videomae", "--to", "vlm")
    to_pth = ("--from", "videomae", "--to", "videomae")
    assert "source and target are one" in refused(capsys, *start, tmp_path / "x.pth", *to_pth, "--force")
    assert "must end in .pth" in refused(capsys, *start, tmp_path / "y", *to_pth)
    assert "no such folder" in refused(capsys, *start, tmp_path / "none" / "y", *to_ours)
    run(*start, tmp_path / "y", *to_ours)
    assert "exists. Mend: another DST, or --force" in refused(capsys, *start, tmp_path / "y", *to_ours)
    run(*start, tmp_path / "y", *to_ours, "--force")
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    assert "no plain checkpoint file or folder" in refused(capsys, *start, precious, *to_ours, "--force")
    (tmp_path / "y" / "runs").mkdir()
    assert "no plain checkpoint file or folder" in refused(capsys, *start, tmp_path / "y", *to_ours, "--force")
    assert (precious / "thesis.tex").exists()


def test_a_failed_write_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read back differs (a bad disk): the target keeps its old content."""
    write_original(tmp_path / "x.pth", FINETUNE)
    run(tmp_path / "x.pth", tmp_path / "y", "--from", "videomae", "--to", "vlm")
    before = (tmp_path / "y" / "model.safetensors").read_bytes()

    def damaged(path: Path, model: Model, recipe: System | None) -> None:
        convert_ckpt.write_vlm(path, Model(kind=model.kind, tensors={n: t + 1 for n, t in model.tensors.items()}), None)

    row = convert_ckpt.FORMATS["vlm"]
    monkeypatch.setitem(convert_ckpt.FORMATS, "vlm", convert_ckpt.replace(row, write=damaged))
    with pytest.raises(RuntimeError, match="read back differs"):
        convert_ckpt.main(
            [str(tmp_path / "x.pth"), str(tmp_path / "y"), "--from", "videomae", "--to", "vlm", "--force"]
        )
    assert (tmp_path / "y" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pth", "y"]


@pytest.mark.parametrize("to", ["hf", "videomae"])
def test_force_keeps_the_old_target_until_the_new_one_stands(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rename fails: the old file or folder is back in its place."""
    write_original(tmp_path / "x.pth", FINETUNE)
    target = tmp_path / ("y.pth" if to == "videomae" else "y")
    arguments = [str(tmp_path / "x.pth"), str(target), *recipe_flags(FINETUNE), "--from", "videomae", "--to", to]
    run(*arguments)
    inside = target if target.is_file() else target / "model.safetensors"
    before = inside.read_bytes()

    def full(self: Path, other: Path, rename: Callable[[Path, Path], Path] = Path.rename) -> Path:
        if self.name == target.name and other == target and "replaced" not in str(self):
            raise OSError("no space left on device")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr(Path, "replace", lambda self, other: full(self, other, os.replace))
    with pytest.raises(OSError, match="no space left"):
        convert_ckpt.main([*arguments, "--force"])
    assert inside.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pth", target.name]


def test_hugging_face_folder_that_contradicts_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_original(tmp_path / "x.pth", FINETUNE)
    hf = tmp_path / "hf"
    run(tmp_path / "x.pth", hf, "--from", "videomae", "--to", "hf", *recipe_flags(FINETUNE))
    config = json.loads((hf / "config.json").read_text())
    back = (hf, tmp_path / "ours", "--from", "hf", "--to", "vlm")
    (hf / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 12}))
    assert "num_hidden_layers is 12, but the tensors say 2" in refused(capsys, *back)
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    assert "model_type is 'bert'" in refused(capsys, *back)
    (hf / "config.json").unlink()
    assert "no config.json" in refused(capsys, *back)


@pytest.mark.parametrize(
    "arguments",
    [["model.depth=3"], ["--layer", "3"], ["--to", "gguf"]],
    ids=" ".join,
)
def test_flags_that_make_no_sense(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        convert_ckpt.main(["a.pth", "b", "--from", "videomae", "--to", "vlm", *arguments])
    with pytest.raises(SystemExit):
        convert_ckpt.main(["a", "b", "--from", "hf", "--to", "vlm", "--key", "model"])


def test_from_the_command_line(tmp_path: Path) -> None:
    content = write_original(tmp_path / "x.pth", PRETRAIN)
    command = [sys.executable, convert_ckpt.__file__, "x.pth", "ours", "--from", "videomae", "--to", "vlm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for line in ("read    videomae: x.pth", "kind    VideoMAE masked pretraining", "sizes   width", "hash    "):
        assert line in done.stdout
    parameters = sum(t.numel() for t in content["model"].values())
    assert f"{len(content['model'])} tensors, {parameters:,} parameters" in done.stdout


def test_an_error_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pth").write_bytes(b"<!DOCTYPE html>")
    said = refused(capsys, tmp_path / "x.pth", tmp_path / "ours", "--from", "videomae", "--to", "vlm")
    assert said.startswith(f"convert_ckpt: {tmp_path / 'x.pth'}: a web page, not weights")
