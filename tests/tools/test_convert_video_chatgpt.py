"""tools/convert_ckpt.py on files of LLaVA, Video-ChatGPT and its Breakfast variant."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests import released as r
from tools import convert_ckpt
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.video_chatgpt import VideoChatGpt, VideoChatGptConfig
from vlm.types import UserError

DIM, LAYERS, WORDS, SEEN, PLACES, STATES = 16, 4, 30, 12, 9, 3
IN, OUT = ("--from", "video_chatgpt", "--to", "vlm"), ("--from", "vlm", "--to", "video_chatgpt")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        yield


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(llama()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def llama(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "vocab_size": WORDS, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def whole(base: Path) -> dict[str, Tensor]:
    """The language model as the published code holds it: three words more."""
    model = LlamaForCausalLM.from_pretrained(base)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], rand(3, DIM)])
    return state


def projector(bias: bool = True) -> dict[str, Tensor]:
    return {"model.mm_projector.weight": rand(DIM, SEEN), "model.mm_projector.bias": rand(DIM)}


def adapter(base: Path) -> dict[str, Tensor]:
    """mm_projector.bin: the embedding is whole, though the rows of the marks alone were trained."""
    return {"model.embed_tokens.weight": whole(base)["model.embed_tokens.weight"], **projector()}


def variant(base: Path) -> dict[str, Tensor]:
    """model.bin of the variant: everything, its trained blocks changed."""
    state = whole(base) | projector()
    for name in list(state):
        if name.startswith(("model.layers.0.", f"model.layers.{LAYERS - 1}.", "model.norm.")):
            state[name] = state[name] + 1
    for n in range(STATES):
        state |= {f"model.pes.{n}.positional_encodings": rand(PLACES, SEEN)}
        state |= {f"model.reducers.{n}.weight": rand(1, PLACES), f"model.reducers.{n}.bias": rand(1)}
        state |= {f"model.projecters.{n}.weight": rand(DIM, SEEN), f"model.projecters.{n}.bias": rand(DIM)}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    return state


def recipe(monkeypatch: pytest.MonkeyPatch, config: VideoChatGptConfig) -> tuple[str, str]:
    monkeypatch.setattr(convert_ckpt, "load", lambda *_: SimpleNamespace(model=config, inputs=None))
    return ("--recipe", "video_chatgpt.tiny")


def config_for(base: Path, **fields: Any) -> VideoChatGptConfig:
    own = LlamaBaseConfig(path=base, dim=DIM, layers=LAYERS, heads=2, hidden=24, vocab_size=WORDS)
    return VideoChatGptConfig(llama=own, **{"frame_dim": SEEN, "num_video_tokens": PLACES, **fields})


def same(path: Path, state: dict[str, Tensor]) -> bool:
    found = torch.load(path, weights_only=True)
    return list(found) == list(state) and all(
        found[n].dtype == state[n].dtype and torch.equal(found[n], state[n]) for n in state
    )


def stated(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", ["projector", "bare", "adapter", "half precision"])
@pytest.mark.parametrize("named", [False, True])
def test_to_ours_and_back(tmp_path: Path, base: Path, name: str, named: bool) -> None:
    """Names, their order, dtypes and bytes; without the language model all rows are kept, with it those of words that
    are its own are not."""
    state = {"projector": projector, "bare": projector}.get(name, lambda: adapter(base))()
    if name == "bare":
        state = {n.removeprefix("model."): t for n, t in state.items()}
    if name == "half precision":
        state = {n: t.half() for n, t in state.items()}
        LlamaForCausalLM(llama()).half().save_pretrained(tmp_path / "unused")
    torch.save(state, tmp_path / "mm_projector.bin")
    option = ("--base", str(base)) if named else ()
    r.convert(tmp_path / "mm_projector.bin", tmp_path / "ours", *IN, *option)
    kept = stated(tmp_path / "ours")["tensors"]
    rows = kept.get("published.model.embed_tokens.weight")
    assert (rows is None) == (named or name in ("projector", "bare"))
    r.convert(tmp_path / "ours", tmp_path / "back.bin", *OUT, *option)
    assert same(tmp_path / "back.bin", state)


@pytest.mark.parametrize("keep", [False, True])
def test_the_whole_variant(tmp_path: Path, base: Path, keep: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """What it trained is a checkpoint of ours; frozen blocks are kept where that is wished, and then the file returns
    to the bit."""
    state = variant(base)
    torch.save(state, tmp_path / "model.bin")
    r.convert(tmp_path / "model.bin", tmp_path / "ours", *IN, *(("--keep-frozen",) if keep else ("--base", str(base))))
    said = capsys.readouterr().out
    assert "fusion of 3 states, encodings of 9 places" in said
    assert "what blocks add: the published formulas and our model differ by at most" in said
    manifest = stated(tmp_path / "ours")
    assert "llm.lm_head.weight" in manifest["tensors"]
    assert ("published.model.layers.1.mlp.up_proj.weight" in manifest["tensors"]) == keep
    assert ("what is frozen of the language model" in said) != keep
    if keep:
        r.convert(tmp_path / "ours", tmp_path / "back.bin", *OUT)
        assert same(tmp_path / "back.bin", state)
        return
    r.convert(tmp_path / "ours", tmp_path / "back.bin", *OUT, "--base", str(base))
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert all(torch.equal(back[name], state[name]) for name in back)
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= back.keys()


def test_what_a_run_trained_becomes_a_published_file(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system = config_for(base).build()
    tensors = {name: p.detach() for name, p in system.named_parameters() if p.requires_grad}
    torch.save(
        {"model.embed_tokens.weight": whole(base)["model.embed_tokens.weight"], **projector()}, tmp_path / "a.bin"
    )
    words = recipe(monkeypatch, config_for(base))
    r.convert(tmp_path / "a.bin", tmp_path / "ours", *IN, *words)
    assert stated(tmp_path / "ours")["frozen_hash"] == system.frozen_hash()
    r.convert(tmp_path / "ours", tmp_path / "b.bin", *OUT, *words)
    assert same(tmp_path / "b.bin", torch.load(tmp_path / "a.bin", weights_only=True))
    begun = config_for(base, init_from=tmp_path / "ours").build()
    assert torch.equal(
        begun.mm_projector.weight, torch.load(tmp_path / "a.bin", weights_only=True)["model.mm_projector.weight"]
    )
    assert tensors.keys() == {n for n, p in begun.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------- refusals


def test_another_language_model_is_noticed(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(adapter(base), tmp_path / "a.bin")
    torch.manual_seed(1)
    LlamaForCausalLM(llama()).save_pretrained(tmp_path / "other")
    said = r.refusal(capsys, tmp_path / "a.bin", tmp_path / "o", *IN, "--base", tmp_path / "other")
    assert "model.embed_tokens.weight in the file is not that of" in said
    assert "trained for another language model" in said
    state = adapter(base)
    rows = state["model.embed_tokens.weight"]
    torch.save(state | {"model.embed_tokens.weight": torch.cat([rows, rows[:1]])}, tmp_path / "more.bin")
    said = r.refusal(capsys, tmp_path / "more.bin", tmp_path / "o", *IN, "--base", str(base))
    assert "its embedding has 34 rows, but that of" in said


def test_what_is_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(state: dict[str, Any], *words: Any) -> str:
        torch.save(state, tmp_path / "x.bin")
        return r.refusal(capsys, tmp_path / "x.bin", tmp_path / "o", *(words or IN))

    assert "mm_projectr" in said(projector() | {"model.mm_projectr.weight": rand(1)})
    assert "no model.mm_projector.bias" in said({"model.mm_projector.weight": rand(DIM, SEEN)})
    assert "makes tokens of width 16" in said(projector() | {"model.embed_tokens.weight": rand(9, 8)})
    assert "its pickle asks for pathlib" in said({"state_dict": projector(), "path": Path("x")})
    named = recipe(monkeypatch, config_for(base))
    assert "no rows of <vid_start> and <vid_end>" in said(projector(), *IN, *named)
    wider = config_for(base, frame_dim=SEEN + 1)
    assert "do not fit" in said(adapter(base), *IN, *recipe(monkeypatch, wider))
    torch.save(adapter(base), tmp_path / "a.bin")
    r.convert(tmp_path / "a.bin", tmp_path / "ours", *IN, "--base", str(base))
    with pytest.raises(UserError, match="holds no mm_projector"):
        config_for(base, projection_from=base).build()
    assert isinstance(config_for(base, projection_from=tmp_path / "a.bin").build(), VideoChatGpt)


def test_marks_alone_need_the_language_model(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of ours without the rest of the embedding, whose language model is not there any more."""
    torch.save(adapter(base), tmp_path / "a.bin")
    r.convert(tmp_path / "a.bin", tmp_path / "ours", *IN, "--base", str(base))
    base.rename(tmp_path / "moved")
    said = r.refusal(capsys, tmp_path / "ours", tmp_path / "b.bin", *OUT)
    assert "a published file holds the whole embedding" in said
    r.convert(tmp_path / "ours", tmp_path / "b.bin", *OUT, "--base", str(tmp_path / "moved"))
    assert same(tmp_path / "b.bin", torch.load(tmp_path / "a.bin", weights_only=True))
