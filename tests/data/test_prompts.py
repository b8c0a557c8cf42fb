"""The prompt encoder: labels follow from segments, truncation spares what must not be lost and is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.data.prompts import NEWLINE, PromptEncoder
from vlm.data.tokenizers import PieceByPiece, SentencePieceTokenizer, Tokenizer, load_tokenizer
from vlm.data.views import VIEWS, Item
from vlm.types import IGNORE, Prompt, Text, Tokens, Video

ITEM = Item(
    question="why did the boy kick the ball",
    options=("to pass it", "the Answer", "Answer: The answer is (C)"),
    answer=1,
    context="A boy plays. Answer: The answer is (C)\nQuestion: none",
    caption="A boy plays. Description: a ball",
)


@pytest.fixture(scope="session", params=["sentencepiece", "opt", "pieces"])
def tokenizer(request: pytest.FixtureRequest, golden: Callable[[str], Path]) -> Tokenizer:
    if request.param == "opt":
        return load_tokenizer(golden("gebc_tokenizers") / "opt")
    file = golden("tiny_llama_tokenizer") / "tokenizer.model"
    return SentencePieceTokenizer(file) if request.param == "sentencepiece" else Blind(file)


class Blind(PieceByPiece):
    """The same tokenizer, which does not say where its tokens lie."""

    def __init__(self, file: Path) -> None:
        model = SentencePieceTokenizer(file)
        self.bos, self.eos, self.newline, self.vocab_size = model.bos, model.eos, model.newline, model.vocab_size
        self.encode, self.decode = model.encode, model.decode  # type: ignore[method-assign]


def encoder(tokenizer: Tokenizer, **settings: object) -> PromptEncoder:
    return PromptEncoder(**({"tokenizer": tokenizer, "num_video_tokens": 4} | settings))  # type: ignore[arg-type]


def learned(tokens: Tokens, tokenizer: Tokenizer) -> str:
    """The text that is to be predicted; the end token must be the last of it."""
    ids = [label for label in tokens.labels if label != IGNORE]
    assert ids[-1] == tokenizer.eos
    assert all(label in (IGNORE, token) for label, token in zip(tokens.labels, tokens.ids))
    return tokenizer.decode(ids[:-1])


def test_layout_of_a_row(tokenizer: Tokenizer) -> None:
    prompt = (Text("Video:"), Video(), NEWLINE, Text("Question: ", apart=True), Text("why?", learn=True))
    tokens = encoder(tokenizer).encode(prompt)
    head, tail = tokenizer.encode("Video:"), tokenizer.encode("Question: why?")
    assert list(tokens.ids) == [tokenizer.bos, *head, 0, 0, 0, 0, tokenizer.newline, *tail, tokenizer.eos]
    assert tokens.video == (1 + len(head), 5 + len(head))
    assert learned(tokens, tokenizer).strip() == "why?"
    assert (tokens.dropped, tokens.excess) == (0, 0)
    assert len(tokens.labels) == len(tokens.ids)


def test_what_stands_apart_is_a_string_of_its_own(tokenizer: Tokenizer) -> None:
    joined = encoder(tokenizer).encode((Text("a b"), Text("c d")))
    apart = encoder(tokenizer).encode((Text("a b"), Text("c d", apart=True)))
    assert list(joined.ids[1:-1]) == tokenizer.encode("a bc d")
    assert list(apart.ids[1:-1]) == tokenizer.encode("a b") + tokenizer.encode("c d")


def test_a_prompt_may_stay_open(tokenizer: Tokenizer) -> None:
    tokens = encoder(tokenizer).encode((Text("a"), Video()), end=False)
    assert tokens.ids[-1] == 0
    assert encoder(tokenizer).encode((Text("a"), Video())).ids[-1] == tokenizer.eos
    assert set(tokens.labels) == {IGNORE}


def test_no_place_for_video(tokenizer: Tokenizer) -> None:
    tokens = encoder(tokenizer, num_video_tokens=0).encode((Text("a"), Video(), NEWLINE))
    assert tokens.video == (0, 0)
    assert list(tokens.ids) == [tokenizer.bos, *tokenizer.encode("a"), tokenizer.newline, tokenizer.eos]


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_words_of_the_prompt_in_captions_and_options_move_no_label(tokenizer: Tokenizer, choice: int) -> None:
    letter = "(" + "ABC"[choice] + ")"
    tokens = encoder(tokenizer).encode(VIEWS["answer"](ITEM, choice))
    assert learned(tokens, tokenizer).strip() == letter
    assert all(label != IGNORE for label in tokens.labels[-3:])
    question = encoder(tokenizer).encode(VIEWS["question"](ITEM, choice))
    assert learned(question, tokenizer).strip() == "Why did the boy kick the ball?"
    caption = encoder(tokenizer).encode(VIEWS["caption"](ITEM, choice))
    assert learned(caption, tokenizer).strip() == ITEM.caption
    order = encoder(tokenizer).encode(VIEWS["video_order"](ITEM, choice))
    assert set(order.labels) == {IGNORE}
    assert order.video == (len(order.ids) - 5, len(order.ids) - 1)


def test_first_tokens_may_be_passed_over(tokenizer: Tokenizer) -> None:
    prompt = (Text("a "), Text("one two three", learn=True, skip=2), Text(" four"))
    plain = encoder(tokenizer).encode((prompt[0], Text("one two three", learn=True), prompt[2]))
    skipped = encoder(tokenizer).encode(prompt)
    assert skipped.ids == plain.ids
    places = [place for place, label in enumerate(plain.labels) if label != IGNORE]
    assert [place for place, label in enumerate(skipped.labels) if label != IGNORE] == places[2:]
    assert skipped.labels[-1] == IGNORE  # the end follows a text that is not predicted


# Rows that are too long ----------------------------------------------------------------------------------------


LONG: Prompt = (
    Text("Video:"),
    Video(),
    NEWLINE,
    Text("Dialogue: we talk about it and go on talking\n", shorten=True, apart=True),
    Text("Video: ", apart=True),
    Text("a man walks along the street and then he turns around and walks back to where he came from", shorten=True),
    Text("\nQuestion: why does he?\nAnswer: "),
    Text("(A)", learn=True),
)


def parts(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """(length of the whole row, of its caption, of its dialogue), in tokens."""
    run = "".join(segment.text for segment in LONG[4:] if isinstance(segment, Text))
    start = tokenizer.tokens_before(run, len("Video: "))
    stop = tokenizer.tokens_before(run, run.index("\n"))
    assert isinstance(LONG[3], Text)
    return len(encoder(tokenizer).encode(LONG).ids), stop - start, len(tokenizer.encode(LONG[3].text))


def test_the_longest_text_is_shortened_first(tokenizer: Tokenizer) -> None:
    whole = encoder(tokenizer).encode(LONG)
    length, caption, dialogue = parts(tokenizer)
    assert caption > dialogue
    for over in (0, 1, 2, caption - 1, caption):
        tokens = encoder(tokenizer, max_length=length - over).encode(LONG)
        assert (len(tokens.ids), tokens.dropped, tokens.excess) == (length - over, over, 0)
        assert tokens.video == whole.video
        assert learned(tokens, tokenizer).strip() == "(A)"
        end = whole.ids[whole.ids.index(tokenizer.newline) :]
        assert tokens.ids[tokens.video[1] : tokens.video[1] + dialogue] == end[:dialogue]  # the dialogue is whole
        kept = length - over
        start = next(place for place in range(kept) if tokens.ids[place] != whole.ids[place]) if over else kept
        assert tokens.ids[start:] == whole.ids[start + over :]  # one piece is missing, at the caption's end


def test_then_the_next(tokenizer: Tokenizer) -> None:
    length, caption, dialogue = parts(tokenizer)
    for over in (1, dialogue):
        tokens = encoder(tokenizer, max_length=length - caption - over).encode(LONG)
        assert (len(tokens.ids), tokens.dropped, tokens.excess) == (length - caption - over, caption + over, 0)
        assert learned(tokens, tokenizer).strip() == "(A)"
        assert "why does he?" in tokenizer.decode(tokens.ids[tokens.video[1] :])


def test_without_enough_to_shorten_nothing_else_is_lost(tokenizer: Tokenizer) -> None:
    length, caption, dialogue = parts(tokenizer)
    least = length - caption - dialogue
    tokens = encoder(tokenizer, max_length=least - 7).encode(LONG)
    assert (len(tokens.ids), tokens.dropped, tokens.excess) == (least, caption + dialogue, 7)
    assert learned(tokens, tokenizer).strip() == "(A)"
    assert tokens.video[1] - tokens.video[0] == 4


def test_a_target_ends_where_it_is_cut_and_no_end_is_taught(tokenizer: Tokenizer) -> None:
    whole = encoder(tokenizer).encode(VIEWS["caption"](ITEM, 0))
    length = len(whole.ids) - 4
    tokens = encoder(tokenizer, max_length=length).encode(VIEWS["caption"](ITEM, 0))
    assert (tokens.ids, tokens.labels) == (whole.ids[:length], whole.labels[:length])
    assert (tokens.dropped, tokens.excess) == (4, 0)
    assert tokenizer.eos not in tokens.labels


def test_the_published_cut_loses_the_answer(tokenizer: Tokenizer) -> None:
    whole = encoder(tokenizer).encode(LONG)
    tokens = encoder(tokenizer, max_length=len(whole.ids) - 6, overflow="tail").encode(LONG)
    assert (tokens.ids, tokens.video, tokens.dropped) == (whole.ids[:-6], whole.video, 6)
    assert set(tokens.labels) == {IGNORE}


@pytest.mark.parametrize("overflow", ["tail", "shorten"])
def test_the_video_is_never_cut(tokenizer: Tokenizer, overflow: str) -> None:
    whole = encoder(tokenizer).encode(VIEWS["video_order"](ITEM, 0))
    length = len(whole.ids)
    tokens = encoder(tokenizer, max_length=length - 3, overflow=overflow).encode(VIEWS["video_order"](ITEM, 0))
    assert tokens.video == whole.video
    assert (tokens.dropped, tokens.excess) == ((1, 2) if overflow == "tail" else (0, 3))


def test_rows_that_fit_are_the_same_under_every_rule(tokenizer: Tokenizer) -> None:
    whole = encoder(tokenizer).encode(LONG)
    for settings in ({"max_length": len(whole.ids)}, {"max_length": len(whole.ids), "overflow": "tail"}):
        assert encoder(tokenizer, **settings).encode(LONG) == whole


@pytest.mark.parametrize("overflow", ["tail", "shorten"])
def test_a_video_between_its_marks(tokenizer: Tokenizer, overflow: str) -> None:
    """They are no places of it, are cut as little as it, and nothing else changes."""
    prompt = (Text("What is it?"), Video(), Text("A ball.", learn=True))
    plain = encoder(tokenizer).encode(prompt)
    marked = encoder(tokenizer, video_words=(900, 901, 902)).encode(prompt)
    first, end = plain.video
    assert marked.video == (first + 1, end + 1)
    assert marked.ids == (*plain.ids[:first], 901, *[900] * (end - first), 902, *plain.ids[end:])
    assert marked.labels == (*plain.labels[:end], IGNORE, IGNORE, *plain.labels[end:])
    cut = encoder(tokenizer, video_words=(900, 901, 902), max_length=first, overflow=overflow).encode(prompt)
    assert (cut.video, cut.ids[: end + 2]) == (marked.video, marked.ids[: end + 2])
