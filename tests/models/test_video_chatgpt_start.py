"""Published files as they are, in a model of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.tools import test_convert_video_chatgpt as files
from vlm.models.video_chatgpt_fit import TRAINED
from vlm.types import UserError

base = files.base


def test_a_projector_file(tmp_path: Path, base: Path) -> None:
    state = files.adapter(base)
    torch.save(state, tmp_path / "video_chatgpt-7B.bin")
    model = files.config_for(base).build()
    model.take_published(tmp_path / "video_chatgpt-7B.bin")
    assert torch.equal(model.mm_projector.weight, state["model.mm_projector.weight"])
    assert torch.equal(model.video_marks, state["model.embed_tokens.weight"][-2:])


def test_the_whole_variant(tmp_path: Path, base: Path) -> None:
    state = files.variant(base)
    torch.save(state, tmp_path / "model.bin")
    config = files.config_for(
        base, frame_tokens=files.STATES, positional_encodings=True, fusion=True, train_also=TRAINED
    )
    model = config.build()
    model.take_published(tmp_path / "model.bin")
    assert torch.equal(model.llm.model.layers[0].mlp.up_proj.weight, state["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(model.llm.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.pes[2].positional_encodings, state["model.pes.2.positional_encodings"])


def test_what_is_refused(tmp_path: Path, base: Path) -> None:
    torch.save(files.adapter(base), tmp_path / "a.bin")
    torch.save(files.projector(), tmp_path / "b.bin")
    torch.save(files.variant(base), tmp_path / "c.bin")
    with pytest.raises(UserError, match=r"1 missing:\n  video_marks"):
        files.config_for(base).build().take_published(tmp_path / "b.bin")
    with pytest.raises(UserError, match="trained part of this recipe's model"):
        files.config_for(base, frame_dim=5).build().take_published(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"layers\.0\..* in the file is not that of model.llama.path"):
        files.config_for(base).build().take_published(tmp_path / "c.bin")
    good, rows = files.adapter(base), "model.embed_tokens.weight"
    weight = "model.mm_projector.weight"
    for change, said in (
        ({rows: good[rows][:-3]}, "its embedding has 30 rows, but .* has 33"),  # words, which are no marks
        ({rows: torch.cat([good[rows], good[rows][:2]])}, "its embedding has 35 rows"),
        ({weight: good[weight] / 0}, r"mm_projector\.weight is no matrix of finite numbers"),
        ({weight: good[weight].long()}, "no matrix of finite numbers .*int64"),
        ({weight: good[weight].to_sparse()}, "no matrix of finite numbers .*sparse"),
    ):
        torch.save(good | change, tmp_path / "d.bin")
        model = files.config_for(base).build()
        before = model.mm_projector.bias.detach().clone()
        with pytest.raises(UserError, match=said):
            model.take_published(tmp_path / "d.bin")
        assert torch.equal(model.mm_projector.bias, before)
        if weight in change:
            with pytest.raises(UserError, match=said):
                files.config_for(base, projection_from=tmp_path / "d.bin").build()
    torch.manual_seed(1)
    LlamaForCausalLM(files.llama()).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"embed_tokens.weight in the file is not that of"):
        files.config_for(tmp_path / "other").build().take_published(tmp_path / "a.bin")
