"""Packed rows, gated prompts and video bias against plain formulas; nothing leaks between rows; padding is not seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vlm.nn import language
from vlm.nn.language import ATTENTION, ExactRotary, Gates, Prompts, causal_attention, make_spans

CPU = torch.device("cpu")


def model(attention: str = ATTENTION, kv_heads: int = 2) -> LlamaForCausalLM:
    """Two blocks, width 32, 4 heads."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=50,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def run(llm: LlamaForCausalLM, ids: Tensor, positions: Tensor, lengths: list[int], parents: list[int]) -> Tensor:
    """Outputs (S, D) of packed rows."""
    return llm.model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=torch.empty(1, 1, 0, 0),
        use_cache=False,
        spans=make_spans(lengths, parents, CPU),
    ).last_hidden_state[0]


def test_packed_rows_are_separate_rows() -> None:
    llm, plain = model(), model("sdpa")
    lengths = [5, 1, 9]
    ids = torch.randint(3, 50, (15,))
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = run(llm, ids, positions, lengths, [-1, -1, -1])
    for row, out in zip(ids.split(lengths), packed.split(lengths)):
        torch.testing.assert_close(out, plain.model(input_ids=row[None]).last_hidden_state[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("together", [1, 6, 256])
def test_a_tree_is_its_whole_rows(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """root (4) with children a (3) and b (2); a has children c (2) and d (1). In one call, or in as many as rows."""
    monkeypatch.setattr(language, "_TOGETHER", together)
    assert len(make_spans([4, 3, 2, 1, 2], [-1, 0, 1, 1, 0], CPU)) == {1: 5, 6: 3, 256: 1}[together]
    llm, plain = model(), model("sdpa")
    lengths, parents = [4, 3, 2, 1, 2], [-1, 0, 1, 1, 0]
    ids = torch.randint(3, 50, (12,))
    starts = [0, 4, 7, 9, 10]
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 4, 5])
    out = run(llm, ids, positions, lengths, parents)

    def span(row: int) -> list[int]:
        return list(range(starts[row], starts[row] + lengths[row]))

    for path in ([0, 1, 2], [0, 1, 3], [0, 4]):
        places = [place for row in path for place in span(row)]
        whole = plain.model(input_ids=ids[places][None]).last_hidden_state[0]
        torch.testing.assert_close(out[places], whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("parents", "changed", "seen_by"),
    [
        ([-1, -1, -1], 0, {0}),
        ([-1, -1, -1], 1, {1}),
        ([-1, 0, 0], 1, {1}),
        ([-1, 0, 0], 2, {2}),
        ([-1, 0, 1], 1, {1, 2}),
    ],
)
@pytest.mark.parametrize("together", [1, 256])
def test_nothing_leaks(
    parents: list[int], changed: int, seen_by: set[int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokens in a row change no bit of rows that do not hang on it; the row itself must change."""
    monkeypatch.setattr(language, "_TOGETHER", together)
    llm = model()
    lengths = [4, 5, 3]
    ids = torch.randint(3, 50, (12,))
    other = ids.clone()
    start = sum(lengths[:changed])
    other[start : start + lengths[changed]] = (ids[start : start + lengths[changed]] + 1) % 50
    positions = torch.arange(12)
    before, after = (run(llm, x, positions, lengths, parents).split(lengths) for x in (ids, other))
    assert {row for row in range(3) if not torch.equal(before[row], after[row])} == seen_by


def test_gradients_do_not_leak() -> None:
    llm = model()
    text = torch.randn(1, 9, 32, requires_grad=True)
    out = llm.model(
        inputs_embeds=text,
        position_ids=torch.arange(9)[None],
        attention_mask=torch.empty(1, 1, 0, 0),
        spans=make_spans([4, 5], [-1, -1], CPU),
    ).last_hidden_state[0]
    out[4:].square().sum().backward()
    assert text.grad is not None
    assert not text.grad[0, :4].any()
    assert text.grad[0, 4:].all()


def formula(
    attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, gate: Tensor, bias: Tensor, vs: int, n: int
) -> Tensor:
    """The attention of the originals, written out (facts of LLaMA-Adapter and Flipped-VQA), one head at a time."""
    heads, length, width = q.shape[1:]
    group = heads // k.shape[1]
    out = torch.zeros(1, length, heads, width)
    for h in range(heads):
        keys, values = k[0, h // group], v[0, h // group]
        own = slice(h // group * width, (h // group + 1) * width)
        prompt_keys, prompt_values = (rows @ p.weight.T[:, own] for p in (attn.k_proj, attn.v_proj))
        for t in range(length):
            scores = torch.stack([q[0, h, t] @ keys[u] / math.sqrt(width) for u in range(t + 1)])
            if t >= vs + n:
                scores[vs : vs + n] += bias[0, h, 0, 0]
            prompted = (prompt_keys @ q[0, h, t] / math.sqrt(width)).softmax(0) @ prompt_values
            out[0, t, h] = scores.softmax(0) @ values[: t + 1] + gate.tanh()[0, h, 0, 0] * prompted
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_prompts_and_bias_are_the_formula(kv_heads: int) -> None:
    """seen: 3e-7"""
    attn = model(kv_heads=kv_heads).model.layers[1].self_attn
    q, k, v = (torch.randn(1, h, 11, 8) for h in (4, kv_heads, kv_heads))
    gates = Gates(4, -1.5)
    with torch.no_grad():
        gates.gate1.normal_()
        gates.gate2.normal_()
    rows = torch.randn(1, 3, 32)
    place = torch.arange(11)
    prompts = Prompts(rows, {1: gates}, place >= 6, (place >= 2) & (place < 6))
    have, _ = causal_attention(attn, q, k, v, None, spans=make_spans([11], [-1], CPU), prompts=prompts)
    want = formula(attn, q, k, v, rows[0], gates.gate1, gates.gate2, 2, 4)
    torch.testing.assert_close(have, want, atol=3e-6, rtol=0)
    plain, _ = causal_attention(attn, q, k, v, None, spans=make_spans([11], [-1], CPU))
    assert (have - plain).abs().max() > 0.1


def test_closed_gates_change_nothing() -> None:
    attn = model().model.layers[0].self_attn
    q, k, v = (torch.randn(1, h, 6, 8) for h in (4, 2, 2))
    gates = Gates(4, None)
    spans = make_spans([6], [-1], CPU)
    prompts = Prompts(torch.randn(1, 3, 32), {0: gates}, None, None)
    with_prompts, _ = causal_attention(attn, q, k, v, None, spans=spans, prompts=prompts)
    torch.testing.assert_close(with_prompts, causal_attention(attn, q, k, v, None, spans=spans)[0], atol=0, rtol=0)
    with_prompts.sum().backward()
    assert gates.gate.grad is not None
    assert gates.gate.grad.all()  # they can open


def test_blocks_without_prompts_are_left_alone() -> None:
    attn = model().model.layers[0].self_attn
    q, k, v = (torch.randn(1, h, 6, 8) for h in (4, 2, 2))
    gates = Gates(4, None)
    torch.nn.init.ones_(gates.gate)
    prompts = Prompts(torch.randn(1, 3, 32), {1: gates}, None, None)
    spans = make_spans([6], [-1], CPU)
    have, want = (causal_attention(attn, q, k, v, None, spans=spans, prompts=p)[0] for p in (prompts, None))
    assert torch.equal(have, want)


def test_gates_have_their_published_names_and_starts() -> None:
    assert {n: tuple(p.shape) for n, p in Gates(4, None).named_parameters()} == {"gate": (1, 4, 1, 1)}
    with_bias = Gates(4, -3.5)
    assert {n: tuple(p.shape) for n, p in with_bias.named_parameters()} == {
        "gate1": (1, 4, 1, 1),
        "gate2": (1, 4, 1, 1),
    }
    assert not with_bias.gate1.any()
    assert torch.equal(with_bias.gate2, torch.full((1, 4, 1, 1), -3.5))


def test_padding_is_not_attended() -> None:
    """Without a registered mask function transformers hands over no mask, and this differs."""
    llm = model()
    ids = torch.randint(3, 50, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    alone = llm(input_ids=ids).logits
    both = llm(input_ids=padded, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])).logits
    torch.testing.assert_close(both[:, 3:], alone, atol=2e-6, rtol=0)
    unmasked = llm(input_ids=padded, position_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])).logits
    assert (unmasked[:, 3:] - alone).abs().max() > 1e-3


def test_generation_is_transformers_own() -> None:
    llm, plain = model(), model("sdpa")
    ids = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
    mask = (ids > 0).long()
    text = llm.get_input_embeddings()(ids)
    have, want = (
        m.generate(inputs_embeds=text, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (llm, plain)
    )
    assert torch.equal(have, want)


def test_mask_function_is_registered() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION] is sdpa_mask


def test_rotary_tables_stay_exact_in_bf16() -> None:
    config = LlamaConfig(hidden_size=128, num_attention_heads=1)
    rotary = ExactRotary(LlamaRotaryEmbedding(config))
    positions = torch.tensor([[0, 1, 777, 1200]])
    want = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    for have, table in zip(rotary.to(torch.bfloat16)(torch.zeros(1), positions), want):
        assert torch.equal(have, table)
    rounded = LlamaRotaryEmbedding(config).to(torch.bfloat16)(torch.zeros(1), positions)
    assert (rounded[0] - want[0]).abs().max() > 0.5  # what the class is for


def test_wrong_trees_are_ours_to_avoid() -> None:
    with pytest.raises(AssertionError, match="before its parent"):
        make_spans([2, 2], [1, -1], CPU)
    with pytest.raises(AssertionError, match=r"depth first|does not hang"):
        make_spans([2, 2, 2], [-1, -1, 0], CPU)
