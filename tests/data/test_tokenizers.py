"""Tokenizers of every published kind: ids, where tokens lie, and files that are none."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from vlm.data.tokenizers import (
    HuggingFaceTokenizer,
    PieceByPiece,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
)
from vlm.types import UserError

TEXTS = (
    "Choices: \n(A) to pass it\nAnswer: The answer is (A)",
    "a ball. He  kicks it.\n\nÉtude: 漢字 🙂 (B)</s>",
    "(A)",
    "<s> <|begin_of_text|> \n",
)
KINDS = ("llama file", "llama folder", "gebc llama", "opt", "tiktoken")


def write_tiktoken(file: Path) -> Path:
    """A vocabulary in LLaMA 3's form: 256 bytes and some words."""
    words = [bytes([n]) for n in range(256)]
    for word in (" (", "is", " is", "er", "sw", "An", "Answer", ".\n", " t", " the", "?\n", " answ", " answer", "Answ"):
        words.append(word.encode())
    lines = (base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words))
    file.write_bytes(b"".join(lines))
    return file


@pytest.fixture(scope="session")
def tokenizers(golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "llama file": load_tokenizer(golden("tiny_llama_tokenizer") / "tokenizer.model"),
        "llama folder": load_tokenizer(golden("tiny_llama_tokenizer")),
        "gebc llama": load_tokenizer(golden("gebc_tokenizers") / "llama" / "tokenizer.model"),
        "opt": load_tokenizer(golden("gebc_tokenizers") / "opt"),
        "tiktoken": load_tokenizer(write_tiktoken(tmp_path_factory.mktemp("llama3") / "tokenizer.model")),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_told_by_content(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    classes = {"llama folder": HuggingFaceTokenizer, "opt": HuggingFaceTokenizer, "tiktoken": TiktokenTokenizer}
    assert type(tokenizers[kind]) is classes.get(kind, SentencePieceTokenizer)


def test_special_ids(tokenizers: dict[str, Tokenizer]) -> None:
    found = {kind: (t.bos, t.eos, t.newline, t.vocab_size) for kind, t in tokenizers.items()}
    assert found["llama file"][:3] == found["llama folder"][:3] == (1, 2, 13)
    assert found["llama file"][3] == 800
    assert found["gebc llama"] == (1, 2, 13, 480)
    assert found["opt"][:2] == (2, 2)
    assert found["tiktoken"] == (270, 271, 10, 270 + 256)
    for kind, tokenizer in tokenizers.items():
        assert tokenizer.decode([tokenizer.newline]) == "\n", kind


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_words_of_control_in_a_text_are_text(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos, tokenizer.eos} & set(ids)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_before_every_place(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    """The tokens counted before a place hold characters before it alone, and the next one does not."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    counts = [tokenizer.tokens_before(text, end) for end in range(len(text) + 1)]
    assert counts[0] == 0
    assert counts[-1] == len(ids)
    assert counts == sorted(counts)
    for end, count in enumerate(counts):
        before = tokenizer.decode(ids[:count])
        assert text.startswith(before)
        assert len(before) <= end
        if count < len(ids):
            more = tokenizer.decode(ids[: count + 1])
            # a part of a character, or the blank that sentencepiece puts before a text, is not yet anything
            assert len(more) > end or "\ufffd" in more or (more == "" and count == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_answer_is_found_with_and_without_offsets(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, text = tokenizers[kind], TEXTS[0]
    ids, place = tokenizer.encode(text), len(text) - len("(A)")
    count = tokenizer.tokens_before(text, place)
    assert tokenizer.decode(ids[count:]).lstrip() == "(A)"
    assert not tokenizer.decode(ids[:count]).endswith("(")

    class Blind(PieceByPiece):
        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    assert Blind().tokens_before(text, place) == count
    assert Blind().tokens_before(text, len(text)) == len(ids)


def test_the_same_as_sentencepiece_itself(golden: Callable[[str], Path], tokenizers: dict[str, Tokenizer]) -> None:
    model = SentencePieceProcessor(model_file=str(golden("tiny_llama_tokenizer") / "tokenizer.model"))
    for text in TEXTS[:3]:
        assert tokenizers["llama file"].encode(text) == model.encode(text)


def test_tiktoken_merges_across_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["tiktoken"]
    is_, bracket, a, close = 258, 256, ord("A"), ord(")")
    ids = tokenizer.encode("Answer is (A)")
    assert ids[-4:] == [is_, bracket, a, close]
    assert tokenizer.tokens_before("Answer is (A)", len("Answer is ")) == len(ids) - 3  # " (" holds the blank too


def test_a_folder_of_meta(golden: Callable[[str], Path], tmp_path: Path) -> None:
    data = (golden("tiny_llama_tokenizer") / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "params.json").write_text("{}")
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "is not a sentencepiece model"),
        (b"IQ== 0\nbroken\n", "row 2: b'broken' is not a base64 word and its rank"),
        (b"IQ== 0\nIg== 2\n", "the ranks of its 2 words are not 0 to 1"),
        (b"IQ== 0\nIg== 1\n", "has no token for a line end"),
    ],
)
def test_files_that_are_none(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(file)
    assert str(file) in str(error.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="transformers cannot read a tokenizer there"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(golden: Callable[[str], Path], tmp_path: Path) -> None:
    for file in (golden("gebc_tokenizers") / "opt").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(tmp_path)
