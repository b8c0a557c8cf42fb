"""What the language model of Video-LLaMA's demo reads: the rows that its inputs give, with words for frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.data.dialogues import DialogueConfig
from vlm.data.rng import SampleRng
from vlm.data.templates import Media
from vlm.data.tokenizers import load_tokenizer
from vlm.models.story_dialogues import ASK, FIXED, FORMS, VOCAB_SIZE, encode_dialogues, make_dialogue_tokenizer
from vlm.models.text_base import TextBaseConfig, dialogue_base, pretrain
from vlm.recipe import load
from vlm.sources.common_stories import NUM_TOLD, phrases, stories
from vlm.types import IGNORE, Record, Tokens, UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("words") / "tokenizer.model"
    make_dialogue_tokenizer(file)
    return file


def test_tokenizer_knows_template_and_stories(tokenizer: Path) -> None:
    known = load_tokenizer(tokenizer)
    assert known.vocab_size == VOCAB_SIZE
    assert all(len(known.encode(phrase)) == 1 for phrase in phrases())
    assert all(len(known.encode(f"x{words}")) == len(known.encode("x")) + 1 for words in FIXED)


@pytest.mark.parametrize(("form", "stage"), [("bare", "demo_pretrain"), ("asked", "demo"), ("dialogue", "demo")])
def test_rows_are_those_of_the_recipes(form: str, stage: str, tokenizer: Path) -> None:
    """Token by token, labels too: what the model learnt to read is what it is given."""
    inputs = load(f"video_llama.{stage}", [f"inputs.tokenizer={tokenizer}"]).inputs
    assert isinstance(inputs, DialogueConfig)
    assert (inputs.num_video_tokens, inputs.prompts) == (NUM_TOLD, () if stage == "demo_pretrain" else (ASK,))
    rows = encode_dialogues(load_tokenizer(tokenizer), 8, seed=0)[form]
    for at, story in enumerate(stories(8, 0)):
        record = Record(key="a", shard="b", row=0, video=None, annotation=story.annotation, num_frames=24, fps=12,
                        decoders=())  # fmt: skip
        made: Tokens = (
            inputs._turns_tokens(record, Media()) if form == "dialogue"
            else inputs._caption_tokens(record, Media(), SampleRng(0))
        )  # fmt: skip
        length = len(made.ids)
        assert rows.ids[at, :length].tolist() == list(made.ids)
        assert rows.labels[at, :length].tolist() == list(made.labels)
        assert (rows.labels[at, length:] == IGNORE).all()
        assert made.video == (rows.first, rows.first + NUM_TOLD)


def test_model_learns_and_fits_the_recipe(tmp_path: Path) -> None:
    tiny = TextBaseConfig(
        speech="dialogues", dim=32, layers=1, tell_layers=1, heads=2, hidden=64, stories=16, held_out=8, tell_steps=4,
        choose_steps=2, batch_size=8,
    )  # fmt: skip
    assert set(pretrain(tiny, tmp_path / "llama")) == set(FORMS)
    assert tiny.llama(tmp_path / "llama").build().config.vocab_size == VOCAB_SIZE
    assert load("video_llama.demo").model.llama.vocab_size == dialogue_base().llama(None).vocab_size == VOCAB_SIZE
    with pytest.raises(UserError, match="speech is 'songs'"):
        TextBaseConfig(speech="songs")  # type: ignore[arg-type]
