"""Numbers that go wrong in real runs of two processes: what a user sees, and that a restart changes nothing."""

import json
from pathlib import Path

import pytest
from launching import run, train_arguments
from test_train import assert_same_end, final, kill_after_step, rows

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SETTINGS = ["checkpoint_every=3", "checkpoint_keep=3", "global_batch_size=4", "eval.at_end=false"]


def arguments(shards: Path, tmp_path: Path, name: str, *overrides: str, stage: int = 2) -> list[str]:
    hardware = tmp_path / f"zero{stage}.json"
    section = {"stage": stage, "reduce_bucket_size": 1_000_000}
    hardware.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}))
    words = train_arguments(shards, tmp_path / name, *SETTINGS, *overrides)
    words[0] = str(HERE / "guard_run.py")
    words[words.index("--deepspeed_config") + 1] = str(hardware)
    return words


def faulty(monkeypatch, **faults) -> None:
    monkeypatch.setenv("GUARD_FAULTS", json.dumps(faults))


def strict(folder: Path, name: str) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{name}: {constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_text().splitlines()]


def test_nan_on_one_rank_and_a_spike_are_skipped_and_told(shape_shards, tmp_path, monkeypatch):
    faulty(monkeypatch, rank=1, nan=[3], spike=[7])
    words = arguments(shape_shards, tmp_path, "run", "steps=9", "guard.least=3")
    printed = run(words, processes=2)
    assert "step 3 was skipped: the loss is nan (rank 1, samples" in printed
    assert "step 7 was skipped: the gradient's norm" in printed
    steps = strict(tmp_path / "run", "metrics.jsonl")
    assert [row["skipped"] for row in steps] == [None, None, "loss", None, None, None, "spike", None, None]
    assert (steps[2]["loss"], steps[2]["grad_norm"]) == (None, None)
    loss, spike = strict(tmp_path / "run", "skipped.jsonl")
    assert (loss["step"], loss["reason"], loss["value"], list(loss["ranks"])) == (3, "loss", "nan", ["1"])
    assert len(loss["ranks"]["1"]["keys"]) == 2
    assert (spike["step"], spike["reason"], set(spike["ranks"])) == (7, "spike", {"0", "1"})
    assert spike["value"] > spike["limit"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000009" / "state.json").read_text())
    assert (state["step"], state["adam_steps"], state["guard"]["skipped"]) == (9, 7, [3, 7])
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Skipped steps: 2" in report


def test_back_to_a_checkpoint_and_the_same_bits_after_kills(shape_shards, tmp_path, monkeypatch):
    faulty(monkeypatch, rank=1, nan=[5, 6])
    settings = ["steps=12", "guard.skip_budget=1", "guard.rollbacks=1"]
    whole = arguments(shape_shards, tmp_path, "whole", *settings, stage=3)
    printed = run(whole, processes=2)
    assert "went back to the weights of" in printed
    told = strict(tmp_path / "whole", "skipped.jsonl")
    assert [(row["step"], row["reason"]) for row in told] == [(5, "loss"), (6, "loss"), (6, "rolled_back")]
    assert (told[2]["to"], told[2]["passed_over"]) == (3, [4, 6])
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, 13)), "no batch is trained on twice"
    pieces = arguments(shape_shards, tmp_path, "pieces", *settings, stage=3)
    kill_after_step(pieces, tmp_path / "pieces", 5, 2)
    kill_after_step(pieces, tmp_path / "pieces", 8, 2)
    run(pieces, processes=2)
    assert strict(tmp_path / "pieces", "skipped.jsonl") == told
    assert_same_end(tmp_path / "whole", tmp_path / "pieces")
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-00000012" / "state.json").read_text())
        for name in ("whole", "pieces")
    ]
    assert states[0]["guard"] == states[1]["guard"]
    assert states[0]["adam_steps"] == states[1]["adam_steps"] == 12 - 3  # steps 4 to 6 are gone


def test_a_damaged_frozen_tensor_ends_the_run_by_name_and_a_restart_mends_it(shape_shards, tmp_path, monkeypatch):
    words = arguments(shape_shards, tmp_path, "run", "steps=8")
    faulty(monkeypatch, rank=1, frozen=5)
    printed = run(words, processes=2, expect=1)  # torchrun's; the processes end with 86
    name = printed.partition("damaged ")[2].split()[0]
    assert f"{name} (rank 1)" in printed
    assert "loads them anew" in printed
    assert "exitcode  : 86" in printed
    assert 'Traceback (most recent call last):\n  File "' + str(HERE) not in printed
    monkeypatch.delenv("GUARD_FAULTS")
    run(words, processes=2)
    run(arguments(shape_shards, tmp_path, "good", "steps=8"), processes=2)
    assert_same_end(tmp_path / "good", tmp_path / "run")
    assert not (tmp_path / "run" / "skipped.jsonl").read_text(), "the step was made again, and is well"


def test_without_a_budget_the_first_one_ends_the_run(shape_shards, tmp_path, monkeypatch):
    faulty(monkeypatch, rank=0, nan=[2])
    words = arguments(shape_shards, tmp_path, "run", "steps=4", "guard.skip_budget=0")
    printed = run(words, expect=3)
    assert printed.count("stopped: step 2 was skipped: the loss is nan") == 1
    assert "guard.skip_budget=0" in printed
    assert "Traceback" not in printed
    monkeypatch.delenv("GUARD_FAULTS")
    run([*words, "guard.skip_budget=3"])  # how much is allowed may change
    assert final(tmp_path / "run")
