"""extract_features in several processes: shares of the videos, one file, the same as from one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import extract_features
from vlm.sources import shapes

REPOSITORY = Path(__file__).resolve().parents[2]


def together(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in two processes under torchrun."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*starter, "tools/extract_features.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """For a corpus of 24 videos, two of which cannot be read."""
    corpus = tmp_path_factory.mktemp("corpus")
    shapes.render(corpus, num_train=24, num_test=0)
    for number in ("03", "08"):
        (corpus / f"videos/train/train-000{number}.mp4").write_bytes(b"<html>" * 99)
    return ["shapes", "--root", str(corpus), "--split", "train", "--encoder", "demo"]


def test_two_processes_write_the_file_of_one(command: list[str], tmp_path: Path) -> None:
    """The encoder is fitted by the first alone; a video that cannot be read is reported whoever met it."""
    done = together(*command, "--max-failed", 0.1, "--workers", 1, "--out", tmp_path / "two.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("features of 22 videos, 176 frames; 2 of 24 items rejected") == 1
    assert "12/12 videos (100 %)" in done.stderr
    assert "(process 1 of 2)" in done.stderr
    alone = [*command, "--max-failed", "0.1", "--workers", "0", "--out", str(tmp_path / "one.safetensors")]
    assert extract_features.main(alone) == 0
    for ending in ("safetensors", "encoder.safetensors", "rejected.json"):
        assert (tmp_path / f"two.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes(), ending
    report = json.loads((tmp_path / "two.rejected.json").read_text())
    assert [row["key"] for row in report["rejected"]] == ["train-00003", "train-00008"]


@pytest.mark.slow
def test_all_processes_end_at_an_error_and_one_says_why(command: list[str], tmp_path: Path) -> None:
    done = together(*command, "--max-failed", 0.01, "--workers", 1, "--out", tmp_path / "f.safetensors")
    assert done.returncode != 0
    assert done.stderr.count("extract_features: 2 of 24 items have no features") == 1
    assert not (tmp_path / "f.safetensors").exists()
