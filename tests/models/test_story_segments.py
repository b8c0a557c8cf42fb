"""What the language model of Video-ChatGPT's demo reads: the rows that its inputs give, with words for frames."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.data.chats import ChatConfig
from vlm.data.features import tensor_bytes
from vlm.data.rng import SampleRng
from vlm.data.sampling import middle_frames
from vlm.data.tokenizers import load_tokenizer
from vlm.models.glimpse import GlimpseEncoder
from vlm.models.story_segments import FORMS, MARKS, PLACES, VOCAB_SIZE, encode_segments, make_segment_tokenizer
from vlm.models.text_base import TextBaseConfig, pretrain, segment_base
from vlm.recipe import load
from vlm.sources.common_shapes import CLASSES
from vlm.sources.common_stories import WAYS, sequences, ways
from vlm.types import IGNORE, Record, Visit


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("words") / "tokenizer.model"
    make_segment_tokenizer(file)
    return file


def test_tokenizer_knows_borders_and_labels(tokenizer: Path) -> None:
    known = load_tokenizer(tokenizer)
    assert known.vocab_size == VOCAB_SIZE
    before = len(known.encode("["))
    pieces = [known.encode(f"[{border}")[before:] for border in range(PLACES + 1)]
    assert all(len(ids) == 1 for ids in pieces)
    assert len({ids[0] for ids in pieces}) == PLACES + 1
    assert all(len(known.encode(f"[ {motion.words}")) == before + 1 for motion in CLASSES)
    assert len(known.encode("[0-12 up then down\n12-40 from left to right")) == before + 4 + 1 + 4
    assert known.decode(known.encode("3-17 down: Größe 5")) == "3-17 down: Größe 5"


def test_rows_are_those_of_the_recipe(tokenizer: Path) -> None:
    """Token by token, labels too, but for the marks: what the model learnt to read is what it is given."""
    inputs = load("video_chatgpt.demo", [f"inputs.tokenizer={tokenizer}"]).inputs
    assert isinstance(inputs, ChatConfig)
    known = load_tokenizer(tokenizer)
    marks = [known.encode(mark)[-1] for mark in MARKS]
    tables = encode_segments(known, 6, seed=0)
    assert set(tables) == set(FORMS)
    draw = random.Random(0)
    for at, clip in enumerate(sequences(6, 0)):
        record = Record(key=clip.key, shard="b", row=0, video=None, annotation=clip.annotation,
                        num_frames=len(clip.centres), fps=12, decoders=(), members=_features())  # fmt: skip
        for form in FORMS:
            said = [number for number, row in enumerate(clip.annotation["chat"]) if row["kind"] == form]
            number = draw.choice(said)
            inputs.repeats = (1, 1)
            (example,) = inputs.train(record, SampleRng(0), Visit(part=number, views=("dialogue",)))
            (made,) = example.rows["dialogue"]
            rows, length = tables[form], len(made.ids)
            first = rows.first
            around = (first - 1, first + PLACES)  # of the video: words that are trained with the projector
            assert [made.ids[place] for place in around] == [VOCAB_SIZE + 1, VOCAB_SIZE + 2]
            assert rows.ids[at, list(around)].tolist() == marks
            words = [place for place in range(length) if not around[0] <= place <= around[1]]
            assert rows.ids[at, words].tolist() == [made.ids[place] for place in words]
            assert set(made.ids[first : first + PLACES]) == {VOCAB_SIZE}
            assert rows.labels[at, :length].tolist() == list(made.labels)
            assert (rows.labels[at, length:] == IGNORE).all()
        assert tables["segments"].words[at, :, 0].tolist() == [
            known.encode(way)[-1] for way in ways(clip.centres[middle_frames(len(clip.centres), PLACES)])
        ]


def _features() -> dict[str, bytes]:
    return {"glimpse.safetensors": tensor_bytes("glimpse", torch.zeros(PLACES, GlimpseEncoder.width))}


def test_stories_say_no_number_and_come_from_seeds_of_their_own() -> None:
    """What tells a story are ways alone; the same seed tells the same, another one another."""
    first, again, other = (list(sequences(4, seed)) for seed in (3, 3, 4))
    assert [clip.annotation for clip in first] == [clip.annotation for clip in again]
    assert [clip.annotation for clip in first] != [clip.annotation for clip in other]
    assert {way for clip in first for way in ways(clip.centres)} <= set(WAYS)
    assert ways(np.array([[0, 0], [0, 0.5], [3, 1], [3, -4]])) == ["still", "still", "right", "up"]


def test_model_learns_and_fits_the_recipe(tmp_path: Path) -> None:
    tiny = TextBaseConfig(
        speech="segments", dim=32, layers=1, tell_layers=1, heads=2, hidden=64, stories=16, held_out=8, tell_steps=6,
        choose_steps=2, batch_size=8,
    )  # fmt: skip
    told: list[str] = []
    right = pretrain(tiny, tmp_path / "llama", lambda done, total, how: told.append(how))
    assert set(right) == set(FORMS)
    assert all(0 <= share <= 1 for share in right.values())
    assert len(told) == 8
    assert tiny.llama(tmp_path / "llama").build().config.vocab_size == VOCAB_SIZE
    recipe = load("video_chatgpt.demo")
    assert recipe.model.llama.vocab_size == segment_base().llama(None).vocab_size == VOCAB_SIZE
    assert recipe.inputs.num_video_tokens == PLACES
