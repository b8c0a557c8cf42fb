"""Video-ChatGPT's prompts, ids and label masks against those recorded from the original.

As published (`label_mask=v1`) ids and labels are equal everywhere. The exact mask has the same ids and labels wherever
the original is right. Where it is not, of the recorded dialogues: one whose answer has a role's name in it, or `</s>`,
teaches the original nothing, and ours its answer, in which `</s>` is a text. A dialogue with two videos is refused,
as one whose turns do not alternate; the original splices the last video alone into the former.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.data.chat_templates import PATCH, SYSTEM, TemplateName, pairs, published_text, published_tokens
from vlm.data.chats import ChatConfig
from vlm.data.features import tensor_bytes
from vlm.data.rng import SampleRng
from vlm.data.tokenizers import tokenizer_of
from vlm.data.video import DecodeError
from vlm.types import IGNORE, Example, Record, Row, Visit

Load = Callable[[str], Any]
TEMPLATES: dict[str, TemplateName] = {
    "default": "v0",
    "video-chatgpt_v1": "video_chatgpt_v1",
    "vicuna_v1_1": "vicuna_v1_1",
}


@pytest.fixture(scope="module")
def values(load_golden: Load) -> Any:
    return load_golden("vcgpt_labels.json")


@pytest.fixture(scope="module")
def tokenizer(golden: Callable[[str], Path], values: Any) -> Path:
    return golden(values["tokenizer_dir"]) / "tokenizer.model"


@pytest.fixture(scope="module")
def cases(values: Any) -> dict[str, Any]:
    return {case["name"]: case for case in values["cases"]}


def inputs(tokenizer: Path, case: Any, **changes: Any) -> ChatConfig:
    return ChatConfig(
        tokenizer=tokenizer,
        num_video_tokens=case["video_token_count"],
        frame_dim=2,
        marks=case["use_vid_start_end"],
        question_side="front" if case.get("sep_video_conv_front") else "given",
        max_length=case.get("model_max_length", 2048),
        **changes,
    )


def record(case: Any, turns: Any) -> Record:
    member = tensor_bytes("clip_pooled", torch.zeros(case["video_token_count"], 2, dtype=torch.float16))
    return Record(
        key="a",
        shard="shard-000000.tar",
        row=0,
        video=None,
        annotation={"conversations": turns},
        num_frames=100,
        fps=15.0,
        decoders=(),
        members={"clip_pooled.safetensors": member},
    )


def trained(config: ChatConfig, case: Any, turns: Any = None) -> Example:
    (example,) = config.train(record(case, turns or case["conversations"]), SampleRng(0), Visit(None, 0, ("dialogue",)))
    return example


def mistaken(case: Any) -> bool:
    """Whether an answer has words in it by which the original finds answers."""
    return any(word in turn["value"] for turn in case["conversations"] for word in ("ASSISTANT: ", "</s>"))


def refused(case: Any) -> bool:
    """Whether ours does not take it: turns do not alternate, or its video has several places."""
    return bool(case["error"]) or sum(turn["value"].count("<video>") for turn in case["conversations"]) > 1


def row_of(config: ChatConfig, case: Any, turns: Any = None) -> Row:
    return trained(config, case, turns).rows["dialogue"][0]


def check_video(row: Row, case: Any, values: Any) -> None:
    first, end = row.video
    if PATCH not in case["prompt"]:
        assert (first, end) == (0, 0)
        return
    assert row.ids[first:end] == (values["vid_patch_id"],) * case["video_token_count"]
    if case["use_vid_start_end"]:
        assert (row.ids[first - 1], row.ids[end]) == (values["vid_start_id"], values["vid_end_id"])


def test_templates(values: Any) -> None:
    assert {TEMPLATES[name] for name in values["templates"] if name in TEMPLATES} == set(SYSTEM)
    for name, template in TEMPLATES.items():
        assert values["templates"][name]["system"] == SYSTEM[template]


def test_as_published(values: Any, cases: dict[str, Any], tokenizer: Path) -> None:
    """Every recorded dialogue: ids and labels, whatever the original makes of it."""
    assert len(cases) >= 18
    for name, case in cases.items():
        config = inputs(tokenizer, case, label_mask="v1")
        if case["error"]:
            with pytest.raises(DecodeError, match="must take turns"):
                trained(config, case)
            continue
        if refused(case):
            continue
        example = trained(config, case)
        (row,) = example.rows["dialogue"]
        assert list(row.ids) == case["input_ids"], name
        assert list(row.labels) == case["labels"], name
        check_video(row, case, values)
        untaught = all(label == values["ignore_index"] for label in case["labels"])
        assert example.counters["rows_untaught"] == untaught, name
        if "mismatch" in case["stdout"]:
            assert untaught, name


def test_two_videos_as_published(values: Any, cases: dict[str, Any], tokenizer: Path) -> None:
    """What such a dialogue became in the original; its last video is the one that was spliced."""
    (case,) = [case for case in cases.values() if refused(case) and not case["error"]]
    config = inputs(tokenizer, case, label_mask="v1")
    with pytest.raises(DecodeError, match="several places"):
        trained(config, case)
    system, asked = pairs(case["conversations"], SYSTEM["vicuna_v1_1"])
    video = "<vid_start>" + PATCH * case["video_token_count"] + "<vid_end>"
    words = config._published_words()
    tokens = published_tokens(asked, "vicuna_v1_1", system, words, video, case["model_max_length"])
    assert (list(tokens.ids), list(tokens.labels)) == (case["input_ids"], case["labels"])
    starts = [place for place, token in enumerate(tokens.ids) if token == values["vid_start_id"]]
    assert tokens.video == (starts[-1] + 1, starts[-1] + 1 + case["video_token_count"])


def test_exact(values: Any, cases: dict[str, Any], tokenizer: Path) -> None:
    """The same ids and labels without looking for role names, where the original is right."""
    for name, case in cases.items():
        if mistaken(case) or refused(case):
            continue
        row = row_of(inputs(tokenizer, case), case)
        assert list(row.ids) == case["input_ids"], name
        assert list(row.labels) == case["labels"], name
        check_video(row, case, values)


def test_a_folder_of_hugging_face(values: Any, cases: dict[str, Any], tokenizer: Path) -> None:
    """The tokenizer as published language models bring it reads the same; `</s>` within a text alone is read otherwise,
    as the blank before it is another piece there."""
    assert (tokenizer.parent / "tokenizer_config.json").is_file()
    for name, case in cases.items():
        if refused(case) or any("</s>" in turn["value"] for turn in case["conversations"]):
            continue
        for mask in ("exact", "v1"):
            there, here = (row_of(inputs(path, case, label_mask=mask), case) for path in (tokenizer.parent, tokenizer))
            assert there == here, name


def test_exact_where_the_original_is_mistaken(values: Any, cases: dict[str, Any], tokenizer: Path) -> None:
    """The original learns nothing; we learn the answer and its end, and `</s>` in it is a text."""
    found = [case for case in cases.values() if mistaken(case)]
    assert len(found) >= 2
    for case in found:
        assert set(case["labels"]) == {values["ignore_index"]}
        row = row_of(inputs(tokenizer, case), case)
        learnt = [label for label in row.labels if label != IGNORE]
        assert learnt[-1] == values["eos_id"]
        assert values["eos_id"] not in learnt[:-1]
        assert tokenizer_of(tokenizer).decode(learnt) == case["conversations"][1]["value"]
        if "</s>" not in case["conversations"][1]["value"]:
            assert list(row.ids) == case["input_ids"]


def test_what_the_exact_mask_teaches(cases: dict[str, Any], tokenizer: Path) -> None:
    """Its learnt tokens are the answers to the letter, in every dialogue that is not cut."""
    for name, case in cases.items():
        if refused(case) or len(case["input_ids"]) == case["model_max_length"]:
            continue
        row = row_of(inputs(tokenizer, case), case)
        answers = [turn["value"] for turn in case["conversations"][1:] if turn["from"] == "gpt"]
        ends, texts, known = tokenizer_of(tokenizer).eos, [], []
        for label in row.labels:
            if label == ends:
                texts.append(tokenizer_of(tokenizer).decode(known))
                known = []
            elif label != IGNORE:
                known.append(label)
        assert not known, name
        assert [text.strip() for text in texts] == [answer.strip() for answer in answers if answer], name


def test_a_row_that_is_cut_is_counted(cases: dict[str, Any], tokenizer: Path) -> None:
    cut = [case for case in cases.values() if len(case["input_ids"] or ()) == case["model_max_length"]]
    assert len(cut) >= 2
    for case in cut:
        untaught = set(case["labels"]) == {IGNORE}
        for mask in ("exact", "v1"):
            example = trained(inputs(tokenizer, case, label_mask=mask), case)
            whole = trained(inputs(tokenizer, {**case, "model_max_length": 10**6}, label_mask=mask), case)
            lost = len(whole.rows["dialogue"][0].ids) - case["model_max_length"]
            counters = {"rows_shortened": 1, "tokens_dropped": lost, "rows_too_long": 0, "rows_untaught": untaught}
            assert example.counters == counters


def test_two_rows_of_a_batch(values: Any, tokenizer: Path) -> None:
    """What the original pads, ours lays end to end; features keep their type."""
    config = inputs(tokenizer, {"video_token_count": 8, "use_vid_start_end": True})
    several = values["batch_preprocess"]
    for turns, ids, labels in zip(several["conversations"], several["input_ids"], several["labels"]):
        row = row_of(config, {"video_token_count": 8}, turns)
        length = len(row.ids)
        assert list(row.ids) == ids[:length]
        assert list(row.labels) == labels[:length]
        assert ids[length:] == [values["pad_token_id"]] * (len(ids) - length)
        assert set(labels[length:]) <= {values["ignore_index"]}


def test_collator(values: Any, cases: dict[str, Any], tokenizer: Path) -> None:
    """The recorded batch is the dialogue of three turns and that of one letter."""
    recorded = values["collator"]
    chosen = [case for ids in recorded["input_ids"] for case in cases.values() if _begins(ids, case["input_ids"])]
    assert len(chosen) == len(recorded["input_ids"]) == 2
    config = inputs(tokenizer, chosen[0])
    batch = config.collate([trained(config, case) for case in chosen], SampleRng(0))
    rows, at = batch.views["dialogue"], 0
    assert batch.frame_tokens is not None
    assert str(batch.frame_tokens.dtype) == recorded["video_dtype"]
    assert batch.frame_counts == (chosen[0]["video_token_count"],) * 2
    targets = {}
    for place, target in zip(rows.predictors.tolist(), rows.targets.tolist()):
        targets[place + 1] = target
    for number, length in enumerate(rows.lengths):
        assert sum(recorded["attention_mask"][number]) == length
        assert rows.tokens[at : at + length].tolist() == recorded["input_ids"][number][:length]
        learnt = [targets.get(place, values["ignore_index"]) for place in range(at, at + length)]
        assert learnt == recorded["labels"][number][:length]
        at += length


def _begins(padded: list[int], ids: list[int] | None) -> bool:
    return ids is not None and padded[: len(ids)] == ids and not any(padded[len(ids) :])


def test_the_template_of_the_first_models(values: Any, tokenizer: Path) -> None:
    """As published the mask runs ahead by a token a turn; ours has the same ids and learns the answers."""
    recorded = values["legacy_default_template"]
    for turns, ids, labels in zip(recorded["conversations"], recorded["input_ids"], recorded["labels"]):
        case = {"video_token_count": 8, "use_vid_start_end": True}
        words = inputs(tokenizer, case)._published_words()
        system, asked = pairs(turns, SYSTEM["v0"])
        tokens = published_tokens(asked, "v0", system, words, "<video>", 2048)  # recorded with the placeholder in it
        assert (list(tokens.ids), list(tokens.labels)) == (ids, labels)
        text = [{**turn, "value": turn["value"].replace("<video>", "").strip()} for turn in turns]
        row = row_of(inputs(tokenizer, case, template="v0"), case, text)
        published = row_of(inputs(tokenizer, case, template="v0", label_mask="v1"), case, text)
        assert row.ids == published.ids
        assert row.labels != published.labels
        learnt = tokenizer_of(tokenizer).decode([label for label in row.labels if label != IGNORE])
        assert learnt.split() == [word for turn in text[1::2] for word in f"{turn['value']} ###".split()]


def test_prompts_of_tests(values: Any, tokenizer: Path) -> None:
    """What the model is asked, with the tokenizer that it was trained with; the fast one of the original reads the same
    text otherwise."""
    for prompt in values["inference_prompts"]:
        template = TEMPLATES[prompt["conv_mode"]]
        config = inputs(tokenizer, prompt, test_template=template)
        asked = [(prompt["question"], None)]
        if "second turn" in prompt["question"]:
            asked = [("What?", "A salad."), ("Sure?", None)]
        video = torch.zeros(prompt["video_token_count"], 1, 2)
        (row,) = config.converse(asked, Example(key="", frame_tokens=video)).prompts
        assert list(row.ids) == prompt["ids_slow"]
        assert set(row.labels) == {IGNORE}
        words = "<vid_start>{}<vid_end>" if prompt["use_vid_start_end"] else "{}"
        shown = words.format(PATCH * prompt["video_token_count"])
        asked[0] = (f"{asked[0][0]}\n{shown}", asked[0][1])
        assert published_text(asked, template, SYSTEM[template]) == prompt["prompt"]


def test_blanks_that_are_kept(cases: dict[str, Any], tokenizer: Path) -> None:
    """The line end beside the video is then a token, and the answer is learnt as before."""
    case = next(case for case in cases.values() if len(case["conversations"]) > 2 and not refused(case))
    for mask in ("exact", "v1"):
        stripped, kept = (
            row_of(inputs(tokenizer, case, label_mask=mask, whitespace=rule), case) for rule in ("strip", "keep")
        )
        newline = tokenizer_of(tokenizer).newline
        assert newline not in stripped.ids
        assert kept.ids[kept.video[1] + 1 :].count(newline) == 1
        learnt = [[label for label in row.labels if label != IGNORE] for row in (stripped, kept)]
        assert learnt[0] == learnt[1]
