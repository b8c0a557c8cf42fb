"""Stories as rows of tokens, in the forms from which the demo's language model learns, and the tokenizer of both.

Forms: `caption` and `answer` are views of vlm/data/views.py, the prompts that a video system gives. Two more are text
of the same kind, which teach in a few minutes what takes an hour to find from letters alone:

- `told`: a question without choices, and its answer in words
- `judged`: after each choice whether it is right, yes or no
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional

from vlm.data.prompts import PromptEncoder
from vlm.data.tokenizers import SentencePieceTokenizer, Tokenizer
from vlm.data.views import VIEWS, Item, items
from vlm.sources.common_stories import NUM_TOLD, Frame, phrases, stories
from vlm.types import IGNORE, Prompt, Segment, Text

KINDS = ("motion", "colour", "shape")
"""Forms of the view `answer`: one a kind of question."""
VOCAB_SIZE = 653  # words of the tokenizer, which follows from the expressions alone
FORMS = ("caption", "told", "judged", *KINDS)


class Rows(NamedTuple):
    """Rows of one form, padded on the right: what comes after a token does not matter to it. R rows, F frames."""

    ids: Tensor  # (R, L) int64
    labels: Tensor  # (R, L) int64, IGNORE where nothing is to be predicted
    words: Tensor  # (R, F, words of a frame) int64
    first: int  # place of the first frame; the same in every row


def join(several: Sequence[Rows]) -> Rows:
    """Rows of several forms as one."""
    length = max(rows.ids.shape[1] for rows in several)
    assert len({rows.first for rows in several}) == 1, "frames begin at different places"
    pad = functional.pad
    return Rows(
        ids=torch.cat([pad(rows.ids, (0, length - rows.ids.shape[1])) for rows in several]),
        labels=torch.cat([pad(rows.labels, (0, length - rows.ids.shape[1]), value=IGNORE) for rows in several]),
        words=torch.cat([rows.words for rows in several]),
        first=several[0].first,
    )


def encode_stories(tokenizer: Tokenizer, number: int, seed: int) -> dict[str, Rows]:
    """The rows of each form about `number` stories."""
    encoder = PromptEncoder(tokenizer=tokenizer, num_video_tokens=NUM_TOLD)
    found: dict[str, list[tuple[Prompt, tuple[Frame, ...]]]] = {form: [] for form in FORMS}
    for story in stories(number, seed):
        asked = items(story.annotation, caption=story.annotation["caption"])
        found["caption"].append((VIEWS["caption"](asked[0], 0), story.frames))
        for item in asked:
            assert item.answer is not None
            answer = VIEWS["answer"](item, item.answer)
            found[item.kind].append((answer, story.frames))
            found["told"].append((told(answer, item), story.frames))
            if item.kind != "shape":
                found["judged"].append((judged(answer, item), story.frames))
    ids = word_ids(tokenizer, [frames for _, frames in found["caption"]])
    return {
        form: encode_rows(
            encoder,
            [prompt for prompt, _ in several],
            torch.tensor([[[ids[word] for word in frame] for frame in frames] for _, frames in several]),
        )
        for form, several in found.items()
    }


def told(answer: Prompt, item: Item) -> Prompt:
    """Video (and caption) and question -> the right option's words. `answer`: the view's prompt of this item."""
    assert item.answer is not None
    before, ask = _question_of(answer)
    question = ask._replace(text=ask.text.partition("\n")[0])
    return (*before, question, Text(f" {item.options[item.answer]}\n", learn=True))


def judged(answer: Prompt, item: Item) -> Prompt:
    """Video (and caption), question and each option -> yes or no. `answer`: the view's prompt of this item."""
    before, ask = _question_of(answer)
    head, *rest = ask.text.split("\n(")
    prompt: list[Segment] = [*before, ask._replace(text=head)]
    options = [option.partition("\n")[0] for option in rest]
    for place, option in enumerate(options):
        prompt += [Text(f"\n({option}"), Text(" yes" if place == item.answer else " no", learn=True)]
    return tuple(prompt)


def _question_of(answer: Prompt) -> tuple[Prompt, Text]:
    """What stands before the question, and question and choices."""
    *before, ask, letter = answer
    assert isinstance(ask, Text)
    assert isinstance(letter, Text)
    assert letter.learn
    return tuple(before), ask


def word_ids(tokenizer: Tokenizer, told: Iterable[tuple[Frame, ...]]) -> dict[str, int]:
    """The token of each word that tells a frame."""
    return {word: _one(tokenizer, word) for word in {word for frames in told for frame in frames for word in frame}}


def _one(tokenizer: Tokenizer, word: str) -> int:
    found = tokenizer.encode(word)
    assert len(found) == 1, f"{word!r} is {len(found)} tokens"
    return found[0]


def encode_rows(encoder: PromptEncoder, prompts: Sequence[Prompt], words: Tensor, *, end: bool = True) -> Rows:
    """Prompts as rows. `words`: (R, F, words of a frame) int64 ids; F is 0 where rows have no frames. `end`: close each
    with the end token."""
    encoded = [encoder.encode(prompt, end=end) for prompt in prompts]
    shape = (len(encoded), max(len(tokens.ids) for tokens in encoded))
    rows = Rows(
        ids=torch.zeros(shape, dtype=torch.int64),
        labels=torch.full(shape, IGNORE),
        words=words,
        first=encoded[0].video[0],
    )
    for at, tokens in enumerate(encoded):
        assert tokens.video == (rows.first, rows.first + words.shape[1])
        rows.ids[at, : len(tokens.ids)] = torch.tensor(tokens.ids)
        rows.labels[at, : len(tokens.labels)] = torch.tensor(tokens.labels)
    return rows


def make_tokenizer(file: Path) -> SentencePieceTokenizer:
    """A sentencepiece model that knows each expression of prompts and stories as one piece, and any text by bytes."""
    tokenizer = train_tokenizer(file, list(dict.fromkeys(_lines_of_prompts())))
    assert tokenizer.vocab_size == VOCAB_SIZE, f"{tokenizer.vocab_size} words: set VOCAB_SIZE"
    return tokenizer


def train_tokenizer(file: Path, fixed: Sequence[str]) -> SentencePieceTokenizer:
    """A sentencepiece model that knows `fixed` lines and what stories say as one piece each."""
    known = [phrase for phrase in (*fixed, *phrases(), "yes", "no") for _ in range(3)]
    with file.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(known),
            model_writer=out,
            model_type="bpe",
            vocab_size=2000,
            hard_vocab_limit=False,  # as many as there are
            user_defined_symbols=[line.replace(" ", "\u2581") for line in fixed],  # they begin lines: no blank before
            byte_fallback=True,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            max_sentencepiece_length=80,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    return SentencePieceTokenizer(file)


def _lines_of_prompts() -> Iterable[str]:
    """What prompts say whatever the question is."""
    blank = Item(question="?", options=("",) * 4, answer=0)
    for view in ("answer", "caption"):
        for segment in VIEWS[view](blank, 0):
            if isinstance(segment, Text):
                yield from (line for line in (line.strip(" ?") for line in segment.text.split("\n")) if line)
