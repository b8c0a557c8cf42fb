"""tools/convert_ckpt.py on Vamos, Flipped-VQA and ViCo files: round trips, their LLaMA, and what is refused."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import released as r
from vlm.config import to_dict
from vlm.models import gated_files
from vlm.models.gated_files import stored_config
from vlm.models.trained import other_rows
from vlm.models.vamos import Vamos
from vlm.recipe import check_inputs, load
from vlm.run import checkpoint, restore
from vlm.tensor_files import seal
from vlm.types import UserError
from vlm.weights import state_hash

FAMILIES = ("vamos", "flipped", "vico")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """LLaMA 1, by its folder: what the released-looking args name."""
    return r.llama_folder(tmp_path / "llama" / "7B", 2)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def model_of(folder: Path) -> Vamos:
    """The model that a converted checkpoint's own settings describe, with fresh trained tensors."""
    return stored_config(manifest_of(folder)["recipe"]["model"], str(folder)).build()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state_hash(one) == state_hash(other)


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("family", "sizes", "args"),
    [
        ("vamos", {}, {}),
        ("vamos", {"projector": "mlp"}, {"proj_type": "mlp"}),
        ("vamos", {"rows": 6}, {"adapter_layer": 2}),  # the lowest block has gates that nothing uses
        ("flipped", {}, {}),
        ("flipped", {"rows": 3}, {"adapter_layer": 1, "bias": 3.0}),
        ("vico", {}, {}),
    ],
    ids=str,
)
def test_released_to_ours_and_back(
    tmp_path: Path,
    llama: Path,
    family: str,
    sizes: dict[str, Any],
    args: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = r.released(tmp_path / "best.pth", family, args, **sizes)
    ours = tmp_path / "ours"
    r.convert(tmp_path / "best.pth", ours, "--from", family, "--to", "vlm", "--base", llama)
    said = capsys.readouterr().out
    assert "logits  24 random tokens, 4 of them video: the published formulas and our model differ by at most" in said
    assert "dropped optimizer (tensors)" in said
    assert sorted(p.name for p in ours.iterdir()) == ["manifest.json", "model.safetensors"]  # no LLaMA in it
    assert same(load_file(ours / "model.safetensors"), content["model"])

    model = model_of(ours)
    skipped = r.LAYERS - args.get("adapter_layer", r.LAYERS)
    gates = 1 if family == "vamos" else 2
    assert len(dict(model.named_buffers())) == gates * skipped
    restore.load_weights(ours, model)  # names, shapes and the LLaMA's hash
    assert same({n: t for n, t in model.state_dict().items() if not n.startswith("llm.")}, content["model"])

    r.convert(ours, tmp_path / "back.pth", "--from", "vlm", "--to", family)
    assert "logits  24 random tokens" in capsys.readouterr().out
    back = torch.load(tmp_path / "back.pth", weights_only=False)
    assert list(back) == ["model", "epoch", "scaler", "args"]
    assert list(back["model"]) == list(content["model"])
    assert same(back["model"], content["model"])
    assert isinstance(back["args"], argparse.Namespace)
    assert {name: back[name] for name in ("epoch", "scaler", "args")} == {
        name: content[name] for name in ("epoch", "scaler", "args")
    }
    # and once more, from what was written
    r.convert(tmp_path / "back.pth", tmp_path / "again", "--from", family, "--to", "vlm", "--base", llama)
    one, two = manifest_of(ours), manifest_of(tmp_path / "again")
    assert one["frozen_hash"] == two["frozen_hash"] == model.frozen_hash()
    assert one["files"] == two["files"]


@pytest.mark.parametrize("layout", ["hf", "vlm"])
def test_the_llama_may_have_any_layout(tmp_path: Path, llama: Path, layout: str) -> None:
    r.released(tmp_path / "best.pth", "flipped")
    other = tmp_path / "other"
    r.convert(llama, other, "--from", "meta_llama", "--to", layout)
    for name, base in (("one", llama), ("two", other)):
        r.convert(tmp_path / "best.pth", tmp_path / name, "--from", "flipped", "--to", "vlm", "--base", base)
    hashes = {manifest_of(tmp_path / name)["frozen_hash"] for name in ("one", "two")}
    assert len(hashes) == 1


def test_a_llama_larger_than_memory(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, shapes and hash are compared all the same; the report says that logits are not."""
    r.released(tmp_path / "best.pth", "flipped", {"adapter_layer": 2}, rows=6)
    command = ("--from", "flipped", "--to", "vlm", "--base", llama)
    r.convert(tmp_path / "best.pth", tmp_path / "one", *command)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: argparse.Namespace(total=1000))
    capsys.readouterr()
    r.convert(tmp_path / "best.pth", tmp_path / "two", *command)
    assert "logits  not compared: the LLaMA in fp32 takes 0 GB, this machine has 0" in capsys.readouterr().out
    assert manifest_of(tmp_path / "one")["frozen_hash"] == manifest_of(tmp_path / "two")["frozen_hash"]
    r.released(tmp_path / "best.pth", "flipped", {"adapter_layer": 2}, rows=6, layers=4)
    assert "layers" in r.refusal(capsys, tmp_path / "best.pth", tmp_path / "three", *command)


def test_a_model_that_reads_no_video_keeps_the_projector_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Released files on captions alone hold a projector; the recipe has none."""
    recipe = recipe_of("vamos")
    overrides = [*recipe, "model.use_video=false", "inputs.use_video=false"]
    content = r.released(tmp_path / "best.pth", "vamos", {"use_vis": False, "use_cap": True, "llama_model_path": "x/"})
    r.convert(tmp_path / "best.pth", tmp_path / "ours", "--from", "vamos", "--to", "vlm", *overrides)
    said = capsys.readouterr().out
    assert "the projector is kept aside for the way back" in said
    assert "To run it, add inputs.max_length=128 inputs.caption=llava_v15_13b_n6 inputs.blind_placeholders" in said
    assert set(load_file(tmp_path / "ours" / "unused.safetensors")) == {"visual_proj.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        restore.load_weights(tmp_path / "ours", load("vamos.debug", overrides[2:]).model.build())
    r.convert(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "vamos")
    assert same(torch.load(tmp_path / "back.pth", weights_only=False)["model"], content["model"])


def recipe_of(family: str) -> list[str]:
    """Flags of a recipe whose (random) LLaMA has the sizes of these files."""
    sizes = {"dim": r.DIM, "layers": r.LAYERS, "heads": r.HEADS, "kv_heads": r.KEY_HEADS, "hidden": r.HIDDEN}
    flags = [f"model.llama.{name}={value}" for name, value in sizes.items()]
    flags += [f"model.llama.vocab_size={max(320, r.WORDS)}", "model.adapter_len=3", f"model.num_frames={r.FRAMES}"]
    flags += [f"model.feature_dim={r.WIDTH}", f"inputs.num_frames={r.FRAMES}", f"inputs.feature_dim={r.WIDTH}"]
    name = {"vamos": "vamos", "flipped": "llama_vqa", "vico": "vico"}[family]
    theta = ["model.rope_theta=500000"] if family == "vamos" else []
    return ["--recipe", f"{name}.debug", *flags, *theta]


# ---------------------------------------------------------------------------------------------- trained here


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_here_for_the_original(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """args come from the run's recipe: every flag of the original, with the values that training had."""
    flags = recipe_of(family)
    recipe = load(flags[1], flags[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = recipe.model.build()
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    state = {"step": 7, "recipe": to_dict(recipe)}
    root = tmp_path / "run" / "checkpoints"
    checkpoint.write(root, state, weights, {}, model.frozen_hash())

    r.convert(tmp_path / "run", tmp_path / "out.pth", "--from", "vlm", "--to", family)
    said = capsys.readouterr().out
    assert "the published formulas and our model differ by at most" in said
    out = torch.load(tmp_path / "out.pth", weights_only=False)
    assert same(out["model"], weights)
    args = vars(out["args"])
    assert args.keys() >= r.arguments(family).keys() - {"llama_model_path"}
    assert (args["max_feats"], args["adapter_len"], args["adapter_layer"]) == (r.FRAMES, 3, r.LAYERS)
    assert (args["weight_decay"], args["max_seq_len"]) == (0.14, 640)
    assert args["lr"] == pytest.approx(args["blr"] * args["batch_size"] / 256)
    if family == "flipped":
        assert (args["vaq"], args["qav"], args["bias"]) == (True, True, 3.5)
    if family == "vico":
        assert args["cap"] == recipe.views["caption"]
    if family == "vamos":
        assert (args["use_cap"], args["use_vis"], args["proj_type"], args["rope_theta"]) == (True, True, "linear", 5e5)
    # and what was written is ours again, to the bit
    r.convert(tmp_path / "out.pth", tmp_path / "again", "--from", family, "--to", "vlm", *flags)
    restore.load_weights(tmp_path / "again", model)
    assert same(load_file(tmp_path / "again" / "model.safetensors"), weights)


def test_what_the_original_cannot_compute(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks below the prompted ones run here unless told; the originals never run them."""
    r.released(tmp_path / "best.pth", "flipped", {"adapter_layer": 2}, rows=6)
    ours = tmp_path / "ours"
    r.convert(tmp_path / "best.pth", ours, "--from", "flipped", "--to", "vlm", "--base", llama)
    manifest = manifest_of(ours)
    manifest["recipe"]["model"]["skip_lower_blocks"] = False
    del manifest["source"]
    system = stored_config(manifest["recipe"]["model"], "x").build()
    manifest["frozen_hash"] = system.frozen_hash()
    (ours / "manifest.json").write_text(json.dumps(seal(manifest)))
    said = r.refusal(capsys, ours, tmp_path / "back.pth", "--from", "vlm", "--to", "flipped")
    assert "model.adapter_layer is 2 of 3 blocks and model.skip_lower_blocks false" in said
    assert not (tmp_path / "back.pth").exists()


# ---------------------------------------------------------------------------------------------- another LLaMA


@pytest.mark.parametrize("family", FAMILIES)
def test_another_size_is_refused(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    r.released(tmp_path / "best.pth", family)
    other = r.llama_folder(tmp_path / "llama" / "13B", dim=20)
    said = r.refusal(capsys, tmp_path / "best.pth", tmp_path / "ours", "--from", family, "--to", "vlm", "--base", other)
    assert "was trained on a LLaMA of dim 16, 3 layers, 2 heads, the LLaMA given is a LLaMA of dim 20, 3" in said
    assert not (tmp_path / "ours").exists()


def test_another_generation_is_refused(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By args.llama_model_path against the recipe's LLaMA, both named; --trained-on overrules."""
    common = ("--from", "flipped", "--to", "vlm", "--base")
    source, ours = tmp_path / "best.pth", tmp_path / "ours"
    second = r.llama_folder(tmp_path / "llama2" / "7B", norm_eps=1e-5)
    r.released(source, "flipped", {"llama_model_path": "./pretrained/llama2/"})
    said = r.refusal(capsys, source, ours, *common, llama)
    assert "on LLaMA 2 (args.llama_model_path = './pretrained/llama2/'), but the LLaMA given is LLaMA 1" in said
    assert "norm_eps 1e-06" in said
    assert "same sizes and words, other weights" in said
    r.released(source, "flipped")
    assert "was trained on LLaMA 1 (args" in r.refusal(capsys, source, ours, *common, second)
    r.convert(source, ours, *common, second, "--trained-on", "llama2")
    said = r.refusal(capsys, source, tmp_path / "x", *common, second, "--trained-on", "llama3")
    assert "was trained on LLaMA 3 (--trained-on llama3)" in said
    third = r.llama_folder(tmp_path / "llama3" / "8B", norm_eps=1e-5, rope_theta=500000.0)
    r.released(source, "vamos")
    said = r.refusal(capsys, source, tmp_path / "x", "--from", "vamos", "--to", "vlm", "--base", third)
    assert "was trained on LLaMA 1 (args" in said
    assert "their tokenizers number words differently" in said
    r.released(source, "vamos", {"llama_model_path": "/models/"})
    said = r.refusal(capsys, source, tmp_path / "x", "--from", "vamos", "--to", "vlm", "--base", third)
    assert "was trained on LLaMA 1 or 2 (args.llama_model_path = '/models/' does not have 'llama3' in it" in said


def test_what_cannot_be_told_is_a_warning(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r.released(tmp_path / "best.pth", "vico", {"llama_model_path": "/models/"})
    common = (tmp_path / "best.pth", tmp_path / "ours", "--from", "vico", "--to", "vlm", "--base", llama)
    r.convert(*common)
    said = capsys.readouterr().out
    assert "WARNING: it cannot be told whether this checkpoint was trained on LLaMA 1 or 2 (args.llama_model" in said
    r.convert(*common, "--force", "--trained-on", "llama1")
    assert "WARNING" not in capsys.readouterr().out


def test_the_base_contradicts_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA 2's files under a LLaMA-1 recipe: params.json tells."""
    r.released(tmp_path / "best.pth", "flipped", {"llama_model_path": "/models/"})
    second = r.llama_folder(tmp_path / "models" / "7B", norm_eps=1e-5)
    common = (tmp_path / "best.pth", tmp_path / "ours", "--from", "flipped", "--to", "vlm", "--base", second)
    said = r.refusal(capsys, *common, *recipe_of("flipped"))
    assert "says norm_eps = 1e-05, the recipe model.llama.norm_eps = 1e-06: another LLaMA" in said


def test_ours_is_tied_to_its_llama_by_hash(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r.released(tmp_path / "best.pth", "flipped")
    ours = tmp_path / "ours"
    r.convert(tmp_path / "best.pth", ours, "--from", "flipped", "--to", "vlm", "--base", llama)
    other = r.llama_folder(tmp_path / "other" / "llama" / "7B", seed=9)
    back = (ours, tmp_path / "back.pth", "--from", "vlm", "--to", "flipped")
    said = r.refusal(capsys, *back, "--base", other)
    manifest = manifest_of(ours)
    wrong = stored_config({**manifest["recipe"]["model"], "llama": {**_llama(manifest), "path": other}}, "x")
    assert f"was trained on a LLaMA of hash {manifest['frozen_hash']}, LLaMA 1" in said
    assert f"has hash {wrong.build().frozen_hash()}" in said
    assert not (tmp_path / "back.pth").exists()
    with pytest.raises(UserError, match="other frozen weights") as caught:
        restore.load_weights(ours, wrong.build())
    for fact in (manifest["frozen_hash"], wrong.build().frozen_hash(), f"'{llama}' -> '{other}'"):
        assert fact in str(caught.value)
    # without any LLaMA the tensors are still what they are
    capsys.readouterr()
    (llama / "consolidated.00.pth").unlink()
    llama.rename(tmp_path / "gone")
    r.convert(*back)
    assert f"logits  not compared: its LLaMA {llama} is not there (--base names one)" in capsys.readouterr().out
    said = r.refusal(capsys, ours, tmp_path / "x", "--from", "vlm", "--to", "vlm")
    assert f"its LLaMA {llama} is not there. Mend: --base" in said


def _llama(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["recipe"]["model"]["llama"]


# ---------------------------------------------------------------------------------------------- other settings


SETTINGS = [
    ("vamos", {"max_feats": 10}, {}, "model.num_frames: the checkpoint has 10 (args.max_feats), the recipe 4"),
    ("vamos", {"adapter_len": 9, "adapter_layer": 1}, {}, "model.adapter_len: the checkpoint has 9"),
    (
        "vamos",
        {"adapter_layer": 2},
        {"rows": 6},
        "model.skip_lower_blocks: the checkpoint has true (args.adapter",
    ),
    ("vamos", {"proj_type": "mlp"}, {"projector": "mlp"}, "model.projector: the checkpoint has mlp (args.proj_type)"),
    ("flipped", {"bias": 3.0}, {}, "model.video_bias: the checkpoint has 3.0 (args.bias), the recipe 3.5"),
    (
        "flipped",
        {"max_feats": 5},
        {"frames": 5},
        "model.num_frames: the checkpoint has 5 (args.max_feats)",
    ),
    ("flipped", {"tau": 50.0}, {}, "model.tau: the checkpoint has 50.0 (args.tau), the recipe 100.0"),
    ("vico", {}, {"feature_dim": 8}, "model.feature_dim: the checkpoint has 8 (visual_proj), the recipe 12"),
]


@pytest.mark.parametrize(("family", "args", "sizes", "message"), SETTINGS, ids=[s[3].split(":")[0] for s in SETTINGS])
def test_settings_that_contradict_the_recipe(
    tmp_path: Path,
    family: str,
    args: dict[str, Any],
    sizes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both values are named; with the overrides that the message gives, the conversion goes through."""
    r.released(tmp_path / "best.pth", family, {**args, "llama_model_path": "x/"}, **sizes)
    command = [tmp_path / "best.pth", tmp_path / "ours", "--from", family, "--to", "vlm", *recipe_of(family)]
    said = r.refusal(capsys, *command)
    assert message in said
    mend = said.split("Mend: add ")[1].split()
    assert not (tmp_path / "ours").exists()
    r.convert(*command, *mend)


def test_rope_theta_of_vamos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On LLaMA 1 and 2 the original rotated with 500000: silently loaded with 10000 it would answer worse."""
    r.released(tmp_path / "best.pth", "vamos", {"llama_model_path": "x/"})
    flags = [flag for flag in recipe_of("vamos") if "rope" not in flag]
    said = r.refusal(capsys, tmp_path / "best.pth", tmp_path / "ours", "--from", "vamos", "--to", "vlm", *flags)
    assert "model.rope_theta: the checkpoint has 500000.0 (Vamos' default where LLaMA's params.json is silent)" in said
    assert "the recipe 10000.0\nMend: add model.rope_theta=500000.0" in said


def test_ours_under_other_settings(tmp_path: Path, llama: Path) -> None:
    """The same names, shapes and LLaMA: only the settings tell."""
    r.released(tmp_path / "best.pth", "vamos", {})
    ours = tmp_path / "ours"
    r.convert(tmp_path / "best.pth", ours, "--from", "vamos", "--to", "vlm", "--base", llama)
    settings = manifest_of(ours)["recipe"]["model"]
    for change, said in (
        ({"rope_theta": None}, r"model\.rope_theta: 500000\.0 -> 10000\.0"),
        ({"num_frames": 6}, r"model\.num_frames: 4 -> 6"),
        ({"adapter_len": 9, "adapter_layer": 1}, r"model\.adapter_len: 3 -> 9"),
    ):
        other = stored_config({**settings, **change}, "x").build()
        with pytest.raises(UserError, match=said):
            restore.load_weights(ours, other)
    free = stored_config({**settings, "activation_checkpointing": True, "tau": 1.0, "adapter_layer": 3}, "x").build()
    restore.load_weights(ours, free)


def test_args_that_contradict_their_tensors(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (tmp_path / "best.pth", tmp_path / "ours", "--from", "flipped", "--to", "vlm", "--base", llama)
    r.released(tmp_path / "best.pth", "flipped", {"max_feats": 10})
    assert "args.max_feats is 10, but its tensors say 4 (temporal_emb)" in r.refusal(capsys, *common)
    r.released(tmp_path / "best.pth", "flipped", {"adapter_len": 10})
    assert "has 9 rows, but args.adapter_len x args.adapter_layer is 10 x 3" in r.refusal(capsys, *common)


# ---------------------------------------------------------------------------------------------- files


def test_names_are_strict(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = r.released(tmp_path / "best.pth", "flipped")
    whole = content["model"]
    common = (tmp_path / "best.pth", tmp_path / "ours", "--from", "flipped", "--to", "vlm", "--base", llama)

    def with_model(tensors: dict[str, Tensor]) -> str:
        torch.save({**content, "model": tensors}, tmp_path / "best.pth")
        return r.refusal(capsys, *common)

    said = with_model({n: t for n, t in whole.items() if n != "layers.1.attention.gate2"})
    assert "1 missing:\n  layers.1.attention.gate2  (nearest: layers." in said
    said = with_model({n.replace("gate1", "gate_1"): t for n, t in whole.items()})
    assert "layers.2.attention.gate_1  (nearest: layers.0.attention.gate" in said
    said = with_model({n: t for n, t in whole.items() if n != "temporal_emb.weight"})
    assert "1 missing:\n  temporal_emb.weight" in said
    said = with_model({**whole, "layers.1.attention.gate1": torch.zeros(1, 3, 1, 1)})
    assert "layers.1.attention.gate1: has [1, 3, 1, 1], wanted [1, 2, 1, 1]" in said
    said = with_model({**whole, "output.weight": torch.zeros(2, 2)})
    assert "output.weight" in said
    said = r.refusal(capsys, *[word if word != "flipped" else "vamos" for word in common])
    assert "Vamos' .pth has no form for a LLaMA-VQA or ViCo" in said
    assert not (tmp_path / "ours").exists()


def test_one_systems_file_for_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flipped-VQA and ViCo have the same tensors: args are made anew, with what both know."""
    content = r.released(tmp_path / "best.pth", "vico", {"adapter_layer": 2}, rows=6)
    r.convert(tmp_path / "best.pth", tmp_path / "out.pth", "--from", "vico", "--to", "flipped")
    said = capsys.readouterr().out
    assert "dropped optimizer (tensors), epoch, scaler" in said
    assert "logits  not compared: no LLaMA was named (--base)" in said
    assert "trained model.feature_dim=12 model.projector=linear" in said
    out = torch.load(tmp_path / "out.pth", weights_only=False)
    assert same(out["model"], content["model"])
    args = vars(out["args"])
    assert (args["adapter_layer"], args["llama_model_path"], args["vaq"]) == (2, "./pretrained/llama/", False)
    assert "max_cap_len" not in args
    r.convert(tmp_path / "best.pth", tmp_path / "o.pth", "--from", "flipped", "--to", "flipped")
    assert "args has cap, which only vico's command line has: is this file vico's?" in capsys.readouterr().out
    said = r.refusal(capsys, tmp_path / "best.pth", tmp_path / "hf", "--from", "vico", "--to", "hf")
    assert "the Hugging Face form has no form for a LLaMA-VQA or ViCo" in said


def test_without_args(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare state dict: the recipe must say what args would, and the LLaMA's generation cannot be told."""
    torch.save(r.tensors("vico"), tmp_path / "bare.pth")
    common = (tmp_path / "bare.pth", tmp_path / "ours", "--from", "vico", "--to", "vlm")
    assert "the LLaMA has to be known. Mend: --base" in r.refusal(capsys, *common)
    said = r.refusal(capsys, *common, "--base", llama)
    assert "has no args that say adapter_len" in said
    said = r.refusal(capsys, tmp_path / "bare.pth", tmp_path / "o.pth", "--from", "vico", "--to", "flipped")
    assert "holds neither its recipe nor args" in said
    r.convert(*common, *recipe_of("vico"))
    r.convert(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "vico")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), r.tensors("vico"))


def test_a_file_that_would_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": r.tensors("vamos"), "args": Path("x")}, tmp_path / "best.pth")
    said = r.refusal(capsys, tmp_path / "best.pth", tmp_path / "o", "--from", "vamos", "--to", "vlm")
    assert "its pickle asks for pathlib" in said


def test_logits_that_differ_are_refused(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our model with its gates shut: the tensors are equal, the function is not."""
    r.released(tmp_path / "best.pth", "vamos")
    compare = gated_files.compare_logits

    def shut(system: Vamos, *rest: Any) -> str:
        with torch.no_grad():
            system.layers[2].attention.gate.zero_()
        return compare(system, *rest)

    monkeypatch.setattr(gated_files, "compare_logits", shut)
    said = r.refusal(capsys, tmp_path / "best.pth", tmp_path / "o", "--from", "vamos", "--to", "vlm", "--base", llama)
    assert "not the same model, so nothing was written" in said
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------------------------- as a start


def test_training_starts_from_a_converted_file(tmp_path: Path) -> None:
    recipe = recipe_of("vico")
    content = r.released(tmp_path / "best.pth", "vico")
    ours = tmp_path / "ours"
    r.convert(tmp_path / "best.pth", ours, "--from", "vico", "--to", "vlm", *recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = load(recipe[1], [*recipe[2:], f"model.init_from={ours}"]).model.build()
        fresh = load(recipe[1], recipe[2:]).model.build()
        with pytest.raises(UserError, match=r"trained with other settings .*llama\.norm_eps: 1e-06 -> 1e-05"):
            load(recipe[1], [*recipe[2:], f"model.init_from={ours}", "model.llama.norm_eps=1e-5"]).model.build()
        with pytest.raises(UserError, match="other frozen weights"):
            load(recipe[1], [*recipe[2:], f"model.init_from={ours}", "model.llama.random_seed=7"]).model.build()
    want = content["model"]
    assert same({n: t for n, t in started.state_dict().items() if n in want}, want)
    assert not same({n: t for n, t in fresh.state_dict().items() if n in want}, want)
    with pytest.raises(UserError, match=r"is no checkpoint of ours .*convert_ckpt"):
        load(recipe[1], [*recipe[2:], f"model.init_from={tmp_path / 'best.pth'}"]).model.build()
    with (ours / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="content differs from the manifest"):
        load(recipe[1], [*recipe[2:], f"model.init_from={ours}"]).model.build()


def test_rows_of_another_make_are_told_when_it_runs(tmp_path: Path) -> None:
    """Released Vamos files on captions alone were trained on rows with places of the token 0."""
    recipe = [*recipe_of("vamos"), "model.use_video=false", "inputs.use_video=false", "inputs.max_length=128"]
    r.released(tmp_path / "best.pth", "vamos", {"use_vis": False, "use_cap": True, "llama_model_path": "x/"})
    ours = tmp_path / "ours"
    r.convert(tmp_path / "best.pth", ours, "--from", "vamos", "--to", "vlm", *recipe)
    with pytest.warns(UserWarning, match="rows made otherwise .*To run it as it was: .*inputs.blind_placeholders=true"):
        check_inputs(load(recipe[1], [*recipe[2:], f"model.init_from={ours}"]))
    mended = [*recipe[2:], "inputs.blind_placeholders=true", "inputs.caption=llava_v15_13b_n6"]
    assert other_rows(ours, load(recipe[1], mended).inputs) == ""
    assert other_rows(ours, load(recipe[1], [*mended, "inputs.caption=other"]).inputs).endswith(
        "To run it as it was: inputs.caption=llava_v15_13b_n6"
    )
