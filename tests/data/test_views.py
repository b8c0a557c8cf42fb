"""The views' texts to the letter, and the captions they are made from."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from vlm.data.views import (
    VIEWS,
    Item,
    answer,
    caption,
    find_caption,
    free_question,
    items,
    question,
    random_suffix,
    without_lead,
)
from vlm.types import Prompt, Text, UserError, Video

ITEM = Item(question="why did Tom kick the ball", options=("to pass it", "for fun"), answer=1)


def spelled(prompt: Prompt) -> str:
    """[ ] what is predicted, { } what may be shortened, | where a string begins, <V> the video."""
    text = ""
    for segment in prompt:
        if isinstance(segment, Video):
            text += "<V>"
            continue
        inner = f"[{segment.text}]" if segment.learn else segment.text
        inner = f"{{{inner}}}" if segment.shorten else inner
        text += f"|{inner}" if segment.apart else inner
    return text


OPTIONS = "Choices: \n(A) to pass it\n(B) for fun\n"


def test_answer() -> None:
    assert spelled(answer(ITEM, 1)) == (
        "Instruction: Predict the answer based on the video and question.\nVideo:<V>|\n|Question: Why did tom kick the "
        f"ball?\n{OPTIONS}Answer: The answer is [(B)]"
    )


def test_answer_with_a_caption_and_with_a_dialogue() -> None:
    shown = spelled(answer(replace(ITEM, context="A ball."), 0))
    assert shown.endswith(f"<V>|\n|Video: {{A ball.}}\nQuestion: Why did tom kick the ball?\n{OPTIONS}"
                          "Answer: The answer is [(A)]")  # fmt: skip
    said = spelled(answer(replace(ITEM, dialogue=" TOM: Go."), 0))
    assert said.startswith("Instruction: Predict the answer based on the dialogue, video and question.\nVideo:<V>|\n")
    assert "|\n|{Dialogue:  TOM: Go.\n}|Question: Why did" in said
    both = spelled(answer(replace(ITEM, dialogue=" TOM: Go.", context="A ball."), 0))
    assert "|{Dialogue:  TOM: Go.\n}|Video: {A ball.}\nQuestion: Why did" in both


def test_question() -> None:
    assert spelled(question(ITEM, 0)) == (
        f"Instruction: Predict the question based on the video and answer.\nVideo:<V>|\n|{OPTIONS}"
        "Answer: The answer is (A)\nQuestion: [Why did tom kick the ball?]"
    )
    said = spelled(question(replace(ITEM, dialogue="x"), 0))
    assert said.startswith("Instruction: Predict the question based on the dialogue, video and answer.\nVideo:<V>|\n")
    assert "|{Dialogue: x\n}|Choices: " in said


def test_video_order() -> None:
    shown = f"Question: Why did tom kick the ball?\n{OPTIONS}Answer: The answer is (B)\nVideo:<V>"
    assert spelled(VIEWS["video_order"](ITEM, 1)) == (
        f"Instruction: Predict the video based on the question and answer.\n{shown}"
    )
    assert spelled(VIEWS["video_order"](replace(ITEM, dialogue="x"), 1)) == (
        f"Instruction: Predict the video based on the dialogue, question and answer.\n|{{Dialogue: x\n}}|{shown}"
    )


def test_caption() -> None:
    assert spelled(caption(replace(ITEM, caption="A ball."))) == (
        "Instruction: describe the what happens in the video.\nVideo:<V>|\n|Description: {[A ball.\n]}"
    )
    target = caption(ITEM, skip=3)[-1]
    assert isinstance(target, Text)
    assert target.skip == 3


def test_names_are_those_of_the_losses() -> None:
    assert list(VIEWS) == ["answer", "question", "video_order", "caption"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("where is this happening ?", "Where is this happening ?"),
        ("is it?", "Is it?"),
        (" what is NBC ", " what is nbc".strip() + "?"),
        ("why", "Why?"),
        ("2 dogs. Or 3", "2 dogs. or 3?"),
    ],
)
def test_questions_are_spelled_as_published(text: str, shown: str) -> None:
    assert f"\n|Question: {shown}\nChoices" in spelled(answer(replace(ITEM, question=text), 0))


def test_items_of_an_annotation() -> None:
    row = {"id": "7", "question": "why", "options": ["a", "b"], "answer": 1}
    full = row | {"kind": "CW", "span": [1.0, 2.5], "dialogue": " hi", "answer": None}
    plain, rich = items({"questions": [row, full]}, context="c", caption="d")
    assert plain == Item(id="7", question="why", options=("a", "b"), answer=1, context="c", caption="d")
    assert (rich.kind, rich.span, rich.dialogue, rich.answer) == ("CW", (1.0, 2.5), " hi", None)


def test_captions_by_name() -> None:
    annotation = {"video": "12", "captions": {"one": "A.", "two": "B."}}
    assert find_caption(annotation, "two") == "B."
    with pytest.raises(UserError, match=r"video '12' has no caption 'three' \(it has one, two\)"):
        find_caption(annotation, "three")
    with pytest.raises(UserError, match=r"\(it has none\)"):
        find_caption({"video": "12"}, "three")


def test_leads_are_taken_away() -> None:
    assert without_lead("In the video we see these scenes: a; b. ") == "a; b."
    assert without_lead("x In the video we see these scenes: y In the video we see these scenes: z") == "z"
    assert without_lead("The video shows: a cup.") == "a cup."
    assert without_lead("A cup.") == "A cup."
    both = "In the video we see these scenes: a man. The video shows: a cup."
    assert without_lead(both) == "a man. The video shows: a cup."


def test_random_suffix_begins_at_a_sentence() -> None:
    text = "One. Two. Three. Four. Five."
    drawn = Counter(random_suffix(text, random.Random(seed)) for seed in range(400))
    assert set(drawn) == {text, text[5:], text[10:], text[17:]}
    assert min(drawn.values()) > 60
    assert random_suffix("No stop", random.Random(0)) == "No stop"
    assert random_suffix("One. Two.", random.Random(0)) == "One. Two."


def test_a_question_that_a_person_types() -> None:
    typed = free_question("why did Tom kick the ball\n(A) to pass it\n b. for fun\n")
    assert (typed.question, typed.options) == (ITEM.question, ITEM.options)
    assert spelled(answer(typed, 1)) == spelled(answer(ITEM, 1))
    open_ended = free_question("  what is it?\nTell me more. ")
    assert (open_ended.question, open_ended.options) == ("what is it? Tell me more.", ())
    assert spelled(answer(open_ended, 0)).endswith("|Question: What is it? tell me more.?\nAnswer: The answer is [(A)]")
