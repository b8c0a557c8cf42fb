"""Video-LLaMA: videos of any number of frames together, pixels or stored tokens, what is frozen, what starts it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_video as s
import torch
from torch import nn
from torch.testing import assert_close

from vlm import recipe
from vlm.config import to_dict
from vlm.models.llama_base import DERIVED, SIZES, llama
from vlm.models.trained import MANIFEST, WEIGHTS, persistent_buffers
from vlm.models.video_llama import VideoLlama, VideoLlamaConfig
from vlm.run.optim import parameter_groups
from vlm.types import Batch, UserError
from vlm.weights import file_hash, write_safetensors


@pytest.fixture(scope="module")
def model() -> VideoLlama:
    return s.video_llama()


def losses(model: VideoLlama, batch: Batch) -> torch.Tensor:
    """Of each predicted token."""
    names, rows = list(batch.views), list(batch.views.values())
    with torch.no_grad():
        return torch.cat(model.nll(model.read_at(names, rows, [p.predictors for p in rows], batch), rows))


# ---------------------------------------------------------------------------- videos of different numbers of frames


@pytest.mark.parametrize("counts", [(3, 1, 5), (1, 1), (2, 5, 2, 1)])
def test_a_video_is_as_if_alone(model: VideoLlama, counts: tuple[int, ...]) -> None:
    batch = s.pixels(counts)
    with torch.no_grad():
        together = model.encode_video(batch)
        assert together is not None
        assert together.shape == (len(counts), s.PLACES, 32)
        assert batch.frames is not None
        for number, frames in enumerate(batch.frames.split(list(counts))):
            alone = model.encode_video(replace(batch, frames=frames, frame_counts=(len(frames),)))
            assert_close(together[number], alone[0], rtol=0, atol=2e-6)


def test_losses_and_gradients_do_not_depend_on_neighbours(model: VideoLlama) -> None:
    counts, lengths = (3, 1, 5), (9, 14, 11)

    def gradients(batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            model(batch)["caption"].total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together = s.pixels(counts, s.rows(lengths))
    assert together.frames is not None
    apart = [
        Batch(keys=("x",), frames=frames, frame_counts=(len(frames),), views={"caption": s.rows([length])})
        for frames, length in zip(together.frames.split(list(counts)), lengths)
    ]
    assert_close(losses(model, together), torch.cat([losses(model, b) for b in apart]), rtol=0, atol=1e-5)
    have, want = gradients([together]), gradients(apart)
    assert have.keys() == want.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in want.items():
        assert_close(have[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_frames_are_told_apart_by_their_number() -> None:
    """Without the embedding of the number the Q-Former reads a set."""
    model, batch = s.video_llama(), s.pixels((3,))

    @torch.no_grad()
    def difference() -> float:
        assert batch.frames is not None
        one, two = (model.encode_video(replace(batch, frames=f)) for f in (batch.frames, batch.frames.flip(0)))
        return float((one - two).abs().max())

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "crossattention.attention" in name:
                p.mul_(20)  # a fresh one looks at everything alike
        assert difference() > 1e-2
        model.video_frame_position_embedding.weight.zero_()
        assert difference() < 1e-5


def test_one_call_of_each_module_whatever_the_mix(model: VideoLlama) -> None:
    """ZeRO-3 gathers weights module by module, so all ranks must call the same ones in the same order."""

    def calls(batch: Batch) -> list[str]:
        made: list[str] = []
        hooks = [
            module.register_forward_hook(lambda m, given, out, name=name: made.append(name))
            for name, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        model(batch)
        for hook in hooks:
            hook.remove()
        return made

    image = calls(s.pixels((1,), s.rows([9])))
    assert image == calls(s.pixels((3, 1, 5), s.rows([9, 14, 11]))) == calls(s.pixels((2, 2), s.rows([9, 10])))
    assert image.count("tower.query_tokens") == 0
    for name in ("video_Qformer.layernorm", "video_frame_position_embedding", "llama_proj", "llm.lm_head"):
        assert image.count(name) == 1, name


# -------------------------------------------------------------------------------------------------- pixels or features


def test_features_give_the_losses_of_pixels(model: VideoLlama) -> None:
    batch = s.pixels((3, 1), s.rows([9, 14]))
    assert batch.frames is not None
    stored = replace(batch, frames=None, frame_tokens=model.tower(batch.frames))
    assert torch.equal(losses(model, batch), losses(model, stored))
    without = s.video_llama(tower=None)
    assert not hasattr(without, "tower")
    own = {name: p for name, p in model.state_dict().items() if not name.startswith("tower.")}
    without.load_state_dict(own, strict=True)
    assert torch.equal(losses(model, batch), losses(without, stored))


def test_rows_without_video(model: VideoLlama) -> None:
    text = Batch(keys=("t",), views={"dialogue": s.rows([8, 9], videos=[-1, -1])})
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert torch.isfinite(losses(model, text)).all()
    assert not any(model.reached(name, text) for name in trained)
    seen = s.pixels((2,), s.rows([9]))
    assert {n for n in trained if not model.reached(n, seen)} == {n for n in trained if n.endswith(".key.bias")}
    with pytest.raises(UserError, match="places for video"):
        losses(model, Batch(keys=("t",), views={"caption": s.rows([9])}))


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (s.pixels((6,)), r"clip0: a video has 6 frames, but model\.max_frames is 5"),
        (replace(s.pixels((2,)), frame_counts=(1,)), "2 frames, but the videos have"),
        (Batch(keys=("a",), frame_tokens=torch.zeros(1, 9, s.DIM), frame_counts=(1,)), r"model\.frame_tokens"),
        (Batch(keys=("a",), frames=torch.zeros(1, 3, 30, 28), frame_counts=(1,)), r"patch_size=14"),
    ],
)
def test_what_does_not_fit(model: VideoLlama, batch: Batch, match: str) -> None:
    with pytest.raises(UserError, match=match):
        model.encode_video(batch)


def test_pixels_without_a_tower() -> None:
    with pytest.raises(UserError, match=r"model\.tower is none"):
        s.video_llama(tower=None).encode_video(s.pixels((1,)))


# ------------------------------------------------------------------------------------------------------ what is frozen


def test_what_trains(model: VideoLlama) -> None:
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if not n.startswith(("tower.", "llm."))}
    assert trained >= {"video_query_tokens", "video_frame_position_embedding.weight", "llama_proj.weight"}
    decay = {
        n for group in parameter_groups(model, lr=1, weight_decay=1) if group["weight_decay"] for n in group["names"]
    }
    assert decay == {n for n, p in model.named_parameters() if n in trained and p.ndim >= 2}
    assert not persistent_buffers(model)


def test_published_number_of_weights() -> None:
    """Of the sheet: 22,104,064 train with a 7B, 22,891,520 with a 13B."""
    for name, want in (("llama1_7b", 22_104_064), ("vicuna_13b_v0", 22_891_520)):
        with torch.device("meta"):
            model = VideoLlama(VideoLlamaConfig(tower=None, llama=llama(name)))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want


def test_training_mode_reaches_the_video_qformer_alone(model: VideoLlama) -> None:
    batch = s.pixels((2,))
    model.train()
    try:
        assert not model.llm.training
        assert not model.tower.training
        assert not any(m.training for m in model.tower.modules())
        with torch.no_grad():
            one, two = (model.encode_video(batch) for _ in range(2))
            assert batch.frames is not None
            assert torch.equal(model.tower(batch.frames), model.tower(batch.frames))
        assert not torch.equal(one, two)  # dropout of the video Q-Former
    finally:
        model.eval()


def test_activation_checkpointing_works_while_the_llm_is_in_evaluation_mode(model: VideoLlama) -> None:
    saving = s.video_llama(activation_checkpointing=True)
    batch = s.pixels((2, 1), s.rows([9, 12]))
    calls: list[int] = []
    block = saving.llm.model.layers[0]
    block.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    for one in (saving, model):
        one.train()
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for name, module in one.video_Qformer.named_modules():
            if name.endswith("attention"):
                module.attention_dropout = 0.0
    gradients = []
    for one in (saving, model):
        one.zero_grad()
        one(batch)["caption"].total.backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.requires_grad})
        one.eval()
    assert len(calls) == 2  # once forward, once again in the backward pass
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_no_graph_and_no_fp32_copy_of_what_is_frozen() -> None:
    half = s.video_llama(llama=s.llama(dtype="bfloat16"), tower=s.tower(dtype="bfloat16"))
    assert {p.dtype for n, p in half.named_parameters() if n.startswith(("llm.", "tower."))} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    made: set[torch.dtype] = set()
    hooks = [
        m.register_forward_hook(lambda m, given, out: made.add(m.weight.dtype))
        for m in half.llm.modules()
        if isinstance(m, nn.Linear)
    ]
    half(s.pixels((2,), s.rows([9])))["caption"].total.backward()
    for hook in hooks:
        hook.remove()
    assert made == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    assert all(p.grad is None for p in half.parameters() if not p.requires_grad)


# ------------------------------------------------------------------------------------------------------- what starts it


def save(model: VideoLlama, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    write_safetensors(folder / WEIGHTS, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    manifest = {
        "format": 1,
        "files": {WEIGHTS: {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": file_hash(folder / WEIGHTS)}},
        "frozen_hash": model.frozen_hash(),
        "recipe": {"model": to_dict(model.config)},
    }
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    return folder


def test_stage_two_begins_with_stage_one(tmp_path: Path) -> None:
    first = s.video_llama()
    with torch.no_grad():
        for p in first.parameters():
            if p.requires_grad:
                p.add_(1.0)
    second = s.video_llama(init_from=save(first, tmp_path / "first"))
    for (name, p), q in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"llama": s.llama(random_seed=1)}, "other frozen weights"),
        ({"tower": s.tower(random_seed=1)}, "other frozen weights"),
        ({"qformer": s.qformer(heads=4)}, r"model\.qformer\.heads: 2 -> 4"),
        ({"tower": s.tower(heads=2)}, r"model\.tower\.heads: 4 -> 2"),
        ({"max_frames": 6}, "video_frame_position_embedding"),
    ],
)
def test_another_stage_one_is_refused(model: VideoLlama, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        s.video_llama(init_from=save(model, tmp_path / "first"), **settings)


def test_stored_tokens_stand_for_any_tower(model: VideoLlama, tmp_path: Path) -> None:
    """A run on features knows no tower: its checkpoint fits the model that sees pixels, and the other way round."""
    blind = s.video_llama(tower=None)
    assert blind.frozen_hash() == model.frozen_hash().split("+")[0]
    s.video_llama(init_from=save(blind, tmp_path / "blind"))
    s.video_llama(tower=None, init_from=save(model, tmp_path / "seeing"))
    other = s.video_llama(tower=None, llama=s.llama(random_seed=1))
    with pytest.raises(UserError, match="other frozen weights"):
        s.video_llama(init_from=save(other, tmp_path / "other"))


def test_projection_of_minigpt4(tmp_path: Path) -> None:
    file = tmp_path / "pretrained_minigpt4.pth"
    want = {"llama_proj.weight": s.noise(1, 32, s.DIM), "llama_proj.bias": s.noise(2, 32)}
    torch.save({"model": {**want, "other": torch.ones(1)}}, file)
    state = s.video_llama(projection_from=file).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in want.items())
    torch.save({"model": {"llama_proj.weight": torch.ones(7, s.DIM), "llama_proj.bias": torch.ones(7)}}, file)
    with pytest.raises(UserError, match="LLaMA of width 32"):
        s.video_llama(projection_from=file)
    torch.save({"model": {"other": torch.ones(1)}}, file)
    with pytest.raises(UserError, match="holds no llama_proj"):
        s.video_llama(projection_from=file)
    with pytest.raises(ValueError, match="init_from"):
        s.video_llama_config(projection_from=file, init_from=tmp_path)


# ------------------------------------------------------------------------------------------------------------ settings


def inputs(**settings: Any) -> SimpleNamespace:
    own = {"num_video_tokens": s.PLACES, "num_frames": 4, "source": "pixels", "tokenizer": None, "vocab_size": s.WORDS}
    return SimpleNamespace(**{**own, **settings})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_video_tokens": 5}, r"inputs\.num_video_tokens is 5, but this model makes 4"),
        ({"num_frames": 6}, r"model\.max_frames is 5"),
        ({"vocab_size": 61}, "another model's"),
    ],
)
def test_inputs_that_do_not_fit(settings: dict[str, Any], match: str) -> None:
    s.video_llama_config().check_inputs(inputs())
    with pytest.raises(UserError, match=match):
        s.video_llama_config().check_inputs(inputs(**settings))


def test_rows_that_no_word_has() -> None:
    """Ziya: 39,410 words, padded to 39,424 rows. Another LLaMA's 32,000 words are still refused there."""
    config, path = s.video_llama_config(llama=s.llama(vocab_size=39_424)), Path(__file__)
    config.check_frames_and_words(inputs(tokenizer=path, vocab_size=39_410), 39_424, path, "model.llama.path")
    with pytest.raises(UserError, match="another model's"):
        config.check_frames_and_words(inputs(tokenizer=path, vocab_size=32_000), 39_424, path, "model.llama.path")


def test_pixels_need_a_tower() -> None:
    s.video_llama_config(tower=None).check_inputs(inputs(source="features"))
    with pytest.raises(UserError, match=r"inputs\.source=features"):
        s.video_llama_config(tower=None).check_inputs(inputs())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tower": s.tower(queries=2)}, r"model\.frame_tokens is 3, but model\.tower\.queries is 2"),
        ({"qformer": s.qformer(dim=32)}, r"model\.qformer\.dim is 32"),
        ({"max_frames": 0}, r"model\.max_frames"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        s.video_llama_config(**settings)


@pytest.mark.parametrize("name", DERIVED)
def test_derived_llamas(name: str) -> None:
    origin, words = DERIVED[name]
    config = llama(name)
    assert config.vocab_size == words
    assert (config.dim, config.layers, config.heads) == SIZES[origin][:3]
    assert llama(name, vocab_size=7).vocab_size == 7


@pytest.mark.parametrize("name", recipe.families()["video_llama"])
def test_recipes_store_big_language_models_in_half_precision(name: str) -> None:
    config = recipe.load(f"video_llama.{name}").model
    llm = getattr(config, "opt", None) or config.llama
    assert llm.dim < 1000 or llm.dtype == "bfloat16"


def test_cost(model: VideoLlama) -> None:
    """The tower has no backward pass; the video Q-Former and the projection have a whole one."""
    batch = s.pixels((2, 2), s.rows([9, 12]))
    cost = model.cost(batch)
    assert cost.unlearned_flops == 4 * s.tower().flops()
    assert batch.frames is not None
    stored = model.cost(replace(batch, frames=None, frame_tokens=model.tower(batch.frames)))
    assert stored == cost._replace(unlearned_flops=0.0)
    text = model.cost(Batch(keys=("t",), views={"caption": s.rows([9, 12], videos=[-1, -1])}))
    qformer = s.qformer().flops(s.DIM, s.PLACES, 2 * s.QUERIES)
    assert cost.trained_flops - text.trained_flops == 2 * (qformer + 2.0 * s.PLACES * s.DIM * 32)
