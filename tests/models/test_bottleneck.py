"""Vamos with the token bottleneck: few caption tokens are read, what is learnt reaches the selector, nothing leaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import small_llama as small
import torch

from vlm.config import override, to_dict
from vlm.data.questions import QuestionConfig
from vlm.data.rng import SampleRng
from vlm.models.vamos import SelectorConfig, Vamos, decisive_settings
from vlm.recipe import check_inputs, load
from vlm.types import Batch, Record, UserError, Visit

SEGMENT = 8
CAPTION = "a red circle moves up. it is a dark day. there is a tree."


def inputs(**settings: Any) -> QuestionConfig:
    return QuestionConfig(
        **{
            "num_frames": small.FRAMES,
            "feature_dim": small.WIDTH,
            "use_video": False,
            "caption": "c",
            "max_length": 600,
            **settings,
        }
    )


def record(key: str = "v", caption: str = CAPTION, questions: int = 2) -> Record:
    rows = [{"question": f"which way {n}", "options": ["up", "down", "left"], "answer": n} for n in range(questions)]
    annotation = {"questions": rows, "captions": {"c": caption}}
    return Record(
        key=key, shard="s", row=0, video=None, annotation=annotation, num_frames=-1, fps=0.0, decoders=(), members={}
    )


def system(keep: int | None = SEGMENT, **settings: Any) -> Vamos:
    selector = None if keep is None else SelectorConfig(keep=keep, width=16, heads=2)
    return small.system(small.base(vocab_size=320), use_video=False, selector=selector, **settings)


def trained_on(config: QuestionConfig, *records: Record) -> Batch:
    found = [config.train(r, SampleRng(0), Visit(1, 0, ("answer",)))[0] for r in records]
    return config.collate(found, SampleRng(0))


def asked_on(config: QuestionConfig, *records: Record) -> Batch:
    return config.test_batch([config.all_views(r, SampleRng(0), ())[""][0] for r in records])


def test_all_tokens_kept_is_the_model_without_a_bottleneck() -> None:
    """The same losses, gradients and scores, where the bottleneck is as wide as the caption."""
    whole, wide = system(keep=None), system(keep=len(CAPTION))
    wide.load_state_dict(whole.state_dict(), strict=False)
    plain, narrow = inputs(), inputs(keep_tokens=len(CAPTION))
    losses = [m(trained_on(c, record()))["answer"] for m, c in ((whole, plain), (wide, narrow))]
    assert losses[0].count == losses[1].count
    assert torch.equal(losses[0].total, losses[1].total)
    for term in losses:
        term.total.backward()
    assert torch.allclose(whole.adapter_query.weight.grad, wide.adapter_query.weight.grad, atol=1e-7)
    scores = [
        m.eval().predict(asked_on(c, record(), record("w", "b" + CAPTION[1:])))
        for m, c in ((whole, plain), (wide, narrow))
    ]
    assert torch.allclose(scores[0], scores[1], atol=1e-6)


@pytest.mark.parametrize("chosen_for", ["question", "caption"])
def test_the_language_model_reads_the_kept_tokens_alone(chosen_for: str) -> None:
    model, config = system().eval(), inputs(keep_tokens=SEGMENT, select_for=chosen_for)
    batch, plain = asked_on(config, record()), asked_on(inputs(), record())
    saved = sum(plain.options.lengths) - sum(batch.options.lengths)
    if chosen_for == "caption":
        assert saved == len(CAPTION) - SEGMENT
    else:  # what questions have in common behind the caption is read for each, since their captions differ
        assert 0 < saved < len(CAPTION) - 2 * SEGMENT
    read = []
    model.llm.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    scores = model.predict(batch)
    assert scores.shape == (2, 3)
    _, chosen = model.choose(batch.passages)
    words = model.llm.get_input_embeddings()(batch.passages.tokens[chosen])
    assert torch.equal(read[0][0, batch.options.pick_slots], words[batch.options.pick_sources])


def test_what_is_not_chosen_does_not_matter() -> None:
    """Tests are the same every time, and a caption's other tokens are never read by the language model."""
    model, config = system().eval(), inputs(keep_tokens=SEGMENT)
    batch = asked_on(config, record())
    scores = model.predict(batch)
    assert torch.equal(scores, model.predict(batch))
    _, chosen = model.choose(batch.passages)
    fixed = model.llm.get_input_embeddings()(batch.passages.tokens)[chosen].detach()
    model.choose = lambda passages: (fixed, chosen)  # type: ignore[method-assign]
    other = replace(batch, passages=replace(batch.passages, tokens=batch.passages.tokens.flip(0)))
    assert torch.equal(scores, model.predict(other))


def test_a_video_does_not_depend_on_the_rest_of_its_batch() -> None:
    model, config = system().eval(), inputs(keep_tokens=SEGMENT)
    one, two = record("v"), record("w", "no circle here, but a long blue square that moves down and down again.")
    together = model.predict(asked_on(config, one, two))
    alone = torch.cat([model.predict(asked_on(config, r)) for r in (one, two)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[:2], together[2:], atol=1e-4)


@pytest.mark.parametrize("chosen_for", ["question", "question_options", "caption"])
def test_sharing_leaves_losses_as_they_are(chosen_for: str) -> None:
    """One tree of a video's questions, or a row for each."""
    model = system().eval()
    config = inputs(keep_tokens=SEGMENT, select_for=chosen_for)
    shared = replace(config, share_questions=True)
    tree = shared.collate(shared.train(record(), SampleRng(0), Visit(None, 0, ("answer",))), SampleRng(0))
    rows = config.collate(
        [config.train(record(), SampleRng(0), Visit(n, 0, ("answer",)))[0] for n in range(2)], SampleRng(0)
    )
    assert sum(tree.views["answer"].lengths) < sum(rows.views["answer"].lengths)
    with torch.no_grad():
        assert float(model(tree)["answer"].total) == pytest.approx(float(model(rows)["answer"].total), rel=1e-5)


def test_gradients_reach_the_selector() -> None:
    """In training; the LLaMA stays frozen. Where there is nothing to choose, the audit is told so."""
    model = system(activation_checkpointing=True).train()
    batch = trained_on(inputs(keep_tokens=SEGMENT), record())
    model(batch)["answer"].total.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == model.trainable(name), name
    names = [name for name, _ in model.named_parameters() if name.startswith("selector.")]
    assert len(names) > 8
    assert all(model.reached(name, batch) for name in names)
    short = trained_on(inputs(keep_tokens=SEGMENT), record(caption="up down"))
    assert not any(model.reached(name, short) for name in names)
    none = trained_on(inputs(keep_tokens=SEGMENT), record(caption=""))
    assert not any(model.reached(name, none) for name in names)
    assert torch.isfinite(model(none)["answer"].total)


def test_video_and_bottleneck_together() -> None:
    config = inputs(keep_tokens=SEGMENT, use_video=True)
    selector = SelectorConfig(keep=SEGMENT, width=16, heads=2)
    model = small.system(small.base(vocab_size=320), selector=selector)
    example = replace(
        inputs(keep_tokens=SEGMENT).train(record(), SampleRng(0), Visit(1, 0, ("answer",)))[0],
        features=small.features(1),
    )
    batch = config.collate([example], SampleRng(0))
    model(batch)["answer"].total.backward()
    assert model.selector.score.weight.grad.any()


def test_inputs_and_model_must_agree() -> None:
    recipe = load("vamos.nextqa_bottleneck")
    recipe = replace(recipe, inputs=replace(recipe.inputs, tokenizer=None))
    with pytest.raises(UserError, match=r"keeps 40 tokens of a caption, but inputs\.keep_tokens is 20"):
        check_inputs(override(recipe, ["inputs.keep_tokens=20"]))
    with pytest.raises(UserError, match=r"keeps all tokens of a caption, but inputs\.keep_tokens is 40"):
        check_inputs(override(recipe, ["model.selector=none"]))
    model, batch = system(keep=None), asked_on(inputs(keep_tokens=SEGMENT), record())
    with pytest.raises(UserError, match="this model has no selector"):
        model.predict(batch)


def test_published_recipe() -> None:
    recipe = load("vamos.nextqa_bottleneck")
    assert (recipe.model.selector.keep, recipe.inputs.keep_tokens, recipe.inputs.select_for) == (40, 40, "question")
    with torch.device("meta"):
        names = {n for n, p in recipe.model.build().named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in names} == {
        "adapter_query",
        "layers",
        "selector",
    }  # what the original's rule trains
    whole = load("vamos.nextqa_cap")
    assert decisive_settings(to_dict(whole.model)) != decisive_settings(to_dict(recipe.model))
    stored = to_dict(whole.model)
    del stored["selector"]  # of a run made before there was one
    assert decisive_settings(stored) == decisive_settings(to_dict(whole.model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "selector.keep is 0"),
        ({"temperature": 0.0}, "selector.temperature is 0.0"),
        ({"width": 30, "heads": 4}, "does not divide into 4 heads"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectorConfig(**settings)
