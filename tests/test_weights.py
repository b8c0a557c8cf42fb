"""Names, LLaMA layers, rotary row orders, hashes, and the safetensors writer."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.test_weight_files import llama, write_meta
from vlm.types import UserError
from vlm.weights import (
    atomic_file,
    diff_keys,
    file_hash,
    halves_to_pairs,
    layer_tensors,
    open_tensors,
    pairs_to_halves,
    rename,
    state_hash,
    tensor_hash,
    write_safetensors,
)

# ---------------------------------------------------------------------------------------------- names


def test_rename_takes_the_first_row_that_matches_the_whole_name() -> None:
    table = ((r"a\.(\d+)\.w", r"first.\1"), (r"a\.(.+)", r"second.\1"))
    assert rename(["a.3.w", "a.x"], table) == {"a.3.w": "first.3", "a.x": "second.x"}


def test_rename_lists_every_unknown_name() -> None:
    with pytest.raises(UserError, match=r"(?s)2 tensors.*b\.weigth  \(nearest: b\.weight.*xx\.c"):
        rename(["b.weight", "b.weigth", "xx.c"], ((r"b\.weight", "b"),))


def test_rename_refuses_two_for_one_name() -> None:
    with pytest.raises(UserError, match="a1 and a2 would both become b"):
        rename(["a1", "a2"], ((r"a\d", "b"),))


def test_diff_keys() -> None:
    have = {"blocks.0.w": torch.zeros(2, 3), "hed.weight": torch.zeros(4), "extra": torch.zeros(1)}
    want = {"blocks.0.w": (3, 2), "head.weight": (4,)}
    diff = diff_keys(have, want)
    assert diff
    assert diff.missing == ("head.weight",)
    assert diff.unexpected == ("hed.weight", "extra")
    assert diff.wrong_shape == {"blocks.0.w": ((2, 3), (3, 2))}
    text = str(diff)
    assert "head.weight  (nearest: hed.weight)" in text
    assert "hed.weight  (nearest: head.weight)" in text
    assert "blocks.0.w: has [2, 3], wanted [3, 2]" in text
    with pytest.raises(UserError, match=r"x\.pth and recipe r: the tensors do not fit"):
        diff.require("x.pth and recipe r")
    assert not diff_keys(have, have)
    diff_keys(have, have).require("x")


def test_diff_message_is_cut() -> None:
    diff = diff_keys({}, {f"blocks.{i}.w": (1,) for i in range(500)})
    assert "500 missing" in str(diff)
    assert "and 488 more" in str(diff)


# ---------------------------------------------------------------------------------------------- LLaMA layers

OURS = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


@pytest.mark.parametrize("count", [1, 2])
def test_layer_of_a_meta_folder(tmp_path: Path, count: int) -> None:
    state = write_meta(tmp_path, count)
    layer = layer_tensors(tmp_path, 1)
    assert set(layer) == set(OURS)
    assert all(torch.equal(layer[ours], state[f"layers.1.{meta}"]) for ours, meta in OURS.items())
    assert {tensor.dtype for tensor in layer.values()} == {torch.float16}


@pytest.mark.parametrize("prefix", ["model.", "", "llama."])
def test_layer_of_a_hugging_face_folder(tmp_path: Path, prefix: str) -> None:
    state = llama()
    hf = {f"{prefix}layers.{n}.{ours}": state[f"layers.{n}.{meta}"] for n in range(2) for ours, meta in OURS.items()}
    hf[f"{prefix}layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file({**hf, "lm_head.weight": state["output.weight"]}, tmp_path / "model.safetensors")
    layer = layer_tensors(tmp_path, 1)
    assert all(torch.equal(layer[ours], state[f"layers.1.{meta}"]) for ours, meta in OURS.items())
    assert layer_tensors(open_tensors(tmp_path), 0).keys() == layer.keys()


def test_only_the_layer_is_read(tmp_path: Path) -> None:
    write_meta(tmp_path, 1)
    loaders = open_tensors(tmp_path)
    read: list[str] = []

    def counting(name: str) -> Tensor:
        read.append(name)
        return loaders[name]()

    layer_tensors({name: lambda name=name: counting(name) for name in loaders}, 1)  # type: ignore[misc]
    assert len(read) == 9
    assert all(name.startswith("layers.1.") for name in read)


def test_layer_errors(tmp_path: Path) -> None:
    state = llama()
    torch.save(state, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match="layer 31 was asked for, counted from 0; there are layers 0 to 1"):
        layer_tensors(tmp_path, 31)
    del state["layers.1.attention.wq.weight"]
    torch.save(state, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"(?s)layer 1.*1 missing:.*self_attn\.q_proj\.weight"):
        layer_tensors(tmp_path, 1)
    torch.save({**state, "layers.0.attention.wq.bias": torch.ones(8)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"attention\.wq\.bias"):
        layer_tensors(tmp_path, 0)


def test_golden_meta_layer(golden, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The original maps the same Meta keys to one layer and ignores the same extra ones."""
    rules = json.loads(golden("vitllama_checkpoint_rules.json").read_text())["meta_llama"]
    dtypes = {"torch.float16": torch.float16, "torch.float32": torch.float32}
    keys = rules["consolidated_keys"]
    state = {name: torch.rand(shape).to(dtypes[dtype]) for name, (shape, dtype) in keys.items()}
    torch.save(state, tmp_path / "consolidated.00.pth")
    numbers = {int(name.split(".")[1]) for name in keys if name.startswith("layers.")}
    for number in numbers:
        layer = layer_tensors(tmp_path, number)
        assert all(torch.equal(layer[ours], state[f"layers.{number}.{meta}"]) for ours, meta in OURS.items())
        left = {n for n in keys if n.startswith(f"layers.{number}.")} - {f"layers.{number}.{m}" for m in OURS.values()}
        assert all("rope" in name for name in left)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_row_orders_are_inverse(heads: int) -> None:
    weight = torch.randn(16, 5)
    assert torch.equal(halves_to_pairs(pairs_to_halves(weight, heads), heads), weight)
    assert torch.equal(pairs_to_halves(halves_to_pairs(weight, heads), heads), weight)
    with pytest.raises(UserError, match="16 rows do not divide into 3 heads"):
        pairs_to_halves(weight, 3)


def test_row_orders_give_the_same_rotary_scores() -> None:
    """Meta rotates neighbours as complex numbers, transformers halves: scores must agree after renumbering the rows."""
    heads, width, length = 2, 8, 5
    head_dim = width // heads
    generator = torch.Generator().manual_seed(1)
    q, k, x = (torch.randn(shape, generator=generator) for shape in ((width, width), (width, width), (length, width)))

    angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def meta(weight: Tensor) -> Tensor:
        pairs = (x @ weight.T).view(length, heads, head_dim // 2, 2)
        return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(2)

    want = torch.einsum("qhd,khd->hqk", meta(q), meta(k))

    config = LlamaConfig(hidden_size=width, num_attention_heads=heads, max_position_embeddings=length)
    positions = LlamaRotaryEmbedding(config)(x[None], torch.arange(length)[None])
    rows = [(x @ pairs_to_halves(w, heads).T).view(1, length, heads, head_dim).transpose(1, 2) for w in (q, k)]
    rotated = apply_rotary_pos_emb(*rows, *positions)
    torch.testing.assert_close((rotated[0] @ rotated[1].transpose(2, 3))[0], want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- hashes

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "half": torch.ones(3, dtype=torch.float16),
    "count": torch.tensor(7),
    "flag": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 4),
    "byte": torch.arange(5, dtype=torch.uint8),
    "ünicode": torch.ones(1, dtype=torch.float64),
}


def test_hashes_see_every_difference_and_nothing_else() -> None:
    base = state_hash(TENSORS)
    assert base == state_hash(dict(reversed(TENSORS.items())))
    assert base == state_hash({name: t.clone().requires_grad_(t.is_floating_point()) for name, t in TENSORS.items()})
    changes = [
        {"b": TENSORS["b"] + torch.tensor(1e-7)},
        {"b": TENSORS["b"].reshape(3, 2)},
        {"b": TENSORS["b"].half()},
        {"b2": torch.ones(1)},
        {"half": torch.ones(3, dtype=torch.bfloat16)},
    ]
    hashes = {base, *(state_hash({**TENSORS, **change}) for change in changes)}
    assert len(hashes) == 1 + len(changes)
    assert tensor_hash(torch.zeros(2)) != tensor_hash(torch.zeros(2, dtype=torch.int32))  # equal bytes
    assert tensor_hash(torch.tensor([0.0])) != tensor_hash(torch.tensor([-0.0]))
    assert tensor_hash(torch.arange(6.0).reshape(2, 3).T) == tensor_hash(torch.arange(6.0).reshape(2, 3).T.contiguous())


def test_state_hash_is_stable() -> None:
    """Checkpoints store it, so it may never change."""
    value = state_hash({"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3], dtype=torch.int64)})
    assert value == "b2ddfaa9ac9d69f34c71b4927b4c690c78fb5a16818b674649f7590920e4b2a0"


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


# ---------------------------------------------------------------------------------------------- writing


def test_written_file_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {"format": "pt", "note": "é", "a": "1"}
    write_safetensors(path, {**TENSORS, "strided": torch.arange(6.0).reshape(2, 3).T}, metadata)
    back = load_file(path)
    assert state_hash(back) == state_hash({**TENSORS, "strided": torch.arange(6.0).reshape(2, 3).T})
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_written_file_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: t for name, t in TENSORS.items() if name != "nothing"}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    header = int.from_bytes(ours[:8], "little")
    assert len(ours) == len(theirs)
    assert header == int.from_bytes(theirs[:8], "little")
    assert len(ours[8 + header :]) == sum(t.nbytes for t in tensors.values())


def test_same_input_same_bytes(tmp_path: Path) -> None:
    metadata = {"format": "pt", "one": "1", "two": "2", "three": "3"}
    write_safetensors(tmp_path / "x", TENSORS, metadata)
    write_safetensors(tmp_path / "y", dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    assert file_hash(tmp_path / "x") == file_hash(tmp_path / "y")


def test_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"z has dtype torch\.complex64"):
        write_safetensors(tmp_path / "x.safetensors", {"z": torch.zeros(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="midway"), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError("midway")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert re.fullmatch(r"0o.*644", oct(path.stat().st_mode))
