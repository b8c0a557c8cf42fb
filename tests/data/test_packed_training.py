"""Packs planned from the index, in training: what a pack's samples give together is what they give alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from question_shards import shards as make_shards

from vlm.data.loader import MicroBatch, TrainLoader
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.data.stream import Source, Stream
from vlm.recipe import Recipe, load
from vlm.types import Batch, UserError, Visit

LENGTH = 1400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("packed"), videos=9, questions=4) / "train"


def opened(folder: Path, *changes: str, pack: int | None = LENGTH) -> tuple[Recipe, Stream]:
    recipe = load("llama_vqa.debug", changes)
    return recipe, Stream([Source(ShardSet(folder))], 3, recipe.inputs, pack)


def steps(recipe: Recipe, stream: Stream, count: int, world: int = 1) -> Iterator[list[MicroBatch]]:
    loaders = [
        TrainLoader(
            stream, recipe.inputs, views=list(recipe.views), global_batch_size=3, world_size=world, rank=rank,
            micro_batch_size=2, start_step=0, stop_step=count, workers=0,
        )
        for rank in range(world)
    ]  # fmt: skip
    for parts in zip(*loaders, strict=True):
        yield [micro for part in parts for micro in part if micro.weight]


def losses_and_gradients(recipe: Recipe, batches: list[Batch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = recipe.model.build().double()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # gates begin at 0: nothing would flow
    totals: dict[str, float] = {}
    for batch in batches:
        batch.features = None if batch.features is None else batch.features.double()
        terms = model(batch)
        torch.stack([term.total for term in terms.values()]).sum().backward()
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + float(term.total.detach())
    return totals, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [False, True])
def test_losses_and_gradients_are_those_of_the_samples_alone(folder: Path, share: bool) -> None:
    recipe, stream = opened(folder, f"inputs.share_questions={share}", pack=4000 if share else LENGTH)
    packed = [micro.batch for step in steps(recipe, stream, 2) for micro in step]
    placed = [placed for position in range(6) for placed in stream.samples(position)]
    assert len(placed) > 8, "packs hold several samples"
    alone = []
    samples = stream.sets[0].samples
    for one in placed:
        row, part = samples.locate(one.sample)
        examples = recipe.inputs.train(samples.shards.read(row), SampleRng(0), Visit(part, 0, tuple(recipe.views)))
        alone.append(recipe.inputs.collate(examples, SampleRng(0)))
    assert [key for batch in packed for key in batch.keys] == [key for batch in alone for key in batch.keys]
    got, gradients = losses_and_gradients(recipe, packed)
    expected, expected_gradients = losses_and_gradients(recipe, alone)
    assert got == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-9)


def test_the_packs_are_the_same_for_any_number_of_processes(folder: Path) -> None:
    recipe, stream = opened(folder)
    expected = [[key for micro in step for key in micro.batch.keys] for step in steps(recipe, stream, 4)]
    for world in (2, 3):
        assert [[k for micro in step for k in micro.batch.keys] for step in steps(recipe, stream, 4, world)] == expected
    assert len({len(step) for step in expected}) > 1, "steps have as many packs, not samples"


def test_a_pack_that_turns_out_longer_is_counted(folder: Path) -> None:
    recipe, stream = opened(folder)
    within = [micro.batch for step in steps(recipe, stream, 3) for micro in step]
    assert not any(batch.counters.get("packs_too_long") for batch in within)
    stream.pack_length = 300
    longer = [micro.batch for step in steps(recipe, stream, 3) for micro in step]
    assert sum(batch.counters.get("packs_too_long", 0) for batch in longer) >= 3


def test_clips_cannot_be_packed(shape_shards: Path) -> None:
    recipe = load("vit_llama.debug")
    with pytest.raises(UserError, match=r"data\.pack_length=none"):
        Stream([Source(ShardSet(shape_shards / "train"))], 0, recipe.inputs, 100)
