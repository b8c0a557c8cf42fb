"""The demo's language model: what it reads, that it learns, and the folder that it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from vlm.data.tokenizers import load_tokenizer
from vlm.models.story_rows import FORMS, VOCAB_SIZE, encode_stories, make_tokenizer
from vlm.models.text_base import TextBaseConfig, initial_model, predict, pretrain, train
from vlm.sources.common_stories import NUM_TOLD, phrases
from vlm.types import IGNORE, UserError
from vlm.weights import file_hash, state_hash

TINY = TextBaseConfig(
    dim=32,
    layers=2,
    tell_layers=1,
    heads=2,
    hidden=64,
    stories=16,
    held_out=8,
    tell_steps=6,
    choose_steps=3,
    batch_size=8,
)


def test_tokenizer_knows_every_phrase_as_one_piece_and_any_text_by_bytes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert all(len(tokenizer.encode(phrase)) == 1 for phrase in phrases())
    assert tokenizer.decode(tokenizer.encode("Größe: 3 µm\n(B) up")) == "Größe: 3 µm\n(B) up"
    make_tokenizer(tmp_path / "again.model")
    assert file_hash(tmp_path / "again.model") == file_hash(tmp_path / "tokenizer.model")


def test_rows_are_the_real_prompts_with_words_for_frames(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer.model")
    tables = encode_stories(tokenizer, 8, seed=0)
    assert set(tables) == set(FORMS)
    learnt = {}
    for form, rows in tables.items():
        assert rows.words.shape[1] == NUM_TOLD
        assert (rows.ids[:, rows.first : rows.first + NUM_TOLD] == 0).all()
        here = rows.labels[0] != IGNORE
        assert torch.equal(rows.labels[0][here], rows.ids[0][here])
        learnt[form] = tokenizer.decode(rows.ids[0][here].tolist()).strip()
        said = tokenizer.decode(rows.ids[0].tolist())
        assert said.startswith("Instruction: ")
        assert ("Choices: \n(A)" in said) == (form not in ("caption", "told"))
    assert learnt["caption"].startswith("a ")
    assert learnt["judged"].replace("yes", "no") == "no no no no"
    assert all(learnt[kind] in ("(A)", "(B)", "(C)", "(D)") for kind in ("motion", "colour", "shape"))


def test_frames_are_the_words_and_nothing_else(tmp_path: Path) -> None:
    """Another word in a frame changes what is said; the order of a frame's words does not."""
    rows = encode_stories(make_tokenizer(tmp_path / "tokenizer.model"), 8, seed=0)["caption"]
    model = initial_model(TINY)
    with torch.no_grad():
        logits, _ = predict(model, rows)
        turned, _ = predict(model, rows._replace(words=rows.words.flip(2)))
        other = rows.words.clone()
        other[:, -1, 1] += 1
        changed, _ = predict(model, rows._replace(words=other))
    torch.testing.assert_close(turned, logits, rtol=1e-4, atol=1e-5)
    assert (changed - logits).abs().max() > 1e-3


def test_pretraining_learns_and_leaves_a_folder_that_a_recipe_reads(tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    accuracy = pretrain(TINY, tmp_path / "llama", lambda *how: said.append(how))
    assert set(accuracy) == set(FORMS)
    assert said[-1][:2] == (9, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    model = TINY.llama(tmp_path / "llama").build()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_tokenizer(tmp_path / "llama").vocab_size == VOCAB_SIZE
    before, after = initial_model(TINY).state_dict(), model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)

    again = tmp_path / "again"
    assert pretrain(TINY, again) == accuracy
    assert state_hash(TINY.llama(again).build().state_dict()) == state_hash(after)


def test_a_finished_folder_is_kept_and_another_refused(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    accuracy = pretrain(TINY, folder)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain(TINY, folder) == accuracy
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="seed 0 there, 1 now"):
        pretrain(replace(TINY, seed=1), folder)
    (folder / "pretraining.json").unlink()
    with pytest.raises(UserError, match="not a model that this program made"):
        pretrain(TINY, folder)
    with pytest.raises(UserError, match="batch_size is 0"):
        replace(TINY, batch_size=0)


def test_telling_is_learnt_from_few_stories(tmp_path: Path) -> None:
    """The loss on words to be told falls, by the lower blocks alone; the upper ones wait without an effect."""
    tables = encode_stories(make_tokenizer(tmp_path / "tokenizer.model"), 40, seed=5)
    config = replace(TINY, tell_steps=25, choose_steps=1, batch_size=16)
    model = initial_model(config)
    with torch.no_grad():
        (whole, targets), (lower, _) = (predict(model, tables["told"], layers) for layers in (None, 1))
    torch.testing.assert_close(whole, lower)
    before = float(functional.cross_entropy(whole, targets))
    train(model, tables, config, lambda *how: None)
    with torch.no_grad():
        after = float(functional.cross_entropy(*predict(model, tables["told"])))
    assert after < before / 2
