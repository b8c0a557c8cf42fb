"""Frozen LLaMA layers: the maths, both naming schemes, strict loading, storage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vlm.nn.llama_block import FrozenLlama, hidden_size, norm_tensor, select_layers
from vlm.types import UserError
from vlm.weights import META_LAYER_TABLE

DIM, HEADS, EPS = 16, 2, 1e-5
HF = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
      "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
      "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
      "ffn_norm": "post_attention_layernorm"}  # fmt: skip


def make(num_layers: int = 1, dtype: torch.dtype = torch.float32) -> FrozenLlama:
    return FrozenLlama(dim=DIM, heads=HEADS, num_layers=num_layers, multiple_of=8, norm_eps=EPS, dtype=dtype)


def meta_file(num_layers: int = 3, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A checkpoint with Meta's names."""
    generator = torch.Generator().manual_seed(5)
    hidden = hidden_size(DIM, 8)
    shapes = {**dict.fromkeys(("attention.wq", "attention.wk", "attention.wv", "attention.wo"), (DIM, DIM)),
              "feed_forward.w1": (hidden, DIM), "feed_forward.w2": (DIM, hidden), "feed_forward.w3": (hidden, DIM),
              "attention_norm": (DIM,), "ffn_norm": (DIM,)}  # fmt: skip
    state = {"norm.weight": torch.randn(DIM, generator=generator), "rope.freqs": torch.zeros(4)}
    for number in range(num_layers):
        state[f"layers.{number}.attention.inner_attention.rope.freqs"] = torch.zeros(4)
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator) * 0.3
            state[f"layers.{number}.{name}.weight"] = tensor.to(dtype)
    return state


def with_hf_names(meta: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"model.norm.weight": meta["norm.weight"], "model.embed_tokens.weight": torch.zeros(3, DIM)}
    for name, tensor in meta.items():
        if name.startswith("layers.") and "rope" not in name:
            _, number, part = name.split(".", 2)
            state[f"model.layers.{number}.{HF[part.removesuffix('.weight')]}.weight"] = tensor
            state[f"model.layers.{number}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    return state


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def formula(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One layer as the paper states it, without rotary embedding and mask, loop over heads."""
    normed = rms(x, w["attention_norm.weight"])
    q, k, v = (normed @ w[f"attention.w{name}.weight"].T for name in "qkv")
    width, outs = DIM // HEADS, []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        weights = torch.softmax(q[:, part] @ k[:, part].T / width**0.5, dim=-1)
        outs.append(weights @ v[:, part])
    h = x + torch.cat(outs, dim=-1) @ w["attention.wo.weight"].T
    normed = rms(h, w["ffn_norm.weight"])
    gate = functional.silu(normed @ w["feed_forward.w1.weight"].T)
    return h + (gate * (normed @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T


@pytest.mark.parametrize(
    ("dim", "multiple", "want"), [(4096, 256, 11008), (64, 256, 256), (512, 256, 1536), (6, 4, 16)]
)
def test_hidden_size(dim: int, multiple: int, want: int) -> None:
    assert hidden_size(dim, multiple) == want


def test_two_layers_are_the_formula() -> None:
    state = meta_file(dtype=torch.float32)
    block = make(num_layers=2)
    block.load(select_layers(state, 1, 2, "file"), "file")
    x = torch.randn(2, 9, DIM)
    want = x
    for number in (1, 2):
        weights = {
            n.removeprefix(f"layers.{number}."): t for n, t in state.items() if n.startswith(f"layers.{number}.")
        }
        want = torch.stack([formula(sample, weights) for sample in want])
    torch.testing.assert_close(block(x), rms(want, torch.ones(DIM)), rtol=1e-4, atol=1e-5)


def test_final_norm_is_ones_unless_given() -> None:
    state, block = meta_file(), make()
    layers = select_layers(state, 0, 1, "file")
    block.load(layers, "file")
    assert torch.equal(block.norm.weight, torch.ones(DIM))
    block.load(layers, "file", norm_tensor(state, "file"))
    assert torch.equal(block.norm.weight, state["norm.weight"])
    assert torch.equal(norm_tensor(with_hf_names(state), "file"), state["norm.weight"])
    with pytest.raises(UserError, match=r"norm\.weight.*final_norm=ones"):
        norm_tensor({}, "file")


def test_both_naming_schemes_and_lazy_readers() -> None:
    meta = meta_file()
    layers = select_layers(meta, 1, 2, "file")
    assert set(layers) == {f"layers.{j}.{new}" for j in (0, 1) for _, new in META_LAYER_TABLE}
    assert torch.equal(layers["layers.1.mlp.up_proj.weight"], meta["layers.2.feed_forward.w3.weight"])
    from_hf = select_layers(with_hf_names(meta), 1, 2, "file")
    assert from_hf.keys() == layers.keys()
    assert all(torch.equal(from_hf[name], layers[name]) for name in layers)
    read: list[str] = []

    def reader(name: str) -> Tensor:
        read.append(name)
        return meta[name]

    select_layers({name: (lambda name=name: reader(name)) for name in meta}, 2, 1, "file")
    assert len(read) == 9  # nothing but the one layer is read
    assert all(name.startswith("layers.2.") for name in read)


def test_missing_and_foreign_tensors_are_errors() -> None:
    state = meta_file()
    with pytest.raises(UserError, match=r"big\.pth: layer 15 .*holds layers 0 to 2.*model\.llama\.layer"):
        select_layers(state, 15, 1, "big.pth")
    with pytest.raises(UserError, match=r"big\.pth.*no LLaMA layers"):
        select_layers({"head.weight": torch.zeros(1)}, 0, 1, "big.pth")
    lost = {name: t for name, t in state.items() if name != "layers.1.feed_forward.w2.weight"}
    with pytest.raises(UserError, match=r"big\.pth, layer 1(.|\n)*mlp\.down_proj\.weight"):
        select_layers(lost, 1, 1, "big.pth")
    foreign = {**state, "layers.1.attention.wq.bias": torch.zeros(DIM)}
    with pytest.raises(UserError, match=r"attention\.wq\.bias"):
        select_layers(foreign, 1, 1, "big.pth")
    layers = select_layers(state, 0, 1, "big.pth")
    layers["layers.0.mlp.up_proj.weight"] = layers["layers.0.mlp.up_proj.weight"][:, :8]
    with pytest.raises(UserError, match=r"(?s)big\.pth.*layers\.0\.mlp\.up_proj\.weight.*8.*16"):
        make().load(layers, "big.pth")


def test_storage() -> None:
    layers = select_layers(meta_file(), 0, 1, "file")
    x = torch.randn(2, 5, DIM)
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        block = make(dtype=dtype)
        block.load(layers, "file")
        assert {p.dtype for p in block.parameters()} == {dtype}
        assert not any(p.requires_grad for p in block.parameters())
        outputs[dtype] = block(x)
        assert outputs[dtype].dtype == torch.float32
    difference = (outputs[torch.bfloat16] - outputs[torch.float32]).abs().max()
    assert 0 < difference < 0.1
    weight = layers["layers.0.mlp.up_proj.weight"]
    block = make(dtype=weight.dtype)
    block.load(layers, "file")
    assert block.layers[0].mlp.up_proj.weight.data_ptr() != weight.data_ptr()  # no view of a file that may change


def test_gradients_pass_through_the_frozen_layers() -> None:
    block = make()
    block.randomize(0)
    x = torch.randn(2, 5, DIM, requires_grad=True)
    block(x)[:, 0].sum().backward()
    assert bool((x.grad.abs().amax(-1) > 0).all())  # token 0 sees all tokens: no causal mask
    assert all(p.grad is None for p in block.parameters())


def test_random_weights_depend_on_the_seed_alone() -> None:
    states = []
    for seed, disturb in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(disturb)
        block = make()
        block.randomize(seed)
        states.append(block.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0]["layers.0.mlp.up_proj.weight"], states[2]["layers.0.mlp.up_proj.weight"])
    assert torch.equal(states[0]["norm.weight"], torch.ones(DIM))


def test_autocast() -> None:
    block = make()
    block.randomize(0)
    x = torch.randn(1, 5, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    torch.testing.assert_close(out, block(x), rtol=0.1, atol=0.1)


def test_flops() -> None:
    block = make(num_layers=2)
    weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    assert block.flops(7) == (2.0 * 7 * weights, 2 * 2 * (2.0 * 7 * 7 * DIM))
