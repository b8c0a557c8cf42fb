"""Questions and answers about videos whose features are read whole: samples, rows, times, copies, batches, tests."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm.data.chats import ChatConfig
from vlm.data.features import tensor_bytes
from vlm.data.loader import TrainLoader
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet, write_shards
from vlm.data.stream import Source, Stream
from vlm.data.tokenizers import ByteTokenizer
from vlm.data.video import DecodeError
from vlm.types import IGNORE, Example, Record, Row, Sample, UserError, Visit

BYTES = ByteTokenizer()
PLACES, STATES, DIM, FRAMES = 6, 2, 3, 60
VIEWS = ("dialogue",)
CHAT = [
    {"kind": "segments", "question": "Segments?", "answer": "<t:0>-<t:20> pour milk\n<t:20>-<t:60> stir"},
    {"kind": "at", "question": "What happens at <t:40>?", "answer": "stir"},
    {"kind": "counts", "question": "How many?", "answer": "2"},
]
SEGMENTS = [
    {"start": 0, "end": 20, "label": 1, "name": "pour_milk"},
    {"start": 20, "end": 60, "label": 2, "name": "stir"},
]
CUT_UP = {"chat": CHAT, "segments": SEGMENTS, "name": "cereals"}
TALK = [
    {"from": "human", "value": "<video>\nWhat is it?"},
    {"from": "gpt", "value": "A bowl."},
    {"from": "human", "value": "And then?"},
    {"from": "gpt", "value": "Milk."},
]
TEXT = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]


def config(**changes: Any) -> ChatConfig:
    sizes = {"num_video_tokens": PLACES, "frame_tokens": STATES, "frame_dim": DIM, "features": "states"}
    return ChatConfig(**{**sizes, "repeats": (3, 2), **changes})


def features(number: float, places: int = PLACES) -> Tensor:
    return torch.full((places, STATES, DIM), number, dtype=torch.float16)


def record(annotation: dict[str, Any], row: int = 0, num_frames: int = FRAMES, **tensors: Tensor) -> Record:
    tensors = tensors or {"states": features(1)}
    return Record(
        key=f"v{row}",
        shard="shard-000000.tar",
        row=row,
        video=None,
        annotation=annotation,
        num_frames=num_frames,
        fps=15.0,
        decoders=(),
        members={f"{name}.safetensors": tensor_bytes(name, tensor) for name, tensor in tensors.items()},
    )


def train(inputs: ChatConfig, made: Record, part: int | None = None, seed: int = 0) -> Example:
    (example,) = inputs.train(made, SampleRng(seed), Visit(part, 0, VIEWS))
    return example


def row_of(inputs: ChatConfig, made: Record, part: int | None = None) -> Row:
    (row,) = train(inputs, made, part).rows["dialogue"]
    return row


def text(row: Row) -> str:
    """A row as text, its words of videos as `[***]`, its end tokens as `$`."""
    spelled = {BYTES.eos: "$", 259: "*", 260: "[", 261: "]"}
    return "".join(spelled.get(token, BYTES.decode([token])) for token in row.ids)


def said(row: Row) -> str:
    """What stands after the text of the system."""
    return text(row).partition("questions. ")[2]


def learnt(row: Row) -> str:
    return "".join("$" if label == BYTES.eos else BYTES.decode([label]) for label in row.labels if label != IGNORE)


# Samples --------------------------------------------------------------------------------------------------------------


def test_a_record_is_as_many_samples_as_its_questions_are_repeated() -> None:
    inputs, made = config(), record(CUT_UP)
    answers = [learnt(row_of(inputs, made, part)) for part in range(3 + 2 * 2)]
    assert answers == [" 0-2 pour milk\n2-6 stir$"] * 3 + [" stir$"] * 2 + [" 2$"] * 2
    assert train(inputs, made, 4).key == "v0/4"
    assert [learnt(row_of(config(repeats=(0, 1)), made, part)) for part in range(2)] == [" stir$", " 2$"]


def test_kinds_of_questions_are_repeated_as_told(shards: Path) -> None:
    """From the kinds of all records, which are as many samples, each of them of the kind."""
    found = ShardSet(shards)
    inputs = config(repeats=(3, 2))
    inputs = replace(inputs, repeats_of={**inputs.repeats_of, "at": 0, "counts": 5})
    assert config().parts(found).tolist() == [3, 5, 7, 1]  # type: ignore[union-attr]
    parts = inputs.parts(found)
    assert parts is not None
    assert parts.tolist() == [3, 3, 8, 1]
    answers = [learnt(row_of(inputs, record(CUT_UP), part)) for part in range(8)]
    assert answers == [" 0-2 pour milk\n2-6 stir$"] * 3 + [" 2$"] * 5
    assert len(inputs.lengths(found)) == 15
    real = [len(row_of(inputs, record(CUT_UP), part).ids) for part in range(8)]
    assert (inputs.lengths(found)[6:14] >= real).all()


def test_the_video_stands_after_one_question_and_before_the_next() -> None:
    """By the numbers of record and visit alone; `[******]` is its place between its marks."""
    for number in range(2):
        rows = [said(row_of(config(), record(CUT_UP, number), part)) for part in range(7)]
        assert [row.startswith("USER:[******]") for row in rows] == [bool((number + part) % 2) for part in range(7)]
    shapes = {
        "after": "USER: How many?[******]ASSISTANT: 2$",
        "before": "USER:[******]How many? ASSISTANT: 2$",
        "front": "USER:[******]USER: How many? ASSISTANT: 2$",
        "given": "USER: How many?[******]ASSISTANT: 2$",
    }
    for side, expected in shapes.items():
        assert said(row_of(config(question_side=side), record(CUT_UP), 5)) == expected
    kept = said(row_of(config(question_side="after", whitespace="keep"), record(CUT_UP), 5))
    assert kept == "USER: How many?\n[******] ASSISTANT: 2$"


def test_where_the_video_of_a_dialogue_stands() -> None:
    made = record({"conversations": TALK}, row=2)
    assert said(row_of(config(whitespace="keep"), made)).startswith("USER: What is it?\n[******] ASSISTANT: A bowl.$")
    made = record({"conversations": TALK}, row=3)
    row = row_of(config(whitespace="keep"), made)
    assert said(row) == "USER: [******]\nWhat is it? ASSISTANT: A bowl.$USER: And then? ASSISTANT: Milk.$"
    assert learnt(row) == " A bowl.$ Milk.$"
    middle = [{"from": "human", "value": "In <video> what?"}, TALK[1]]
    assert said(row_of(config(whitespace="keep"), record({"conversations": middle}))).startswith("USER: In [******] w")


def test_a_dialogue_of_text_alone_has_no_video() -> None:
    example = train(config(), record({"conversations": TEXT}))
    assert example.frame_tokens is None
    assert said(example.rows["dialogue"][0]) == "USER: Two and two? ASSISTANT: Four.$"


def test_ids_of_the_words_of_videos() -> None:
    row = row_of(config(words=300), record(CUT_UP), 0)
    first, end = row.video
    assert row.ids[first - 1 : end + 1] == (301, *[300] * PLACES, 302)
    assert (config(words=300).vocab_size, config(marks=False).vocab_size) == (303, 260)
    bare = row_of(config(marks=False), record(CUT_UP), 0)
    first, end = bare.video
    assert bare.ids[first:end] == (259,) * PLACES
    assert 260 not in bare.ids


def test_words_of_videos_in_a_text_are_text() -> None:
    chat = [CHAT[0], {"kind": "at", "question": "<vid_patch>?", "answer": "</s><vid_start>"}]
    row = row_of(config(question_side="before"), record({**CUT_UP, "chat": chat}), 3)
    assert learnt(row) == " </s><vid_start>$"
    assert row.ids.count(259) == PLACES


# Times ----------------------------------------------------------------------------------------------------------------


def test_times_are_places_of_the_video() -> None:
    inputs = config(time_places=30)
    assert learnt(row_of(inputs, record(CUT_UP), 0)) == " 0-10 pour milk\n10-30 stir$"
    assert "at 20?" in said(row_of(inputs, record(CUT_UP), 3))
    (ask,) = inputs.asks(record(CUT_UP))
    assert ask.segments == ((0, 20, "pour_milk"), (20, 60, "stir"))
    assert (ask.num_frames, ask.kind, ask.references) == (FRAMES, "cereals", ("0-10 pour milk\n10-30 stir",))
    assert inputs.axis(FRAMES).frame(10) == 20


def test_how_many_frames_there_are() -> None:
    unknown = record(CUT_UP, num_frames=-1)
    with pytest.raises(DecodeError, match="how many frames its video has is not known"):
        train(config(), unknown, 0)
    stated = record({**CUT_UP, "num_frames": FRAMES}, num_frames=-1)
    assert row_of(config(), stated, 0) == row_of(config(), record(CUT_UP), 0)
    assert learnt(row_of(config(), record({"conversations": TALK}, num_frames=-1))) == " A bowl.$ Milk.$"


# What is cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["exact", "v1"])
def test_a_row_that_is_too_long(mask: str) -> None:
    made = record(CUT_UP)
    whole = row_of(config(label_mask=mask), made, 0)
    cut = train(config(label_mask=mask, max_length=len(whole.ids) - 5), made, 0)
    (row,) = cut.rows["dialogue"]
    assert (row.ids, row.labels) == (whole.ids[:-5], whole.labels[:-5])
    assert cut.counters == {"rows_shortened": 1, "tokens_dropped": 5, "rows_too_long": 0, "rows_untaught": 0}


@pytest.mark.parametrize("mask", ["exact", "v1"])
def test_a_row_of_which_nothing_is_left_stays_and_is_counted(mask: str) -> None:
    """The video is never cut, so it may stay too long besides."""
    end = row_of(config(label_mask=mask), record(CUT_UP), 0).video[1]
    for length, long in ((10, 1), (end + 4, 0)):
        example = train(config(label_mask=mask, max_length=length), record(CUT_UP), 0)
        (row,) = example.rows["dialogue"]
        assert set(row.labels) == {IGNORE}
        assert row.video[1] - row.video[0] == PLACES
        assert (row.ids[row.video[1]], row.ids[row.video[0] - 1]) == (261, 260), "its marks stay with it"
        assert (example.counters["rows_untaught"], example.counters["rows_too_long"]) == (1, long)
        batch = config().collate([example], SampleRng(0))
        assert batch.views["dialogue"].targets.numel() == 0
        assert batch.counters["rows_untaught"] == 1


# Copies ---------------------------------------------------------------------------------------------------------------


def test_one_copy_is_drawn_at_each_visit() -> None:
    inputs = config(augmented=("states_flip", "states_dark"))
    copies = {"states": features(1), "states_flip": features(2), "states_dark": features(3)}
    made = record(CUT_UP, **copies)
    seen = [float(train(inputs, made, 0, seed).frame_tokens.mean()) for seed in range(60)]  # type: ignore[union-attr]
    assert {round(one) for one in seen} == {1, 2, 3}
    assert min(seen.count(one) for one in (1, 2, 3)) > 8
    for seed in range(10):
        members = inputs.drawn_members(SampleRng(seed))
        only = replace(made, members={name: data for name, data in made.members.items() if name in members})
        again = train(inputs, only, 0, seed).frame_tokens
        assert again is not None
        assert float(again.mean()) == seen[seed], "what is read is what is drawn"
    assert inputs.members == ("states.safetensors", "states.npy")
    (test,) = inputs.all_views(made, SampleRng(5), ())[""]
    assert test.frame_tokens is not None
    assert float(test.frame_tokens.mean()) == 1


def test_a_copy_that_is_missing_is_told() -> None:
    inputs = config(augmented=("states_flip",))
    seeds = [seed for seed in range(9) if "states_flip.npy" in inputs.drawn_members(SampleRng(seed))]
    with pytest.raises(DecodeError, match="states_flip"):
        train(inputs, record(CUT_UP), 0, seeds[0])


# Batches and shards ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cut-up videos with two copies each, and a dialogue."""
    folder, samples = tmp_path_factory.mktemp("chats"), []
    for number in range(4):
        members = {}
        for copy in ("states", "states_flip"):
            file = folder / f"{number}{copy}.npy"
            np.save(file, features(number + 10 * (copy != "states")).numpy())
            members[f"{copy}.npy"] = file
        chat = CHAT[: number + 1]
        annotation = {**CUT_UP, "chat": chat, "num_frames": FRAMES} if number < 3 else {"conversations": TALK}
        samples.append(Sample(key=f"v{number}", annotation=annotation, members=members))
    write_shards(samples, folder / "shards", arguments={}, check=False)
    return folder / "shards"


def test_what_an_epoch_holds(shards: Path) -> None:
    """Each question as often as it is repeated; each row reads its own video, of which one copy is read."""
    inputs = config(augmented=("states_flip",))
    stream = Stream([Source(ShardSet(shards))], seed=3, parted=inputs)
    assert len(stream) == 3 + (3 + 2) + (3 + 4) + 1
    loader = TrainLoader(
        stream,
        inputs,
        views=VIEWS,
        global_batch_size=4,
        world_size=1,
        rank=0,
        micro_batch_size=4,
        start_step=0,
        stop_step=4,
        workers=0,
    )
    keys, seen = [], []
    for (micro,) in loader:
        batch = micro.batch
        assert not batch.incidents
        keys += batch.keys
        assert batch.frame_tokens is not None
        assert batch.frame_tokens.dtype == torch.float16, "features stay as they are stored"
        assert batch.frame_counts == (PLACES,) * 4
        several = batch.frame_tokens.unflatten(0, (4, PLACES)).mean((1, 2, 3)).tolist()
        assert [round(one) % 10 for one in several] == [int(key[1]) for key in batch.keys]
        seen += several
        rows = batch.views["dialogue"]
        assert rows.sources.tolist() == list(range(4 * PLACES))
        assert (rows.tokens[rows.slots] == 259).all()
    assert sorted(keys) == sorted(
        f"v{record}/{part}" for record, parts in enumerate((3, 5, 7, 1)) for part in range(parts)
    )
    assert {one >= 10 for one in seen} == {True, False}


def test_dialogues_alone_are_one_sample_each() -> None:
    class Dialogues:
        num_questions = np.zeros(5, np.int32)

    assert config().parts(Dialogues()) is None  # type: ignore[arg-type]

    class Questions:
        num_questions, path = np.array([1, 1]), "here"

    with pytest.raises(UserError, match="take none of its questions"):
        config(repeats=(0, 2)).parts(Questions())  # type: ignore[arg-type]


@pytest.mark.parametrize("counted", [True, False])
def test_lengths_are_planned_from_the_index(tmp_path: Path, counted: bool) -> None:
    """No row is longer than planned, of first and other questions apart, and few are much shorter."""
    tokenizer = Path(__file__).parent.parent / "goldens" / "tiny_llama_tokenizer" / "tokenizer.model"
    draw, samples = np.random.default_rng(0), []
    for number in range(60):
        borders = sorted({0, 900, *draw.integers(10, 890, draw.integers(1, 9)).tolist()})
        lines = [f"<t:{a}>-<t:{b}> stir" for a, b in pairwise(borders)]
        chat = [{**CHAT[0], "answer": "\n".join(lines)}, *CHAT[1 : draw.integers(1, 4)]]
        samples.append(Sample(key=f"v{number:02d}", annotation={**CUT_UP, "chat": chat, "num_frames": 900}))
    write_shards(samples, tmp_path / "s", arguments={}, check=False, tokenizer=tokenizer if counted else None)
    found, inputs = ShardSet(tmp_path / "s"), config(tokenizer=tokenizer)
    planned, at = inputs.lengths(found), 0
    parts = inputs.parts(found)
    assert parts is not None
    assert len(planned) == parts.sum()
    spare = []
    for number in range(len(found)):
        made = replace(found.read(number, ()), members=record(CUT_UP).members)
        for part in range(parts[number]):
            spare.append(planned[at] - len(row_of(inputs, made, part).ids))
            at += 1
    assert min(spare) >= -2
    assert np.mean(spare) < (8 if counted else 20)
    assert (config(tokenizer=tokenizer, max_length=60).lengths(found) <= 60).all()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "part"),
    [
        ({}, "no questions"),
        ({"chat": []}, "damaged"),
        ({"chat": [{"kind": "segments", "question": 1, "answer": ""}]}, "damaged"),
        ({"conversations": [TALK[0], TALK[0], TALK[1]]}, "turn 2 is from 'human'"),
        ({"conversations": [TALK[0], TALK[1], TALK[0], TALK[1]]}, "several places"),
        ({"conversations": "what"}, "damaged"),
    ],
)
def test_damaged_records_are_unusable(annotation: dict[str, Any], part: str) -> None:
    with pytest.raises(DecodeError, match=part):
        train(config(), record(annotation))
    assert config().row_lengths(record(annotation)) == []


def test_features_of_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 5 places, but inputs\.num_video_tokens=6"):
        train(config(), record(CUT_UP, states=features(1, 5)), 0)
    with pytest.raises(UserError, match="another tower"):
        train(config(frame_dim=4), record(CUT_UP), 0)
    with pytest.raises(UserError, match="no view 'caption'"):
        config().check_views(("caption",))


@pytest.mark.parametrize(
    "change",
    [
        {"num_video_tokens": 0},
        {"max_length": 0},
        {"max_length": PLACES + 1},
        {"words": 0},
        {"time_places": 0},
        {"repeats": (0, 0)},
        {"repeats": (1, -1)},
        {"repeats_of": {"at": -1}},
        {"template": "v0", "question_side": "front"},
    ],
)
def test_settings_that_mean_nothing(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"inputs.{'question_side' if 'template' in change else next(iter(change))}"):
        config(**change)
