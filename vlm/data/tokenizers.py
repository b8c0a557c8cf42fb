"""The tokenizers of published language models behind one small interface: ids, and where in the text each begins.

    tokenizer = load_tokenizer("pretrained/llama3/tokenizer.model")   # sentencepiece, tiktoken: told apart by content
    tokenizer = load_tokenizer("pretrained/vicuna-7b")                # a Hugging Face folder

Texts are data: a word such as `</s>` in a caption is encoded as ordinary characters, never as a control token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from vlm.types import UserError


class Tokenizer(Protocol):
    """What the prompt encoder asks of a tokenizer."""

    @property
    def bos(self) -> int | None:
        """Id that begins every row; None: this model has none."""

    @property
    def eos(self) -> int:
        """Id that ends every row."""

    @property
    def newline(self) -> int:
        """Id of a line end that no other character is merged with."""

    @property
    def vocab_size(self) -> int:
        """Rows that the model's embedding must have."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Control tokens, and ids that only the model's embedding has, are nothing in it."""

    def tokens_before(self, text: str, end: int) -> int:
        """How many tokens of `encode(text)` hold only characters before `end`: the index of the first that does not."""


class PieceByPiece:
    """`tokens_before` for tokenizers that do not say where their tokens lie in the text."""

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def tokens_before(self, text: str, end: int) -> int:
        """Tokens that the piece before `end` has in common with the whole: exact where `end` is a word's boundary."""
        if end >= len(text):
            return len(self.encode(text))
        same = 0
        for piece, whole in zip(self.encode(text[:end]), self.encode(text)):
            if piece != whole:
                break
            same += 1
        return same


class ByteTokenizer:
    """A token a byte (UTF-8), for debugging: needs no file, and can write every text."""

    bos = 1
    eos = 2
    newline = 3 + ord("\n")
    vocab_size = 3 + 256

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 3 for token in ids if 3 <= token < self.vocab_size).decode(errors="replace")

    def tokens_before(self, text: str, end: int) -> int:
        return len(text[:end].encode())


class SentencePieceTokenizer:
    """LLaMA 1 and 2, Vicuna: a `tokenizer.model` of sentencepiece (https://github.com/google/sentencepiece)."""

    def __init__(self, file: str | Path) -> None:
        """UserError where the file is no sentencepiece model, or one without begin, end or line end."""
        from sentencepiece import SentencePieceProcessor

        self.file = Path(file)
        try:
            self._model: Any = SentencePieceProcessor(model_proto=_read(self.file))
        except RuntimeError as error:
            raise UserError(f"{file} is not a sentencepiece model ({error}): is it the tokenizer.model?") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos = self._known(self._model.bos_id(), "begin token")
        self.eos = self._known(self._model.eos_id(), "end token")
        newline = self._model.piece_to_id("<0x0A>")
        if newline == self._model.unk_id():
            newline = self._model.piece_to_id("\n")
        self.newline = self._known(-1 if newline == self._model.unk_id() else newline, "token for a line end")
        self._borders: tuple[str, list[int], list[int]] = ("", [], [])

    def _known(self, token: int, what: str) -> int:
        if token < 0:
            raise UserError(f"{self.file} has no {what}: prompts cannot be written with it")
        return token

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([token for token in ids if token < self.vocab_size])

    def tokens_before(self, text: str, end: int) -> int:
        if self._borders[0] != text:  # a dialogue asks for border after border of one text
            self._borders = (text, *self._find_borders(text))
        _, sizes, counts = self._borders
        place = bisect_right(sizes, end)
        return counts[place - 1] if place else 0

    def _find_borders(self, text: str) -> tuple[list[int], list[int]]:
        """(characters, tokens) up to the end of each token that ends a character. Others have no surface: the blank put
        before a text, and all bytes of a character but the last."""
        sizes, counts, size = [], [], 0
        for number, piece in enumerate(self._model.encode(text, return_type="proto").pieces, 1):
            surface = piece.surface
            if surface:
                size += len(surface)
                sizes.append(size)
                counts.append(number)
        return sizes, counts


class TiktokenTokenizer:
    """LLaMA 3: a `tokenizer.model` of base64 words and ranks (https://github.com/openai/tiktoken)."""

    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    SPECIALS = 256  # reserved ids after the words; the first two are begin and end of text

    def __init__(self, file: str | Path) -> None:
        """UserError where the file is not such a list."""
        try:
            import tiktoken
        except ImportError as error:
            raise UserError(f"{file} is a tiktoken vocabulary: pip install tiktoken") from error
        self.file = Path(file)
        words = _read_ranks(self.file)
        self._model = tiktoken.Encoding(self.file.stem, pat_str=self.PATTERN, mergeable_ranks=words, special_tokens={})
        self.bos = len(words)
        self.eos = len(words) + 1
        self.vocab_size = len(words) + self.SPECIALS
        if b"\n" not in words:
            raise UserError(f"{file} has no token for a line end: prompts cannot be written with it")
        self.newline = words[b"\n"]

    def encode(self, text: str) -> list[int]:
        return self._model.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([token for token in ids if token < self.bos])

    def tokens_before(self, text: str, end: int) -> int:
        limit = len(text[:end].encode())
        count = size = 0
        for token in self.encode(text):
            size += len(self._model.decode_single_token_bytes(token))
            if size > limit:
                break
            count += 1
        return count


class HuggingFaceTokenizer(PieceByPiece):
    """Any tokenizer of a Hugging Face folder (OPT, Vicuna, BiLLa, …), through transformers."""

    def __init__(self, folder: str | Path) -> None:
        """UserError where transformers cannot read the folder, or the tokenizer has no end token."""
        from transformers import AutoTokenizer

        self.file = Path(folder)
        if not self.file.is_dir():
            raise UserError(f"{folder}: no such folder of a tokenizer")
        try:
            self._model: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, legacy=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{folder}: transformers cannot read a tokenizer there ({error})") from error
        if self._model.eos_token_id is None:
            raise UserError(f"{folder}: the tokenizer has no end token, so a row has no end; set eos_token")
        self.bos = self._model.bos_token_id
        self.eos: int = self._model.eos_token_id
        self.vocab_size = len(self._model)
        self.newline = self._newline()

    def _newline(self) -> int:
        for word in ("<0x0A>", "\n", "\u010a"):  # sentencepiece's byte; plain; byte-level BPE's letter for it
            token = self._model.convert_tokens_to_ids(word)
            if token is not None and token != self._model.unk_token_id:
                return token
        raise UserError(f"{self.file}: the tokenizer has no token for a line end: prompts cannot be written with it")

    def _encoded(self, text: str, **options: Any) -> Any:
        return self._model(text, add_special_tokens=False, split_special_tokens=True, **options)

    def encode(self, text: str) -> list[int]:
        return self._encoded(text)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        known = [token for token in ids if token < self.vocab_size]
        return self._model.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def tokens_before(self, text: str, end: int) -> int:
        if not self._model.is_fast:
            return super().tokens_before(text, end)
        return _count_before(self._encoded(text, return_offsets_mapping=True)["offset_mapping"], end)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file (sentencepiece or tiktoken, told apart by content) or of a Hugging Face folder.

    A folder with a `tokenizer.model` and nothing of Hugging Face's is a published LLaMA folder. UserError: neither.
    """
    path = Path(path)
    if path.is_dir():
        theirs = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
        if theirs or not (path / "tokenizer.model").is_file():
            return HuggingFaceTokenizer(path)
        path = path / "tokenizer.model"
    first = _read(path).split(b"\n", 1)[0]
    return TiktokenTokenizer(path) if _is_rank(first) else SentencePieceTokenizer(path)


@lru_cache(maxsize=4)
def tokenizer_of(path: Path | None) -> Tokenizer:
    """What a recipe's inputs read and write with, opened once a process; None: bytes, for debugging only."""
    return ByteTokenizer() if path is None else load_tokenizer(path)


def content_hash(path: str | Path) -> str:
    """sha256 of what `load_tokenizer` reads, wherever it lies. UserError: it cannot be read."""
    path = Path(path)
    kinds = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*")
    inside = sorted({file for kind in kinds for file in path.glob(kind) if file.is_file()})
    digest = hashlib.sha256()
    for file in inside if path.is_dir() else [path]:
        digest.update(b"" if file == path else file.name.encode())
        digest.update(hashlib.sha256(_read(file)).digest())
    return digest.hexdigest()


def _read(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if not data:
        raise UserError(f"{file} is empty: the tokenizer was not downloaded")
    return data


def _is_rank(line: bytes) -> bool:
    word, _, rank = line.partition(b" ")
    try:
        return bool(base64.b64decode(word, validate=True)) and rank.strip().isdigit()
    except binascii.Error:
        return False


def _read_ranks(file: Path) -> dict[bytes, int]:
    words: dict[bytes, int] = {}
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        if not _is_rank(line):
            raise UserError(
                f"{file} row {number}: {line[:60]!r} is not a base64 word and its rank: the file is damaged"
            )
        word, _, rank = line.partition(b" ")
        words[base64.b64decode(word)] = int(rank)
    if sorted(words.values()) != list(range(len(words))):
        raise UserError(f"{file}: the ranks of its {len(words)} words are not 0 to {len(words) - 1}: rows are missing")
    return words


def _count_before(spans: Iterable[tuple[int, int]], end: int) -> int:
    """Index of the first span that reaches beyond `end`."""
    count = 0
    for _, stop in spans:
        if stop > end:
            break
        count += 1
    return count
