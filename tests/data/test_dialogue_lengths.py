"""Lengths of captions and dialogues planned from the index: packs are as full as the plan says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_dialogues import TEXT
from vlm.data.dialogues import IMAGE_LINES, DialogueConfig
from vlm.data.packs import plan_packs
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet, write_shards
from vlm.data.stream import Source, Stream
from vlm.data.templates import PLACE, Media
from vlm.recipes import video_llama
from vlm.types import Record, Sample

TOKENIZER = Path(__file__).parent.parent / "goldens" / "tiny_llama_tokenizer" / "tokenizer.model"
WORDS = ("the", "man", "in", "a", "red", "coat", "runs", "to", "that", "old", "house", "while", "two", "dogs", "look")
CAPACITY = 2048


def caption(draw: np.random.Generator) -> str:
    """As WebVid's: 4 to 45 words, about 14; a capital letter, here and there a comma, mostly a full stop."""
    count = int(np.clip(draw.lognormal(2.5, 0.5), 4, 45))
    words = [word + ("," if draw.random() < 0.06 else "") for word in draw.choice(WORDS, count)]
    return " ".join(words).capitalize() + ("." if draw.random() < 0.7 else "")


def turns(draw: np.random.Generator, count: int) -> list[dict[str, str]]:
    said = []
    for number in range(count):
        said.append({"from": "human", "value": f"{'' if number else PLACE}{caption(draw)}"})
        said.append({"from": "gpt", "value": caption(draw) * int(draw.integers(1, 6))})
    return said


def made(folder: Path, annotations: list[dict[str, Any]], tokenizer: Path | None = TOKENIZER) -> ShardSet:
    samples = [Sample(key=f"{at:05d}", annotation=annotation) for at, annotation in enumerate(annotations)]
    write_shards(samples, folder / "shards", arguments={}, check=False, tokenizer=tokenizer)
    return ShardSet(folder / "shards")


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    draw = np.random.default_rng(0)
    return made(tmp_path_factory.mktemp("set"), [{"caption": caption(draw)} for _ in range(3000)])


def config(recipe: str = "pretrain", **changes: Any) -> DialogueConfig:
    return dataclasses.replace(getattr(video_llama, recipe)().inputs, tokenizer=TOKENIZER, **changes)


def rows(inputs: DialogueConfig, record: Record) -> int:
    media = Media(message="The video contains 8 frames. ")
    found = inputs._rows(record, ("caption", "dialogue"), media, SampleRng(record.row), {})
    return sum(len(row.ids) for several in found.values() for row in several)


def real(inputs: DialogueConfig, shards: ShardSet) -> np.ndarray:
    return np.array([rows(inputs, shards.read(row, ())) for row in range(len(shards))])


def filled(planned: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """True fill of each pack but the last, which takes what is left."""
    packs = plan_packs(planned, CAPACITY)
    return np.array([truth[packs[number]].sum() / CAPACITY for number in range(len(packs) - 1)])


def test_packs_of_captions_are_truly_full(captions: ShardSet) -> None:
    inputs = config()
    planned, truth = inputs.lengths(captions), real(inputs, captions)
    fill = filled(planned, truth)
    assert fill.mean() >= 0.97
    assert fill.max() <= 1.02
    assert planned.max() <= truth.max(), "captions are cut"
    assert abs(planned - truth).max() <= 5


def test_captions_that_are_asked_for(captions: ShardSet) -> None:
    inputs = config("finetune")
    assert inputs.prompts == IMAGE_LINES
    over = inputs.lengths(captions) - real(inputs, captions)
    assert over.min() >= -4
    assert over.max() <= 20  # one of several lines is drawn


def test_dialogues_of_few_and_many_turns(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    talks = [{"conversations": turns(draw, int(draw.integers(1, 7)))} for _ in range(300)]
    shards, inputs = made(tmp_path, talks), config("finetune")
    over = inputs.lengths(shards) - real(inputs, shards)
    assert over.min() >= -3
    assert over.max() <= 40
    assert inputs.lengths(shards).max() == inputs.max_length, "dialogues are cut"


def test_both_texts_count_and_texts_alone_have_no_video(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    both = {"caption": caption(draw), "conversations": turns(draw, 2)}
    shards, inputs = made(tmp_path, [both] * 3), config()
    assert abs(inputs.lengths(shards) - real(inputs, shards)).max() <= 3
    alone = made(tmp_path / "alone", [{"conversations": TEXT}] * 3)
    length = len(inputs._rows(alone.read(0), ("dialogue",), None, SampleRng(0), {})["dialogue"][0].ids)
    assert inputs.lengths(alone).tolist() == [length] * 3


@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
def test_a_damaged_record_is_not_measured(tmp_path: Path, tokenizer: Path | None) -> None:
    draw = np.random.default_rng(3)
    shards = made(tmp_path, [{"caption": caption(draw)} for _ in range(40)], tokenizer)
    inputs = config()
    whole = inputs.lengths(shards)
    with (shards.path / shards.shard_name(0)).open("r+b") as file:
        for row in (0, 1, 39):
            file.seek(int(shards.index["offset"][row]))
            file.write(b"\xff" * 512)
    damaged = ShardSet(shards.path)
    assert abs(inputs.lengths(damaged) - whole).max() <= (1 if tokenizer else 20)
    assert (inputs.lengths(damaged) == inputs.lengths(ShardSet(shards.path))).all()


def test_estimates_are_cut_and_on_the_safe_side(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    shards, inputs = made(tmp_path, [{"caption": caption(draw)} for _ in range(200)], None), config()
    over = inputs.lengths(shards) - real(inputs, shards)
    assert (over >= 0).mean() > 0.9
    assert inputs.lengths(shards).max() <= 33 + inputs.max_caption_length


def test_the_fingerprint_of_a_stream_has_its_packs(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    records = [{"caption": caption(draw)} for _ in range(300)]
    sets = [made(tmp_path / name, records, tokenizer) for name, tokenizer in (("a", TOKENIZER), ("b", None))]
    plain, packed = (
        [Stream([Source(shards)], 0, config(), length).fingerprint for shards in sets] for length in (None, CAPACITY)
    )
    assert plain == [shards.fingerprint for shards in sets]
    assert plain[0] == plain[1]
    assert packed[0] != packed[1]
    assert packed[0] == Stream([Source(ShardSet(sets[0].path))], 7, config(), CAPACITY).fingerprint
    assert all(one.partition(" packs ")[0] == plain[0] for one in packed)


def test_one_record_of_thousands_of_turns_does_not_widen_the_index_of_all(tmp_path: Path) -> None:
    draw = np.random.default_rng(6)
    short = [{"conversations": turns(draw, 2), "caption": caption(draw)} for _ in range(30)]
    long = [{"conversations": turns(draw, 33), "caption": caption(draw)} for _ in range(5)]
    shards = made(tmp_path / "one", [*short, {"conversations": TEXT * 1500}])
    assert shards.counted("conversations") is None
    assert shards.counted("caption") is not None
    assert shards.index.dtype.itemsize < 300
    inputs = config("finetune")
    assert (inputs.lengths(shards) >= real(inputs, shards)).mean() > 0.9, "turns are estimated, not left out"
    for name, records in (("few", [*short, {"conversations": TEXT * 32}]), ("worth", [*short[:5], *long])):
        assert made(tmp_path / name, records).counted("conversations") is not None
