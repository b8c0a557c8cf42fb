"""What every system on a causal language model does: losses of views in one pass, scores of options, errors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import small_llama as small
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm.data.packing import Row, pack, pack_trees, share_prefixes
from vlm.models.causal import NO_ANSWER, CausalSystem, join
from vlm.models.vamos import Vamos
from vlm.types import IGNORE, Batch, UserError


class Least(CausalSystem):
    """A system of the least kind: one linear map from features, no prompts."""

    def __init__(self, **settings: bool) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
            llm = small.base().build()
        super().__init__(llm, **settings)
        torch.manual_seed(3)
        self.project = nn.Linear(small.WIDTH, 32)
        self.freeze()

    def encode_video(self, batch: Batch) -> Tensor | None:
        return None if batch.features is None else self.project(batch.features)


def by_hand(model: Least, row: Row, features: Tensor) -> tuple[Tensor, int]:
    """Summed loss of one row through plain transformers calls."""
    text = model.llm.get_input_embeddings()(torch.tensor(row.ids))
    if row.video[1]:
        text = torch.cat([text[: row.video[0]], model.project(features[row.sample]), text[row.video[1] :]])
    model.llm.config._attn_implementation = "sdpa"
    logits = model.llm(inputs_embeds=text[None]).logits[0]
    model.llm.config._attn_implementation = "vlm_causal"
    labels = torch.tensor(row.labels)[1:]
    return functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORE, reduction="sum"), int(
        (labels != IGNORE).sum()
    )


def test_losses_are_those_of_single_rows() -> None:
    model, features = Least(), small.features()
    rows = [small.row(0, 9, 4), small.row(1, 14, 2, sample=1), small.row(2, 6, 3, video=False)]
    batch = Batch(keys=("a", "b"), features=features, views={"answer": pack(rows, small.FRAMES)})
    term = model(batch)["answer"]
    parts = [by_hand(model, row, features) for row in rows]
    torch.testing.assert_close(term.total, sum(part[0] for part in parts), atol=2e-5, rtol=0)
    assert term.count == sum(part[1] for part in parts) == 9
    assert model.counts(batch) == {"answer": 9}


def test_views_share_one_pass_and_keep_their_losses() -> None:
    model = Least()
    batch = small.batch(("answer", "question", "caption"))
    calls: list[int] = []
    model.llm.model.register_forward_hook(lambda *_: calls.append(1))
    together = model(batch)
    assert len(calls) == 1
    assert list(together) == ["answer", "question", "caption"]
    for name, rows in batch.views.items():
        alone = model(replace(batch, views={name: rows}))[name]
        torch.testing.assert_close(alone.total, together[name].total, atol=1e-5, rtol=0)
        assert alone.count == together[name].count == model.counts(batch)[name]


def test_words_are_scored_where_they_are_learnt_alone() -> None:
    model = Least()
    seen: list[int] = []
    model.llm.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    batch = small.batch()
    model(batch)
    assert seen == [batch.views["answer"].targets.numel()]
    assert seen[0] < sum(batch.views["answer"].lengths) / 2


def test_the_last_block_works_where_its_output_is_read() -> None:
    """Training: at the predictors; options of a question: at each place once, though several predict from it."""
    model = Least()
    seen: list[int] = []
    model.llm.model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    batch = small.batch()
    model(batch)
    tree = pack_trees(trees(questions()), small.FRAMES)
    with torch.no_grad():
        model.predict(Batch(keys=("q",), features=small.features(), options=tree))
    assert seen == [batch.views["answer"].targets.numel(), len(set(tree.predictors.tolist()))]
    assert seen[1] < tree.targets.numel()


def questions(num_options: int = 3) -> list[list[Row]]:
    """Two questions on one video, one on another; an option is a letter and an end."""
    made = []
    for number, sample in enumerate((0, 0, 1)):
        head = small.row(50 + sample, 8, 0, sample)
        text = small.row(70 + number, 4 + number, 0).ids
        made.append(
            [
                Row(
                    (*head.ids, *text, 40 + o, 2),
                    (*[IGNORE] * (7 + len(text)), text[-1], 40 + o, 2),
                    head.video,
                    sample,
                )
                for o in range(num_options)
            ]
        )
    return made


def trees(rows: list[list[Row]]) -> list[tuple[list[Row], list[tuple[int, ...]]]]:
    return [share_prefixes(rows[:2]), share_prefixes(rows[2:])]


def separate(rows: list[list[Row]]) -> tuple[list[Row], list[tuple[int, ...]]]:
    flat, leaves = [], []
    for options in rows:
        leaves.append(tuple(range(len(flat), len(flat) + len(options))))
        flat += options
    return flat, leaves


def test_scores_are_mean_losses_however_rows_are_shared() -> None:
    model, rows = Least().eval(), questions()
    flat, leaves = separate(rows)
    packs = (pack(flat, small.FRAMES, leaves), pack_trees(trees(rows), small.FRAMES))
    with torch.no_grad():
        whole, shared = (
            model.predict(Batch(keys=("q",), features=small.features(), options=options)) for options in packs
        )
        by_rows = [[by_hand(model, row, small.features()) for row in options] for options in rows]
    want = torch.tensor([[-float(total) / count for total, count in question] for question in by_rows])
    torch.testing.assert_close(whole, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(shared, want, atol=2e-5, rtol=0)
    assert sum(packs[1].lengths) < 0.5 * sum(packs[0].lengths)


def test_sharing_rows_in_training_keeps_loss_and_gradients() -> None:
    model = small.system(temporal_embedding=True, video_bias=0.5)
    rows = [options[:1] for options in questions()]
    flat, _ = separate(rows)
    gradients = []
    nested = share_prefixes([rows[:2], rows[2:]])
    for packed in (pack(flat, small.FRAMES), pack_trees(trees(rows), small.FRAMES), pack_trees([nested], small.FRAMES)):
        model.zero_grad(set_to_none=True)
        term = model(Batch(keys=("q",), features=small.features(), views={"answer": packed}))["answer"]
        term.total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        gradients[-1]["loss"] = term.total.detach()
    for shared in gradients[1:]:
        assert gradients[0].keys() == shared.keys()
        for name, want in gradients[0].items():
            torch.testing.assert_close(shared[name], want, atol=2e-5, rtol=1e-4, msg=lambda x, n=name: f"{n}: {x}")


def test_options_that_are_not_there_never_win() -> None:
    model, rows = Least().eval(), questions()
    rows[1] = rows[1][:2]
    rows[2][0] = rows[2][0]._replace(labels=(IGNORE,) * len(rows[2][0].ids))  # its answer was cut off
    flat, leaves = separate(rows)
    with torch.no_grad():
        scores = model.predict(Batch(keys=("q",), features=small.features(), options=pack(flat, small.FRAMES, leaves)))
    assert scores.shape == (3, 3)
    assert scores.isfinite().all()
    assert (scores == NO_ANSWER).nonzero().tolist() == [[1, 2], [2, 0]]


def test_what_a_batch_can_lack() -> None:
    model = Least()
    batch = small.batch()
    with pytest.raises(UserError, match="0, 1: a batch without text"):
        model(replace(batch, views={}))
    with pytest.raises(UserError, match="no options"):
        model.predict(batch)
    with pytest.raises(UserError, match="places for video, but the batch has no features"):
        model(replace(batch, features=None))


def test_text_alone_needs_no_features() -> None:
    model = Least()
    rows = pack([small.row(0, 9, 4, video=False)], small.FRAMES)
    term = model(Batch(keys=("a",), views={"caption": rows}))["caption"]
    assert term.count == 4
    total, _ = by_hand(model, small.row(0, 9, 4, video=False), small.features())
    torch.testing.assert_close(term.total, total, atol=1e-5, rtol=0)


def test_join_moves_every_place() -> None:
    batch = small.batch(("answer", "caption"))
    first, second = batch.views.values()
    both = join([first, second])
    shift = sum(first.lengths)
    assert both.lengths == first.lengths + second.lengths
    for name in ("slots", "predictors"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(first, name), getattr(second, name) + shift]))
    assert torch.equal(both.sources, torch.cat([first.sources, second.sources]))
    tree = pack_trees(trees(questions()), small.FRAMES)
    assert join([first, tree]).parents[2:] == tuple(p + 2 if p >= 0 else -1 for p in tree.parents)
    assert join([first]) is first


@pytest.mark.parametrize("kind", ["least", "vamos"])
def test_activation_checkpointing_changes_nothing(kind: str) -> None:
    results = []
    for recompute in (False, True):
        model = (
            Least(activation_checkpointing=recompute)
            if kind == "least"
            else small.system(activation_checkpointing=recompute)
        )
        runs: list[int] = []
        model.llm.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_, seen=runs: seen.append(1))
        model.train()
        term = model(small.batch())["answer"]
        term.total.backward()
        assert len(runs) == 1 + recompute
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert gradient is not None
        assert gradient.any(), name
        assert torch.equal(gradient, results[1][name]), name


def test_only_the_language_model_is_frozen() -> None:
    model = small.system()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"llm.{n}" for n, _ in model.llm.named_parameters()}
    before, hashed = model.frozen_hash(), model._hash_frozen()
    model(small.batch())["answer"].total.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
    assert before == hashed
    assert Vamos.trainable(model, "layers.0.attention.gate")


def test_cost_counts_what_is_computed() -> None:
    model = small.system()
    batch = small.batch()
    cost = model.cost(batch)
    rows = batch.views["answer"]
    assert cost.tokens == sum(rows.lengths)
    linear = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    words = 2 * rows.targets.numel() * 32 * small.WORDS
    read = rows.targets.numel()
    last = (cost.tokens - read) * (32 * 32 * 2 + 3 * 32 * 48)  # keys and values alone are needed everywhere
    assert 2 * read < cost.tokens
    assert cost.frozen_flops == 2 * (cost.tokens * linear - last) + words
    pairs = sum(n * (n + 1) / 2 for n in rows.lengths)
    prompts = 3 * 4 * (2 * 2 * 32 * 16 + 4 * cost.tokens * 32)
    projector = 2 * 2 * small.FRAMES * 32 * small.WIDTH
    assert cost.trained_flops == 4 * (2 * pairs + read * cost.tokens) * 32 + prompts + projector
    shared = model.cost(replace(batch, views={"answer": pack_trees(trees(questions()), small.FRAMES)}))
    whole = model.cost(replace(batch, views={"answer": pack(separate(questions())[0], small.FRAMES)}))
    assert shared.tokens < whole.tokens
    assert shared.trained_flops < whole.trained_flops
