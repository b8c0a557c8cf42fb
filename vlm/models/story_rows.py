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

from vlm.data.prompts import NEWLINE, PromptEncoder
from vlm.data.tokenizers import SentencePieceTokenizer, Tokenizer
from vlm.data.views import VIEWS, Item, items
from vlm.sources.common_stories import NUM_TOLD, Frame, phrases, stories
from vlm.types import IGNORE, Prompt, Text, Video

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
            found["told"].append((_told(answer, item), story.frames))
            if item.kind != "shape":
                found["judged"].append((_judged(answer, item), story.frames))
    words = {word for _, told in found["caption"] for frame in told for word in frame}
    ids = {word: _one(tokenizer, word) for word in words}
    return {form: _rows(encoder, ids, several) for form, several in found.items()}


def _told(answer: Prompt, item: Item) -> Prompt:
    """Video and question -> the right option's words."""
    assert item.answer is not None
    question = _ask(answer).partition("\n")[0]
    return (*_until_question(answer), Text(question, apart=True), Text(f" {item.options[item.answer]}\n", learn=True))


def _judged(answer: Prompt, item: Item) -> Prompt:
    """Video, question and each option -> yes or no."""
    head, *rest = _ask(answer).split("\n(")
    prompt = [*_until_question(answer), Text(head, apart=True)]
    options = [option.partition("\n")[0] for option in rest]
    for place, option in enumerate(options):
        prompt += [Text(f"\n({option}"), Text(" yes" if place == item.answer else " no", learn=True)]
    return tuple(prompt)


def _until_question(answer: Prompt) -> Prompt:
    """Instruction, video and the line end."""
    place = answer.index(NEWLINE) + 1
    assert isinstance(answer[1], Video)
    return answer[:place]


def _ask(answer: Prompt) -> str:
    """Question and choices."""
    text = answer[answer.index(NEWLINE) + 1]
    assert isinstance(text, Text)
    return text.text


def _one(tokenizer: Tokenizer, word: str) -> int:
    found = tokenizer.encode(word)
    assert len(found) == 1, f"{word!r} is {len(found)} tokens"
    return found[0]


def _rows(encoder: PromptEncoder, ids: dict[str, int], several: list[tuple[Prompt, tuple[Frame, ...]]]) -> Rows:
    encoded = [encoder.encode(prompt) for prompt, _ in several]
    shape = (len(encoded), max(len(tokens.ids) for tokens in encoded))
    rows = Rows(
        ids=torch.zeros(shape, dtype=torch.int64),
        labels=torch.full(shape, IGNORE),
        words=torch.tensor([[[ids[word] for word in frame] for frame in told] for _, told in several]),
        first=encoded[0].video[0],
    )
    for at, tokens in enumerate(encoded):
        assert tokens.video[0] == rows.first
        rows.ids[at, : len(tokens.ids)] = torch.tensor(tokens.ids)
        rows.labels[at, : len(tokens.labels)] = torch.tensor(tokens.labels)
    return rows


def make_tokenizer(file: Path) -> SentencePieceTokenizer:
    """A sentencepiece model that knows each expression of prompts and stories as one piece, and any text by bytes."""
    fixed = list(dict.fromkeys(_lines_of_prompts()))
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
    tokenizer = SentencePieceTokenizer(file)
    assert tokenizer.vocab_size == VOCAB_SIZE, f"{tokenizer.vocab_size} words: set VOCAB_SIZE"
    return tokenizer


def _lines_of_prompts() -> Iterable[str]:
    """What prompts say whatever the question is."""
    blank = Item(question="?", options=("",) * 4, answer=0)
    for view in ("answer", "caption"):
        for segment in VIEWS[view](blank, 0):
            if isinstance(segment, Text):
                yield from (line for line in (line.strip(" ?") for line in segment.text.split("\n")) if line)
