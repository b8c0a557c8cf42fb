"""A run as a user starts it: it resumes where it was killed, to the bit, and refuses what it cannot continue."""

import json
import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launching import run, start, train_arguments
from safetensors.torch import load_file

FIELDS = {
    "step", "epoch", "loss", "losses", "counts", "lr", "grad_norm", "step_time", "data_wait", "samples_per_s",
    "batch_digest", "tokens_per_s", "peak_memory", "mfu", "quarantined",
}  # fmt: skip


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder: Path) -> tuple[dict, dict]:
    name = (folder / "checkpoints" / "latest").read_text().strip()
    checkpoint = folder / "checkpoints" / name
    return load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "optimizer.safetensors")


def assert_same_end(first: Path, second: Path) -> None:
    for one, other in zip(final(first), final(second)):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].equal(other[name]), name
    for one, other in zip(rows(first), rows(second), strict=True):
        assert {k: one[k] for k in ("step", "loss", "lr", "grad_norm", "batch_digest")} == {
            k: other[k] for k in ("step", "loss", "lr", "grad_norm", "batch_digest")
        }


def kill_after_step(
    arguments: list[str], folder: Path, step: int, processes: int, pause: float = 0.0, launcher_alone: bool = False
) -> None:
    """Start a run and kill -9 all of its processes, or what launched them, once metrics.jsonl has `step` lines."""
    process = start(arguments, processes)
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) >= step:
            break
        time.sleep(0.005)
    time.sleep(pause)
    tree = []
    with suppress(psutil.NoSuchProcess):  # it has come to its end
        first = psutil.Process(process.pid)
        tree = [first, *first.children(recursive=True)]  # torchrun's sessions
    for one in tree[:1] if launcher_alone else tree:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate()
    assert not psutil.wait_procs(tree, timeout=120)[1], "it trains on without its launcher"


def test_a_run_writes_its_five_files_and_a_full_log(shape_shards, tmp_path):
    printed = run(train_arguments(shape_shards, tmp_path / "run", "steps=3", "eval.batch_size=3"))
    for name in ("recipe.json", "metrics.jsonl", "metrics.json", "predictions.jsonl", "report.html"):
        assert (tmp_path / "run" / name).is_file(), name
    assert "world size 1" in printed
    assert printed.strip().splitlines()[-1].endswith("report.html")
    lines = rows(tmp_path / "run")
    assert [row["step"] for row in lines] == [1, 2, 3]
    assert set(lines[0]) >= FIELDS
    about = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert about["world_size"] == 1
    assert about["config"]["steps"] == 3
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {"top1", "top5", "chance", "top1_one_frame", "top1_shuffled_frames"}
    assert all(0 <= value <= 1 for value in metrics.values())
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in predictions}) == 8


def test_killed_and_started_again_it_ends_with_the_same_bits(shape_shards, tmp_path):
    settings = ["steps=12", "checkpoint_every=3", "model.drop_path=0.2", "eval.at_end=false"]
    run(train_arguments(shape_shards, tmp_path / "whole", *settings))
    arguments = train_arguments(shape_shards, tmp_path / "killed", *settings, "data.workers=1")
    for _ in range(5):  # where this process is slow to strike, the run may have come to its end
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        # The first checkpoint, of step 3, is complete when the next one is begun, at step 6.
        kill_after_step(arguments, tmp_path / "killed", step=7, processes=1)
        if len(rows(tmp_path / "killed")) < 12:
            break
    assert len(rows(tmp_path / "killed")) < 12
    printed = run(arguments)
    assert "resuming from" in printed
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_killed_at_random_moments_in_two_processes(shape_shards, tmp_path):
    """Five kills, some inside a save; then a run that is left alone. `seed` is printed for a repeat."""
    settings = ["steps=40", "checkpoint_every=2", "model.drop_path=0.2", "eval.at_end=false"]
    run(train_arguments(shape_shards, tmp_path / "whole", *settings), processes=2)
    seed = int(os.environ.get("VLM_SEED", time.time_ns() % 10**6))
    print(f"VLM_SEED={seed}")
    rng = random.Random(seed)
    arguments = train_arguments(shape_shards, tmp_path / "killed", *settings)
    for attempt in range(5):
        step, pause = 6 * attempt + rng.randrange(1, 8), rng.uniform(0, 0.1)
        kill_after_step(arguments, tmp_path / "killed", step, 2, pause, launcher_alone=attempt % 2 == 0)
        latest = tmp_path / "killed" / "checkpoints" / "latest"
        if latest.is_file():
            assert (latest.parent / latest.read_text().strip() / "manifest.json").is_file()
    run(arguments, processes=2)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_loader_workers_and_processes_do_not_change_the_order(shape_shards, tmp_path):
    digests = []
    for name, processes, workers in (("a", 1, 0), ("b", 2, 1)):
        arguments = train_arguments(shape_shards, tmp_path / name, f"data.workers={workers}", "eval.at_end=false")
        run(arguments, processes)
        digests.append([row["batch_digest"] for row in rows(tmp_path / name)])
    assert digests[0] == digests[1]


def test_another_recipe_in_the_same_folder_is_refused(shape_shards, tmp_path):
    run(train_arguments(shape_shards, tmp_path / "run", "steps=2", "eval.at_end=false"))
    printed = run(train_arguments(shape_shards, tmp_path / "run", "steps=2", "optim.lr=0.5"), expect=2)
    assert "optim.lr" in printed
    assert "Traceback" not in printed


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(shape_shards, tmp_path):
    settings = ["steps=4", "checkpoint_every=2", "eval.at_end=false"]
    run(train_arguments(shape_shards, tmp_path / "run", *settings))
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    whole = rows(tmp_path / "run")
    moved = shape_shards.rename(shape_shards.with_name("moved"))
    try:
        printed = run(train_arguments(moved, tmp_path / "run", *settings), processes=2)
    finally:
        moved.rename(shape_shards)
    assert "passed over a damaged checkpoint" in printed
    assert f"changed since the run began: data.shards: '{shape_shards}/train' -> '{moved}/train'" in printed
    assert "changed since the run began: world_size: 1 -> 2" in printed
    about = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (about["world_size"], about["resumed"][0]["world_size"], about["resumed"][0]["step"]) == (1, 2, 2)
    assert "step-00000002" in printed
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in whole], rel=1e-5)


def test_pretraining_runs_and_fine_tuning_starts_from_it(shape_shards, tmp_path):
    run(train_arguments(shape_shards, tmp_path / "pretrained", "steps=2", recipe="video_mae.debug"))
    name = (tmp_path / "pretrained" / "checkpoints" / "latest").read_text().strip()
    source = tmp_path / "pretrained" / "checkpoints" / name
    settings = [f"model.init_from={source}", "steps=2", "optim.lr=1e-30", "eval.at_end=false"]
    run(train_arguments(shape_shards, tmp_path / "tuned", *settings))
    before = load_file(source / "model.safetensors")["encoder.blocks.0.attn.qkv.weight"]
    after = final(tmp_path / "tuned")[0]["blocks.0.attn.qkv.weight"]
    assert after.equal(before)


def test_user_mistakes_give_one_message_and_no_traceback(shape_shards, tmp_path):
    for overrides, part in (
        (["data.shards=nowhere"], "nowhere"),
        (["model.dpth=3"], "'depth'"),
        (["eval.metric=top1", "model.init_from=none.pth"], "none.pth"),
    ):
        printed = run(train_arguments(shape_shards, tmp_path / "x", *overrides), expect=2)
        assert part in printed
        assert "Traceback" not in printed


def test_evaluate_alone_gives_the_same_predictions(shape_shards, tmp_path):
    run(train_arguments(shape_shards, tmp_path / "run", "steps=2"))
    script, *_ = train_arguments(shape_shards, tmp_path / "again")
    arguments = [script.replace("train.py", "evaluate.py"), "--recipe", "vit_llama.debug", "--checkpoint"]
    arguments += [str(tmp_path / "run"), f"eval.shards={shape_shards / 'test'}", f"run_dir={tmp_path / 'again'}"]
    run([*arguments, "eval.workers=0", "model.init_from=gone.pth"], processes=2)  # what it began with is not needed
    assert (tmp_path / "again" / "metrics.json").read_text() == (tmp_path / "run" / "metrics.json").read_text()
    refused = [word.replace("again", "run") if word.startswith("run_dir=") else word for word in arguments]
    assert f"{tmp_path}/run holds a training run" in run(refused, expect=2)
    first, second = ((tmp_path / n / "predictions.jsonl").read_text().splitlines() for n in ("run", "again"))
    assert [json.loads(a)["key"] for a in first] == [json.loads(b)["key"] for b in second]
    for a, b in zip(first, second):
        assert json.loads(a)["scores"] == pytest.approx(json.loads(b)["scores"], abs=1e-5)
