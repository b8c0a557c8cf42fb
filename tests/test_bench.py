"""bench/vqa.py: NExT-QA's histograms, the rival computes the same, the figures have their names. No timings."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
TINY = {
    "dim": 32,
    "layers": 2,
    "heads": 2,
    "hidden": 48,
    "words": 200,
    "feature_dim": 12,
    "long": 180,
    "captions": (20, 40),
}
KEYS = {
    "train_128",
    "train_1200",
    "score",
    "score_captions",
    "padding_128",
    "padding_1200",
    "rival_cpu_128",
    "rival_cpu_1200",
    "max_loss_diff",
    "argmin_equal",
}


@pytest.fixture(scope="module")
def vqa() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("vqa")
    finally:
        sys.path.remove(str(BENCH))


def test_histograms_are_those_of_the_validation_questions(vqa: ModuleType) -> None:
    """4,996 questions on 570 videos, 92 tokens a row."""
    histograms = vqa.read()
    lengths, videos = histograms["row_lengths"], histograms["questions_per_video"]
    assert sum(lengths.values()) == sum(count * n for count, n in videos.items()) == 4996
    assert sum(videos.values()) == 570
    assert sum(length * n for length, n in lengths.items()) / 4996 == pytest.approx(92.0, abs=0.05)
    assert max(lengths) == 124


def test_rows_share_what_real_ones_share(vqa: ModuleType) -> None:
    size = vqa.Size(**TINY)
    first, second, other = size.draw(random.Random(0), [2, 1], size.long)
    assert (first.video, second.video, other.video) == (0, 0, 1)
    for question in (first, second, other):
        rows = torch.tensor(question.rows)
        assert (rows != rows[0]).any(0).nonzero().flatten().tolist() == [question.length - 3]
        assert not (rows == vqa.PADDING).any()

    def shared(a: object, b: object) -> int:
        pairs = zip(a.rows[0], b.rows[0])  # type: ignore[attr-defined]
        return next(place for place, (x, y) in enumerate(pairs) if x != y)

    head = vqa.LEAD + size.num_frames + 1
    assert shared(first, second) >= head + 3 + size.captions[0]
    assert head <= shared(first, other) <= head + 4


def test_figures(vqa: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and answers are the rival's, all keys are there, and the exit code says so."""
    threads = torch.get_num_threads()
    size = vqa.Size(**TINY)
    monkeypatch.setattr(vqa, "Size", lambda: size)
    file = tmp_path / "new" / "figures.json"
    try:
        assert vqa.main(["--quick", "--threads", "1", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(file.read_text())
    assert figures.keys() >= KEYS
    assert figures["argmin_equal"] is True
    assert figures["max_loss_diff"] < 2e-5
    assert 0.2 < figures["padding_128"] < 0.4
    assert all(figures[name] > 0 for name in KEYS - {"argmin_equal", "max_loss_diff"})


def test_a_difference_is_seen(vqa: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival with another gate has other losses, and the run fails."""
    size = vqa.Size(**TINY)
    renamed = sys.modules["rival_vqa"].renamed

    def other(ours: object) -> dict[str, torch.Tensor]:
        tensors = renamed(ours)
        tensors["layers.1.attention.gate"] += 1.0
        return tensors

    monkeypatch.setattr(sys.modules["rival_vqa"], "renamed", other)
    assert vqa.train(size, size.short, 1).difference > 10 * vqa.TOLERANCE


def test_the_command_runs_as_documented() -> None:
    done = subprocess.run(
        [sys.executable, BENCH / "vqa.py", "--help"],
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "--quick" in done.stdout
    assert "--json" in done.stdout
