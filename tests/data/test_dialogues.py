"""Captions and dialogues about videos and images: rows, labels, batches, tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_frames import levels, picture, record
from tests.encoded import encode, pictures
from vlm.data.dialogues import IMAGE_LINES, DialogueConfig
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet, write_shards
from vlm.data.templates import PLACE
from vlm.data.tokenizers import ByteTokenizer
from vlm.data.video import DecodeError
from vlm.types import IGNORE, Batch, Example, Record, Row, Sample, UserError, Visit

WORDS = ByteTokenizer()
ASKED = [
    {"from": "human", "value": f"{PLACE}\nWhat runs?"},
    {"from": "gpt", "value": "A dog."},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "In a field,\nfar away."},
]
TEXT = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
VIEWS = Visit(None, 0, ("caption", "dialogue"))


def config(**changes: Any) -> DialogueConfig:
    return DialogueConfig(**{"num_video_tokens": 3, "num_frames": 4, "size": 16, "augment": False, **changes})


def video(**annotation: Any) -> Record:
    made = record(encode(levels(20), rate=10), 20, 10.0)
    made.annotation = annotation
    return made


def image(**annotation: Any) -> Record:
    made = record(picture(pictures(1, 32, 24)[0]), 1, 0.0)
    made.annotation = annotation
    return made


def train(inputs: DialogueConfig, made: Record, seed: int = 0):
    (example,) = inputs.train(made, SampleRng(seed), VIEWS)
    return example


def text(row: Row) -> str:
    """A row as text; the video is `*`."""
    first, end = row.video
    ids = [*row.ids[:first], *([WORDS.encode("*")[0]] if end else []), *row.ids[end:]]
    return WORDS.decode(ids)


def learnt(row: Row) -> str:
    return WORDS.decode([label for label in row.labels if label != IGNORE])


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_caption_follows_its_video() -> None:
    example = train(config(), video(caption="A Dog; runs!"))
    (row,) = example.rows["caption"]
    assert (row.ids[0], row.video) == (WORDS.bos, (1, 4))
    assert (text(row), learnt(row)) == ("*a dog runs\n", "a dog runs\n")
    assert example.frames.shape == (4, 3, 16, 16)


def test_captions_of_images_stay_as_they_are_unless_told() -> None:
    assert learnt(train(config(), image(caption="A Dog!")).rows["caption"][0]) == "A Dog!\n"
    assert learnt(train(config(clean="all"), image(caption="A Dog!")).rows["caption"][0]) == "a dog\n"
    assert learnt(train(config(clean="none"), video(caption="A Dog!")).rows["caption"][0]) == "A Dog!\n"


def test_a_caption_that_is_asked_for() -> None:
    inputs = config(prompts=IMAGE_LINES, caption_end="###")
    found = [train(inputs, image(caption="A dog"), seed).rows["caption"][0] for seed in range(20)]
    leads = {text(row).partition(" ###Assistant: ")[0] for row in found}
    assert leads == {f"###Human: {line.replace(PLACE, '<Image>*</Image>')}" for line in IMAGE_LINES}
    assert {learnt(row) for row in found} == {"A dog###"}
    (row,) = train(config(prompts=IMAGE_LINES[:1], template="llama2", caption_end=None), image(caption="A dog")).rows[
        "caption"
    ]
    assert text(row) == ("[INST] <<SYS>>\n \n<</SYS>>\n\n<Image>*</Image> Describe this image in detail. [/INST] A dog")
    assert row.labels[-1] == row.ids[-1] == WORDS.eos


def test_a_long_caption_ends_where_it_is_cut() -> None:
    example = train(config(max_caption_length=6), image(caption="A dog runs"))
    assert learnt(example.rows["caption"][0]) == "A dog "
    assert (example.counters["rows_shortened"], example.counters["tokens_dropped"]) == (1, 5)


def test_a_dialogue_about_a_video() -> None:
    (row,) = train(config(), video(conversations=ASKED)).rows["dialogue"]
    assert text(row) == (
        "\n\n###Human: <Video>*</Video> The video contains 4 frames sampled at 0.0, 0.5, 1.0, 1.5 seconds. What runs?\n"
        "###Assistant: A dog.\n###Human: Where?\n###Assistant: In a field,\nfar away.\n###"
    )
    assert learnt(row) == " A dog.\n### In a field,\nfar away.\n###"


def test_a_dialogue_about_an_image() -> None:
    (row,) = train(config(), image(conversations=ASKED)).rows["dialogue"]
    assert text(row).startswith("\n\n###Human: <Image>*</Image>\nWhat runs?\n###Assistant: A dog.\n###Human: Where?")


def test_what_the_template_and_the_settings_change() -> None:
    spoken = [{"from": "system", "value": "Be kind."}, *ASKED]
    (row,) = train(config(frames_message=False), video(conversations=spoken)).rows["dialogue"]
    assert text(row).startswith("Be kind.\n\n###Human: <Video>*</Video> What runs?\n###Assistant: A dog.")
    (row,) = train(config(template="llama2"), image(conversations=spoken)).rows["dialogue"]
    assert text(row) == (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n<Image>*</Image>\nWhat runs? [/INST] A dog. "
        "[INST] Where? [/INST] In a field,\nfar away. "
    )
    assert learnt(row) == " A dog.  In a field,\nfar away. "
    assert row.ids.count(WORDS.eos) == row.labels.count(WORDS.eos) == 2
    assert row.ids.count(WORDS.bos) == 2


def test_text_alone_is_a_dialogue() -> None:
    made = video(conversations=TEXT)
    made.video = None
    example = train(config(), made)
    assert example.frames is None
    assert text(example.rows["dialogue"][0]) == "\n\n###Human: Two and two?\n###Assistant: Four.\n###"
    made.annotation = {"conversations": ASKED}
    with pytest.raises(DecodeError, match="has no video, but its text has a place for one"):
        train(config(), made)


def test_a_record_may_have_both() -> None:
    example = train(config(), image(caption="A dog", conversations=ASKED))
    assert set(example.rows) == {"caption", "dialogue"}


def test_labels_that_are_cut_away_are_counted() -> None:
    example = train(config(max_length=40), video(conversations=ASKED))
    assert example.counters["rows_untaught"] == 1
    assert learnt(example.rows["dialogue"][0]) == ""
    rows = config(max_length=40).collate([example], SampleRng(0)).views["dialogue"]
    assert (len(rows.targets), rows.target_counts) == (0, (0,))


def test_the_drift_of_the_published_labels() -> None:
    """A token more with each turn: the second answer has lost its beginning."""
    (row,) = train(config(label_mask="drift"), image(conversations=ASKED)).rows["dialogue"]
    (exact,) = train(config(), image(conversations=ASKED)).rows["dialogue"]
    assert row.ids == exact.ids
    assert "Assistant: A dog.\n###" in learnt(row)
    assert not learnt(row).endswith("###Assistant: In a field,\nfar away.\n###")


@pytest.mark.parametrize(
    ("views", "annotation", "error", "message"),
    [
        (("caption",), {"conversations": ASKED}, UserError, "give views.dialogue a weight"),
        (("caption",), {}, UserError, "neither caption nor dialogue"),
        (("label",), {"caption": "a"}, UserError, "no view 'label'"),
        (("caption",), {"caption": 3}, DecodeError, "caption is 3, not a text"),
        (("dialogue",), {"conversations": [{"from": "human"}]}, DecodeError, "conversations are damaged"),
        (("dialogue",), {"conversations": ASKED[:1]}, DecodeError, "or nobody answers"),
    ],
)
def test_what_cannot_be_used(views: tuple[str, ...], annotation: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        config().train(image(**annotation), SampleRng(0), Visit(None, 0, views))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"prompts": ("Describe it.",)}, "must have <video> once"),
        ({"caption_end": ""}, "never end"),
        ({"label_mask": "drift", "template": "llama2"}, "never had this fault"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)


# Batches --------------------------------------------------------------------------------------------------------------


def test_videos_images_and_text_in_one_batch() -> None:
    alone = video(conversations=TEXT)
    alone.video = None
    records = [image(caption="A dog"), alone, video(conversations=ASKED), video(caption="A cat")]
    inputs = config()
    batch: Batch = inputs.collate([train(inputs, made) for made in records], SampleRng(0))
    assert batch.frame_counts == (1, 4, 4)
    assert batch.frames.shape == (9, 3, 16, 16)
    assert batch.frames.dtype == torch.uint8
    assert batch.colours == inputs.colours
    captions, dialogues = batch.views["caption"], batch.views["dialogue"]
    assert captions.sources.tolist() == [0, 1, 2, 6, 7, 8]
    assert dialogues.sources.tolist() == [3, 4, 5]
    assert dialogues.lengths[0] == len(train(inputs, alone).rows["dialogue"][0].ids)


def test_training_depends_on_the_rng_alone() -> None:
    inputs = config(augment=True)
    frames = [train(inputs, video(caption="a"), seed).frames for seed in (0, 0, 1)]
    assert torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0], frames[2])


# Features -------------------------------------------------------------------------------------------------------------


def features(tokens: torch.Tensor, num_frames: int = 20, fps: float = 10.0, **annotation: Any) -> Record:
    file = io.BytesIO()
    np.save(file, tokens.numpy())
    made = record(None, num_frames, fps)
    made.members, made.annotation = {"q_former.npy": file.getvalue()}, annotation
    return made


def test_features_in_the_place_of_frames() -> None:
    inputs = config(source="features", frame_tokens=2, frame_dim=5)
    assert inputs.members == ("q_former.safetensors", "q_former.npy")
    tokens = torch.randn(4, 2, 5)
    example = train(inputs, features(tokens, conversations=ASKED))
    assert torch.equal(example.frame_tokens, tokens)
    pixels = train(config(), video(conversations=ASKED))
    assert example.rows == pixels.rows, "the same words as with pixels, seconds of frames too"
    long = train(inputs, features(torch.randn(8, 2, 5), caption="a"))
    assert len(long.frame_tokens) == 4
    batch = inputs.collate([example, long], SampleRng(0))
    assert (batch.frames, batch.colours, batch.frame_counts) == (None, None, (4, 4))
    one = train(inputs, features(torch.randn(1, 2, 5), 1, 0.0, conversations=ASKED))
    assert "<Image>*</Image>" in text(one.rows["dialogue"][0])
    with pytest.raises(UserError, match="another tower's"):
        train(inputs, features(torch.randn(4, 3, 5), caption="a"))
    with pytest.raises(DecodeError, match=r"has no q_former.safetensors or q_former.npy"):
        train(inputs, video(caption="a"))


# Tests ----------------------------------------------------------------------------------------------------------------


def test_what_a_test_asks() -> None:
    inputs = config(augment=True)
    made = video(caption="A Dog!", conversations=ASKED)
    asks = inputs.asks(made)
    assert [(ask.key, ask.question, ask.references) for ask in asks] == [
        ("v", "", ("a dog",)),
        ("v/0", "What runs?", ("A dog.",)),
        ("v/1", "Where?", ("In a field,\nfar away.",)),
    ]
    views = inputs.all_views(made, SampleRng(0), ("blind",))
    (example,), (blind,) = views[""], views["blind"]
    whole = text(train(inputs, made).rows["dialogue"][0])
    texts = [text(row) for row in example.prompts]
    assert texts[0] == "*"
    assert texts[1] == whole.partition(" A dog.")[0]
    assert texts[2] == whole.partition(" In a field")[0]
    assert example.frames.any()
    assert not blind.frames.any()
    assert blind.prompts == example.prompts
    batch = inputs.test_batch([example, inputs.blank()])
    assert batch.frame_counts == (4, 1)
    assert batch.prompts.lengths == tuple(len(row.ids) for row in (*example.prompts, *inputs.blank().prompts))
    assert batch.prompts.targets.numel() == 0
    with pytest.raises(UserError, match="did you mean 'blind'"):
        inputs.all_views(made, SampleRng(0), ("blnd",))


@pytest.mark.parametrize(
    ("written", "want"),
    [
        (" A dog.\n###Human: more", "A dog."),
        ("a dog\nand more", "a dog"),
        (" plain ", "plain"),
    ],
)
def test_what_was_written(written: str, want: str) -> None:
    inputs = config()
    assert inputs.decode([*WORDS.encode(written), WORDS.eos, *WORDS.encode("after")]) == want
    assert inputs.decode([*WORDS.encode(written), 300]) == want, "an id that only the embedding has"
    assert (WORDS.eos,) in inputs.ends
    assert tuple(WORDS.encode("###")) in inputs.ends
    assert tuple(WORDS.encode("\n")) in inputs.ends


def test_ends_of_real_words(golden) -> None:
    inputs = config(tokenizer=golden("gebc_tokenizers") / "llama", caption_end="###")
    words = inputs.ends
    assert words[0] == (2,)
    assert len(words) == len(set(words)) >= 3
    assert all(inputs.decode([*ids, 300]) == "" for ids in words[1:])


# Lengths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
def test_expected_lengths_are_not_too_short(tmp_path, golden, counted: bool) -> None:
    samples = []
    for number in range(12):
        turns = [ASKED[0], {"from": "gpt", "value": "word " * (3 + 5 * number)}]
        samples.append(Sample(key=f"k{number}", video=None, annotation={"conversations": turns}))
    path = tmp_path / "i.png"
    path.write_bytes(picture(pictures(1, 16, 16)[0]))
    for sample in samples:
        sample.video = path
    words = golden("gebc_tokenizers") / "llama" if counted else None
    write_shards(samples, tmp_path / "shards", arguments={}, tokenizer=words)
    shards = ShardSet(tmp_path / "shards")
    inputs = config(tokenizer=words)
    rows = [train(inputs, shards.read(row)).rows["dialogue"][0] for row in range(len(shards))]
    assert (inputs.lengths(shards) >= [len(row.ids) for row in rows]).all()
    assert (inputs.lengths(shards) <= [len(row.ids) + (70 if counted else 200) for row in rows]).all()


# Conversations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["vicuna_v0", "llama2"])
def test_a_conversation_goes_on_as_a_dialogue_is_trained(template: str) -> None:
    """Turn by turn it is the row of training up to each answer."""
    inputs = config(template=template)
    made = video(conversations=ASKED)
    (row,) = train(inputs, made).rows["dialogue"]
    seen = inputs.look(made)
    assert torch.equal(seen.frames, train(inputs, made).frames)
    for turns in ([("What runs?", None)], [("What runs?", "A dog."), ("Where?", None)]):
        example = inputs.converse(turns, seen)
        (prompt,) = example.prompts
        assert prompt.ids == row.ids[: len(prompt.ids)]
        assert (prompt.video, set(prompt.labels)) == (row.video, {IGNORE})
        first = next(place for place in range(len(prompt.ids), len(row.ids)) if row.labels[place] != IGNORE)
        assert first == len(prompt.ids), "the answer is what comes next"
        batch = inputs.test_batch([example])
        assert batch.prompts.lengths == (len(prompt.ids),)


def test_a_conversation_about_an_image_or_about_nothing() -> None:
    inputs = config()
    made = image(conversations=ASKED)
    (prompt,) = inputs.converse([("What runs?", None)], inputs.look(made)).prompts
    assert text(prompt) == "\n\n###Human: <Image>*</Image>\nWhat runs?\n###Assistant:"
    (prompt,) = inputs.converse([("What <video> runs?", None)], Example(key="")).prompts
    assert (text(prompt), prompt.video) == ("\n\n###Human: What  runs?\n###Assistant:", (0, 0))
