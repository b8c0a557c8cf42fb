"""tools/convert_ckpt.py on whole LLaMAs: Meta's folders, Hugging Face's and ours, to the bit and with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from tests import released as r
from vlm.models import llama_base, llama_files
from vlm.models.llama_base import SIZES, LlamaBaseConfig, llama
from vlm.models.llama_facts import hidden_width, llama_config, meta_params
from vlm.models.llama_pass import fixed_tokens, meta_logits
from vlm.types import UserError
from vlm.weights import open_tensors, read_state_dict, state_hash


def equal_folders(one: Path, other: Path) -> None:
    """The same files with the same tensors in the same order, and the same params.json to the byte."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert (one / "params.json").read_bytes() == (other / "params.json").read_bytes()
    for file in one.glob("*.pth"):
        have, want = (torch.load(f, weights_only=True) for f in (other / file.name, file))
        assert list(have) == list(want)
        assert state_hash(have) == state_hash(want)


@pytest.mark.parametrize(("shards", "words_cut"), [(1, False), (2, False), (4, False), (2, True)])
def test_meta_to_ours_and_back(
    tmp_path: Path, shards: int, words_cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = r.llama_folder(tmp_path / "7B", shards, words_cut=words_cut)
    r.convert(meta, tmp_path / "ours", "--from", "meta_llama", "--to", "vlm")
    said = capsys.readouterr().out
    assert "kind    whole LLaMA" in said
    assert "logits  24 random tokens: source and target differ by at most" in said
    r.convert(tmp_path / "ours", tmp_path / "back", "--from", "vlm", "--to", "meta_llama")
    assert "dropped nothing" in capsys.readouterr().out
    equal_folders(meta, tmp_path / "back")


def test_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """Loaded by from_pretrained: Meta's formulas on Meta's numbering give the same logits."""
    meta = r.llama_folder(tmp_path / "8B", rope_theta=500000.0, dtype=torch.bfloat16)
    r.convert(meta, tmp_path / "hf", "--from", "meta_llama", "--to", "hf")
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    config = llama_config(meta)
    assert (config.kv_heads, config.rope_theta, config.norm_eps) == (r.KEY_HEADS, 500000.0, 1e-6)
    tokens = fixed_tokens(r.WORDS)
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    ours = meta_logits(open_tensors(meta), config, tokens)
    assert ours.abs().max() > 1
    assert_close(theirs, ours, rtol=0, atol=1e-4)
    # what was written is bf16 as it came
    assert {t.dtype for t in read_state_dict(tmp_path / "hf").values()} == {torch.bfloat16}


def test_hugging_face_to_meta_and_back(tmp_path: Path) -> None:
    meta = r.llama_folder(tmp_path / "7B")
    hf, back = tmp_path / "hf", tmp_path / "back"
    r.convert(meta, hf, "--from", "meta_llama", "--to", "hf")
    config = {**json.loads((hf / "config.json").read_text()), "transformers_version": "4.31.0", "use_cache": True}
    (hf / "config.json").write_text(json.dumps(config))
    r.convert(hf, tmp_path / "meta", "--from", "hf", "--to", "meta_llama", "--shards", "2")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert llama_config(tmp_path / "meta").hidden == r.HIDDEN == hidden_width(r.DIM, params["multiple_of"], None)
    whole = read_state_dict(meta)
    del whole["rope.freqs"]
    assert state_hash(read_state_dict(tmp_path / "meta")) == state_hash(whole)
    assert len(list((tmp_path / "meta").glob("*.pth"))) == 2
    r.convert(hf, tmp_path / "ours", "--from", "hf", "--to", "vlm")
    r.convert(tmp_path / "ours", back, "--from", "vlm", "--to", "hf")
    assert json.loads((back / "config.json").read_text()) == config
    assert state_hash(read_state_dict(back)) == state_hash(read_state_dict(hf))


def test_large_folders_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = r.llama_folder(tmp_path / "7B")
    r.convert(meta, tmp_path / "whole", "--from", "meta_llama", "--to", "hf")
    monkeypatch.setattr(llama_files, "HF_SHARD_BYTES", 3000)
    r.convert(meta, tmp_path / "parts", "--from", "meta_llama", "--to", "hf")
    files = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(f.stat().st_size < 3000 + 2000 for f in files)
    assert state_hash(read_state_dict(tmp_path / "parts")) == state_hash(read_state_dict(tmp_path / "whole"))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "parts")
    assert model.config.num_key_value_heads == r.KEY_HEADS
    r.convert(tmp_path / "parts", tmp_path / "ours", "--from", "hf", "--to", "vlm")
    r.convert(tmp_path / "ours", tmp_path / "back", "--from", "vlm", "--to", "meta_llama")
    assert (tmp_path / "back" / "consolidated.00.pth").exists()


def test_ours_is_a_recipes_llama(tmp_path: Path) -> None:
    """All three layouts give the recipe the same frozen weights."""
    meta = r.llama_folder(tmp_path / "7B", 2)
    r.convert(meta, tmp_path / "ours", "--from", "meta_llama", "--to", "vlm")
    r.convert(tmp_path / "ours", tmp_path / "hf", "--from", "vlm", "--to", "hf")
    states = [llama_config(tmp_path / name).build().state_dict() for name in ("7B", "ours", "hf")]
    assert len({state_hash(state) for state in states}) == 1


def test_one_matrix_for_input_and_output(tmp_path: Path) -> None:
    """A Hugging Face folder that stores lm_head with the embeddings stays so; Meta's layout has both."""
    r.convert(r.llama_folder(tmp_path / "7B"), tmp_path / "hf", "--from", "meta_llama", "--to", "hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in read_state_dict(tmp_path / "tied")
    r.convert(tmp_path / "tied", tmp_path / "meta", "--from", "hf", "--to", "meta_llama")
    state = read_state_dict(tmp_path / "meta")
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
    r.convert(tmp_path / "tied", tmp_path / "ours", "--from", "hf", "--to", "vlm")
    r.convert(tmp_path / "ours", tmp_path / "back", "--from", "vlm", "--to", "hf")
    assert state_hash(read_state_dict(tmp_path / "back")) == state_hash(read_state_dict(tmp_path / "tied"))


def test_wrong_numbering_shows_in_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of q and k left in Meta's order: every tensor reads back to the bit, and still nothing is written."""
    meta = r.llama_folder(tmp_path / "7B")
    monkeypatch.setattr(llama_base, "pairs_to_halves", lambda weight, heads: weight)
    said = r.refusal(capsys, meta, tmp_path / "hf", "--from", "meta_llama", "--to", "hf")
    assert "not the same model, so nothing was written" in said
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", SIZES)
def test_published_params_follow_from_the_sizes(name: str) -> None:
    params = meta_params(llama(name))
    if name.startswith("llama3"):
        assert (params["multiple_of"], params["ffn_dim_multiplier"]) == (1024, 1.3)
    else:
        assert "ffn_dim_multiplier" not in params
        assert "n_kv_heads" not in params
        assert "rope_theta" not in params
    assert hidden_width(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == llama(name).hidden


@pytest.mark.parametrize("hidden", [7, 40, 43, 99, 1001])
def test_any_width_can_be_said(hidden: int) -> None:
    params = meta_params(LlamaBaseConfig(dim=16, layers=1, heads=2, hidden=hidden))
    assert hidden_width(16, params["multiple_of"], params.get("ffn_dim_multiplier")) == hidden


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n_layers": 4}, "n_layers is 4, but the tensors say 3"),
    ({"vocab_size": 41}, "vocab_size is 41, but the tensors say 40"),
    ({"use_scaled_rope": True}, "scaled rotary embedding (LLaMA 3.1) is not supported"),
    ({"n_heads": None}, "n_heads is None; it must be a number"),
    ({"n_kv_heads": 2}, "layers.0.self_attn.k_proj.weight: has [8, 16], wanted [16, 16]"),
]


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=[next(iter(p)) for p, _ in REFUSED])
def test_params_that_contradict_the_tensors(
    tmp_path: Path, params: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = r.llama_folder(tmp_path / "7B", **params)
    assert message in r.refusal(capsys, meta, tmp_path / "ours", "--from", "meta_llama", "--to", "vlm")
    assert [p.name for p in tmp_path.iterdir()] == ["7B"]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = r.llama_folder(tmp_path / "7B", 2)
    to_ours = ("--from", "meta_llama", "--to", "vlm")
    said = r.refusal(capsys, meta, tmp_path / "ours", *to_ours, "--recipe", "llama_vqa.debug")
    assert "another LLaMA than the recipe's.\n  dim: 16 there, 32 in the recipe" in said
    assert "a whole LLaMA has no other base" in r.refusal(capsys, meta, tmp_path / "o", *to_ours, "--base", meta)
    assert "--trained-on states" in r.refusal(capsys, meta, tmp_path / "o", *to_ours, "--trained-on", "llama1")
    said = r.refusal(capsys, meta, tmp_path / "o.pth", "--from", "meta_llama", "--to", "vamos")
    assert "Vamos' .pth has no form for a whole LLaMA" in said
    said = r.refusal(capsys, meta, tmp_path / "o", "--from", "meta_llama", "--to", "meta_llama", "--shards", "3")
    assert "cannot be cut into 3 equal parts" in said
    (meta / "consolidated.01.pth").unlink()
    assert "shards are missing" in r.refusal(capsys, meta, tmp_path / "o", *to_ours)
    (meta / "params.json").unlink()
    assert "Meta's folder has consolidated.00.pth" in r.refusal(capsys, meta, tmp_path / "o", *to_ours)
    with pytest.raises(UserError, match=r"neither params\.json"):
        llama_config(meta)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7B"]
    with pytest.raises(SystemExit):
        r.convert(meta, tmp_path / "o", *to_ours, "--shards", "2")
