"""Several processes write one checkpoint together; any number of them, at any ZeRO stage, goes on from it."""

import json
import re
from pathlib import Path

import pytest
from launching import run

from vlm.run import checkpoint

WORKER = str(Path(__file__).with_name("checkpoint_worker.py"))


def result(processes, *arguments):
    printed = run([WORKER, *map(str, arguments)], processes)
    (line,) = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def assert_written(results):
    for setting, found in results.items():
        assert found == {"differ": [[], []], "adam_steps": 4, "left": []}, setting


def test_two_processes_write_what_they_hold_while_training_goes_on(tmp_path):
    settings = ("0", "2", "3", "1 bf16")
    results = result(2, "write", tmp_path, *settings)
    assert results.keys() == set(settings)
    assert_written(results)


@pytest.mark.slow
def test_three_processes_write_what_they_hold(tmp_path):
    settings = ("0", "1", "2", "3", "0 bf16", "2 bf16", "3 bf16", "2 offload", "3 bf16 offload")
    results = result(3, "write", tmp_path, *settings)
    assert results.keys() == set(settings)
    assert_written(results)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("2", "3", "0"), ("3", "1", "2"), ("0", "2 offload", "3")])
def test_two_then_three_then_one_process_at_other_stages(tmp_path, settings):
    whole = result(1, "go_on", tmp_path / "whole", "1", 9)
    pieces = []
    for processes, setting, until in zip((2, 3, 1), settings, (3, 6, 9), strict=True):
        pieces += result(processes, "go_on", tmp_path / "pieces", setting, until)
    assert pieces == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [("full", "rank 1: .*No space left on device"), ("stuck", r"rank 1 is still at this: flushing model\.safetensors")],
)
def test_what_one_rank_cannot_write_all_are_told(tmp_path, how, told):
    """In the time that a save has, and not in a collective of the training."""
    results = result(2, "refuse", tmp_path, how)
    sentences = {sentence for sentence, _, _ in results}
    assert len(sentences) == 1, sentences
    assert re.search(rf"step-00000002: .*{told}", sentences.pop())
    assert all(goes_on and seconds < 20 for _, seconds, goes_on in results)
    assert checkpoint.newest(tmp_path)[0].name == (tmp_path / "latest").read_text().strip() == "step-00000001"
    # rank 0 may still wait for the stuck one: what is left then goes at the next start
    assert how == "stuck" or not list(tmp_path.glob(".step-*"))
