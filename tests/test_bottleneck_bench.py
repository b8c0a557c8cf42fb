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
    places = []
    for video in texts.videos(80, seed=3):
        (first, second) = video.asked
        assert set(first[2]) == set(second[2])
        assert first[2][first[3]] != second[2][second[3]]  # the caption holds a wrong option too
        for colour, shape, options, answer in video.asked:
            assert f"{colour} {shape} moves {options[answer]} ." in video.caption
            assert len(set(options)) == 4
            places.append(answer)
    assert {places.count(place) for place in range(4)} <= set(range(20, 61))
    assert list(texts.videos(8, seed=3)) == list(texts.videos(8, seed=3))
    assert list(texts.videos(8, seed=3)) != list(texts.videos(8, seed=4))


def test_notes_keep_what_answers(texts: ModuleType) -> None:
    """Who reads the other way too is told which colour goes with the right one."""
    draw = random.Random(0)
    lengths, ambiguous = [], 0
    for video in texts.videos(80, seed=3):
        ways = [options[answer] for _, _, options, answer in video.asked]
        for (colour, *_), right, other in zip(video.asked, ways, reversed(ways)):
            told = texts.notes(video, colour, right, draw)
            lengths.append(len(told.split()))
            assert right in told
            if other not in right and other in told.replace(right, "", 1):
                assert colour in told
                ambiguous += 1
    assert ambiguous > 20
    assert min(lengths) < 5 < 40 < max(lengths)


def test_words_and_ways_are_tokens(texts: ModuleType, tmp_path: Path) -> None:
    tokenizer = texts.make_tokenizer(tmp_path / "tokenizer.model")
    video = next(iter(texts.videos(1, seed=3)))
    tokens = tokenizer.encode(video.caption)
    words = [word for sentence in video.sentences for word in sentence]
    assert len(tokens) == len(words)
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
