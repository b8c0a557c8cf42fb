"""A signal ends a run at the next step's end, also the last one."""

import json
import os
import signal

import pytest
from launching import run, train_arguments

from vlm.config import override
from vlm.distributed import join
from vlm.errors import Preempted
from vlm.recipe import load
from vlm.run import evaluate
from vlm.run.checkpoint import Saver
from vlm.run.train import train

HARDWARE = {"train_micro_batch_size_per_gpu": 32}


def recipe_at(shards, run_dir):
    settings = [f"data.shards={shards / 'train'}", "data.workers=0", f"eval.shards={shards / 'test'}", "eval.workers=0"]
    return override(load("vit_llama.debug"), [*settings, f"run_dir={run_dir}", "steps=2", "global_batch_size=8"])


def test_a_signal_within_the_last_step_is_not_forgotten(shape_shards, tmp_path, monkeypatch):
    world, recipe = join(), recipe_at(shape_shards, tmp_path / "run")
    waiting, evaluating, evaluated = Saver.wait, evaluate.run, []

    def wait(saver):
        os.kill(os.getpid(), signal.SIGTERM)
        waiting(saver)

    def run(*arguments):
        evaluated.append(arguments)
        return evaluating(*arguments)

    monkeypatch.setattr(evaluate, "run", run)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="SIGTERM came; saved at step 2"):
        patch.setattr(Saver, "wait", wait)
        train(recipe, "vit_llama.debug", [], HARDWARE, world)
    assert not evaluated
    stopped = json.loads((tmp_path / "run" / "recipe.json").read_text())["stopped"]
    assert stopped == [{"step": 2, "why": "SIGTERM"}]

    train(recipe, "vit_llama.debug", [], HARDWARE, world)
    assert len(evaluated) == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_test_within_training_is_broken_off_and_made_when_the_run_goes_on(
    shape_shards, tmp_path, monkeypatch, capsys
):
    settings = ["eval.every=1", "eval.metric=top1", "eval.at_end=false"]
    whole, stopped = (override(recipe_at(shape_shards, tmp_path / name), settings) for name in ("whole", "stopped"))
    train(whole, "vit_llama.debug", [], HARDWARE, join())
    capsys.readouterr()
    testing = evaluate.is_best

    def stop_in_test(number):
        """Run on, with a signal while this many tests are behind it."""
        tests = []

        def is_best(recipe, engine, world, progress, *rest):
            if len(tests) == number:
                os.kill(os.getpid(), signal.SIGUSR1)
            tests.append(progress.step)
            return testing(recipe, engine, world, progress, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "is_best", is_best)
            train(stopped, "vit_llama.debug", [], HARDWARE, join())

    # In the test of step 1, in that test when the run goes on with it, and in that of step 2, the last.
    for number, step in ((0, 1), (0, 1), (1, 2)):
        with pytest.raises(Preempted, match=f"SIGUSR1 came; saved at step {step}"):
            stop_in_test(number)
        said = capsys.readouterr().out
        assert f"the test of step {step} was stopped by a signal" in said
        assert f"step {step}: top1" not in said
        assert state_of(stopped, step)["untested"]
    train(stopped, "vit_llama.debug", [], HARDWARE, join())
    assert "step 2: top1" in capsys.readouterr().out
    assert not state_of(whole, 2)["untested"]
    best = (stopped.run_dir / "checkpoints" / "best").read_text()
    assert best == (whole.run_dir / "checkpoints" / "best").read_text()


SIGNALLED = """
import os, signal
from vlm.run import evaluate
from vlm.run.command import finish, train_main

reading, calls = evaluate._next_group, []

def next_group(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return reading(*arguments)

evaluate._next_group = next_group
finish(train_main())
"""


@pytest.mark.slow
def test_a_signal_to_one_rank_breaks_off_the_test_of_all(shape_shards, tmp_path):
    settings = ["steps=2", "eval.every=1", "eval.metric=top1", "eval.at_end=false", "eval.batch_size=2"]
    arguments = train_arguments(shape_shards, tmp_path / "run", *settings)
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    printed = run([str(tmp_path / "signalled.py"), *arguments[1:]], 2, expect=1)  # torchrun says 1 for any
    assert "the test of step 1 was stopped by a signal" in printed
    assert "saved at step 1; the same command goes on" in printed
    assert "exitcode  : 85" in printed or "exitcode: 85" in printed, printed[-3000:]
    printed = run(arguments, 2)
    assert printed.index("step 1: top1") < printed.index("step 2: top1")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def state_of(recipe, step):
    return json.loads((recipe.run_dir / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
