"""bench/bottleneck.py: its questions cannot be answered without the caption, notes keep what answers, it runs."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vlm.types import UserError

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
            told = texts.notes(video, [answer], draw)
            assert answer in told
            lengths.append(len(told.split()))
    assert min(lengths) < 6 < 40 < max(lengths)


def test_words_and_ways_are_tokens(texts: ModuleType, tmp_path: Path) -> None:
    tokenizer = texts.make_tokenizer(tmp_path / "tokenizer.model")
    video = next(iter(texts.videos(1, seed=3)))
    tokens = tokenizer.encode(video.caption)
    assert len(tokens) == len(video.words)
    assert tokenizer.decode(tokens) == video.caption


def test_every_form_shows_the_caption_and_asks_for_its_answer(texts: ModuleType, tmp_path: Path) -> None:
    tokenizer = texts.make_tokenizer(tmp_path / "tokenizer.model")
    video = next(iter(texts.videos(1, seed=3)))
    for form, rows in texts.encode_videos(tokenizer, 1, seed=3, whole=True).items():
        learnt = rows.labels[0] >= 0
        assert torch.equal(rows.labels[0][learnt], rows.ids[0][learnt])
        shown = tokenizer.decode(rows.ids[0][~learnt].tolist())
        assert f"Video: {video.caption}\n" in shown
        said = tokenizer.decode(rows.ids[0][learnt].tolist()).strip()
        answers = [asked["options"][asked["answer"]] for asked in video.questions]
        if form == "caption":
            assert all(answer in said for answer in answers)
        elif form == "told":
            assert said == answers[0]
        elif form == "judged":
            assert sorted(said.split()) == ["no", "no", "no", "yes"]
        else:
            assert said in ("(A)", "(B)", "(C)", "(D)")


def test_blur_mixes_fillers_into_contexts_alone(texts: ModuleType, tmp_path: Path) -> None:
    tokenizer = texts.make_tokenizer(tmp_path / "tokenizer.model")
    ids = texts.encode_videos(tokenizer, 8, seed=3, whole=True)["colour"].ids
    words = torch.nn.Embedding(tokenizer.vocab_size, 16)
    blurred = texts.Blur(tokenizer, texts.Reader(sharp=0.0))(words, (ids,), words(ids))
    changed = (blurred != words(ids)).any(2)
    for row, places in zip(ids, changed):
        there = places.nonzero()[:, 0]
        assert len(there) > 30
        text = tokenizer.decode(row[int(there[0]) : int(there[-1]) + 1].tolist())
        assert text.startswith("Video: ")
        assert "\n" not in text
    untouched = texts.Blur(tokenizer, texts.Reader(sharp=1.0))(words, (ids,), words(ids))
    assert torch.equal(untouched, words(ids))


@pytest.mark.slow
def test_quick_run_and_its_language_model_again(texts: ModuleType, tmp_path: Path) -> None:
    figures, llama = tmp_path / "figures.json", tmp_path / "llama"
    command = [sys.executable, str(BENCH / "bottleneck.py"), "--quick", "--json", str(figures), "--llama", str(llama)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=2400)
    found = json.loads(figures.read_text())
    assert found["time"]["speedup"] > 2
    rows = found["accuracy"]
    assert [row["kept"] for row in rows] == [None, 16, 8, 4, 2, 1]
    read = [row["tokens_read"] for row in rows]
    assert read == sorted(read, reverse=True)
    assert read[1] - read[4] == 14
    said: list[str] = []
    assert texts.pretrain(texts.QUICK, llama, said.append).path == llama
    assert said == [f"language model: the one in {llama}"]
    with pytest.raises(UserError, match="other settings"):
        texts.pretrain(replace(texts.QUICK, blurred_steps=9), llama, said.append)
