"""The lean layers are transformers' own: same names, outputs and gradients; the last block can work at a few places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from vlm.nn.language import ATTENTION, Gates, Prompts, make_spans, make_wanted
from vlm.nn.llama_layers import LeanNorm, can_narrow, last_block_savings, rotate, use_lean_layers

CPU = torch.device("cpu")
LENGTHS, PARENTS = (4, 3, 2, 1, 2, 5), (-1, 0, 1, 1, 0, -1)  # a tree of five rows and a row alone
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 4, 5, 0, 1, 2, 3, 4])


def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """transformers' and ours, with the same frozen weights: three blocks, width 32."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config._attn_implementation = ATTENTION
    torch.manual_seed(0)
    plain, lean = (LlamaForCausalLM(config).requires_grad_(False) for _ in range(2))
    use_lean_layers(lean)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    assert list(lean.state_dict()) == list(plain.state_dict())
    lean.load_state_dict(plain.state_dict())
    return plain, lean.requires_grad_(False)


def prompts(bias: float | None) -> Prompts:
    """Prompts in the upper two blocks; where there is a bias, the tree's second and third tokens are its video."""
    torch.manual_seed(1)
    gates = {number: Gates(4, bias) for number in (1, 2)}
    with torch.no_grad():
        for gate in gates.values():
            next(gate.parameters()).normal_()
    rows = torch.randn(2, 3, 32, requires_grad=True)
    video = torch.zeros(17, dtype=torch.bool)
    video[1:3] = True
    after = (torch.arange(17) >= 3) & (torch.arange(17) < 12)
    return Prompts(rows, gates, *((after, video) if bias is not None else (None, None)))


def run(llm: LlamaForCausalLM, text: Tensor, **arguments: Any) -> Tensor:
    return llm.model(
        inputs_embeds=text[None],
        position_ids=POSITIONS[None],
        attention_mask=torch.empty(1, 1, 0, 0),
        use_cache=False,
        spans=make_spans(LENGTHS, PARENTS, CPU),
        **arguments,
    ).last_hidden_state[0]


@pytest.mark.parametrize("places", [None, [0, 3, 5, 8, 9, 11, 16], [12], [8, 3, 3]])
@pytest.mark.parametrize("bias", [None, -1.5])
def test_same_outputs_and_gradients(places: list[int] | None, bias: float | None) -> None:
    results = []
    for llm, narrow in zip(models(), (False, places is not None)):
        text = torch.randn(17, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        given = prompts(bias)
        wanted = torch.tensor(places if places is not None else range(17))
        more = {"wanted": make_wanted(wanted, LENGTHS, PARENTS)} if narrow else {}
        out = run(llm, text, prompts=given, **more)
        out = out if narrow else out[wanted]
        assert out.shape == (len(wanted), 32)
        leaves = [text, given.rows, *(p for gate in given.gates.values() for p in gate.parameters())]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for have, want in zip(results[1], results[0]):
        torch.testing.assert_close(have, want, atol=5e-6, rtol=2e-5)
    assert all(part.any() for part in results[0][:3])


def test_what_places_see() -> None:
    wanted = make_wanted(torch.tensor([8, 11, 13]), LENGTHS, PARENTS)
    assert [row.nonzero().flatten().tolist() for row in wanted.mask] == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 3, 10, 11],
        [12, 13],
    ]


def test_only_the_last_block_is_narrowed_and_by_what_it_says() -> None:
    plain, lean = models()
    assert can_narrow(lean)
    assert not can_narrow(plain)
    rows: dict[str, int] = {}
    for name, module in lean.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, inputs, out, n=name: rows.update({n: out.shape[1]}))
    run(lean, torch.randn(17, 32), wanted=make_wanted(torch.tensor([2, 16]), LENGTHS, PARENTS))
    narrowed = {name for name, count in rows.items() if count == 2}
    assert set(rows.values()) == {2, 17}
    assert {name.partition(".")[2].partition(".")[0] for name in narrowed} == {"2"}
    weights = dict(lean.model.named_parameters())
    assert sum(weights[f"{name}.weight"].numel() for name in narrowed) == last_block_savings(lean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    own, other = LeanNorm(64, 1e-5), LlamaRMSNorm(64, 1e-5)
    with torch.no_grad():
        own.weight.uniform_(0.5, 1.5)
        other.weight.copy_(own.weight)
    x = torch.randn(3, 5, 64).to(dtype)
    results = []
    for module in (own, other):
        module.to(dtype).requires_grad_(False)
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        assert out.dtype == dtype
        out.backward(torch.cos(x.float()).to(dtype))
        results.append((out, leaf.grad))
    tolerance = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    for have, want in zip(*results):
        torch.testing.assert_close(have, want, **tolerance)


def test_norm_that_trains_has_its_gradient() -> None:
    norm = LeanNorm(8, 1e-5)
    norm(torch.randn(2, 8)).square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.any()


def test_rotation() -> None:
    x = torch.randn(2, 3, 7, 8)
    angles = torch.rand(2, 7, 4)
    angles = torch.cat([angles, angles], dim=-1)
    results = []
    for turn in (rotate, lambda q, cos, sin: apply_rotary_pos_emb(q, q, cos, sin)[0]):
        leaf = x.clone().requires_grad_()
        out = turn(leaf, angles.cos(), angles.sin())
        out.backward(x.cos())
        results.append((out, leaf.grad))
    for have, want in zip(*results):
        torch.testing.assert_close(have, want, atol=1e-6, rtol=0)


def test_a_cache_and_other_kernels_run_transformers_code() -> None:
    plain, lean = models()
    ids = torch.randint(3, 50, (1, 6))
    for name in (ATTENTION, "sdpa", "eager"):
        for llm in (plain, lean):
            llm.config._attn_implementation = name
        torch.testing.assert_close(lean(ids).logits, plain(ids).logits, atol=2e-6, rtol=0)
        have, want = (
            llm.eval().generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
            for llm in (lean, plain)
        )
        assert torch.equal(have, want)
