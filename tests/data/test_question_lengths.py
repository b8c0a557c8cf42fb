"""Lengths planned from the index are those that rows have, so packs are as full as the plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.question_shards import CAPTION
from vlm.data.packing import share_prefixes
from vlm.data.packs import plan_packs
from vlm.data.question_lengths import Rows, question_lengths
from vlm.data.questions import QuestionConfig
from vlm.data.shards import ShardSet, write_shards
from vlm.data.tokenizers import load_tokenizer
from vlm.types import Sample

GOLDENS = Path(__file__).parent.parent / "goldens"
TOKENIZER = GOLDENS / "tiny_llama_tokenizer" / "tokenizer.model"
WORDS = ("the", "man", "in", "a", "red", "coat", "runs", "to", "that", "old", "house", "while", "two", "dogs", "look")


def samples(records: int) -> list[Sample]:
    """Records of 1 to 9 questions of very different lengths."""
    draw = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, most)))

    def question() -> dict[str, Any]:
        return {"question": words(20), "options": [words(8) for _ in range(5)], "answer": 0, "dialogue": words(30)}

    return [
        Sample(
            key=f"{number:04d}",
            annotation={
                "video": f"{number:04d}",
                "questions": [question() for _ in range(draw.integers(1, 10))],
                "captions": {"n6": CAPTION.format(words(40)), "other": words(200)},
            },
        )
        for number in range(records)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("set") / "shards"
    write_shards(samples(400), folder, arguments={}, check=False, tokenizer=TOKENIZER)
    return ShardSet(folder)


def real_lengths(config: QuestionConfig, shards: ShardSet) -> np.ndarray:
    of_records = [config._answer_rows(shards.read(row, ())) for row in range(len(shards))]
    if not config.share_questions:
        return np.array([len(row.ids) for rows in of_records for row in rows])
    return np.array([sum(len(row.ids) for row in share_prefixes(rows, learnt=False)[0]) for rows in of_records])


@pytest.mark.parametrize(
    "settings",
    [{}, {"caption": "n6"}, {"dialogue": True}, {"share_questions": True}, {"share_questions": True, "caption": "n6"}],
    ids=str,
)
def test_lengths_are_right_to_a_few_tokens(shards: ShardSet, settings: dict[str, Any]) -> None:
    config = QuestionConfig(tokenizer=TOKENIZER, use_video=False, max_length=1000, **settings)
    planned, real = config.lengths(shards), real_lengths(config, shards)
    over = planned - real
    slack = 4 * (9 if config.share_questions else 1)
    assert over.min() >= -2
    assert over.max() <= slack
    packs = plan_packs(planned, 4096)
    filled = sum(min(4096, int(real[packs[number]].sum())) for number in range(len(packs))) / (4096 * len(packs))
    assert filled >= 0.95  # 400 records are few packs: the last one counts
    assert filled >= packs.fill - 0.025


def test_rows_that_are_cut_are_no_longer_than_that(shards: ShardSet) -> None:
    config = QuestionConfig(tokenizer=TOKENIZER, use_video=False, max_length=120, caption="n6")
    assert config.lengths(shards).max() == 120


def test_records_without_dialogue_may_have_the_most_questions(tmp_path: Path) -> None:
    few, *many = samples(20)
    few.annotation["questions"] = few.annotation["questions"][:2]
    for sample in many:
        for question in sample.annotation["questions"]:
            del question["dialogue"]
    write_shards([few, *many], tmp_path / "shards", arguments={}, check=False, tokenizer=TOKENIZER)
    shards = ShardSet(tmp_path / "shards")
    counted = [shards.counted(name) for name in ("questions", "dialogues")]
    assert [found.shape[1] for found in counted if found is not None] == [9, 2]
    config = QuestionConfig(tokenizer=TOKENIZER, use_video=False, max_length=1000, dialogue=True)
    over = config.lengths(shards) - real_lengths(config, shards)
    assert over.min() >= -2
    assert over.max() <= 16  # what leads to a dialogue, where a question has none


def test_another_tokenizer_gives_an_estimate_on_the_safe_side(shards: ShardSet) -> None:
    config = QuestionConfig(use_video=False, max_length=2000)
    planned, real = config.lengths(shards), real_lengths(config, shards)
    assert (planned >= real).mean() > 0.95


def test_counts_of_the_index(shards: ShardSet) -> None:
    encode = load_tokenizer(TOKENIZER).encode
    annotation = shards.read(7).annotation
    question = annotation["questions"][0]
    counted = shards.counted("questions")
    assert counted is not None
    assert counted.shape == (400, 9)
    assert counted[7, 0] == sum(len(encode(text)) for text in (question["question"], *question["options"]))
    assert (counted[7] > 0).sum() == len(annotation["questions"])
    told = shards.counted("captions.other")
    assert told is not None
    assert told[7, 0] == len(encode(annotation["captions"]["other"]))
    assert shards.counted("conversations") is None
    assert shards.tokenizer_hash is not None


@pytest.mark.parametrize("counted", [True, False])
def test_a_damaged_record_is_not_measured(tmp_path: Path, counted: bool) -> None:
    tokenizer = TOKENIZER if counted else None
    write_shards(samples(20), tmp_path / "shards", arguments={}, check=False, tokenizer=tokenizer)
    shards = ShardSet(tmp_path / "shards")
    config = QuestionConfig(tokenizer=TOKENIZER, use_video=False, max_length=1000)
    whole = config.lengths(shards)
    with (shards.path / shards.shard_name(0)).open("r+b") as file:
        file.seek(int(shards.index["offset"][0]))
        file.write(b"\xff" * 512)
    damaged = config.lengths(ShardSet(shards.path))
    assert len(damaged) == len(whole)
    assert abs(damaged - whole).max() <= (2 if counted else 60)


def test_no_records_that_can_be_measured(shards: ShardSet) -> None:
    about = Rows(
        read=lambda record: [], prompt=50, most=400, shared=False, caption=None, dialogue=False,
        tokenizer=shards.tokenizer_hash,
    )  # fmt: skip
    assert question_lengths(shards, about).min() > 50
    assert len(question_lengths(shards, replace(about, shared=True))) == len(shards)
