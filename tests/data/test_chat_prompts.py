"""What is asked of a record with questions in tests, and in a conversation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.data.test_chats import (
    BYTES,
    CHAT,
    CUT_UP,
    DIM,
    PLACES,
    SEGMENTS,
    STATES,
    TALK,
    TEXT,
    config,
    learnt,
    record,
    row_of,
    said,
    text,
)
from vlm.data.rng import SampleRng
from vlm.data.video import DecodeError
from vlm.types import IGNORE, Example


def test_segments_are_asked_for() -> None:
    """The first question alone, which its row of training goes on from; blind it is the same without the video."""
    inputs, made = config(question_side="after"), record(CUT_UP)
    (ask,) = inputs.asks(made)
    assert (ask.key, ask.question) == ("v0", "Segments?")
    views = inputs.all_views(made, SampleRng(0), ("blind",))
    ((seen,), (blind,)) = views[""], views["blind"]
    (prompt,) = seen.prompts
    row = row_of(inputs, made, 0)
    first = next(place for place, label in enumerate(row.labels) if label != IGNORE)
    assert (prompt.ids, prompt.video) == (row.ids[:first], row.video)
    assert text(prompt).endswith("ASSISTANT:")
    assert set(prompt.labels) == {IGNORE}
    assert blind.prompts == seen.prompts
    assert blind.frame_tokens is not None
    assert seen.frame_tokens is not None
    assert not blind.frame_tokens.any()
    assert seen.frame_tokens.all()
    batch = inputs.test_batch([seen, blind])
    assert batch.prompts is not None
    assert batch.prompts.lengths == (first, first)
    assert inputs.decode([*BYTES.encode(" 0-2 cut\n"), BYTES.eos, 5]) == "0-2 cut"
    assert inputs.ends == ((BYTES.eos,),)


def test_tests_have_the_video_after_the_question_and_may_have_another_template() -> None:
    for row in range(2):
        (example,) = config().all_views(record(CUT_UP, row), SampleRng(0), ())[""]
        assert said(example.prompts[0]) == "USER: Segments?[******]ASSISTANT:"
    (example,) = config(test_template="video_chatgpt_v1").all_views(record(CUT_UP), SampleRng(0), ())[""]
    assert text(example.prompts[0]).startswith("You are Video-ChatGPT, ")
    (example,) = config(system="Be kind.").all_views(record(CUT_UP), SampleRng(0), ())[""]
    assert text(example.prompts[0]) == "Be kind. USER: Segments?[******]ASSISTANT:"


def test_every_answer_is_asked_for() -> None:
    inputs = config(task="caption")
    asks = inputs.asks(record(CUT_UP))
    assert [(ask.key, ask.kind, ask.question) for ask in asks] == [
        ("v0/0", "segments", "Segments?"),
        ("v0/1", "at", "What happens at 4?"),
        ("v0/2", "counts", "How many?"),
    ]
    assert asks[0].references == ("0-2 pour milk\n2-6 stir",)
    (example,) = inputs.all_views(record(CUT_UP), SampleRng(0), ())[""]
    assert len(example.prompts) == 3
    made = record({"conversations": TALK})
    asks = inputs.asks(made)
    assert [(ask.question, ask.references) for ask in asks] == [
        ("What is it?", ("A bowl.",)),
        ("And then?", ("Milk.",)),
    ]
    (example,) = inputs.all_views(made, SampleRng(0), ())[""]
    first, second = example.prompts
    assert said(first) == "USER: What is it?[******]ASSISTANT:"
    assert said(second) == "USER: What is it?[******]ASSISTANT: A bowl.$USER: And then? ASSISTANT:"
    (example,) = inputs.all_views(record({"conversations": TEXT}), SampleRng(0), ("blind",))["blind"]
    assert example.frame_tokens is None


def test_a_conversation_goes_on() -> None:
    inputs = config(question_side="after")
    seen = inputs.look(record(CUT_UP))
    turns = [("What <video>is it?", "A bowl."), ("And then?", None)]
    (prompt,) = inputs.converse(turns, seen).prompts
    assert said(prompt) == "USER: What is it?[******]ASSISTANT: A bowl.$USER: And then? ASSISTANT:"
    (prompt,) = inputs.converse(turns, Example(key="")).prompts
    assert said(prompt) == "USER: What is it? ASSISTANT: A bowl.$USER: And then? ASSISTANT:"
    long = replace(inputs, max_length=20).converse(turns, seen)
    assert (long.prompts[0].ids[-10:], long.counters) == (prompt.ids[-10:], {"rows_too_long": 1})
    blank = inputs.blank()
    assert blank.frame_tokens is not None
    assert tuple(blank.frame_tokens.shape) == (PLACES, STATES, DIM)
    assert inputs.test_batch([blank]).prompts is not None


def test_the_template_of_the_first_models_ends_by_its_own_marks() -> None:
    inputs = config(template="v0", question_side="after")
    row = row_of(inputs, record({"conversations": TALK}))
    assert learnt(row) == " A bowl.\n### Milk.\n###"
    assert inputs.decode(BYTES.encode(" Milk.\n### Human: what")) == "Milk."
    (prompt,) = inputs.converse([("What is it?", None)], inputs.look(record(CUT_UP))).prompts
    assert row.ids[: len(prompt.ids)] == prompt.ids
    assert text(prompt).endswith("### Human: What is it?[******]### Assistant:")
    assert tuple(BYTES.encode("###")) in inputs.ends


def test_records_that_cannot_be_cut_up() -> None:
    for annotation in ({"chat": CHAT[1:], "segments": SEGMENTS}, {"conversations": TALK}):
        with pytest.raises(DecodeError, match="no question for its segments"):
            config().asks(record(annotation))
    for segments in (None, [{"start": 0}]):
        with pytest.raises(DecodeError, match="segments are missing or damaged"):
            config().asks(record({**CUT_UP, "segments": segments}))
