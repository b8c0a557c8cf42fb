"""The grammar of answers: what is read, and the sentence for each thing that is not."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from vlm.metrics.segment_answers import class_name, read_answer


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("0-30 SIL\n30-150 take bowl\n150-1000 pour cereals", [(0, 30, "SIL"), (30, 150, "take_bowl"),
                                                               (150, 1000, "pour_cereals")]),
        ("0-30 SIL \n30-31 take bowl  ", [(0, 30, "SIL"), (30, 31, "take_bowl")]),
        ("  \n5-9 a\r\n20-30 take_cup\n ", [(5, 9, "a"), (20, 30, "take_cup")]),  # gaps are nothing said
        ("0-1000 <b>&\"'", [(0, 1000, "<b>&\"'")]),
        ("0-5 a-b c3-4 7", [(0, 5, "a-b_c3-4_7")]),
    ],
)  # fmt: skip
def test_read(text: str, spans: list) -> None:
    assert read_answer(text, 1000) == (spans, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the answer is empty"),
        (" \n\t", "the answer is empty"),
        ("I cannot see the video.", "line 1: 'I cannot see the video.' is not of the form `start-end label`"),
        ("0-30 SIL\n\n30-40 stir", "line 2: '' is not of the form"),
        ("0-30 SIL\n 30-40 stir", "line 2: ' 30-40 stir' is not of the form"),
        ("0 - 30 SIL", "line 1: '0 - 30 SIL' is not of the form"),
        ("0-30", "line 1: '0-30' is not of the form"),
        ("0-30  SIL", "line 1: '0-30  SIL' is not of the form"),
        ("0-30 take  bowl", "line 1: '0-30 take  bowl' is not of the form"),
        ("0-30 take\tbowl", "is not of the form"),
        ("00-30 SIL", "line 1: '00-30 SIL' is not of the form"),
        ("-1-30 SIL", "is not of the form"),
        ("0-3.5 SIL", "is not of the form"),
        ("0-٣ SIL", "is not of the form"),
        ("0-30 SIL, 30-40 stir", "line 1: '0-30 SIL, 30-40 stir' has more than one segment"),
        ("0-30 30-40 stir", "line 1: '0-30 30-40 stir' has more than one segment"),
        ("0-30 SIL\n20-60 cut", "line 2: '20-60 cut' begins before 30, where the line above ends"),
        ("0-30 SIL\n30-1001 stir", "line 2: '30-1001 stir' goes beyond 1000, where the video ends"),
        (f"0-{'9' * 5000} stir", f"line 1: '0-{'9' * 58}'… goes beyond 1000"),
        ("0-30 SIL\n30-30 stir", "line 2: '30-30 stir' does not begin before it ends"),
        ("40-30 SIL", "line 1: '40-30 SIL' does not begin before it ends"),
        ("0-30 SIL\n30-40 stir\n10-50 cut\n", "line 3: '10-50 cut' begins before 40"),
        ("0-30 SIL\n30-60 stir\nDone.", "line 3: 'Done.' is not of the form"),
    ],
)
def test_refused(text: str, problem: str) -> None:
    spans, says = read_answer(text, 1000)
    assert spans == []
    assert problem in says
    assert len(says) < 200


def test_what_is_written_is_read() -> None:
    draw = random.Random(0)
    for _ in range(300):
        places = draw.randint(8, 1000)
        borders = sorted(draw.sample(range(places + 1), draw.randint(2, 8)))
        spans = [(a, b, draw.choice(["SIL", "take_bowl", "put_fruit2bowl"])) for a, b in pairwise(borders)]
        text = "\n".join(f"{start}-{end} {label.replace('_', ' ')}" for start, end, label in spans)
        assert read_answer(text, places) == (spans, "")


def test_class_name() -> None:
    assert class_name("put fruit2bowl") == class_name("put_fruit2bowl") == "put_fruit2bowl"
