"""tools/convert_ckpt.py on files of Video-LLaMA, LLMVA-GEBC, MiniGPT-4, LAVIS and BLIP-2."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2Model, OPTConfig, OPTForCausalLM

from tests import released as r
from tests import released_video as v
from tests.parity import gebc_models as g
from tools import convert_ckpt
from vlm.config import to_dict
from vlm.models import video_llama_files, video_llama_fit, video_llama_sizes
from vlm.models.eva import TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import LlmvaConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.models.published import FAMILIES
from vlm.models.video_llama import VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.recipe import load
from vlm.types import UserError
from vlm.weights import file_hash, write_safetensors

FORMER = QFormerConfig(dim=v.QUERY, heads=v.QUERY_HEADS, hidden=v.HIDDEN)
SIZES: dict[str, Any] = {
    "frame_tokens": v.TOKENS, "frame_dim": v.QUERY, "num_video_tokens": v.TOKENS, "max_frames": v.FRAMES,
    "qformer": FORMER,
}  # fmt: skip
TOWER = TowerConfig(
    image_size=4, patch_size=2, dim=v.SEEN, layers=3, heads=v.SEEN_HEADS, hidden=20, queries=v.TOKENS,
    query_dim=v.QUERY, query_layers=4, query_heads=v.QUERY_HEADS, query_hidden=v.HIDDEN,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_and_heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numbers of heads of these widths, as if they were published; models with random weights, without a warning."""
    for module in (video_llama_sizes, video_llama_fit):
        monkeypatch.setattr(module, "QUERY_HEADS", {v.QUERY: v.QUERY_HEADS})
        monkeypatch.setattr(module, "VISION_HEADS", {v.SEEN: v.SEEN_HEADS})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        yield


def recipe(monkeypatch: pytest.MonkeyPatch, model: Any) -> tuple[str, str]:
    """Words of the command line for a recipe of this model."""
    monkeypatch.setattr(convert_ckpt, "load", lambda *_: SimpleNamespace(model=model, inputs=None))
    return ("--recipe", "video_llama.tiny")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names in the same order, dtypes, bytes."""
    return list(one) == list(other) and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def content(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# ---------------------------------------------------------------------------------------------- round trips

VISION_BRANCH = {**v.positions("Qformer"), **v.random(v.video_llama()), **v.positions("video_Qformer"), **v.rotary(2)}
WITH_HEAD = {**v.random(v.llmva()), "opt_model.lm_head.weight": torch.randn(30, v.LLM).half()}
EVA = v.random(v.eva(3), dtype=torch.float16) | v.random({"blocks.0.norm1.weight": (v.SEEN,)}, 5)
LAST = v.random(v.eva(40)) | v.random({"norm.weight": (v.SEEN,), "norm.bias": (v.SEEN,)}, 3)
BLIP2 = v.random(
    {"query_tokens": (1, v.TOKENS, v.QUERY), **v.q_former("Qformer", 4, 2, v.SEEN)}
    | {"ln_vision.weight": (v.SEEN,), "ln_vision.bias": (v.SEEN,), "t5_proj.weight": (v.LLM, v.QUERY)}
)
WITH_TEXT = v.random({"temp": (1,), **v.q_former("Qformer", 4, 2, v.SEEN, text=True)} | {"itm_head.bias": (2,)})
MINIGPT4 = v.random({"llama_proj.weight": (v.LLM, v.QUERY), "llama_proj.bias": (v.LLM,)}) | v.positions("Qformer")
FILES = {
    "finetune-vicuna7b-v2": ("video_llama", VISION_BRANCH),
    "llmva": ("llmva", WITH_HEAD),
    "llmva on a LLaMA": ("llmva", v.random(v.llmva("llama_project", other=False)) | v.rotary(1)),
    "minigpt4": ("video_llama", MINIGPT4),
    "EVA, fp16 with fp32 norms": ("lavis", EVA),
    "EVA with its last block": ("lavis", LAST),
    "flan-t5": ("lavis", BLIP2),
    "with its text half": ("lavis", WITH_TEXT | v.positions("Qformer")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bare", [False, True])
def test_to_ours_and_back(tmp_path: Path, name: str, bare: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole file returns: names, their order, dtypes, bytes, buffers, container, config, scaler, epoch."""
    family, state = FILES[name]
    path, ours, back = tmp_path / "released.pth", tmp_path / "ours", tmp_path / "back.pth"
    if bare:
        torch.save(state, path)
    else:
        v.released(path, state)
    keep = () if name == "minigpt4" else ("--keep-frozen",)
    r.convert(path, ours, "--from", family, "--to", "vlm", *keep)
    said = capsys.readouterr().out
    assert (
        "outputs not compared: one linear map" in said or "the published formulas and our model differ by at mo" in said
    )
    assert ("dropped nothing" in said) == bare
    r.convert(ours, back, "--from", "vlm", "--to", family, *keep)
    if bare:
        assert same(content(back), state)
        return
    was = content(path)
    del was["optimizer"]
    now = content(back)
    assert now.keys() == was.keys()
    assert same(now.pop("model"), was.pop("model"))
    assert now == was


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_blip2_folder_and_back(tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    hf = v.blip2_folder(tmp_path / "hf", max_shard_size=size)
    assert (hf / "model.safetensors.index.json").exists() == (size != "5GB")
    before = {n: t for file in hf.glob("*.safetensors") for n, t in load_file(file).items()}
    r.convert(hf, tmp_path / "ours", "--from", "hf", "--to", "vlm")
    said = capsys.readouterr().out
    assert "the language model (" in said
    assert "preprocessor_config.json" in said
    assert "a random picture of 4 and 4 queries: the published formulas and our model differ by at most" in said
    r.convert(tmp_path / "ours", tmp_path / "back", "--from", "vlm", "--to", "hf")
    kept = {n: t for n, t in before.items() if not n.startswith("language_model.")}
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert same(dict(sorted(after.items())), dict(sorted(kept.items())))
    r.convert(hf, tmp_path / "whole", "--from", "hf", "--to", "vlm", "--keep-frozen")
    r.convert(tmp_path / "whole", tmp_path / "again", "--from", "vlm", "--to", "hf", "--keep-frozen")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert same(dict(sorted(after.items())), dict(sorted(before.items())))
    assert (tmp_path / "again" / "config.json").read_text().split() == (hf / "config.json").read_text().split()
    # a recipe's tower reads the folder, and what it became
    built = [replace(TOWER, path=tmp_path / name).build().state_dict() for name in ("hf", "ours", "whole", "back")]
    assert all(same(built[0], other) for other in built[1:])


def test_a_bias_of_k_has_no_place_at_lavis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' form has one: zeros, unless somebody trained it."""
    hf = v.blip2_folder(tmp_path / "hf", key_bias=True)
    r.convert(hf, tmp_path / "ours", "--from", "hf", "--to", "vlm")
    assert "not compared: EVA has a bias of k" in capsys.readouterr().out
    said = r.refusal(capsys, tmp_path / "ours", tmp_path / "x.pth", "--from", "vlm", "--to", "lavis")
    assert "the bias of k is not zero, and the published form has no place for it" in said


def test_eva_and_q_former_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LAVIS' two files -> one tower of ours -> transformers' BLIP-2 -> one LAVIS file: the same tokens from all."""
    torch.save(EVA, tmp_path / "eva_vit_g.pth")
    v.released(tmp_path / "t5.pth", BLIP2)
    words = (tmp_path / "eva_vit_g.pth", tmp_path / "ours", "--from", "lavis", "--to", "vlm")
    r.convert(*words, "--also", tmp_path / "t5.pth")
    said = capsys.readouterr().out
    assert "EVA of width 16, 3 blocks, size 4, Q-Former of width 24, 4 layers, 4 queries" in said
    r.convert(tmp_path / "ours", tmp_path / "hf", "--from", "vlm", "--to", "hf")
    said = capsys.readouterr().out
    assert (
        "dropped epoch, config, scaler, what hf has no place for (1 tensor)"
        in said.replace("what hf has no place for (1 tensor), ", "")
        or "what hf has no place for (1 tensor)" in said
    )
    r.convert(tmp_path / "hf", tmp_path / "one.pth", "--from", "hf", "--to", "lavis")
    frames = torch.randn(2, 3, 4, 4)
    towers = [
        replace(TOWER, path=tmp_path / "t5.pth", vision_path=tmp_path / "eva_vit_g.pth").build(),
        *(replace(TOWER, path=tmp_path / name).build() for name in ("ours", "hf", "one.pth")),
    ]
    for name in ("eva_vit_g", "t5"):  # either alone, converted
        r.convert(tmp_path / f"{name}.pth", tmp_path / name, "--from", "lavis", "--to", "vlm")
    towers.append(replace(TOWER, path=tmp_path / "t5", vision_path=tmp_path / "eva_vit_g").build())
    tokens = [tower(frames) for tower in towers]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])
    theirs = Blip2Model.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs.vision_model.post_layernorm.eps = 1e-5
    seen = theirs.vision_model(frames).last_hidden_state
    out = theirs.qformer(query_embeds=theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=seen)
    torch.testing.assert_close(out.last_hidden_state, tokens[0], rtol=0, atol=2e-5)
    said = r.refusal(capsys, *words[:1], tmp_path / "o", *words[2:], "--also", tmp_path / "eva_vit_g.pth")
    assert "both hold tower.vision.embeddings.class_embedding" in said
    said = r.refusal(capsys, *words[:1], tmp_path / "o", "--from", "lavis", "--to", "hf")
    assert "a BLIP-2 folder holds EVA and Q-Former, and norm, qformer, query_tokens is missing" in said


# ------------------------------------------------------------------------------------------ what is left, refused


def test_the_frozen_head_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v.released(tmp_path / "gebc.pth", WITH_HEAD)
    r.convert(tmp_path / "gebc.pth", tmp_path / "ours", "--from", "llmva", "--to", "vlm")
    said = capsys.readouterr().out
    assert "llm.lm_head.weight, a frozen copy of the embedding (1 tensor)" in said
    assert not (tmp_path / "ours" / "frozen.safetensors").exists()
    r.convert(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "llmva")
    want = {name: t for name, t in WITH_HEAD.items() if name != "opt_model.lm_head.weight"}
    assert same(content(tmp_path / "back.pth")["model"], want)


def test_the_audio_branch_stays_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = v.random({"audio_query_tokens": (1, 8, 4), "audio_llama_proj.weight": (v.LLM, 4)})
    v.released(tmp_path / "al.pth", audio)
    words = ("--from", "video_llama", "--to", "vlm")
    said = r.refusal(capsys, tmp_path / "al.pth", tmp_path / "ours", *words)
    assert "holds the audio branch alone (2 tensors, audio_query_tokens among them)" in said
    v.released(tmp_path / "both.pth", VISION_BRANCH | audio)
    r.convert(tmp_path / "both.pth", tmp_path / "ours", *words)
    assert "2 tensors of the audio branch" in capsys.readouterr().out
    r.convert(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "video_llama")
    assert same(content(tmp_path / "back.pth")["model"], VISION_BRANCH)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--from", "video_llama", "--to", "vlm")

    def said(state: dict[str, Tensor], *other: str) -> str:
        v.released(tmp_path / "x.pth", state)
        return r.refusal(capsys, tmp_path / "x.pth", tmp_path / "o", *(other or words))

    assert "video_query_tokenz" in said(VISION_BRANCH | {"video_query_tokenz": torch.ones(1)})
    cut = {name: t for name, t in VISION_BRANCH.items() if "layer.1.output_query.dense.bias" not in name}
    assert "video_Qformer.encoder.layer.1.output_query.dense.bias" in said(cut)
    assert "LLMVA-GEBC's .pth has no form for a Video-LLaMA" in said(VISION_BRANCH, "--from", "llmva", "--to", "vlm")
    assert "the Hugging Face form has no form for a Video-LLaMA" in said(
        VISION_BRANCH, "--from", "video_llama", "--to", "hf"
    )
    half = {name: t for name, t in EVA.items() if name != "blocks.1.attn.v_bias"}
    assert "an incomplete file" in said(half, "--from", "lavis", "--to", "vlm")
    torch.save({"model": VISION_BRANCH, "config": Path("x")}, tmp_path / "code.pth")
    assert "its pickle asks for pathlib" in r.refusal(capsys, tmp_path / "code.pth", tmp_path / "o", *words)
    assert not (tmp_path / "o").exists()


def test_outputs_that_differ_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are equal, the function is not: another number of heads than the formulas take."""
    v.released(tmp_path / "x.pth", VISION_BRANCH)
    plain = video_llama_fit.plain.video_tokens
    monkeypatch.setattr(
        video_llama_fit.plain, "video_tokens", lambda state, frames, heads, *x: plain(state, frames, 2, *x)
    )
    said = r.refusal(capsys, tmp_path / "x.pth", tmp_path / "o", "--from", "video_llama", "--to", "vlm")
    assert "not the same model, so nothing was written" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("swapped", [("layer_norm1", "layer_norm2"), ("q_bias", "v_bias")])
def test_names_that_were_misunderstood_are_refused(
    tmp_path: Path, swapped: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table with two names of one shape swapped still returns every file to the bit; outputs tell."""
    one, other = swapped
    turned = {one: other, other: one}
    pattern = re.compile("|".join(swapped))
    pairs = [(pattern.sub(lambda m: turned[m[0]], ours), theirs) for ours, theirs in video_llama_fit.names.TOWER]
    monkeypatch.setattr(video_llama_fit.names, "TOWER", pairs)
    monkeypatch.setitem(FAMILIES["lavis"].pairs, "tower", pairs)
    torch.save(EVA, tmp_path / "eva_vit_g.pth")
    said = r.refusal(capsys, tmp_path / "eva_vit_g.pth", tmp_path / "o", "--from", "lavis", "--to", "vlm")
    assert "outputs: a random picture of 4: the published formulas and our model differ by at most" in said
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------------------------- language models


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return r.llama_folder(tmp_path / "vicuna", dim=v.LLM, vocab_size=r.WORDS)


def video_llama_config(llama: Path | None, **changes: Any) -> VideoLlamaConfig:
    base = LlamaBaseConfig(
        path=llama, dim=v.LLM, layers=r.LAYERS, heads=r.HEADS, kv_heads=r.KEY_HEADS, hidden=r.HIDDEN, vocab_size=r.WORDS
    )
    return VideoLlamaConfig(llama=base, **{"tower": None, **SIZES, **changes})


def test_training_starts_from_a_released_file(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied to its language model by hash: that one alone may go on, and the tower's where there is one."""
    r.convert(v.blip2_folder(tmp_path / "blip2"), tmp_path / "tower", "--from", "hf", "--to", "vlm")
    v.released(tmp_path / "x.pth", VISION_BRANCH)
    config = video_llama_config(llama, tower=replace(TOWER, path=tmp_path / "tower"))
    words = (tmp_path / "x.pth", tmp_path / "ours", "--from", "video_llama", "--to", "vlm")
    r.convert(*words, *recipe(monkeypatch, config))
    said = capsys.readouterr().out
    assert "trained with llama_model='ckpt/vicuna-7b', end_sym='###'" in said
    built = replace(config, init_from=tmp_path / "ours").build()
    assert manifest(tmp_path / "ours")["frozen_hash"] == built.frozen_hash()
    assert torch.equal(built.video_query_tokens, VISION_BRANCH["video_query_tokens"])
    assert torch.equal(
        built.video_Qformer.layernorm.bias, VISION_BRANCH["video_Qformer.bert.embeddings.LayerNorm.bias"]
    )
    replace(config, tower=None, init_from=tmp_path / "ours").build()  # from stored tokens
    absent = replace(config, tower=replace(TOWER, path=tmp_path / "absent"))
    r.convert(*words, *recipe(monkeypatch, absent), "--force")
    assert "its base is the language model alone" in capsys.readouterr().out
    replace(config, init_from=tmp_path / "ours").build()
    r.convert(*words, *recipe(monkeypatch, config), "--force")
    other = r.llama_folder(tmp_path / "other", dim=v.LLM, vocab_size=r.WORDS, seed=9)
    with pytest.raises(UserError, match="trained on other frozen weights"):
        replace(config, llama=replace(config.llama, path=other), init_from=tmp_path / "ours").build()
    said = r.refusal(
        capsys, tmp_path / "ours", tmp_path / "b.pth", "--from", "vlm", "--to", "video_llama", "--base", other
    )
    assert "was trained on frozen weights of hash" in said


def test_base_alone_is_enough(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v.released(tmp_path / "x.pth", VISION_BRANCH)
    words = (tmp_path / "x.pth", tmp_path / "ours", "--from", "video_llama", "--to", "vlm")
    r.convert(*words, "--base", llama)
    stored = manifest(tmp_path / "ours")
    assert stored["recipe"]["model"]["qformer"]["heads"] == v.QUERY_HEADS
    assert stored["frozen_hash"] == video_llama_config(llama).build().frozen_hash()
    r.convert(v.blip2_folder(tmp_path / "blip2"), tmp_path / "tower", "--from", "hf", "--to", "vlm")
    seeing = video_llama_config(llama, tower=replace(TOWER, path=tmp_path / "tower"), init_from=tmp_path / "ours")
    assert torch.equal(seeing.build().video_query_tokens, VISION_BRANCH["video_query_tokens"])
    wide = r.llama_folder(tmp_path / "wide", dim=2 * v.LLM, vocab_size=r.WORDS)
    said = r.refusal(capsys, *words, "--base", wide, "--force")
    assert "llama_proj was trained for a language model of width 32; the one given has 64" in said
    said = r.refusal(capsys, *words, "--base", tmp_path / "none", "--force")
    assert "no such folder" in said


def test_without_a_language_model_it_serves_gebc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pretrain-vicuna13b.pth as the start of LLMVA-GEBC, which takes its video part: no Vicuna is needed."""
    v.released(tmp_path / "x.pth", VISION_BRANCH)
    r.convert(tmp_path / "x.pth", tmp_path / "ours", "--from", "video_llama", "--to", "vlm")
    assert "the language model that it belongs to is not known" in capsys.readouterr().out
    assert manifest(tmp_path / "ours")["frozen_hash"] == video_llama_fit.UNKNOWN
    with pytest.raises(UserError, match=r"other frozen weights \(hash unknown\)"):
        video_llama_config(None, init_from=tmp_path / "ours").build()
    opt = OptBaseConfig(dim=v.LLM, layers=1, heads=2, hidden=40, vocab_size=30, max_positions=16)
    built = LlmvaConfig(**SIZES, opt=opt, other_tokens=v.OTHER, other_dim=10, init_from=tmp_path / "ours").build()
    assert torch.equal(built.video_query_tokens, VISION_BRANCH["video_query_tokens"])


def test_gebc_on_its_opt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": v.LLM, "ffn_dim": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=v.LLM, max_position_embeddings=16))
    opt.save_pretrained(tmp_path / "opt")
    v.released(tmp_path / "x.pth", WITH_HEAD)
    words = (tmp_path / "x.pth", tmp_path / "ours", "--from", "llmva", "--to", "vlm", "--base", tmp_path / "opt")
    r.convert(*words)
    assert "4 random frames, 7 video tokens: the published formulas" in capsys.readouterr().out
    base = OptBaseConfig(
        path=tmp_path / "opt", dim=v.LLM, layers=1, heads=2, hidden=40, vocab_size=30, max_positions=16
    )
    config = LlmvaConfig(**SIZES, opt=base, other_tokens=v.OTHER, other_dim=10, max_other=9)
    built = replace(config, init_from=tmp_path / "ours").build()
    assert torch.equal(built.opt_proj.weight, WITH_HEAD["opt_proj.weight"])
    assert manifest(tmp_path / "ours")["frozen_hash"] == built.frozen_hash()
    assert "no Hugging Face folder of an OPT" in r.refusal(capsys, *words[:-1], tmp_path, "--force")


def test_minigpt4_projection_as_a_start(tmp_path: Path) -> None:
    """The converted folder and the published file itself."""
    v.released(tmp_path / "minigpt4.pth", MINIGPT4)
    r.convert(tmp_path / "minigpt4.pth", tmp_path / "ours", "--from", "video_llama", "--to", "vlm")
    for source in ("ours", "minigpt4.pth"):
        built = video_llama_config(None, projection_from=tmp_path / source).build()
        assert torch.equal(built.llama_proj.weight, MINIGPT4["llama_proj.weight"])


def test_options_that_say_nothing_of_a_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--from", "video_llama", "--to", "vlm")
    v.released(tmp_path / "minigpt4.pth", MINIGPT4)
    for option in (
        ("--recipe", "video_llama.debug"),
        ("--base", str(tmp_path)),
        ("--base", str(tmp_path), "--layer", "1"),
        ("--keep-frozen",),
    ):
        said = r.refusal(capsys, tmp_path / "minigpt4.pth", tmp_path / "o", *words, *option)
        assert f"{option[0]} says nothing of a projection" in said
    v.released(tmp_path / "branch.pth", VISION_BRANCH)
    said = r.refusal(capsys, tmp_path / "branch.pth", tmp_path / "o", *words, "--base", str(tmp_path), "--layer", "1")
    assert "--layer says nothing of a Video-LLaMA" in said


def test_names_of_extras_are_closed() -> None:
    """What may be kept aside is a list of published names; anything else is an unknown name."""
    with pytest.raises(UserError, match="1 tensors have names that this format does not know"):
        video_llama_files._to_ours({**EVA, "rel_pos": torch.ones(1)}, "lavis", "tower")


@pytest.mark.parametrize(("name", "family"), [("debug", "video_llama"), ("debug_gebc", "llmva")])
def test_what_a_recipe_trains_becomes_a_released_file(tmp_path: Path, name: str, family: str) -> None:
    """A training checkpoint -> .pth -> ours by the recipe's name, with the same hash -> a start."""
    recipe = load(f"video_llama.{name}", [])
    model = recipe.model.build()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", trained)
    file = {"bytes": (folder / "model.safetensors").stat().st_size, "sha256": file_hash(folder / "model.safetensors")}
    stated = {"format": 1, "step": 7, "recipe": {"model": to_dict(recipe.model)}, "frozen_hash": model.frozen_hash()}
    (folder / "manifest.json").write_text(json.dumps({**stated, "files": {"model.safetensors": file}}))
    r.convert(folder, tmp_path / "x.pth", "--from", "vlm", "--to", family)
    words = ("--from", family, "--to", "vlm", "--recipe", f"video_llama.{name}")
    r.convert(tmp_path / "x.pth", tmp_path / "ours", *words)
    assert manifest(tmp_path / "ours")["frozen_hash"] == model.frozen_hash()
    started = load(f"video_llama.{name}", [f"model.init_from={tmp_path / 'ours'}"]).model.build()
    assert all(torch.equal(p, trained[n]) for n, p in started.named_parameters() if n in trained)


# ---------------------------------------------------------------------------------------------- recorded models


def language_folder(path: Path, state: dict[str, Tensor], prefix: str, config: dict[str, Any]) -> Path:
    """The language model of a recorded state as a Hugging Face folder."""
    path.mkdir()
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and "inv_freq" not in n}
    write_safetensors(path / "model.safetensors", own)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_recorded_video_llama(tmp_path: Path, golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The originals' state -> ours, as a start of the recipe's model: the recorded loss; and back, to the bit."""
    values = content(golden("gebc_videollama.pt"))
    state, sizes = values["state_dict"], values["config"]["llama"]
    v.released(tmp_path / "x.pth", state)
    llama = language_folder(tmp_path / "llama", state, "llama_model.", {**sizes, "model_type": "llama"})
    config = g.video_llama(values).config
    tower = replace(config.tower, path=tmp_path / "x.pth")  # the published file itself
    config = replace(config, tower=tower, llama=replace(config.llama, path=llama))
    words = (tmp_path / "x.pth", tmp_path / "ours", "--from", "video_llama", "--to", "vlm")
    r.convert(*words, *recipe(monkeypatch, config))
    assert not (tmp_path / "ours" / "frozen.safetensors").exists()
    model = replace(config, init_from=tmp_path / "ours").build().eval()
    case = values["outputs"]["cases"]["stage2_caption"]
    start = [values["config"]["bos_token_id"], *case["p_before_ids"]]
    rows = g.caption_rows((start, case["p_after_ids"]), case["text_ids"], values["config"]["num_video_query_token"])
    torch.testing.assert_close(g.mean_loss(model, g.clips(values["inputs"]["video"], rows)), case["loss"], **g.LOSS)
    r.convert(*words, *recipe(monkeypatch, config), "--keep-frozen", "--force")
    r.convert(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", "video_llama", "--keep-frozen")
    assert same(content(tmp_path / "back.pth")["model"], state)


def test_recorded_llmva(tmp_path: Path, golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = content(golden("gebc_llmva.pt"))
    state, sizes = values["state_dict"], values["config"]["opt"]
    head = {name: t for name, t in state.items() if not name.startswith("opt_model.model.")}  # as they were saved
    v.released(tmp_path / "x.pth", head)
    opt = language_folder(tmp_path / "opt", state, "opt_model.", {**sizes, "model_type": "opt"})
    config = g.llmva(values, prompt_pad="right").config
    config = replace(config, opt=replace(config.opt, path=opt))
    words = (tmp_path / "x.pth", tmp_path / "ours", "--from", "llmva", "--to", "vlm")
    r.convert(*words, *recipe(monkeypatch, config))
    model = replace(config, init_from=tmp_path / "ours").build().eval()
    loss = g.mean_loss(model, g.boundaries(values, range(3)))
    torch.testing.assert_close(loss, values["outputs"]["loss"], **g.LOSS)
