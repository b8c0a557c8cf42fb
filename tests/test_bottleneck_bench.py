"""bench/bottleneck.py: its questions cannot be answered without the caption, notes keep what answers, it runs."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def texts() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("moving_texts")
    finally:
        sys.path.remove(str(BENCH))


def test_the_caption_tells_and_nothing_else_does(texts: ModuleType) -> None:
    for video in texts.videos(80, seed=3):
        assert 35 < len(video.words) < 60
        for asked in video.questions:
            there = [option for option in asked["options"] if option in video.words]
            assert there == [asked["options"][asked["answer"]]]
            assert there[0] not in asked["question"] or asked["kind"] != "motion"
    assert [v.words for v in texts.videos(8, seed=3)] == [v.words for v in texts.videos(8, seed=3)]
    assert [v.words for v in texts.videos(8, seed=3)] != [v.words for v in texts.videos(8, seed=4)]


def test_notes_keep_what_answers(texts: ModuleType) -> None:
    draw = random.Random(0)
    lengths = []
    for video in texts.videos(80, seed=3):
        for asked in video.questions:
            answer = asked["options"][asked["answer"]]
            told = texts.notes(video, answer, draw)
            assert answer in told
            lengths.append(len(told.split()))
    assert min(lengths) < 6 < 40 < max(lengths)


def test_words_and_ways_are_tokens(texts: ModuleType, tmp_path: Path) -> None:
    tokenizer = texts.make_tokenizer(tmp_path / "tokenizer.model")
    video = next(iter(texts.videos(1, seed=3)))
    tokens = tokenizer.encode(video.caption)
    assert len(tokens) == len(video.words)
    assert tokenizer.decode(tokens) == video.caption


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / "bottleneck.py"), "--quick", "--json", str(figures)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=600)
    found = json.loads(figures.read_text())
    assert found["time"]["speedup"] > 2
    rows = found["accuracy"]
    assert [row["kept"] for row in rows] == [None, 16, 8, 4, 2, 1]
    read = [row["tokens_read"] for row in rows]
    assert read == sorted(read, reverse=True)
    assert read[1] - read[4] == 14
