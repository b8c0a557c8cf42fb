"""vlm/metrics/judged.py and judged_files.py: requests, replies, figures, forms of files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vlm.metrics.judged import ASPECTS, Aspect, Item, Verdict, digest_of, figures, parse, prompts_of, version_of
from vlm.metrics.judged_files import FORMS, items_of_run, published_rows, read_published
from vlm.types import UserError, Writing

ONE = Item("v_0", ("What is he doing?",), "Peeling a carrot.", ("He peels {a} carrot\nslowly",), "v")
TWO = Item("v_0", ("What does he do?", "Which action is it?"), "Peeling.", ("He peels.", "Cutting."), "v")


@pytest.mark.parametrize("aspect", ASPECTS.values(), ids=lambda aspect: aspect.name)
def test_requests_are_built_as_published(aspect: Aspect) -> None:
    item = TWO if aspect.asks_twice else ONE
    system, user = prompts_of(aspect, item)
    role, rules = system.split("\n------\n")
    assert role.startswith(
        f"You are an intelligent chatbot designed for evaluating {aspect.judges} of generative outputs "
    )
    assert rules.startswith("##INSTRUCTIONS:\n- ")
    assert 3 <= rules.count("\n- ") <= 4
    assert "synonyms or paraphrases as valid matches" in rules
    assert user.startswith("Please evaluate the following video-based question-answer pair:\n\nQuestion")
    for text in (*item.questions, item.answer, *item.predictions):
        assert text in user
    assert "integer value between 0 and 5" in user
    assert "JSON" in user
    assert ('"pred"' in user) == aspect.has_verdict


def test_consistency_asks_its_second_question() -> None:
    """The published script of a fork reads the first question twice."""
    user = prompts_of(ASPECTS["consistency"], TWO)[1]
    lines = ["Question 1: What does he do?", "Question 2: Which action is it?", "Correct Answer: Peeling."]
    lines += ["Predicted Answer to Question 1: He peels.", "Predicted Answer to Question 2: Cutting."]
    assert "\n".join(lines) in user


def test_an_item_must_have_the_questions_of_its_aspect() -> None:
    with pytest.raises(UserError, match="v_0: 1 questions and 1 predictions, but consistency is judged by 2"):
        prompts_of(ASPECTS["consistency"], ONE)
    with pytest.raises(UserError, match="but detail is judged by 1"):
        prompts_of(ASPECTS["detail"], TWO)


def test_wordings_have_names() -> None:
    assert len({version_of(aspect) for aspect in ASPECTS.values()}) == len(ASPECTS)
    changed = ASPECTS["detail"]._replace(rules=("Consider nothing.",))
    assert version_of(changed) != version_of(ASPECTS["detail"])
    assert digest_of("a", "bc") != digest_of("ab", "c")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 4}', 4),
        ("{'score': 4.8}", 4.8),
        ("{''score': 4.8}", 4.8),
        ('Sure! Here it is:\n```json\n{"score": 3}\n```\nAnything else?', 3),
        ('{"score": "5"}', 5),
        ('{"score": 0, "why": "wrong"}', 0),
        ('<think>{"score": 1} or 2?</think>{"score": 2}', 2),
        ('so I think {"score": 1}</think> {"score": 2}', 2),
        ('{"evaluation": {"score": 1.5}}', 1.5),
        ('{"score": 2} I repeat: {"score": 2}', 2),
        ("Format: {curly} … {'score': 4}", 4),
    ],
)
def test_replies_that_hold_a_score(reply: str, score: float) -> None:
    assert parse(ASPECTS["detail"], reply) == Verdict(score)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("", "no object"),
        ("4", "no object"),
        ("I cannot judge this.", "no object"),
        ('{"score": 4', "no object"),
        ("{score: 4}", "neither JSON nor a dictionary"),
        ('{"score": __import__("os").getpid()}', "neither JSON nor a dictionary"),
        ('{"score": 2 + 2}', "neither JSON nor a dictionary"),
        ('{"score": 1, "score": 5}', "a key twice"),
        ("{'score': 1, 'score': 5}", "a key twice"),
        ("{''score': 1, ''score': 5}", "a key twice"),
        ('{"score": 4} or {"score": 5}', "verdicts that differ"),
        ('{"score": 6}', "not a number from 0 to 5"),
        ('{"score": -1}', "not a number from 0 to 5"),
        ('{"score": NaN}', "not a number from 0 to 5"),
        ('{"score": true}', "not a number from 0 to 5"),
        ('{"score": null}', "not a number from 0 to 5"),
        ('{"score": [4]}', "not a number from 0 to 5"),
        ('{"score": "high"}', "not a number from 0 to 5"),
        ('{"Score": 4}', "not a number from 0 to 5"),
        (f'{{"score": {"9" * 1500}}}', "not a number from 0 to 5"),
        (f'{{"score": 4, "why": "{"x" * 3000}"}}', "an object of"),
        ("{1: 2, [3]: 4}", "neither JSON nor a dictionary"),
        ("{" + "(" * 500 + "}", "neither JSON nor a dictionary"),
        ("{}" * 50, "50 objects"),
        ('<think>{"score": 4}', "no object"),
    ],
)
def test_replies_without_a_verdict(reply: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(ASPECTS["detail"], reply)


@pytest.mark.parametrize("said", ["yes", "Yes", " YES. ", "no", "No!"])
def test_yes_and_no(said: str) -> None:
    reply = repr({"pred": said, "score": 4})
    assert parse(ASPECTS["qa"], reply) == Verdict(4, said.strip().lower().startswith("yes"))
    assert parse(ASPECTS["qa"], json.dumps({"score": 4.0, "pred": said})).right == ("y" in said.lower())


@pytest.mark.parametrize("said", ["maybe", "", "yes and no", None, 1])
def test_neither_yes_nor_no(said: object) -> None:
    with pytest.raises(ValueError, match="not yes or no"):
        parse(ASPECTS["qa"], json.dumps({"pred": said, "score": 4}))


def test_no_reply_breaks_the_parser() -> None:
    """Whatever comes is a verdict or a ValueError."""
    draw = random.Random(3)
    pieces = [
        "{",
        "}",
        "'",
        '"',
        "score",
        "pred",
        ":",
        "4.8",
        "yes",
        "[",
        "]",
        "(",
        "\\",
        "\x00",
        "<think>",
        "</think>",
    ]
    pieces += ["{'score': 4.8}", "''score'", ",", "é", "\ud800", "1e999", "-", "b''", "0x", "#", "\n"]
    for _ in range(3000):
        reply = "".join(draw.choices(pieces, k=draw.randrange(1, 14)))
        for name in ("temporal", "qa"):
            try:
                verdict = parse(ASPECTS[name], reply)
            except ValueError:
                continue
            assert 0 <= verdict.score <= 5
    parse(ASPECTS["detail"], '{"score": 1}' + "{" * 10**6)
    with pytest.raises(ValueError, match="no object"):
        parse(ASPECTS["detail"], "<think>" * 10**5)


def test_figures() -> None:
    found = figures(ASPECTS["detail"], [Verdict(4.8), Verdict(2.0), Verdict(0.0)])
    assert found["judged"] == 3
    assert found["score"] == pytest.approx(6.8 / 3)
    assert found["score_int"] == pytest.approx(2.0)  # int() of 4.8 is 4, as the published scripts have it
    assert found["scores"] == {"0": 1, "1": 0, "2": 1, "3": 0, "4": 1, "5": 0}
    assert "accuracy" not in found


def test_figures_of_answers() -> None:
    found = figures(ASPECTS["qa"], [Verdict(5, True), Verdict(4, True), Verdict(1, False)])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["yes"], found["no"], found["score"]) == (2, 1, pytest.approx(10 / 3))
    nothing = figures(ASPECTS["qa"], [])
    assert (nothing["judged"], nothing["score"], nothing["accuracy"]) == (0, None, None)


# Files ----------------------------------------------------------------------------------------------

ROWS = {
    "general": [
        {"video_name": "v_a", "Q": "What?", "A": "A cup.", "pred": "A mug."},
        {"video_name": "v_b", "Q": "Who?", "A": "A man.", "pred": ""},
        {"video_name": "v_a", "Q": "Where?", "A": "Inside.", "pred": "Out."},
    ],
    "consistency": [
        {"video_name": "v_a", "Q1": "What?", "Q2": "Which?", "A": "A cup.", "pred1": "A mug.", "pred2": "A car."},
    ],
    "qa": [{"id": "v_a_3", "question": "is it?", "answer": "yes", "pred": "Yes, it is."}],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lines", [False, True])
def test_forms_are_read_and_written(form: str, lines: bool, tmp_path: Path) -> None:
    file = tmp_path / "pred.json"
    rows = ROWS[form]
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    items = read_published(file)
    assert published_rows(items, form) == rows
    assert len(items[0].questions) == (2 if form == "consistency" else 1)
    if form == "general":
        assert [item.key for item in items] == ["v_a_0", "v_b_0", "v_a_1"]  # the count runs within a video


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no row"),
        ("[]", "holds no row"),
        ("[{]", "line 1 is not JSON"),
        ('[{"video_name": "v", "Q": "What?", "A": "x"}]', "has no prediction yet"),
        ('[{"name": "v"}]', "none of the published forms"),
        ('[{"video_name": "v", "Q": "What?", "A": "x", "pred": null}]', "row 1: pred is None, not a text"),
        ('[{"video_name": "v", "Q": "a", "A": "x", "pred": "y"}, {"id": 1}]', "row 2 is not of the form"),
        ('["x"]', "none of the published forms"),
    ],
)
def test_files_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "pred.json"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_published(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path / "none.json")


def _writing(key: str, video: str, question: str, answer: str | None, text: str = "t") -> Writing:
    references = [] if answer is None else [answer]
    return Writing(key=key, text=text, references=references, video=video, question=question)


def test_rows_of_a_run() -> None:
    rows = [_writing("a", "v", "What?", "A cup.", "A mug."), _writing("b", "v", "Who?", None)]
    items, without = items_of_run(rows, pairs=False)
    assert items == [Item("a", ("What?",), "A cup.", ("A mug.",), "v")]
    assert without == ["b"]
    assert published_rows(items, "general") == [{"video_name": "v", "Q": "What?", "A": "A cup.", "pred": "A mug."}]
    rows[0].references = ["A cup.", "A mug.", "A cup."]
    assert items_of_run(rows, pairs=False)[0][0].answer == "A cup. or A mug."


def test_pairs_of_a_run() -> None:
    rows = [_writing(key, key[0], f"{key}?", answer, f"{key}!") for key, answer in
            (("v0", "A"), ("v1", "B"), ("w0", "A"), ("v2", "A"), ("v3", "B"), ("w1", "A"))]  # fmt: skip
    items, _ = items_of_run(rows, pairs=True)
    assert [(item.questions, item.predictions) for item in items] == [
        (("v0?", "v2?"), ("v0!", "v2!")),
        (("v1?", "v3?"), ("v1!", "v3!")),
        (("w0?", "w1?"), ("w0!", "w1!")),
    ]
    with pytest.raises(UserError, match=r"w1: no other text of 'w' goes with it \('A'\)"):
        items_of_run(rows[:2] + rows[3:], pairs=True)
    for row, name in zip(rows, ("v/0/1", "v/1/1", "w/0/1", "v/1/2", "v/0/2", "w/0/2"), strict=True):
        row.id = name
    named, _ = items_of_run(rows, pairs=True)
    assert [item.questions for item in named] == [("v1?", "v2?"), ("v0?", "v3?"), ("w0?", "w1?")]
    with pytest.raises(UserError, match="2 questions, but the form general holds 1"):
        published_rows(items, "general")
    with pytest.raises(UserError, match="no form 'x'"):
        published_rows(items, "x")
