"""BLEU, ROUGE-L, CIDEr by hand, and where there is little to compare."""

from __future__ import annotations

import math

import pytest

from vlm.metrics.ngrams import bleu, cider, rouge_l

close = pytest.approx


def words(*texts: str) -> list[list[str]]:
    return [text.split(" ") if text else [] for text in texts]


def test_bleu_adds_up_the_corpus() -> None:
    # 1-grams: 3 of 3, 1 of 4 ("a" once, though written twice); 2-grams: 2 of 2, 0 of 3.
    texts = words("the cat sat", "a dog a barked")
    references = [words("the cat sat down"), words("a bird flew off")]
    ratio = 7 / 8
    brevity = math.exp(1 - 1 / ratio)
    scores = bleu(texts, references)
    assert scores[0] == close(4 / 7 * brevity)
    assert scores[1] == close(math.sqrt(4 / 7 * 2 / 5) * brevity)
    assert scores[2] == close((4 / 7 * 2 / 5 * 1 / 3) ** (1 / 3) * brevity)
    assert scores[3] == close((4 / 7 * 2 / 5 * 1 / 3 * 1e-15 / 1) ** (1 / 4) * brevity, rel=1e-6)


def test_bleu_counts_against_the_closest_reference() -> None:
    texts = words("one two three")
    near = [words("one two", "one two three four", "one two three four five six")]
    assert bleu(texts, near)[0] == close(1.0)  # 2 and 4 are as close: the shorter, so no penalty
    far = [words("one two three four five", "one two three four five six")]
    assert bleu(texts, far)[0] == close(math.exp(1 - 5 / 3))


def test_bleu_clips_by_the_reference_with_most() -> None:
    assert bleu(words("a a a"), [words("a b c", "a a c")])[0] == close(2 / 3)


def test_rouge_takes_best_precision_and_best_recall() -> None:
    # Against "a b": P 2/4, R 2/2; against "a b c x y z": P 3/4, R 3/6. Together P 3/4, R 1.
    score = rouge_l(words("a b c d"), [words("a b", "a b c x y z")])
    precision, recall = 3 / 4, 1.0
    assert score == [close((1 + 1.44) * precision * recall / (recall + 1.44 * precision))]


def test_rouge_keeps_the_order() -> None:
    assert rouge_l(words("c b a"), [words("a b c")]) == [close((2.44 * (1 / 3) * (1 / 3)) / (2.44 * (1 / 3)))]


def test_cider_by_hand() -> None:
    # Two images, one reference each. "x" is in both (idf 0), "a" and "b" in one (log 2). No 2-gram is shared.
    texts = words("x a", "x b")
    references = [words("x a"), words("x c")]
    # First: 1-grams cosine 1, 2-grams cosine 1, no 3- or 4-grams. Second: nothing in common but "x", of weight 0.
    assert cider(texts, references) == [close(10 * (1 + 1) / 4), 0.0]


def test_cider_punishes_lengths_in_pairs_of_words() -> None:
    texts, references = words("a b c", "q"), [words("a b c d e"), words("q")]
    same = cider(words("a b c d e", "q"), references)[0]
    assert same == close(10.0)
    rare = math.log(2)
    cosines = [math.sqrt(3 / 5), math.sqrt(2 / 4), math.sqrt(1 / 3), 0.0]
    assert cider(texts, references)[0] == close(10 * sum(cosines) / 4 * math.exp(-((4 - 2) ** 2) / 72))
    assert rare > 0


def test_cider_averages_over_references_and_clips() -> None:
    references = [words("a", "b"), words("c")]
    assert cider(words("a a", "c"), references)[0] == close(10 * 0.25 * (1 / 2) * math.exp(-1 / 72) * 0.5)


def test_one_caption_alone_has_no_rarity() -> None:
    assert cider(words("a man walks"), [words("a man walks")]) == [0.0]
    assert bleu(words("a man walks away"), [words("a man walks away")]) == [close(1.0)] * 4
    assert rouge_l(words("a man walks"), [words("a man walks")]) == [1.0]


@pytest.mark.parametrize(("text", "reference", "rouge"), [("", "a b", 0.0), ("a b", "", 0.0), ("", "", 1.0)])
def test_nothing_written(text: str, reference: str, rouge: float) -> None:
    texts, references = words(text, "c d e f"), [words(reference), words("c d e f")]
    assert rouge_l(texts, references) == [close(rouge), 1.0]
    assert cider(texts, references)[0] == 0.0
    assert all(0 <= score <= 1 for score in bleu(texts, references))
    assert bleu(words(text), [words(reference)]) == [close(0.0, abs=1e-5)] * 4


def test_a_word_with_a_blank_in_it_is_two_to_all_but_rouge() -> None:
    texts, references = [["1\u00a01/2", "cups"]], [[["1", "1/2", "cups"]]]
    assert bleu(texts, references)[0] == close(1.0)
    assert rouge_l(texts, references)[0] < 0.5
