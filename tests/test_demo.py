"""`make demo` for real: the five files, what the model must have learned, and what a second call spares."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm.data.shards import ShardSet
from vlm.recipe import load

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = ("recipe.json", "metrics.jsonl", "metrics.json", "predictions.jsonl", "report.html")


def start_demo(folder: Path, system: str = "vit_llama") -> subprocess.Popen[str]:
    variables = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    command = ["make", "demo", f"SYSTEM={system}", f"DATA={folder / 'data'}", f"RUNS={folder / 'runs'}"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    started = time.monotonic()
    demo = start_demo(tmp_path)
    said = demo.communicate()[0]
    minutes = (time.monotonic() - started) / 60
    assert demo.returncode == 0, said[-6000:]
    run = tmp_path / "runs" / "vit_llama"
    assert [name for name in FILES if not (run / name).is_file()] == []
    assert said.rstrip().splitlines()[-1] == f"make demo: done; the report is {run / 'report.html'}"

    about = json.loads((run / "recipe.json").read_text())
    assert about["world_size"] == 2
    assert "world size 2" in said
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = {"step", "loss", "lr", "grad_norm", "step_time", "data_wait", "samples_per_s", "batch_digest"}
    assert all(wanted <= row.keys() for row in steps)
    assert [row["step"] for row in steps] == list(range(1, about["config"]["steps"] + 1))

    metrics = json.loads((run / "metrics.json").read_text())
    print(f"make demo: {minutes:.1f} minutes, {metrics}")
    assert metrics["top1"] >= 0.85
    assert metrics["chance"] <= 0.125
    assert metrics["top1_one_frame"] <= 0.35
    assert metrics["top1_shuffled_frames"] <= 0.65
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    test = ShardSet(tmp_path / "data" / "shards" / "test")
    assert len(predictions) >= 100
    assert sorted(row["key"] for row in predictions) == sorted(test.key(row) for row in range(len(test)))
    train = ShardSet(tmp_path / "data" / "shards" / "train")
    assert not {train.key(row) for row in range(len(train))} & {row["key"] for row in predictions}

    assert_score_agrees(run)
    assert_second_call_spares_the_preparation(tmp_path, run)


SMALL = {
    *("adapter_query", "visual_proj", "temporal_emb", "layers"),  # Vamos, ViCo
    *("video_query_tokens", "video_frame_position_embedding", "video_Qformer", "llama_proj"),  # Video-LLaMA
    *("mm_projector", "video_marks"),  # Video-ChatGPT
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus and one language model for the systems that answer questions."""
    return tmp_path_factory.mktemp("questions")


@pytest.mark.slow
@pytest.mark.parametrize("system", ["vamos", "vico"])
def test_demo_of_questions(shared: Path, system: str) -> None:
    started = time.monotonic()
    demo = start_demo(shared, system)
    said = demo.communicate()[0]
    minutes = (time.monotonic() - started) / 60
    assert demo.returncode == 0, said[-6000:]
    run = shared / "runs" / system
    assert [name for name in FILES if not (run / name).is_file()] == []
    assert said.rstrip().splitlines()[-1] == f"make demo: done; the report is {run / 'report.html'}"

    metrics = json.loads((run / "metrics.json").read_text())
    print(f"make demo SYSTEM={system}: {minutes:.1f} minutes, {metrics}")
    assert metrics["accuracy"] >= 0.85
    assert metrics["accuracy_motion"] >= 0.85
    assert metrics["chance"] == 0.25
    assert metrics["accuracy_blind"] <= 0.4
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    test = ShardSet(shared / "data" / "shards_features" / "test")
    assert len(predictions) == int(test.num_questions.sum()) >= 200
    assert_score_agrees(run)
    assert_only_the_small_set_was_trained(shared, run)


@pytest.mark.slow
def test_demo_of_captions(shared: Path) -> None:
    started = time.monotonic()
    demo = start_demo(shared, "video_llama")
    said = demo.communicate()[0]
    minutes = (time.monotonic() - started) / 60
    assert demo.returncode == 0, said[-6000:]
    run = shared / "runs" / "video_llama"
    assert [name for name in FILES if not (run / name).is_file()] == []
    assert said.rstrip().splitlines()[-1] == f"make demo: done; the report is {run / 'report.html'}"

    metrics = json.loads((run / "metrics.json").read_text())
    print(f"make demo SYSTEM=video_llama: {minutes:.1f} minutes, {metrics}")
    assert metrics["exact_match"] >= 0.8
    assert metrics["exact_match_blind"] <= 0.2
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    test = ShardSet(shared / "data" / "shards_features" / "test")
    assert len(predictions) == len(test) >= 100
    assert predictions[0]["text"] in (run / "report.html").read_text()
    assert_score_agrees(run)
    for stage, recipe in ((run.with_name("video_llama_pretrain"), "demo_pretrain"), (run, "demo")):
        assert_only_the_small_set_was_trained(shared, stage, f"video_llama.{recipe}", "llama_dialogues")


@pytest.mark.slow
def test_demo_of_segments(shared: Path) -> None:
    started = time.monotonic()
    demo = start_demo(shared, "video_chatgpt")
    said = demo.communicate()[0]
    minutes = (time.monotonic() - started) / 60
    assert demo.returncode == 0, said[-6000:]
    run = shared / "runs" / "video_chatgpt"
    assert [name for name in FILES if not (run / name).is_file()] == []
    assert said.rstrip().splitlines()[-1] == f"make demo: done; the report is {run / 'report.html'}"
    assert json.loads((run / "recipe.json").read_text())["world_size"] == 2

    metrics = json.loads((run / "metrics.json").read_text())
    print(f"make demo SYSTEM=video_chatgpt: {minutes:.1f} minutes, {metrics}")
    assert metrics["mof"] >= 0.8
    assert min(metrics[name] for name in ("edit", "f1_10", "f1_25", "f1_50")) >= 0.7
    assert metrics["chance"] <= 0.25
    assert metrics["mof_blind"] <= 0.3
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    test = ShardSet(shared / "data" / "sequences" / "test")
    train = ShardSet(shared / "data" / "sequences" / "train")
    assert len(predictions) == len(test) >= 60
    assert not {train.key(row) for row in range(len(train))} & {row["key"] for row in predictions}
    for row in predictions:  # the question says nothing of the answer but the number of its kind
        assert row["question"] == f"List down all the segments. action is {row['kind']}"
        assert row["truth"][0][0] == 0
        assert row["truth"][-1][1] == row["num_frames"]
    report = (run / "report.html").read_text()
    assert predictions[0]["prediction"][0][2] in report
    assert_score_agrees(run)
    assert_only_the_small_set_was_trained(shared, run, llama="llama_segments")


def assert_only_the_small_set_was_trained(folder: Path, run: Path, name: str = "", llama: str = "llama") -> None:
    """The language model is, to the bit, the one that read text; the checkpoint holds what trains alone."""
    last = (run / "checkpoints" / "latest").read_text().strip()
    manifest = json.loads((run / "checkpoints" / last / "manifest.json").read_text())
    config = json.loads((run / "recipe.json").read_text())["config"]
    recipe = load(name or f"{run.name}.demo", [f"model.llama.path={folder / 'data' / llama}"])
    recipe.model.init_from = None  # what training begins with is not frozen
    assert config["model"]["llama"]["path"] == str(recipe.model.llama.path)
    assert recipe.model.build().frozen_hash() == manifest["frozen_hash"]
    trained = {name.split(".")[0] for name in manifest["tensors"]}
    assert trained <= SMALL


def assert_score_agrees(run: Path) -> None:
    before = (run / "metrics.json").read_text()
    command = [sys.executable, "tools/score.py", str(run)]
    scored = subprocess.run([*command, "--check"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert scored.returncode == 0, scored.stderr
    (run / "metrics.json").unlink()
    subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    assert json.loads((run / "metrics.json").read_text()) == json.loads(before)


def assert_second_call_spares_the_preparation(folder: Path, run: Path) -> None:
    """The second call installs and renders nothing, keeps the finished run aside, and trains; it is stopped there."""
    kept = [REPOSITORY / ".venv" / ".installed-from", folder / "data" / "shards" / "train" / "manifest.json"]
    before = [path.stat().st_mtime_ns for path in kept]
    demo = start_demo(folder)
    assert demo.stdout is not None
    said = []
    for line in demo.stdout:
        said.append(line)
        if line.startswith("step "):
            break
    for way in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(demo.pid, way)
            demo.wait(60)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    assert said[-1].startswith("step "), "".join(said)
    assert any("keeping the finished run" in line for line in said)
    assert not any("installing" in line or "rendering" in line for line in said)
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert (run.parent / "vit_llama.previous" / "report.html").is_file()
