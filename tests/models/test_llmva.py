"""LLMVA-GEBC: the boundary, the other features, both kinds of language model, what starts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_video as s
import torch
from test_video_llama import losses, save
from torch.testing import assert_close

from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import Llmva, LlmvaConfig, boundary_embedding
from vlm.models.opt_base import opt
from vlm.models.trained import persistent_buffers
from vlm.types import UserError

PLACES = s.PLACES + s.OTHER


@pytest.fixture(scope="module")
def model() -> Llmva:
    return s.llmva()


def test_tokens_of_frames_then_of_other_features(model: Llmva) -> None:
    """Each half depends on its own input alone, and both on the boundary."""
    batch = s.features((2, 3))
    changed = {
        "frames": replace(batch, frame_tokens=s.noise(9, 5, s.QUERIES, s.DIM)),
        "other": replace(batch, extra={**batch.extra, "other": s.noise(9, 2, 5, s.OTHER_DIM)}),
        "boundary": replace(batch, extra={**batch.extra, "boundary": batch.extra["boundary"] * 0.5}),
    }
    with torch.no_grad():
        tokens = model.encode_video(batch)
        moved = {
            name: (model.encode_video(other) - tokens).abs().amax((0, 2)) > 1e-6 for name, other in changed.items()
        }
    assert tokens.shape == (2, PLACES, 32)
    first, second = [True] * s.PLACES, [True] * s.OTHER
    assert moved["frames"].tolist() == [*first, *[False] * s.OTHER]
    assert moved["other"].tolist() == [*[False] * s.PLACES, *second]
    assert moved["boundary"].all()


def test_a_boundary_is_as_if_alone(model: Llmva) -> None:
    batch = s.features((2, 5, 1))
    assert batch.frame_tokens is not None
    with torch.no_grad():
        together = model.encode_video(batch)
        for number, frames in enumerate(batch.frame_tokens.split([2, 5, 1])):
            extra = {name: value[number : number + 1] for name, value in batch.extra.items()}
            alone = replace(batch, frame_tokens=frames, frame_counts=(len(frames),), extra=extra)
            assert_close(together[number], model.encode_video(alone)[0], rtol=0, atol=2e-6)


def test_two_boundaries_of_one_video_differ(model: Llmva) -> None:
    one = s.features((2,))
    assert one.frame_tokens is not None
    both = replace(
        one,
        frame_tokens=torch.cat([one.frame_tokens, one.frame_tokens]),
        frame_counts=(2, 2),
        extra={"boundary": torch.tensor([[0.1, 0.2], [0.8, 0.4]]), "other": one.extra["other"].expand(2, -1, -1)},
    )
    with torch.no_grad():
        first, second = model.encode_video(both)
    assert (first - second).abs().max() > 1e-4


def test_boundary_embedding_is_made_of_waves() -> None:
    """By the formula, number by number."""
    boundary, dim = torch.tensor([[0.25, 0.6]], dtype=torch.float64), 8
    half = dim // 2
    want = []
    for value in boundary[0]:
        angle = torch.sigmoid(value) * 2 * torch.pi
        for k in range(half):
            wave = angle / 10000 ** (2 * (k // 2) / half)
            want.append(float(torch.sin(wave) if k % 2 == 0 else torch.cos(wave)))
    have = boundary_embedding(boundary, dim)
    assert have.dtype == torch.float32
    assert_close(have, torch.tensor(want)[None, None])


def test_every_trained_tensor_learns(model: Llmva) -> None:
    model.zero_grad()
    batch = s.features((2, 3), s.rows([14, 12], PLACES))
    model(batch)["caption"].total.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    reached = {n for n in trained if model.reached(n, batch)}
    assert reached == {n for n in trained if not n.endswith(".key.bias")}
    gradients = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None}
    assert all(gradients[n] > 1e-9 for n in reached)
    assert not persistent_buffers(model)  # the tied output layer is no further tensor


def test_published_number_of_weights() -> None:
    with torch.device("meta"):
        model = Llmva(LlmvaConfig(opt=opt("opt_13b")))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 45_445_376
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith("llm.")) == pytest.approx(12.853e9, 1e-4)


def test_dropout_of_a_frozen_opt_by_an_option_alone() -> None:
    """The original's is live while it trains."""
    text = s.rows([12], PLACES)
    for dropout in (0.0, 0.1):
        model = s.llmva(opt=s.opt(dropout=dropout), qformer=s.qformer(dropout=0.0)).train()
        batch = s.features((2,), text)
        one, two = (losses(model, batch) for _ in range(2))
        assert torch.equal(one, two) == (dropout == 0)
        assert not model.llm.training
        assert torch.equal(losses(model.eval(), batch), losses(model, batch))


def test_with_a_llama() -> None:
    """The original's second form: another name of the projection, no other features."""
    model = s.llmva(opt=None, llama=s.llama(), other_tokens=0)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "video_query_tokens",
        "video_frame_position_embedding",
        "video_Qformer",
        "temporal_pos_trans",
        "temporal_pos_trans_norm",
        "llama_project",
    }
    batch = s.features((2, 1), s.rows([12, 9]))
    del batch.extra["other"]
    assert torch.isfinite(losses(model, batch)).all()


def test_starts_from_stage_one(tmp_path: Path) -> None:
    """Of another language model's, it takes video Q-Former, queries and positions, and leaves the projection."""
    stage = s.video_llama()
    with torch.no_grad():
        for p in stage.parameters():
            if p.requires_grad:
                p.add_(1.0)
    folder = save(stage, tmp_path / "stage")
    fresh, started = s.llmva(), s.llmva(init_from=folder)
    theirs = stage.state_dict()
    for (name, p), q in zip(started.named_parameters(), fresh.parameters()):
        assert torch.equal(p, theirs[name] if name.startswith("video_") else q), name
    again = s.llmva(init_from=save(started, tmp_path / "own"))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), started.parameters()))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_frames": 6}, r"video_frame_position_embedding\.weight: has \[5, 16\], wanted \[6, 16\]"),
        ({"qformer": s.qformer(heads=4)}, r"model\.qformer\.heads: 2 -> 4"),
    ],
)
def test_another_stage_one_is_refused(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    folder = save(s.video_llama(), tmp_path / "stage")
    with pytest.raises(UserError, match=match):
        s.llmva(init_from=folder, **settings)


def test_another_language_model_is_refused(model: Llmva, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other frozen weights"):
        s.llmva(init_from=save(model, tmp_path / "own"), opt=s.opt(random_seed=1))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"llama": LlamaBaseConfig()}, r"model\.opt and model\.llama"),
        ({"opt": None}, r"model\.opt and model\.llama"),
        ({"other_tokens": -1}, r"model\.other_tokens"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        s.llmva_config(**settings)


def test_what_a_batch_must_have(model: Llmva) -> None:
    batch = s.features((2,))
    for name in ("boundary", "other"):
        extra = {key: value for key, value in batch.extra.items() if key != name}
        with pytest.raises(UserError, match=f"clip0: the batch has no '{name}'"):
            model.encode_video(replace(batch, extra=extra))
    with pytest.raises(UserError, match=r"7 places x 10.*model\.max_other 6"):
        model.encode_video(s.features((2,), other=7))


def test_rows_beyond_the_positions_of_opt(model: Llmva) -> None:
    """An index error in the embedding otherwise, and on a GPU one that tells nothing."""
    fits = s.features((2,), s.rows([64], PLACES))
    assert torch.isfinite(losses(model, fits)).all()
    with pytest.raises(UserError, match=r"clip0: a row of 65 tokens, but model\.opt\.max_positions is 64"):
        model(s.features((2,), s.rows([65], PLACES)))


def test_inputs_that_do_not_fit() -> None:
    own = {"num_video_tokens": PLACES, "num_frames": 4, "source": "features", "tokenizer": None, "vocab_size": s.WORDS}
    s.llmva_config().check_inputs(SimpleNamespace(**own))
    with pytest.raises(UserError, match=f"this model makes {PLACES} of a video"):
        s.llmva_config().check_inputs(SimpleNamespace(**{**own, "num_video_tokens": s.PLACES}))
    with pytest.raises(UserError, match=r"model\.opt"):
        s.llmva_config().check_inputs(SimpleNamespace(**{**own, "vocab_size": 70}))


def test_cost_counts_the_second_qformer(model: Llmva) -> None:
    batch = s.features((2, 2), s.rows([14, 12], PLACES), other=5)
    without = s.llmva(other_tokens=0)
    plain = s.features((2, 2), s.rows([14, 12], PLACES))
    extra = 2 * (s.qformer().flops(s.DIM, s.OTHER, 5) + 2.0 * 5 * s.OTHER_DIM * s.DIM + 2.0 * s.OTHER * s.DIM * 32)
    assert model.cost(batch).trained_flops - without.cost(plain).trained_flops == extra
