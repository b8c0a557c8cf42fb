"""The gradient audit stops a run by name, at every ZeRO stage in two real processes, and raises no false alarm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import vamos_worker
from launching import run
from torch import nn

from vlm.config import override
from vlm.data.loader import MicroBatch
from vlm.data.packing import Row, pack
from vlm.distributed import join
from vlm.recipe import load
from vlm.run import zero_state
from vlm.run.audit import MIN_RECORDS, Audit, checksums
from vlm.run.engine import Engine, derive
from vlm.types import IGNORE, Batch, UserError


def test_what_is_broken_is_named_at_every_zero_stage() -> None:
    """Gates start at 0 and the first learning rate is 0, and the sound part of each case passes all the same."""
    printed = run([str(Path(__file__).parent / "audit_worker.py"), "0,1,2_bf16,3"], processes=2)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    results = json.loads(line.removeprefix("RESULT "))
    assert set(results) == {"0", "1", "2_bf16", "3"}
    for stage, ways in results.items():
        sound, moved = ways["frozen"]
        assert sound == "audit: 7 trainable tensors all had gradients in steps 1–5; 30 frozen tensors unchanged", stage
        assert "frozen tensors changed: llm.model.layers.1.mlp.up_proj.weight (1 of 30)" in moved, stage
        assert ways["hooks"] == [], f"stage {stage}: the audit goes on costing time"
        assert len(ways["lost"]) == 1
        assert "gradients of layers.2.attention.gate1 (1 of 7 trainable tensors), but the optimizer" in ways["lost"][0]
        assert "error: gradient audit, steps 1 to 6: no gradient" in ways["cut"][-1], stage
        assert "reached visual_proj.weight (1 of 7 trainable tensors)" in ways["cut"][-1], stage
        (missing,) = ways["checkpoint"]
        assert "1 missing:\n  temporal_emb.weight" in missing, stage


@pytest.fixture(scope="module")
def world():
    return join()


def make_engine(recipe, model, world):
    return Engine(model, recipe, derive({"train_micro_batch_size_per_gpu": 8}, recipe, world.size), world)


def go(engine, audit, batches, lr=1e-3):
    for step, batch in enumerate(batches):
        micro = [MicroBatch(batch, 1)]
        audit.after_step(step, lr, micro, engine.step(micro, lr=lr).counts)


def test_stochastic_depth_is_no_false_alarm(world) -> None:
    """One clip a step, a third of all branches left out: judged after 16 records, not after three steps."""
    recipe = override(load("vit_llama.debug"), ["global_batch_size=1", "model.drop_path=0.6", "model.init_values=0.1"])
    for seed in range(4):
        torch.manual_seed(seed)
        model, lines = recipe.model.build(), []
        clips = torch.randn(6, 1, *model.input_shape)
        engine = make_engine(recipe, model, world)
        audit = Audit(engine, 1, lines.append)
        go(engine, audit, [Batch(keys=("a",), video=clip, label=torch.tensor([1])) for clip in clips])
        audit.finish()
        assert lines[0].startswith("audit: ")
        assert "10 frozen tensors unchanged" in lines[0]


def test_masked_pretraining_passes(world) -> None:
    recipe = override(load("video_mae.debug"), ["model.drop_path=0.2"])
    torch.manual_seed(0)
    model, lines = recipe.model.build(), []
    mask = torch.zeros(8, model.config.num_tokens, dtype=torch.bool)
    mask[:, ::2] = True
    batches = [Batch(keys=tuple("abcdefgh"), video=torch.randn(8, *model.input_shape), mask=mask) for _ in range(4)]
    engine = make_engine(recipe, model, world)
    audit = Audit(engine, recipe.audit_steps, lines.append)
    go(engine, audit, batches)
    audit.finish()
    count = len(list(model.parameters()))
    assert lines == [f"audit: {count} trainable tensors all had gradients in steps 1–4; 0 frozen tensors unchanged"]


def text_only(batch: Batch) -> Batch:
    """The same rows, their video places taken by words."""
    places = range(len(batch.keys))
    rows = [Row((3, 4, 5, 6, 7, 8 + place), (IGNORE,) * 4 + (7, 8 + place), (0, 0), place) for place in places]
    return replace(batch, features=None, views={"answer": pack(rows, vamos_worker.FRAMES)})


def test_text_does_not_blame_the_projector(world) -> None:
    """Epochs on text alone: what reads video is watched until a batch reaches it."""
    recipe, model, lines = vamos_worker.recipe(), vamos_worker.build(), []
    engine = make_engine(recipe, model, world)
    batches = [vamos_worker.batch_of(range(5 * step, 5 * step + 5)) for step in range(8)]
    audit = Audit(engine, 3, lines.append)
    go(engine, audit, [text_only(batch) for batch in batches[:7]])
    unreached = "temporal_emb.weight, layers.1.attention.gate2, layers.2.attention.gate2"
    for name in ("visual_proj.weight", *unreached.split(", ")):
        assert name in lines[0].split("for want of records that reach them: ")[1]
    assert lines[0].startswith("audit: 3 of 7 trainable tensors had gradients in steps 1–4; 30 frozen")
    assert lines[0].endswith("; nothing to learn so far for the view question, video_order")
    go(engine, audit, batches[7:])
    assert lines[1].startswith("audit: step 1: gradients now in visual_proj.weight, ")
    audit.finish()
    assert len(lines) == 2


def test_what_never_had_a_chance_is_said_at_the_end(world) -> None:
    recipe, lines = vamos_worker.recipe(), []
    engine = make_engine(recipe, vamos_worker.build(), world)
    audit = Audit(engine, 1, lines.append)
    go(engine, audit, [text_only(vamos_worker.batch_of(range(5)))] * 3)
    audit.finish()
    assert "no batch of this run gave a gradient to visual_proj.weight, " in lines[-1]


def test_batches_without_a_label_stop_the_run(world) -> None:
    """Not the first of them, whose loss is 0: with one sample a step an answer that was cut away is no fault."""
    engine = make_engine(vamos_worker.recipe(), vamos_worker.build(), world)
    rows = [Row((3, 4, 5), (IGNORE,) * 3, (0, 0), place) for place in range(2)]
    batch = Batch(keys=("first", "second"), views={"answer": pack(rows, vamos_worker.FRAMES)})
    for _ in range(2):
        for _ in range(2):
            result = engine.step([MicroBatch(batch, 1)], lr=1e-3)
            assert (result.loss, result.grad_norm, result.counts["answer"]) == (0.0, 0.0, 0)
        assert engine.step([MicroBatch(vamos_worker.batch_of(range(2)), 1)], lr=1e-3).loss > 0
    with pytest.raises(UserError, match=r"anything to learn in 3 whole batches.*first, second"):
        for _ in range(3):
            engine.step([MicroBatch(batch, 1)], lr=1e-3)


def test_a_choice_that_contradicts_itself_is_refused(world) -> None:
    recipe, model = vamos_worker.recipe(), vamos_worker.build()
    model.temporal_emb.weight.requires_grad_(False)
    engine = make_engine(recipe, model, world)
    with pytest.raises(UserError, match=r"temporal_emb\.weight: requires_grad says otherwise than Vamos\.trainable"):
        Audit(engine, 3, print)
    Audit(engine, 0, print)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_is_the_same_with_and_without(world, stage) -> None:
    """To the bit: looking does not touch moments, masters or random numbers."""
    ends = []
    for audited in (0, 2):
        recipe, model = vamos_worker.recipe(), vamos_worker.build()
        hardware = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}}
        engine = Engine(model, recipe, derive(hardware, recipe, world.size), world)
        audit = Audit(engine, audited, lambda line: None)
        go(engine, audit, [vamos_worker.batch_of(range(5 * step, 5 * step + 5)) for step in range(4)], lr=1e-2)
        audit.finish()
        ends.append({name: values["param"] for name, values in zero_state.read(engine)})
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_off_means_off(world) -> None:
    recipe, model, lines = vamos_worker.recipe(), vamos_worker.build(), []
    engine = make_engine(recipe, model, world)
    audit = Audit(engine, 0, lines.append)
    go(engine, audit, [vamos_worker.batch_of(range(5))])
    audit.finish()
    assert lines == []
    assert not any(p._backward_hooks for p in model.parameters())
    with pytest.raises(ValueError, match="audit_steps is -1"):
        override(load("vit_llama.debug"), ["audit_steps=-1"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20, (1 << 23) + 3])
def test_a_checksum_sees_one_bit_and_an_exchange(dtype, size) -> None:
    weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype))

    def checksum():
        return checksums({"weight": weight})["weight"]

    before = checksum()
    bits = weight.data.view(torch.uint8)
    for place in {0, bits.numel() // 2, bits.numel() - 1}:
        for bit in (1, 128):
            bits[place] ^= bit
            assert checksum() != before
            bits[place] ^= bit
    assert checksum() == before
    changes = [lambda: weight.data.neg_(), lambda: weight.data.view(torch.uint8).bitwise_not_()]
    if size > 8:
        changes += [lambda: weight.data.copy_(weight.data.flip(0)), lambda: weight.data[:8].copy_(weight.data[8:16])]
    original = weight.data.clone()
    for change in changes:
        change()
        assert checksum() != before
        weight.data.copy_(original)
    assert checksum() == before


def test_a_checksum_does_not_depend_on_where_a_tensor_lies() -> None:
    storage = torch.randn(101)
    apart = nn.Parameter(storage[1:].clone())
    part = nn.Parameter(storage[1:])
    assert checksums({"a": apart})["a"] == checksums({"a": part})["a"]


def test_few_records_condemn_nothing(world) -> None:
    """A branch left out by chance in three steps of one record each must not stop a run."""
    recipe = override(load("vit_llama.debug"), ["global_batch_size=1"])
    torch.manual_seed(0)
    model = recipe.model.build()
    engine = make_engine(recipe, model, world)
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 0)
    audit = Audit(engine, 3, lambda line: None)
    batch = Batch(keys=("a",), video=torch.randn(1, *model.input_shape), label=torch.tensor([1]))
    go(engine, audit, [batch] * MIN_RECORDS)  # the first step does not count: no gate could have moved before it
    with pytest.raises(UserError, match=r"blocks\.0\.norm2\.weight.*blocks\.0\.mlp\.fc2\.bias"):
        go(engine, audit, [batch])
    handle.remove()
