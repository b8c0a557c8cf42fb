"""Micro-batches with video, images, text, or nothing at all, on any rank: never a hang, and the right gradients.

A seeded part of the patterns runs with the slow tests; all of them with

    VLM_MODALITIES=all python -m pytest -m slow tests/run/test_modalities.py -s
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import modalities_worker as w
import pytest
import torch
from launching import run

from vlm.data.clips import ClipConfig
from vlm.data.loader import MicroBatch
from vlm.distributed import World, join
from vlm.recipe import load
from vlm.run.audit import MIN_RECORDS, Audit
from vlm.run.engine import Engine, derive
from vlm.run.modalities import Modalities
from vlm.types import Batch, UserError

ALL = os.environ.get("VLM_MODALITIES") == "all"
STAGES = (0, 2, 3)


def some(patterns: Sequence[w.Pattern], number: int) -> list[w.Pattern]:
    """A seeded choice of them; all where all are asked for."""
    return list(patterns) if ALL else random.Random(0).sample(list(patterns), number)


def compare(system: str, ranks: int, runs: dict[int, list[w.Pattern]]) -> None:
    """At each stage, in one process group, in random order: gradients equal one process on the union, to 1e-5.

    A hang ends by itself: collectives give up after a minute, and the processes are killed after the time limit.
    """
    steps = sum(steps * len(patterns) for steps, patterns in runs.items())
    argument = json.dumps([STAGES, system, runs])
    printed = run([str(Path(w.__file__)), argument], processes=ranks, timeout=600 + 20 * steps)
    results = json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT "))[7:])
    assert [r["stage"] for r in results] == [stage for stage in STAGES for _ in runs]
    for result in results:
        error, name = result["error"]
        print(
            f"{system}, {ranks} ranks, ZeRO {result['stage']}: {result['patterns']} patterns, largest relative error "
            f"{error:.1e} ({name}), {result['seconds']} s"
        )
        assert 0 < error <= 1e-5, result
        assert result["lost_traces"] == 0, f"ZeRO-3 met modules in another order than before: {result}"
        assert all("trainable tensors all had gradients" in line for line in result["audit"][:1]), result
        assert len(result["audit"]) == 1


@pytest.mark.slow
def test_two_ranks() -> None:
    """Two micro-steps of every kind; then four, with ranks that have less than the other, or nothing."""
    compare("video_llama", 2, {2: some(w.every(2, 2), 36), 4: some(w.longer(2, 4, 200), 8)})


@pytest.mark.slow
def test_three_ranks() -> None:
    compare("video_llama", 3, {1: some(w.every(3, 1), 16)})


@pytest.mark.slow
@pytest.mark.parametrize("system", ["llama_vqa", "llmva"])
def test_other_systems(system: str) -> None:
    kinds = random.Random(1).sample(w.every(2, 2), 40)
    compare(system, 2, {2: some(kinds, 3), 4: some(w.longer(2, 4, 20), 1)})


@pytest.mark.slow
def test_what_hangs_is_ended(tmp_path: Path) -> None:
    """The time limit of these tests leaves no process behind."""
    (tmp_path / "hang.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    for seconds in (20, 80, 320):  # where they take longer to begin, they get longer
        with pytest.raises(subprocess.TimeoutExpired):
            run([str(tmp_path / "hang.py")], processes=2, timeout=seconds)
        if all((tmp_path / rank).is_file() for rank in ("0", "1")):
            break
    for rank in ("0", "1"):
        assert not Path("/proc", (tmp_path / rank).read_text()).exists()


# --------------------------------------------------------------------------------------------- in this process alone


@pytest.fixture(scope="module")
def world() -> World:
    return join()


def engine_of(case: w.Case, world: World, steps: int = 1) -> Engine:
    compared = w.Compared(case, 0, steps, world)
    compared.engine.deepspeed.step = compared._step
    return compared.engine


def modalities_of(case: w.Case, world: World, steps: int = 1) -> Modalities:
    return Modalities(True, case.inputs, case.views, steps, world)


def batch(case: w.Case, kind: str, seed: int = 0) -> Batch:
    return w.batch_of(case, w.items_of(case, kind, seed))


@pytest.mark.parametrize("kind", w.KINDS)
def test_a_batch_gets_what_it_lacks_and_keeps_what_it_has(kind: str, world: World) -> None:
    case = w.video_llama()
    before = batch(case, kind)
    (item,) = modalities_of(case, world).complete([MicroBatch(before, 1)])
    after = item.batch
    assert list(after.views) == list(case.views)
    assert all(after.views[name] is rows for name, rows in before.views.items())
    assert all(not after.views[name].targets.numel() for name in set(case.views) - set(before.views))
    if before.frames is None:
        assert after.frames is not None
        assert (len(after.frames), after.frame_counts) == (1, (1,))
        assert not any(rows.slots.numel() for rows in after.views.values())
    else:
        assert after.frames is before.frames
        assert after.frame_counts == before.frame_counts


def test_a_rank_with_less_makes_as_many_micro_steps(world: World) -> None:
    """The same loss and gradient as without the blank micro-batches."""
    case, results = w.video_llama(), []
    for steps in (1, 3):
        result = engine_of(case, world, steps).step([MicroBatch(batch(case, w.MIXED), 1)], lr=0.0)
        results.append((result.loss, result.grad_norm, result.counts))
    assert results[0][2] == results[1][2]
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-6)


def test_a_system_of_clips_makes_as_many_micro_steps(world: World) -> None:
    results = []
    for steps in (1, 2):
        recipe = replace(load("vit_llama.debug"), global_batch_size=4 * steps)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* RANDOM weights")
            model = recipe.model.build()
        config = derive({"train_micro_batch_size_per_gpu": 4}, recipe, world.size)
        assert config["gradient_accumulation_steps"] == steps
        engine = Engine(model, recipe, config, world)
        clips = torch.randn(4, *model.input_shape, generator=torch.Generator().manual_seed(1))
        step = [MicroBatch(Batch(keys=tuple("abcd"), video=clips, label=torch.arange(4)), 1)]
        result = engine.step(step, lr=0.0)
        results.append((result.loss, result.grad_norm))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_clips_are_left_as_they_are(world: World) -> None:
    clips = MicroBatch(Batch(keys=("a",), video=torch.zeros(1)), 1)
    whole = Modalities(False, ClipConfig(num_classes=4), {"label": 1.0}, 2, world).complete([clips])
    assert whole[0] is clips
    assert whole[1].weight == 0
    assert whole[1].batch.target is not None or whole[1].batch.label is not None


def test_what_knows_no_video_gets_none(world: World) -> None:
    """Vamos on captions alone."""
    case = w.llama_vqa()
    blind = replace(case, inputs=replace(case.inputs, use_video=False))
    (item,) = modalities_of(blind, world).complete([MicroBatch(batch(case, w.TEXT), 1)])
    assert item.batch.features is None
    assert list(item.batch.views) == list(case.views)


def test_passages_are_lacking_nowhere(world: World) -> None:
    """A selector runs on every rank too."""
    case = w.llama_vqa()
    choosing = replace(case, inputs=replace(case.inputs, caption="llava", keep_tokens=4))
    (item,) = modalities_of(choosing, world).complete([])
    assert item.batch.passages is not None
    assert item.weight == 0


def test_ranks_that_differ_are_told_before_anything_runs() -> None:
    """Inputs that give no blank: every rank sees it in the sums, none waits for another."""
    two = World(0, 2, 0, torch.device("cpu"), "test")
    case = w.video_llama()
    ranks = [Modalities(True, None, case.views, 2, two) for _ in range(2)]

    def verdict(*kinds: str) -> None:
        steps = [
            one.complete([MicroBatch(batch(case, kind, seed), 1) for seed, kind in enumerate(mine)])
            for one, mine in zip(ranks, kinds)
        ]
        summed = [a + b for a, b in zip(*(one.marks(step) for one, step in zip(ranks, steps)))]
        for one, step in zip(ranks, steps):
            one.check(step, summed)

    verdict("VI", "IM")
    verdict("TT", "TT")
    verdict("TV", "TM")
    with pytest.raises(UserError, match=r"micro-batch 2 of this step.*rank 0: no video, view caption, view dialogue"):
        verdict("VT", "VV")


def test_the_audit_knows_blanks_from_the_dead(world: World) -> None:
    """Zeros of blank videos are no fault of what reads video; zeros where there was one are."""
    case, lines = w.video_llama(), []
    engine = engine_of(case, world)
    audit = Audit(engine, 2, lines.append)

    def go(kinds: str) -> None:
        for seed, kind in enumerate(kinds):
            step = [MicroBatch(batch(case, kind, seed), 1)]
            audit.after_step(seed, 1e-3, step, engine.step(step, lr=1e-3).counts)

    go(w.TEXT * (MIN_RECORDS // 2 + 2))  # of two records each
    count = len(engine.names)
    assert lines[0].startswith(f"audit: 0 of {count} trainable tensors had gradients in steps 1–3; "), lines
    hook = engine.model.llama_proj.register_forward_hook(lambda module, args, out: out.detach() + 0 * out)
    with pytest.raises(UserError, match=r"no gradient, or zeros alone, reached .*video_query_tokens"):
        go(w.VIDEO * (MIN_RECORDS // 2 + 2))
    hook.remove()
