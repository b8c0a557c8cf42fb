"""From a record with questions to rows: what is shown, what is shared, what is counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from question_shards import DIM, shards

from vlm.data.loader import TrainLoader
from vlm.data.questions import QuestionConfig
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.data.stream import Samples, Source, Stream
from vlm.data.tokenizers import ByteTokenizer
from vlm.data.video import DecodeError
from vlm.types import IGNORE, UserError, Visit

SMALL = {"num_frames": 4, "feature_dim": DIM, "max_length": 600}
CAPTION = "llava_v15_13b_n6"
TEXT = ByteTokenizer()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return ShardSet(shards(tmp_path_factory.mktemp("questions")) / "train")


def train(config, record, part=0, views=("answer",), epoch=0):
    return config.train(record, SampleRng(0), Visit(part, epoch, views))[0]


def said(row):
    return TEXT.decode(row.ids)


def learnt(row):
    return TEXT.decode([label for label in row.labels if label not in (IGNORE, TEXT.eos)])


def test_a_sample_is_a_question(records):
    samples = Samples(records, QuestionConfig(**SMALL))
    assert len(samples) == 18
    assert [samples.locate(number) for number in (0, 2, 3, 17)] == [(0, 0), (0, 2), (1, 0), (5, 2)]
    assert samples.key(4) == f"{records.key(1)}/1"
    shared = Samples(records, QuestionConfig(**SMALL, share_questions=True))
    assert (len(shared), shared.locate(3), shared.key(3)) == (6, (3, None), records.key(3))


def test_views_of_a_question(records):
    config = QuestionConfig(**SMALL, caption_target=CAPTION, caption_lead=False, caption_part="whole")
    example = train(config, records.read(2), part=1, views=("answer", "question", "caption"))
    assert example.key == f"{records.key(2)}/1"
    rows = {view: rows[0] for view, rows in example.rows.items()}
    assert learnt(rows["answer"]) == "(B)"
    assert learnt(rows["question"]) == "What does dog 2 do at place 1?"
    assert learnt(rows["caption"]).startswith("a dog 2 runs.")
    assert "Answer: The answer is (B)" in said(rows["answer"])
    assert tuple(example.features.shape) == (1, 4, DIM)


def test_captions_as_input_lose_their_lead(records):
    row = train(QuestionConfig(**SMALL, caption=CAPTION), records.read(0)).rows["answer"][0]
    assert "Video: a dog 0 runs." in said(row)
    assert "we see these scenes" not in said(row)


def test_alternating_epochs_hide_the_video(records):
    config = QuestionConfig(**SMALL, caption=CAPTION, alternate=True)
    text, both = (train(config, records.read(0), epoch=epoch).rows["answer"][0] for epoch in (0, 1))
    assert text.video == (0, 0)
    assert both.video[1] - both.video[0] == 4
    assert len(both.ids) - len(text.ids) == 4
    kept = train(replace(config, blind_placeholders=True), records.read(0), epoch=0).rows["answer"][0]
    assert (kept.video, kept.ids) == ((0, 0), both.ids)


def test_captions_alone_need_no_features(records):
    config = QuestionConfig(**SMALL, caption=CAPTION, use_video=False)
    example = train(config, records.read(0))
    assert example.features is None
    assert config.collate([example], SampleRng(0)).features is None


def test_rows_that_do_not_fit_are_shortened_and_counted(records):
    config = QuestionConfig(**{**SMALL, "max_length": 220}, caption=CAPTION)
    example = train(config, records.read(0))
    assert learnt(example.rows["answer"][0]) == "(A)"
    assert example.counters["rows_shortened"] == 1
    assert example.counters["tokens_dropped"] > 0
    batch = config.collate([example, example], SampleRng(0))
    assert batch.counters["rows_shortened"] == 2
    cut = train(replace(config, overflow="tail"), records.read(0))
    assert learnt(cut.rows["answer"][0]) == ""


def test_shared_questions_are_the_same_rows_with_less_to_read(records):
    config = QuestionConfig(**SMALL, caption=CAPTION)
    shared = replace(config, share_questions=True)
    record = records.read(1)
    alone = config.collate([train(config, record, part) for part in range(3)], SampleRng(0)).views["answer"]
    together = shared.collate([train(shared, record, None)], SampleRng(0)).views["answer"]
    assert sorted(together.targets.tolist()) == sorted(alone.targets.tolist())
    assert sum(together.lengths) < 0.75 * sum(alone.lengths)


def test_a_test_batch_scores_every_option_once(records):
    config = QuestionConfig(**SMALL)
    record = records.read(1)
    views = config.all_views(record, SampleRng(0), ("blind",))
    assert views["blind"][0].features.abs().max() == 0
    assert views[""][0].features.abs().max() > 0
    batch = config.test_batch([views[""][0], config.all_views(records.read(2), SampleRng(0), ())[""][0]])
    assert [len(question) for question in batch.options.leaves] == [5] * 6
    assert sorted(set(batch.options.sources.tolist())) == list(range(8))
    asks = config.asks(record)
    assert [(ask.key, ask.truth) for ask in asks] == [(f"{record.key}/{n}", n) for n in range(3)]
    assert asks[0].options == ("run", "sit", "eat", "jump", "hide")


def test_a_span_without_a_frame_takes_the_last_one_before_its_end(records):
    config = QuestionConfig(**SMALL)
    record = records.read(4)
    record.annotation.update(span_rule="inside")
    record.annotation["questions"][0]["span"] = [2.2, 2.8]
    example = train(config, record)
    whole = np.load(__import__("io").BytesIO(record.members["features.npy"])).astype(np.float32)
    assert torch.equal(example.features[0, 0], torch.from_numpy(whole[2]))


def test_what_is_missing_is_named(records):
    with pytest.raises(DecodeError, match="no caption 'other'"):
        train(QuestionConfig(**SMALL, caption="other"), records.read(0))
    with pytest.raises(UserError, match=r"8 wide, but inputs\.feature_dim = 9"):
        train(QuestionConfig(**{**SMALL, "feature_dim": 9}), records.read(0))
    with pytest.raises(UserError, match="there is no view 'answr'"):
        train(QuestionConfig(**SMALL), records.read(0), views=("answr",))
    with pytest.raises(UserError, match="caption_target"):
        train(QuestionConfig(**SMALL), records.read(0), views=("caption",))
    with pytest.raises(UserError, match="did you mean 'blind'"):
        QuestionConfig(**SMALL).all_views(records.read(0), SampleRng(0), ("blnd",))
    damaged = records.read(0)
    del damaged.annotation["questions"][0]["options"]
    with pytest.raises(DecodeError, match="its questions are damaged"):
        train(QuestionConfig(**SMALL), damaged)
    damaged = records.read(0)
    damaged.annotation["questions"][0]["span"] = [0.0, 1.0]
    with pytest.raises(DecodeError, match="span_rule"):
        train(QuestionConfig(**SMALL), damaged)
    untold = records.read(0)
    untold.annotation["questions"][0]["answer"] = None
    with pytest.raises(UserError, match="no published answer"):
        train(QuestionConfig(**SMALL), untold)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"max_length": 0}, "inputs.max_length is 0"),
        ({"caption_skip": -1}, "inputs.caption_skip is -1"),
        ({"alternate": True}, "inputs.caption"),
        ({"alternate": True, "use_video": False, "caption": "x"}, "inputs.use_video is false"),
    ],
)
def test_contradictions_are_refused(change, part):
    with pytest.raises(ValueError, match=part):
        QuestionConfig(**{**SMALL, **change})


def test_shards_without_questions_are_refused(shape_shards, monkeypatch):
    videos = ShardSet(shape_shards / "train")
    monkeypatch.setattr(ShardSet, "num_questions", property(lambda self: np.zeros(len(self), np.int32)))
    with pytest.raises(UserError, match="have no questions"):
        Samples(videos, QuestionConfig(**SMALL))


def test_batches_follow_the_order_of_questions(records):
    def keys(workers):
        loader = TrainLoader(
            Stream([Source(records)], 1, QuestionConfig(**SMALL)),
            QuestionConfig(**SMALL),
            views=["answer"],
            global_batch_size=4,
            world_size=1,
            rank=0,
            micro_batch_size=4,
            start_step=0,
            stop_step=9,
            workers=workers,
        )
        return [micro[0].batch.keys for micro in loader], loader

    alone, loader = keys(0)
    flat = [key for step in alone for key in step]
    assert len(set(flat[:18])) == 18
    assert sorted(flat[:18]) == sorted(flat[18:])
    assert loader.keys_of_step(0) == list(alone[0])
    assert keys(1)[0] == alone


def test_a_chat_asks_as_training_does(records):
    """The prompt is the training row up to its answer; turns before the last are not known to these models."""
    config = QuestionConfig(**SMALL)
    record = records.read(2)
    example = train(config, record, part=1)
    row = example.rows["answer"][0]
    asked = record.annotation["questions"][1]
    typed = "\n".join([asked["question"], *(f"({'ABCDE'[at]}) {one}" for at, one in enumerate(asked["options"]))])
    seen = config.look(record)
    assert torch.equal(seen.features, example.features)
    chat = config.converse([("What is it?", "(A)"), (typed, None)], seen)
    (prompt,) = chat.prompts
    first = next(place for place, label in enumerate(row.labels) if label != IGNORE)
    assert (prompt.ids, prompt.video) == (row.ids[:first], row.video)
    assert set(prompt.labels) == {IGNORE}
    batch = config.test_batch([chat, chat])
    assert batch.prompts.lengths == (first, first)
    assert batch.prompts.sources.tolist() == list(range(8)), "each reads its own video"
    assert config.decode(TEXT.encode("(B)\nQuestion: what")) == "(B)"
    assert tuple(TEXT.encode("\n")) in config.ends


def test_a_question_without_options_is_asked_for_words(records):
    config = QuestionConfig(**SMALL)
    (prompt,) = config.converse([("what is red", None)], config.look(records.read(0))).prompts
    assert said(prompt).endswith("Question: What is red?\nAnswer: The answer is ")
    with pytest.raises(UserError, match="sees no video"):
        replace(config, use_video=False).look(records.read(0))
