"""Video-ChatGPT's variant (Breakfast, 50Salads) against numbers recorded from the original: loss, logits, gradients,
written text.

Measured (largest differences): loss 5e-7, logits 1.3e-5, gradients 2e-6, their norms 4e-6 relative; written tokens
equal.

What the original cannot: more than one video in a batch, rows without video, a second pass over the same features, text
written without a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vcgpt_models as v
from torch import Tensor
from torch.testing import assert_close

from vlm.data.packing import Row, pack
from vlm.models.generation import GenerationConfig, generate
from vlm.models.video_chatgpt import VideoChatGpt, breakfast_variant
from vlm.types import IGNORE, Batch, TextRows

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def values(load_golden: Load) -> Any:
    return load_golden("vllama_fork_forward.pt")


@pytest.fixture(scope="module")
def model(values: Any) -> VideoChatGpt:
    c = values["config"]
    return v.build(
        c,
        values["state_dict"],
        c["temporal_size"],
        frame_tokens=c["num_clip_states"],
        positional_encodings=True,
        fusion=True,
        fusion_scale=c["fusion_scale"],
        train_also=breakfast_variant().train_also,
    )


def patch(model: VideoChatGpt) -> int:
    return model.config.llama.vocab_size


@pytest.fixture
def batch(values: Any, model: VideoChatGpt) -> Batch:
    return v.batch(values["inputs"]["features"].clone(), v.rows(values["inputs"], patch(model)))


def test_loss(values: Any, model: VideoChatGpt, batch: Batch) -> None:
    assert_close(v.learn(model, batch), values["outputs"]["loss"], **v.LOSS)


def test_logits(values: Any, model: VideoChatGpt, batch: Batch) -> None:
    want = values["outputs"]["logits"]
    have = v.logits(model, batch, values["inputs"]["input_ids"].shape[1])
    assert_close(have[:, -want.shape[1] :], want, **v.LOGITS)


def test_gradients(values: Any, model: VideoChatGpt, batch: Batch) -> None:
    """The original's embedding has gradients in the rows of the two marks alone, since it detaches the others."""
    want = values["outputs"]
    v.learn(model, batch)
    norms = v.gradient_norms(model)
    assert norms.keys() == {name for name, norm in want["grad_norms"].items() if norm is not None}
    for name, norm in norms.items():
        assert_close(
            norm, want["grad_norms"][name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert_close(model.mm_projector.weight.grad, want["mm_projector_weight_grad"], **v.GRADIENTS)
    assert_close(model.reducers[0].weight.grad, want["reducers0_weight_grad"], **v.GRADIENTS)
    for encoding, gradient in zip(model.pes, want["pes_grad"], strict=True):
        assert_close(encoding.positional_encodings.grad, gradient, **v.GRADIENTS)


def test_what_trains(values: Any, model: VideoChatGpt) -> None:
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    recorded = {v.recorded(name) for name in trained - {"video_marks"}}
    assert recorded | {"model.embed_tokens.weight"} == set(values["trainable"])


def test_features_stay_as_they_are(values: Any, model: VideoChatGpt, batch: Batch) -> None:
    """The original adds its encodings to the features that it is given, and once more at each further pass."""
    states = values["inputs"]["features"]
    added = torch.stack([pe(states[:, :, n]) for n, pe in enumerate(model.pes)], dim=2)
    assert_close(added, values["outputs"]["features_after_inplace_pe"], rtol=0.0, atol=1e-6)
    with torch.no_grad():
        first, again = (model(batch)["dialogue"].total for _ in range(2))
    assert first == again
    assert torch.equal(batch.frame_tokens, states.flatten(0, 1))


def test_greedy(values: Any, model: VideoChatGpt) -> None:
    """With a cache, as recorded; and by whole passes, where the original writes something else."""
    recorded = values["generation"]
    want = recorded["new_tokens_cache"][0].tolist()
    prompts = v.prompt(recorded["input_ids"], patch(model))
    given = v.batch(values["inputs"]["features"], None, prompts)
    config = GenerationConfig(max_new_tokens=len(want))
    assert generate(model, given, config, ends=[[values["config"]["eos_token_id"]]]) == [want]
    assert by_hand(model, given, prompts, len(want)) == want


@torch.no_grad()
def by_hand(model: VideoChatGpt, given: Batch, prompts: TextRows, count: int) -> list[int]:
    """The likeliest words, the whole row anew for each."""
    ids, slots = prompts.tokens.tolist(), prompts.slots.tolist()
    first = len(ids)
    while len(ids) < first + count:
        row = Row(tuple(ids), (IGNORE,) * len(ids), (slots[0], slots[-1] + 1))
        rows = pack([row], len(slots))
        ids.append(int(model.logits(model.read(["dialogue"], [rows], given)[-1:]).argmax()))
    return ids[first:]


class TestBatches:
    """The original fails on a batch of two, and without features."""

    @pytest.fixture
    def two(self, values: Any) -> Tensor:
        states = values["inputs"]["features"]
        return torch.cat([states, 0.5 * states.flip(1)])

    def rows(self, values: Any, model: VideoChatGpt, copies: int) -> TextRows:
        names = ("input_ids", "labels", "attention_mask")
        return v.rows({name: values["inputs"][name].repeat(copies, 1) for name in names}, patch(model))

    def test_two_videos(self, values: Any, model: VideoChatGpt, two: Tensor) -> None:
        assert values["errors"]["batch_size_2"] is not None
        together = v.learn(model, v.batch(two, self.rows(values, model, 2)))
        gradient = model.reducers[0].weight.grad.clone()
        alone, gradients = [], []
        for number in range(2):
            alone.append(v.learn(model, v.batch(two[number : number + 1], self.rows(values, model, 1))))
            gradients.append(model.reducers[0].weight.grad.clone())
        assert alone[0] == pytest.approx(values["outputs"]["loss"], abs=1e-5)
        assert abs(alone[0] - alone[1]) > 1e-3
        assert together == pytest.approx(sum(alone) / 2, abs=1e-5)
        assert_close(gradient, sum(gradients) / 2, **v.GRADIENTS)

    def test_text_alone(self, values: Any, model: VideoChatGpt, two: Tensor) -> None:
        assert values["errors"]["no_features"] is not None
        text = Row(tuple(range(3, 20)), (*[IGNORE] * 9, *range(12, 20)))
        with torch.no_grad():
            bare = Batch(keys=("a",), views={"dialogue": pack([text], two.shape[1])})
            beside = v.batch(two, pack([text], two.shape[1]))
            assert model(bare)["dialogue"].total == pytest.approx(float(model(beside)["dialogue"].total), abs=1e-5)
