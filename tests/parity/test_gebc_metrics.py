"""Caption scores against those recorded from pycocoevalcap 1.2 with its Java tokenizer.

Measured on the recorded file: words equal; BLEU and ROUGE-L equal, CIDEr to 9e-16. Allowed: 1e-9, the rounding of
`score`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vlm.metrics.caption import GEBC_KINDS, score
from vlm.metrics.ngrams import bleu, cider, rouge_l
from vlm.metrics.ptb import tokenize
from vlm.types import Writing

Words = list[list[str]]


@pytest.fixture
def recorded(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("gebc_metrics.json")


@pytest.fixture
def words(recorded: Any) -> tuple[Words, list[Words]]:
    """The words of texts and of references, from the recorded words themselves."""
    split = recorded["tokenized"]
    texts = [text.split(" ") if text else [] for text in split["hyp"]]
    return texts, [[one.split(" ") if one else [] for one in several] for several in split["refs"]]


def test_words(recorded: Any) -> None:
    for pair, own, others in zip(
        recorded["pairs"], recorded["tokenized"]["hyp"], recorded["tokenized"]["refs"], strict=True
    ):
        assert " ".join(tokenize(pair["hyp"])) == own
        assert [" ".join(tokenize(text)) for text in pair["refs"]] == others


def test_bleu(recorded: Any, words: tuple[Words, list[Words]]) -> None:
    assert bleu(*words) == pytest.approx(recorded["scores"]["Bleu"], abs=1e-12)
    each = [bleu([text], [others]) for text, others in zip(*words, strict=True)]
    for order in range(4):
        scores = recorded["scores"]["per_item"][f"Bleu_{order + 1}"]
        assert [one[order] for one in each] == pytest.approx(scores, abs=1e-12)


def test_rouge_l(recorded: Any, words: tuple[Words, list[Words]]) -> None:
    scores = rouge_l(*words)
    assert scores == pytest.approx(recorded["scores"]["per_item"]["ROUGE_L"], abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(recorded["scores"]["ROUGE_L"], abs=1e-12)


def test_cider(recorded: Any, words: tuple[Words, list[Words]]) -> None:
    scores = cider(*words)
    assert scores == pytest.approx(recorded["scores"]["per_item"]["CIDEr"], abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(recorded["scores"]["CIDEr"], abs=1e-12)


def writings(pairs: list[Any], **more: Any) -> list[Writing]:
    return [Writing(key=str(at), text=pair["hyp"], references=pair["refs"], **more) for at, pair in enumerate(pairs)]


def test_whole_set(recorded: Any) -> None:
    figures = score(writings(recorded["pairs"]))
    assert [figures[f"bleu{order}"] for order in range(1, 5)] == pytest.approx(recorded["scores"]["Bleu"], abs=1e-9)
    assert figures["rouge_l"] == pytest.approx(recorded["scores"]["ROUGE_L"], abs=1e-9)
    assert figures["cider"] == pytest.approx(recorded["scores"]["CIDEr"], abs=1e-9)


def test_the_challenge_s_figures(recorded: Any) -> None:
    """The first reference of the first thirds of the pairs, as subject, status before, status after, in percent."""
    truth = recorded["gebc_style_first_ref_only"]
    pairs = [{"hyp": pair["hyp"], "refs": pair["refs"][:1]} for pair in recorded["pairs"]]
    third = len(pairs) // 3
    rows = [
        row
        for number, kind in enumerate(GEBC_KINDS)
        for row in writings(pairs[number * third : (number + 1) * third], kind=kind, video="v")
    ]
    for row in rows:
        row.id, row.key = row.key, f"{row.key}/{row.kind}"
    figures = score(rows)
    for ours, theirs in (("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        for kind in GEBC_KINDS:
            assert 100 * figures[f"{ours}_{kind}"] == pytest.approx(truth[kind][theirs], abs=1e-6)
        assert figures[f"mean_{ours}"] == pytest.approx(truth[f"mean_{theirs}"], abs=1e-8)
    total = truth["mean_ROUGE_L"] + truth["mean_CIDEr"]
    assert figures["overall_cider_rouge_l"] == pytest.approx(total, abs=1e-8)
