"""The words of captions: as the Java tokenizer of COCO's evaluation finds them, from its recorded answers.

`treebank_words.json.gz` holds [text, its words joined by blanks] of 6,725 texts written or drawn for this: captions
with every contraction, abbreviation and sign, random strings, and characters of all scripts. Recorded from
pycocoevalcap 1.2 (CoreNLP 3.4.1) under Java 17; tests/metrics/test_coco.py asks the program itself where there is one.
"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from vlm.metrics.ptb import tokenize

RECORDED = Path(__file__).with_name("treebank_words.json.gz")


@pytest.fixture(scope="module")
def recorded() -> list[tuple[str, str]]:
    return [(text, words) for text, words in json.loads(gzip.decompress(RECORDED.read_bytes()))]


def test_as_the_java_program(recorded: list[tuple[str, str]]) -> None:
    different = [
        (text, words, " ".join(tokenize(text))) for text, words in recorded if " ".join(tokenize(text)) != words
    ]
    assert len(recorded) > 6000
    assert different == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man in a red T-shirt.", "a man in a red t-shirt"),
        ("t - shirt", "t shirt"),
        ("it doesn't, can't, cannot", "it does n't ca n't can not"),
        ("the man's dogs' bowl", "the man 's dogs bowl"),
        ("(left) [right] {both}", "-lrb- left -rrb- -lsb- right -rsb- -lcb- both -rcb-"),
        ("black & white; AT&T!", "black & white at&t"),
        ("/0", "/ 0"),
        ("at 10:30 a.m. in the U.S.", "at 10:30 a.m. in the u.s."),
        ("Mr. Smith, Dr. No etc.", "mr. smith dr. no etc."),
        ("what?? really?", "what ?? really"),
        ("“quoted” … — yes", "quoted yes"),
        ("smiling 😀 café", "smiling café"),
        ("two\nlines\u2028three", "two lines three"),
        ("1 1/2 cups", "1\u00a01/2 cups"),
    ],
)
def test_captions(text: str, words: str) -> None:
    assert " ".join(tokenize(text)) == words


@pytest.mark.parametrize("text", ["", " ", "\n", "...", " . , ! ", "😀", "\u00ad", "---"])
def test_no_word(text: str) -> None:
    assert tokenize(text) == []


@pytest.mark.parametrize(
    "unit", ["a", "a-", "a.", "1,", "<a ", "a@", "'", "é", ". ", "http://", "a/", "&", "<a b=", "x b"]
)
def test_no_text_takes_for_ever(unit: str) -> None:
    """No rule tries all ways to cut a text that it does not match in the end."""
    begun = time.process_time()
    tokenize(unit * (4000 // len(unit)))
    assert time.process_time() - begun < 2.0
