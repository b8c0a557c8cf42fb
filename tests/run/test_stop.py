"""A signal ends a run at the next step's end, also the last one."""

import json
import os
import signal

import pytest

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
