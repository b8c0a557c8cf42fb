"""Names and patterns choose what trains; the rest of a model stays as it is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import small_video as s
from vlm.config import to_dict
from vlm.models.eva import Tower
from vlm.models.freezing import choose, matching
from vlm.models.system import System
from vlm.models.trained import tensors_of
from vlm.nn.mixed import adapt
from vlm.run import checkpoint
from vlm.types import UserError


class Small(System):
    """A frozen base of two parts and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"low": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "high": nn.Linear(4, 4)}).to(dtype)
        self.head = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.freeze()

    def trainable(self, name: str) -> bool:
        return name.startswith("head.")


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


NAMES = ("base.low.weight", "base.low.bias", "blocks.0.w", "blocks.1.w", "blocks.10.w")


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (("base",), {"base.low.weight", "base.low.bias"}),
        (("base.low.bias",), {"base.low.bias"}),
        (("*.bias", "blocks.1"), {"base.low.bias", "blocks.1.w"}),
        (("blocks.[01]",), {"blocks.0.w", "blocks.1.w"}),
        (("*",), set(NAMES)),
        ((), set()),
    ],
)
def test_a_name_means_a_module_a_parameter_or_a_pattern(patterns: tuple[str, ...], found: set[str]) -> None:
    assert matching(NAMES, patterns, "freeze") == found


@pytest.mark.parametrize(("pattern", "hint"), [("base.lo", "did you mean base.low"), ("qqq", "it has base, blocks")])
def test_a_name_that_means_nothing_is_refused(pattern: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"unfreeze={pattern}: the model has no module .*{hint}"):
        matching(NAMES, (pattern,), "unfreeze")


def test_unfreeze_comes_after_freeze() -> None:
    model = Small()
    hashed, fresh = model.frozen_hash(), Small()
    said = choose(model, ("*",), ("base.high", "head.bias"))
    assert trained(model) == {"base.high.weight", "base.high.bias", "head.bias"}
    assert {name for name in dict(model.named_parameters()) if model.trains(name)} == trained(model)
    assert list(model.carried) == ["head.weight"]
    assert torch.equal(model.carried["head.weight"], model.head.weight)
    assert set(tensors_of(model)) == {*trained(model), "head.weight", "seen"}
    assert said == [
        "freeze: 1 tensor (head.weight; 8 parameters) kept from training; checkpoints hold them",
        "unfreeze: 2 tensors (base.high.weight, base.high.bias; 20 parameters) of the frozen base trained too",
    ]
    assert model.frozen_hash() == hashed  # it says where the base came from, whatever trains
    assert set(model.frozen_hashes()) == {name for name, p in fresh.named_parameters() if not p.requires_grad}


def test_without_a_choice_nothing_changes() -> None:
    model = Small()
    assert choose(model, (), ()) == []
    assert trained(model) == {"head.weight", "head.bias"}
    assert not model.carried


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"freeze=\* leaves nothing of Small that trains"):
        choose(Small(), ("*",), ())


def test_what_trains_no_more_is_carried_and_may_train_again() -> None:
    model = Small()
    choose(model, (), ("base.low",))
    with torch.no_grad():
        model.base["low"].weight.fill_(7)
    model.train_only({"head.bias"})
    assert set(model.carried) == {"head.weight", "base.low.weight", "base.low.bias"}
    assert bool((model.carried["base.low.weight"] == 7).all())
    with torch.no_grad():
        model.base["low"].weight.fill_(8)  # as an engine's cast does
    assert bool((model.carried["base.low.weight"] == 7).all())
    model.train_only({"head.bias", "head.weight"})
    assert set(model.carried) == {"base.low.weight", "base.low.bias"}


@pytest.mark.parametrize("name", ["base.low", "base.low.weight", "base.norm", "base.high.bias", "base"])
def test_one_tensor_of_fp32_among_such_of_bf16(name: str) -> None:
    """Its gradient is fp32, and close to that where all is fp32; other layers stay as they are stored."""
    torch.manual_seed(0)
    narrow = Small(torch.bfloat16)
    wide = Small()
    wide.load_state_dict(narrow.state_dict())
    choose(narrow, (), (name,))
    choose(wide, (), (name,))
    layers = {key.rpartition(".")[0] for key in trained(narrow)}
    for key, parameter in narrow.named_parameters():
        assert parameter.dtype == (torch.float32 if key.rpartition(".")[0] in layers else torch.bfloat16), key
    x = torch.randn(16, 3)
    for model in (narrow, wide):
        middle = model.base["norm"](model.base["low"](x if model is wide else x.bfloat16()))
        model.head(model.base["high"](middle).float()).square().sum().backward()
    for (key, have), want in zip(narrow.named_parameters(), wide.parameters()):
        if want.requires_grad:
            assert have.grad is not None
            assert want.grad is not None
            assert have.grad.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(have.grad.flatten(), want.grad.flatten(), dim=0) > 0.99, key


def test_adapting_changes_nothing_where_all_is_of_one_precision() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    want = layer(x)
    adapt(layer)
    adapt(layer)
    assert torch.equal(layer(x), want)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert len(layer._forward_hooks) == 1


# ------------------------------------------------------------------------------------------------ parts of the systems


def gradients(model: System, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    sum(term.total for term in model(batch).values()).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


LLM = (
    "llm.model.layers.1.mlp.up_proj",
    "llm.model.layers.2",
    "llm.lm_head",
    "llm.model.embed_tokens",
    "llm.model.norm",
)
OPT = ("llm.model.decoder.layers.1.fc1", "llm.model.decoder.layers.2", "llm.model.decoder.final_layer_norm")


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "video_llama") for name in LLM), *((name, "llmva") for name in OPT)]
)
def test_a_part_of_a_language_model_of_bf16_trains_in_fp32(name: str, family: str) -> None:
    """Gradients of what trains anyway point where they do with all in fp32; what is unfrozen has some, in fp32."""
    wish: dict[str, dict[str, Any]] = {}
    for dtype in ("float32", "bfloat16"):
        if family == "llmva":
            model: System = s.llmva(opt=s.opt(dtype=dtype))
            batch = s.features((2, 3), s.rows((14, 17), PLACES))
        else:
            model = s.video_llama(llama=s.llama(dtype=dtype), tower=s.tower())
            batch = s.pixels((2, 3), s.rows((14, 17)))
        said = choose(model, (), (name,))
        assert name in said[0]
        wish[dtype] = gradients(model, batch)
    have, want = wish["bfloat16"], wish["float32"]
    assert have.keys() == want.keys()
    news = {key for key in have if key.startswith(name)}
    assert news
    for key in news:
        assert have[key].dtype == torch.float32
        assert bool(have[key].any()), key
    for key in (*news, f"{model.projection}.weight"):  # type: ignore[attr-defined]
        if want[key].norm() > 1e-6:  # that of a key's bias is nothing but rounding
            assert torch.nn.functional.cosine_similarity(have[key].flatten(), want[key].flatten(), dim=0) > 0.98, key


PLACES = s.PLACES + s.OTHER


def test_a_tower_has_a_graph_only_where_some_of_it_trains() -> None:
    model, batch = s.video_llama(), s.pixels((2, 3), s.rows((14, 17)))
    assert isinstance(model.tower, Tower)
    before = gradients(model, batch)
    assert not any(name.startswith("tower.") for name in before)
    assert not model.tower(s.noise(1, 2, 3, s.SIDE, s.SIDE)).requires_grad
    choose(model, (), ("tower.qformer", "tower.query_tokens"))
    after = gradients(model, batch)
    assert bool(after["tower.query_tokens"].any())
    assert not any(name.startswith("tower.vision") for name in after)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not model.tower(s.noise(1, 2, 3, s.SIDE, s.SIDE)).requires_grad


def test_cost_is_that_of_what_trains() -> None:
    """Weights that train cost a third of what is worked out more than frozen ones, a tower without a graph two less."""
    model, batch = s.video_llama(), s.pixels((2, 3), s.rows((14, 17)))
    before = model.cost(batch)
    assert model.chosen_cost(batch) == before
    choose(model, (), ("llm",))
    after = model.chosen_cost(batch)
    assert after.trained_flops == pytest.approx(before.trained_flops + before.frozen_flops)
    assert after.frozen_flops == pytest.approx(0.0)
    assert after.unlearned_flops == before.unlearned_flops > 0
    choose(model, ("video_*", "llama_proj"), ("tower", "video_query_tokens"))
    after = model.chosen_cost(batch)
    assert after.unlearned_flops == 0
    assert after.trained_flops < before.trained_flops + before.unlearned_flops
    assert sum(after[1:]) == pytest.approx(sum(before[1:]))


def stage_one(folder: Any, *unfreeze: str, gebc: bool = False) -> tuple[System, Any]:
    """A model whose every trained tensor has moved, and its checkpoint."""
    model: System = s.llmva() if gebc else s.video_llama()
    choose(model, (), unfreeze)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    state = {"step": 1, "recipe": {"model": to_dict(model.config)}}
    tensors = {name: value.detach().clone() for name, value in tensors_of(model).items()}
    return model, checkpoint.write(folder, state, tensors, {}, model.frozen_hash())


@pytest.mark.parametrize("gebc", [False, True])
def test_stage_two_begins_with_what_stage_one_unfroze(tmp_path: Path, gebc: bool) -> None:
    first, folder = stage_one(tmp_path, "llm.*.1.*norm*", gebc=gebc)
    second = s.llmva(init_from=folder) if gebc else s.video_llama(init_from=folder)
    assert second.carried
    assert all(name.startswith("llm.") for name in second.carried)
    for (name, p), q in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(p, q), name
    choose(second, (), ("llm.*.1.*norm*", "llm.*.2.*norm*"))
    assert not second.carried
    for (name, p), q in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(p, q), name


def test_another_system_takes_its_own_part_of_it(tmp_path: Path) -> None:
    """LLMVA-GEBC from a stage of Video-LLaMA that trained some of a LLaMA that LLMVA does not have."""
    first, folder = stage_one(tmp_path, "llm.model.norm")
    second = s.llmva(init_from=folder)
    assert torch.equal(second.video_query_tokens, first.get_parameter("video_query_tokens"))
    assert not second.carried


def test_what_cannot_be_kept_in_fp32_alone_is_refused() -> None:
    model = s.video_llama(tower=s.tower(dtype="bfloat16"))
    with pytest.raises(UserError, match=r"tower\.query_tokens is stored as bfloat16 .*dtype=float32"):
        choose(model, (), ("tower",))


def test_what_is_stored_in_few_bits_cannot_train() -> None:
    model = Small()
    few = torch.zeros(4, 4, dtype=torch.int8)
    model.base["high"].weight = nn.Parameter(few, requires_grad=False)
    with pytest.raises(UserError, match=r"unfreeze: base\.high\.weight is stored in 8 or 4 bits .*quantise=none"):
        choose(model, (), ("base",))
    assert trained(model) == {"head.weight", "head.bias"}
    choose(model, (), ("base.low",))


if find_spec("bitsandbytes") is not None:

    @pytest.mark.parametrize("bits", ["8bit", "4bit"])
    def test_what_is_quantised_cannot_train(bits: Any) -> None:
        model = s.video_llama(llama=s.llama(quantise=bits))
        with pytest.raises(
            UserError, match=r"unfreeze: llm\.model\.layers\.0\.self_attn\.q_proj\.weight is stored in 8 or"
        ):
            choose(model, (), ("llm",))
        choose(model, (), ("llm.lm_head", "*layernorm*"))  # what is not, can
        assert "llm.model.layers.0.input_layernorm.weight" in trained(model)
