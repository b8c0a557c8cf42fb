"""Parts of the ViT: tokens in their order, the sine table, stochastic depth, checkpointed blocks, initial weights."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.nn.vision import (
    Attention,
    Block,
    DropPath,
    PatchEmbed,
    block_flops,
    init_truncated_normal,
    init_xavier,
    make_blocks,
    run_blocks,
    sinusoid_table,
)

CPU = torch.device("cpu")


def test_tokens_are_cubes_in_time_row_column_order() -> None:
    embed = PatchEmbed(image_size=8, patch_size=4, tubelet_size=2, num_frames=4, dim=5)
    video = torch.randn(1, 3, 4, 8, 8)
    tokens = embed(video)
    assert tokens.shape == (1, 2 * 2 * 2, 5)
    cube = video[0, :, 2:4, 0:4, 4:8]  # t=1, h=0, w=1
    want = (embed.proj.weight * cube).sum(dim=(1, 2, 3, 4)) + embed.proj.bias
    torch.testing.assert_close(tokens[0, 1 * 4 + 0 * 2 + 1], want)


def test_a_clip_of_another_size_is_refused() -> None:
    embed = PatchEmbed(image_size=8, patch_size=4, tubelet_size=2, num_frames=4, dim=5)
    with pytest.raises(ValueError, match=r"\(3, 2, 8, 8\).*\(3, 4, 8, 8\)"):
        embed(torch.zeros(1, 3, 2, 8, 8))


def test_sinusoid_table_is_the_formula_and_no_state() -> None:
    table = sinusoid_table(6, 8, CPU)
    assert table.shape == (1, 6, 8)
    assert table.dtype == torch.float32
    for p, j in ((0, 0), (5, 2), (5, 3), (4, 7)):
        angle = p / 10000 ** (2 * (j // 2) / 8)
        assert float(table[0, p, j]) == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-7)
    with torch.inference_mode():
        table = sinusoid_table(7, 8, CPU)
    x = torch.ones(1, 7, 8, requires_grad=True)
    (x * table).sum().backward()  # a table first asked for in inference mode also serves training


def test_drop_path_drops_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    x = torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    out = drop(x)
    values = out[:, 0, 0]
    assert torch.equal(out, values[:, None, None].expand_as(out))
    assert sorted(set(values.tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert float(values.mean()) == pytest.approx(1.0, abs=0.03)
    assert drop.eval()(x) is x


def test_drop_path_grows_with_depth() -> None:
    rates = [block.drop_path.rate for block in make_blocks(5, 8, 2, drop_path=0.2)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_attention_has_no_bias_on_keys() -> None:
    part = Attention(8, 2, qkv_bias=True, attention_dropout=0.0, dropout=0.0)
    assert [name for name, _ in part.named_parameters()] == [
        "q_bias",
        "v_bias",
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    ]
    x = torch.randn(2, 5, 8)
    before = part(x)
    with torch.no_grad():
        part.v_bias.add_(1.0)  # each output moves by proj(1): weights of a softmax sum to 1
    torch.testing.assert_close(part(x) - before, (part.proj.weight.sum(1)).expand(2, 5, 8), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        part.q_bias.add_(1.0)
    assert not torch.allclose(part(x), before + part.proj.weight.sum(1), atol=1e-4)


def test_layer_scale() -> None:
    block = Block(8, 2, init_values=1e-3)
    x = torch.randn(2, 5, 8)
    plain = Block(8, 2)
    plain.load_state_dict({n: t for n, t in block.state_dict().items() if "gamma" not in n})
    assert {n for n, _ in block.named_parameters()} - {n for n, _ in plain.named_parameters()} == {"gamma_1", "gamma_2"}
    assert (block(x) - x).abs().max() < 0.01 < (plain(x) - x).abs().max()
    with torch.no_grad():
        block.gamma_1.fill_(1.0)
        block.gamma_2.fill_(1.0)
    torch.testing.assert_close(block(x), plain(x))


def test_recomputed_blocks_give_the_same_gradients() -> None:
    blocks = make_blocks(3, 8, 2, drop_path=0.5).train()
    results = []
    for recompute in (False, True):
        x = torch.linspace(-1, 1, 16 * 5 * 8).sin().view(16, 5, 8)  # needs no gradient, like the first block's input
        blocks.zero_grad()
        torch.manual_seed(3)  # the same samples are dropped in both passes
        run_blocks(blocks, x, recompute=recompute).square().sum().backward()
        results.append([p.grad.clone() for p in blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(bool(g.abs().max() > 0) for g in results[1])


def test_recomputing_runs_each_block_twice() -> None:
    calls = []
    block = Block(8, 2)
    block.norm1.register_forward_hook(lambda *_: calls.append(1))
    run_blocks([block], torch.randn(1, 3, 8), recompute=True).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        run_blocks([block], torch.randn(1, 3, 8), recompute=True)
    assert len(calls) == 3


def test_initial_weights() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 200)
    init_truncated_normal(linear)
    assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not linear.bias.any()
    init_xavier(linear)
    assert float(linear.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / 500), rel=0.01)


def test_flops_are_those_of_the_matrices() -> None:
    n, d = 7, 8
    matrices = sum(p.numel() for name, p in Block(d, 2).named_parameters() if p.ndim == 2)
    assert block_flops(n, d, 4.0) == 2 * n * matrices + 2 * (2 * n * n * d)


def test_bfloat16_blocks() -> None:
    block = Block(8, 2, drop_path=0.5).bfloat16().train()
    assert block(torch.randn(2, 5, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
