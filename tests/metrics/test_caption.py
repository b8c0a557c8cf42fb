"""What written texts are worth: matches, kinds, the challenge's means, and what is counted rather than dropped."""

from __future__ import annotations

import pytest

from vlm.metrics.caption import GEBC_KINDS, normalise, score
from vlm.types import UserError, Writing


def writing(key: str, text: str, *references: str, **more: object) -> Writing:
    return Writing(key=key, text=text, references=list(references), **more)  # type: ignore[arg-type]


ROWS = [
    writing("a", "A red circle moves left.", "a red circle moves left"),
    writing("b", "a blue square moves up", "a green square moves up", "a blue square goes up"),
    writing("c", "", "a red triangle falls"),
]


def test_figures() -> None:
    figures = score(ROWS, "python")
    assert figures["texts"] == 3
    assert figures["texts_empty"] == 1
    assert figures["texts_without_references"] == 0
    assert figures["exact_match"] == pytest.approx(1 / 3)
    assert 0 < figures["bleu4"] < figures["bleu1"] < 1
    assert 0 < figures["rouge_l"] < 1
    assert 0 < figures["cider"] < 10
    assert set(figures) >= {"bleu2", "bleu3"}
    assert not any("mean" in name or "overall" in name or "spice" in name for name in figures)


@pytest.mark.parametrize(
    ("text", "same"),
    [("A  man walks. ", "a man walks"), ("a man walks .", "A man walks"), ("a man\nwalks", "a man walks"), ("É.", "é")],
)
def test_exact_match_forgives_form(text: str, same: str) -> None:
    assert normalise(text) == normalise(same)


@pytest.mark.parametrize(
    ("text", "other"), [("a man walks", "a man walk"), ("a man, walks", "a man walks"), ("e.g.x", "e.gx")]
)
def test_exact_match_forgives_nothing_else(text: str, other: str) -> None:
    assert normalise(text) != normalise(other)


def test_probes_have_matches_alone() -> None:
    rows = [
        writing("a", "one", "one", probes={"blind": "two"}),
        writing("b", "two", "two", "deux", probes={"blind": "Deux."}),
    ]
    figures = score(rows, "python")
    assert figures["exact_match"] == 1.0
    assert figures["exact_match_blind"] == 0.5
    assert not any("blind" in name for name in figures if not name.startswith("exact_match"))


def test_texts_without_references_are_counted() -> None:
    figures = score([*ROWS, writing("d", "nobody wrote of this")], "python")
    assert figures.pop("texts_without_references") == 1
    whole = score(ROWS, "python")
    assert whole.pop("texts_without_references") == 0
    assert figures == whole


def boundaries(count: int) -> list[Writing]:
    words = ["man", "woman", "dog", "ball", "runs", "sits", "red", "blue", "left", "right", "hand", "cup"]
    rows = []
    for at in range(count):
        for number, kind in enumerate(GEBC_KINDS):
            truth = " ".join(words[(at + number * step) % len(words)] for step in range(1, 6))
            text = truth if at % 2 else truth.replace("man", "person").replace("red", "pink")
            rows.append(writing(f"v{at}/{number}", text, truth, kind=kind, id=f"v{at}_0", video=f"v{at}"))
    return rows


def test_kinds_are_scored_by_themselves() -> None:
    rows = boundaries(12)
    figures = score(rows, "python")
    for kind in GEBC_KINDS:
        alone = score([row for row in rows if row.kind == kind], "python")
        for name in ("exact_match", "bleu1", "bleu4", "rouge_l", "cider"):
            assert figures[f"{name}_{kind}"] == alone[name], "rarity is that of the kind"
    assert figures["cider"] != pytest.approx(sum(figures[f"cider_{kind}"] for kind in GEBC_KINDS) / 3, abs=1e-3)


def test_the_challenge_s_means() -> None:
    figures = score(boundaries(12), "python")
    for name in ("rouge_l", "cider", "bleu4"):
        mean = 100 * sum(figures[f"{name}_{kind}"] for kind in GEBC_KINDS) / 3
        assert figures[f"mean_{name}"] == pytest.approx(mean, abs=1e-6)
    assert figures["overall_cider_rouge_l"] == pytest.approx(figures["mean_cider"] + figures["mean_rouge_l"], abs=1e-6)
    assert figures["boundaries_incomplete"] == 0
    assert "overall_score" not in figures, "that name is of the sum with SPICE"
    assert "mean_score" not in figures


def test_boundaries_that_lack_a_text_are_counted() -> None:
    assert score(boundaries(4)[:-1], "python")["boundaries_incomplete"] == 1
    assert "mean_cider" not in score([row for row in boundaries(4) if row.kind != "subject"], "python")


def test_one_text_alone() -> None:
    figures = score([writing("a", "a man", "a man")], "python")
    assert figures["cider"] == 0.0
    assert figures["rouge_l"] == figures["exact_match"] == 1.0


def test_unicode_and_blanks() -> None:
    figures = score(
        [writing("a", "一个人 走路 😀", "一个人 走路"), writing("b", " \n", "…"), writing("c", "x", "y")], "python"
    )
    assert figures["texts_empty"] == 1
    assert figures["bleu1"] > 0.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no texts to score"),
        ([writing("a", "x")], "none of 1 texts has references"),
        ([writing("a", "x", "x", probes={"blind": "y"}), writing("b", "x", "x")], r"'b' has the probes \[\]"),
        ([writing("a", "x", "x", probes={"blind": "y"}, kind="blind")], "a kind of text and a probe"),
        ([*boundaries(1), boundaries(1)[1]], "'v0_0' of video 'v0' has 2 texts of the kind 'status_before'"),
    ],
)
def test_what_cannot_be_scored(rows: list[Writing], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(rows, "python")


def test_figures_are_the_same_in_any_order() -> None:
    rows = boundaries(9)
    assert score(rows[::-1], "python") == score(rows, "python")
