"""Numbers that go wrong: no trace of a refused step, a budget, a way back, and every one of them told."""

import json
import math
from pathlib import Path

import guard_worker
import pytest
from launching import run

from vlm.distributed import join
from vlm.errors import DamagedMemory
from vlm.recipe import GuardConfig, Recipe
from vlm.run import checkpoint
from vlm.run.checkpoint import Progress, Saver
from vlm.run.engine import Here, StepResult
from vlm.run.guard import NAME, Guard, checkpoint_before, not_finite
from vlm.run.log import plain
from vlm.run.rewind import rewind


@pytest.fixture(scope="module")
def world():
    return join()


@pytest.fixture(scope="module")
def engine(world):
    return guard_worker.make_engine(world, 0, "fp32")


def make_guard(engine, folder, known=None, first_step=0, **settings):
    recipe: Recipe = engine.recipe
    recipe.guard, recipe.run_dir = GuardConfig(**settings), folder
    said: list[str] = []
    guard = Guard(recipe, engine, known, first_step, said.append)
    return guard, said


def good(norm=1.0):
    return StepResult(1.0, {"label": 1.0}, {"label": 4}, norm)


def bad(reason="gradient", loss=1.0, norm=math.inf, limit=math.inf):
    return StepResult(loss, {"label": loss}, {"label": 4}, norm, {}, reason, limit, Here(loss, ("a", "b")))


class NoSaver:
    """Nothing has been saved."""

    def __init__(self, root):
        self.root, self.waited = root, 0

    def wait(self):
        self.waited += 1


def lines(folder: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / NAME).read_text().splitlines()]


def test_the_limit_is_a_multiple_of_the_largest_recent_norm(engine, tmp_path):
    guard, _ = make_guard(engine, tmp_path, least=3, window=4, spike_factor=2.0)
    saver = NoSaver(tmp_path)
    for step, norm in enumerate([1.0, 5.0, 0.0], 1):  # 0: a batch without anything to learn
        assert guard.limit == math.inf
        guard.after_step(good(norm), step, saver)
    guard.after_step(good(3.0), 4, saver)
    assert guard.limit == 10.0
    guard.after_step(bad("spike", norm=11.0, limit=10.0), 5, saver)
    assert guard.limit == 10.0, "what was refused is no measure"
    for step in range(6, 9):
        guard.after_step(good(2.0), step, saver)
    assert guard.limit == 6.0, "5.0 is too long ago"
    assert make_guard(engine, tmp_path, guard.state(), spike_factor=0)[0].limit == math.inf


def test_every_skipped_step_is_told_and_written_as_strict_json(engine, tmp_path):
    guard, said = make_guard(engine, tmp_path, skip_budget=3)
    saver = NoSaver(tmp_path)
    assert guard.after_step(bad("loss", loss=math.nan), 4, saver) is False
    assert guard.after_step(bad("gradient", norm=math.inf, limit=7.0), 5, saver) is False
    assert guard.after_step(bad("spike", norm=80.0, limit=7.0), 6, saver) is False
    assert [(row["step"], row["reason"], row["value"], row["limit"]) for row in lines(tmp_path)] == [
        (4, "loss", "nan", None),
        (5, "gradient", "inf", 7.0),
        (6, "spike", 80.0, 7.0),
    ]
    assert lines(tmp_path)[0]["ranks"] == {"0": {"loss": "nan", "keys": ["a", "b"]}}
    assert "step 4 was skipped: the loss is nan (rank 0, samples a, b); 1 of 3 that may be within 200 steps" in said[0]
    assert "the gradient is not finite, though the loss is 1" in said[1]
    assert "the gradient's norm 80 is above 7, a spike" in said[2]
    # a run that goes on from step 4 makes the other two again
    make_guard(engine, tmp_path, guard.state(), first_step=4)
    assert [row["step"] for row in lines(tmp_path)] == [4]


def test_old_skips_leave_the_budget_and_a_spent_one_ends_the_run(engine, tmp_path):
    guard, _ = make_guard(engine, tmp_path, skip_budget=2, budget_steps=10)
    saver = NoSaver(tmp_path)
    for step in (1, 2, 11, 12, 21):
        assert guard.after_step(bad("spike", norm=9.0, limit=1.0), step, saver) is False
    assert guard.state()["skipped"] == [12, 21]
    with pytest.raises(
        FloatingPointError, match=r"3rd of the last 10 steps.*skip_budget=2; there is no checkpoint yet"
    ):
        guard.after_step(bad("spike", norm=9.0, limit=1.0), 21, saver)
    assert saver.waited == 1
    strict, _ = make_guard(engine, tmp_path, skip_budget=0)
    with pytest.raises(FloatingPointError, match=r"the loss is inf \(rank 0, samples a, b\).*guard.skip_budget=0"):
        strict.after_step(bad("loss", loss=math.inf), 1, saver)


def test_what_is_damaged_in_memory_is_named(engine, tmp_path):
    assert not_finite(engine) == []
    parameters = dict(engine.model.named_parameters())
    frozen = next(name for name, p in parameters.items() if not p.requires_grad)
    trained = "head.weight"
    kept = {name: parameters[name].detach().clone() for name in (frozen, trained)}
    parameters[frozen].data.view(-1)[1] = math.inf
    parameters[trained].data.view(-1)[0] = math.nan
    try:
        named = not_finite(engine)
        guard, _ = make_guard(engine, tmp_path)
        told = rf"damaged, with inf or nan: .*{frozen}.*loads them anew"
        with pytest.raises(DamagedMemory, match=told):
            guard.after_step(bad("loss", loss=math.nan), 3, NoSaver(tmp_path))
        with pytest.raises(FloatingPointError, match=told) as error:  # it was loaded so
            guard.after_step(bad("loss", loss=math.nan), 1, NoSaver(tmp_path))
        assert not isinstance(error.value, DamagedMemory)
    finally:
        for name, value in kept.items():
            parameters[name].data.copy_(value)
    assert named == [f"{frozen} (rank 0)", f"{trained} (rank 0)", f"{trained} (its fp32 master) (rank 0)"] or named == [
        f"{trained} (rank 0)",
        f"{frozen} (rank 0)",
        f"{trained} (its fp32 master) (rank 0)",
    ]
    assert [row["step"] for row in lines(tmp_path)] == [3, 1], "the step is told all the same"


@pytest.mark.parametrize(("stage", "precision", "kind"), [(0, "fp32", "gradient"), (2, "fp32", "loss")])
def test_a_refused_step_leaves_no_trace(world, stage, precision, kind):
    """In one process, two of all; test_at_every_stage_in_two_processes has the others."""
    _, want = guard_worker.run(world, stage, precision, None)
    said, have = guard_worker.run(world, stage, precision, kind)
    assert said["skipped"] == kind
    assert have == want


def test_it_goes_back_to_before_the_trouble_and_only_so_often(world, tmp_path):
    engine = guard_worker.make_engine(world, 0, "fp32")
    guard, said = make_guard(engine, tmp_path, skip_budget=1, rollbacks=1, budget_steps=50, least=1, window=3)
    saver = Saver(tmp_path / "checkpoints", engine, keep=3)

    def make_step(step, limit=math.inf):
        result = engine.step(guard_worker.micro_batches(engine, step % 10), lr=1e-3, limit=limit)
        return guard.after_step(result, step, saver)

    for step in (1, 2):
        make_step(step)
    saver.save(Progress(step=2), {"guard": guard.state()})
    saver.wait()
    known, want = guard.state(), guard_worker.state(engine)
    make_step(3)
    assert make_step(4, limit=1e-9) is False
    saver.save(Progress(step=4), {"guard": guard.state()})  # amid the trouble
    saver.wait()
    assert guard_worker.state(engine) != want
    assert make_step(5, limit=1e-9) is True
    assert guard_worker.state(engine) == want
    assert guard.state() == {**known, "skipped": [], "rollbacks": 1}
    row = lines(tmp_path)[-1]
    assert (row["step"], row["reason"], row["to"], row["passed_over"]) == (5, "rolled_back", 2, [3, 5])
    assert "went back to the weights of" in said[-1]
    assert "step 6 is next" in said[-1]
    make_step(6, limit=1e-9)
    with pytest.raises(FloatingPointError, match="after going back to a checkpoint 1 times; the run ends"):
        make_step(7, limit=1e-9)


def test_a_damaged_checkpoint_is_not_gone_back_to(world, engine, tmp_path, capsys):
    saver = Saver(tmp_path, engine, keep=3)
    for step in (2, 4, 6):
        saver.save(Progress(step=step), {})
    saver.wait()
    trains = list(engine.names.values())
    assert checkpoint_before(tmp_path, 5, trains).name == "step-00000004"
    (tmp_path / "step-00000004" / checkpoint.OPTIMIZER).write_bytes(b"")
    assert checkpoint_before(tmp_path, 5, trains).name == "step-00000002"
    assert "passed over a damaged checkpoint" in capsys.readouterr().out
    assert checkpoint_before(tmp_path, 1, trains).name == "step-00000002", "the oldest, where all are of later"
    assert checkpoint_before(tmp_path / "none", 5, trains) is None
    assert checkpoint_before(tmp_path, 5, [*trains, "llama.norm.weight"]) is None, "it did not train then"
    assert rewind(tmp_path / "step-00000002", engine)["step"] == 2


def test_without_a_limit_an_engine_raises(engine):
    batches = guard_worker.micro_batches(engine, 1)
    batches[0].batch.video[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"a loss is not finite.*samples on rank 0: 10, 11, 12"):
        engine.step(batches, lr=1e-3)


def test_numbers_for_strict_json():
    value = {"loss": math.nan, "losses": {"a": math.inf, "b": 1.5}, "keys": ("x", -math.inf), "step": 3, "why": None}
    assert plain(value) == {"loss": None, "losses": {"a": None, "b": 1.5}, "keys": ["x", None], "step": 3, "why": None}
    assert plain(value, str)["keys"] == ["x", "-inf"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("skip_budget", -1), ("budget_steps", 0), ("spike_factor", 1.0), ("spike_factor", math.nan), ("least", 200)],
)
def test_settings_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=rf"guard\.{field} is {value}"):
        GuardConfig(**{field: value})


def zero_worker_run(*arguments: str) -> dict:
    printed = run([str(Path(guard_worker.__file__)), *arguments], processes=2, timeout=1800)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def check(results: dict) -> None:
    for name, told in results.items():
        kind = name.rpartition("/")[2]
        for rank, (said, differs) in enumerate(told):
            assert not differs, f"{name}: on rank {rank} a trace in {differs[:5]}"
            if said is not None:
                assert said["skipped"] == kind, name
        if kind == "loss":
            assert math.isfinite(told[0][0]["loss"])
            assert math.isnan(told[1][0]["loss"])
            assert told[1][0]["keys"] == ["95", "96", "97"], "the micro-batch that was not finite, not the other"


@pytest.mark.slow
def test_at_every_stage_in_two_processes():
    """NaN in a sample of rank 1, inf in a gradient of rank 1 alone, a spike; and a way back. To the bit."""
    results = zero_worker_run("0,1,2,3", "fp32,bf16")
    assert len(results) == 4 * 2 * 4
    check(results)


@pytest.mark.slow
def test_with_an_offloaded_optimizer_in_two_processes():
    """Compiles DeepSpeed's CPU Adam on a fresh machine (one to two minutes)."""
    results = zero_worker_run("2,3", "bf16", "offload")
    assert len(results) == 2 * 4
    check(results)
