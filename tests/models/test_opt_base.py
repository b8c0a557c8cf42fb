"""The frozen OPT: files, memory, packed rows against transformers' own attention, dropout."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import small_video as s
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import OPTForCausalLM

from vlm.models import opt_base
from vlm.models.opt_base import SIZES, opt
from vlm.nn.language import ATTENTION, make_spans
from vlm.nn.llama_layers import can_narrow
from vlm.types import UserError
from vlm.weights import open_tensors


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return s.build(s.opt())


@pytest.fixture(scope="module")
def folder(model: OPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub has it: safetensors in several files, the head stored or not."""
    path = tmp_path_factory.mktemp("opt")
    model.save_pretrained(path, max_shard_size="12KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def same(a: OPTForCausalLM, b: OPTForCausalLM) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_folder_is_read(model: OPTForCausalLM, folder: Path) -> None:
    read = s.opt(path=folder).build()
    assert same(read, model)
    assert read.lm_head.weight is read.model.decoder.embed_tokens.weight
    assert not any(p.requires_grad for p in read.parameters())


def test_torch_files_with_old_names(model: OPTForCausalLM, tmp_path: Path) -> None:
    """opt-125m's pytorch_model.bin lacks the first `model.`, others store the head besides."""
    state = {name.removeprefix("model."): t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert same(s.opt(path=tmp_path).build(), model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same(s.opt(path=tmp_path).build(), model)
    torch.save({**model.state_dict(), "lm_head.weight": model.lm_head.weight + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not its embedding"):
        s.opt(path=tmp_path).build()


def test_one_tensor_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is never in memory twice: before a tensor is read, the one read before it is gone, but for its copy in
    the model; and the model had no weights before."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(path: Path) -> dict[str, Any]:
        def wrap(load: Any) -> Any:
            def read() -> Tensor:
                nonlocal most
                tensor = load().clone()
                alive.append(weakref.ref(tensor))
                most = max(most, sum(ref() is not None for ref in alive))
                return tensor

            return read

        return {name: wrap(load) for name, load in open_tensors(path).items()}

    monkeypatch.setattr(opt_base, "open_tensors", watched)
    built = s.opt(path=folder, dtype="bfloat16").build()
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert len(alive) >= len(list(built.parameters()))
    assert most <= 2  # head and embedding, where they are compared


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ({"num_attention_heads": 2}, r"model\.opt\.heads=2"),
        ({"max_position_embeddings": 32}, r"model\.opt\.max_positions=32"),
        ({"word_embed_proj_dim": 16}, "opt-350m"),
        ({"do_layer_norm_before": False}, "opt-350m"),
    ],
)
def test_another_opt_is_refused(folder: Path, tmp_path: Path, stated: dict[str, Any], match: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    known = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**known, **stated}))
    with pytest.raises(UserError, match=match):
        s.opt(path=tmp_path).build()


def test_tensors_of_another_size_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="not the OPT that this recipe describes"):
        s.opt(path=tmp_path, hidden=64).build()


def test_packed_rows_equal_rows_alone(model: OPTForCausalLM) -> None:
    """Spans reach the attention of every block, positions begin anew in each row: as transformers' own model."""
    lengths = (9, 4, 7)
    rows = [s.noise(n, length, 32) for n, length in enumerate(lengths)]
    packed = model.model(
        inputs_embeds=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        attention_mask=torch.empty(1, 1, 0, 0),
        use_cache=False,
        spans=make_spans(lengths, (-1, -1, -1), torch.device("cpu")),
    ).last_hidden_state[0]
    assert model.config._attn_implementation == ATTENTION
    model.set_attn_implementation("eager")
    try:
        for row, have in zip(rows, packed.split(lengths)):
            assert_close(have, model.model(inputs_embeds=row[None]).last_hidden_state[0], rtol=0, atol=2e-6)
    finally:
        model.set_attn_implementation(ATTENTION)
    assert not can_narrow(model)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    known = {"opt_125m": 125.2e6, "opt_1_3b": 1.316e9, "opt_2_7b": 2.652e9, "opt_6_7b": 6.658e9, "opt_13b": 12.853e9}
    with torch.device("meta"):
        model = opt(name).build()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(known[name], rel=1e-3)


def test_no_such_opt() -> None:
    with pytest.raises(UserError, match="opt_350m"):
        opt("opt_350m")
