"""Vamos, LLaMA-VQA and ViCo are settings of one model: what trains, how it starts, what each setting does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import small_llama as small
import torch

from vlm.data.packing import pack
from vlm.models.vamos import VIDEO_ORDER, VamosConfig, llama_vqa, vamos, vico
from vlm.types import UserError

GATE = {f"layers.{i}.attention.gate" for i in range(3)}
GATES = {f"layers.{i}.attention.gate{n}" for i in range(3) for n in (1, 2)}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"adapter_query.weight", "visual_proj.weight", *GATE}),
        (
            {"projector": "mlp"},
            {"adapter_query.weight", *GATE, *(f"visual_proj.{n}.{p}" for n in (0, 2) for p in ("weight", "bias"))},
        ),
        ({"use_video": False}, {"adapter_query.weight", *GATE}),
        (
            {"temporal_embedding": True, "video_bias": 3.5},
            {"adapter_query.weight", "visual_proj.weight", "temporal_emb.weight", *GATES},
        ),
    ],
)
def test_exactly_these_train(settings: dict[str, Any], names: set[str]) -> None:
    model = small.system(**settings)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert not list(model.named_buffers())
    assert all(p.ndim > 0 for p in model.parameters())


def test_published_settings() -> None:
    assert (vamos().temporal_embedding, vamos().video_bias, vamos().num_frames) == (False, None, 6)
    for config in (llama_vqa(), vico()):
        assert (config.temporal_embedding, config.video_bias, config.num_frames, config.tau) == (True, 3.5, 10, 100.0)
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in config.build().parameters() if p.requires_grad)
            for config in (vamos(), llama_vqa(), vico())
        ]
    assert sizes == [4_457_472, 4_499_456, 4_499_456]


def test_starts() -> None:
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match="RANDOM"):
        model = llama_vqa(llama=small.base(dim=128), video_bias=2.5).build()
    assert not any(layer.attention.gate1.any() for layer in model.layers)
    assert all((layer.attention.gate2 == -2.5).all() for layer in model.layers)
    for weight in (model.adapter_query.weight, model.temporal_emb.weight):
        assert float(weight.detach().std()) == pytest.approx(1, abs=0.05)
    assert float(model.visual_proj.weight.detach().abs().max()) == pytest.approx(768**-0.5, rel=0.01)


def test_prompts_of_the_upper_blocks_alone() -> None:
    """Gates of blocks without prompts are buffers: kept in checkpoints, never trained."""
    model = small.system(adapter_layer=1, video_bias=1.0)
    assert model.adapter_query.weight.shape == (4, 32)
    assert {n for n, _ in model.named_buffers()} == {f"layers.{i}.attention.gate{n}" for i in (0, 1) for n in (1, 2)}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("layers")}
    assert trained == {"layers.2.attention.gate1", "layers.2.attention.gate2"}
    model(small.batch())["answer"].total.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)


def test_lower_blocks_run_unless_told() -> None:
    """The originals lost the blocks below the prompted ones; here that takes a setting."""
    batch = small.batch()
    whole, cut = (small.system(adapter_layer=2, skip_lower_blocks=skip) for skip in (False, True))
    assert (len(whole.llm.model.layers), len(cut.llm.model.layers)) == (3, 2)
    # the same trained weights over the same upper blocks
    for number in (0, 1):
        source = whole.llm.model.layers[number + 1].state_dict()
        cut.llm.model.layers[number].load_state_dict(source)
    cut.load_state_dict(
        {n: t for n, t in whole.state_dict().items() if not n.startswith("llm.model.layers")}, strict=False
    )
    full, without = (float(m(batch)["answer"].total.detach()) for m in (whole, cut))
    assert abs(full - without) > 1e-2
    whole.llm.model.layers[0] = torch.nn.Identity()  # taking the block out by hand gives the same
    whole.llm.model.layers[0].forward = lambda x, **_: x
    assert float(whole(batch)["answer"].total.detach()) == pytest.approx(without, abs=1e-5)


def test_rope_theta_is_the_llamas_unless_told() -> None:
    batch = small.batch()
    own = small.system()
    other, same = small.system(rope_theta=500000.0), small.system(small.base(rope_theta=500000.0))
    losses = [float(m(batch)["answer"].total.detach()) for m in (own, other, same)]
    assert losses[1] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_video_order_is_a_loss_over_frames() -> None:
    """The output before each place is compared with the projected frames, without the embedding of their number."""
    model = small.system(temporal_embedding=True, video_bias=2.0, tau=5.0)
    batch = small.batch((VIDEO_ORDER,))
    rows = batch.views[VIDEO_ORDER]
    term = model(batch)[VIDEO_ORDER]
    assert term.count == model.counts(batch)[VIDEO_ORDER] == 2 * small.FRAMES
    with torch.no_grad():
        hidden = model.read([VIDEO_ORDER], [rows], batch)
        frames = model.project(batch.features)
        total, place = 0.0, 0
        for sample, length in enumerate(rows.lengths):
            for number in range(small.FRAMES):
                scores = frames[sample] @ hidden[place + 2 + number - 1] / 5.0
                total -= float(scores.log_softmax(0)[number])
            place += length
    assert float(term.total.detach()) == pytest.approx(total, abs=1e-4)


def test_the_bias_spares_video_order() -> None:
    model = small.system(video_bias=2.0)
    batch = small.batch(("answer", VIDEO_ORDER))
    before = {n: float(term.total.detach()) for n, term in model(batch).items()}
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.gate2.fill_(4.0)
    after = {n: float(term.total.detach()) for n, term in model(batch).items()}
    assert after[VIDEO_ORDER] == before[VIDEO_ORDER]
    assert after["answer"] != before["answer"]


def test_video_makes_a_difference() -> None:
    model = small.system()
    batch = small.batch()
    one, other = (model(replace(batch, features=f))["answer"].total for f in (batch.features, batch.features.flip(1)))
    assert one != other


def test_captions_alone_leave_the_projector_out() -> None:
    model = small.system(use_video=False)
    rows = pack([small.row(0, 9, 3, video=False)], small.FRAMES)
    term = model(replace(small.batch(), features=None, views={"answer": rows}))["answer"]
    assert term.count == 3
    with_features = model(replace(small.batch(), views={"answer": rows}))["answer"]
    assert torch.equal(term.total, with_features.total)


def test_half_precision_of_the_base_alone_and_of_all() -> None:
    batch = small.batch(("answer", VIDEO_ORDER))
    settings = {"temporal_embedding": True, "video_bias": 1.0}
    want = small.system(**settings)(batch)
    mixed = small.system(small.base(dtype="bfloat16"), **settings)
    halved = small.system(**settings).to(torch.bfloat16)
    for model in (mixed, halved):
        terms = model(batch)
        for name, term in terms.items():
            assert term.total.dtype == torch.float32
            assert float(term.total.detach()) == pytest.approx(float(want[name].total.detach()), rel=0.03)
        sum(term.total for term in terms.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert mixed.adapter_query.weight.dtype == torch.float32


def test_wrong_features_are_named() -> None:
    batch = small.batch()
    with pytest.raises(
        UserError, match=r"features are 3 frames x 5, but model\.num_frames = 3 and model\.feature_dim = 12"
    ):
        small.system()(replace(batch, features=batch.features[..., :5]))
    with pytest.raises(UserError, match="video_order needs frame features"):
        rows = pack([small.row(0, 9, 3, video=False)], small.FRAMES)
        small.system()(replace(batch, features=None, views={VIDEO_ORDER: rows}))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"adapter_layer": 4}, "model.llama.layers is 3"),
        ({"adapter_layer": 0}, "between 1"),
        ({"adapter_len": 0}, "adapter_len is 0"),
        ({"use_video": False, "video_bias": 1.0}, "no video to act on"),
        ({"tau": 0.0}, "tau is 0"),
    ],
)
def test_contradictions(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        VamosConfig(**{"llama": small.base(), **change})
