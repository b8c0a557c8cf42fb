"""Video-LLaMA's and LLMVA-GEBC's data against the originals': captions, frames, dialogues, features, prompts."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm.data.boundaries import KINDS, LEADS, BoundaryConfig, nearest_places
from vlm.data.dialogues import DialogueConfig
from vlm.data.frames import CLIP_COLOURS
from vlm.data.rng import SampleRng
from vlm.data.sampling import headtail_frames, uniform_frames
from vlm.data.templates import PLACE, Media, blip_caption, dialogue, frames_message
from vlm.data.tokenizers import load_tokenizer
from vlm.data.transforms import normalize
from vlm.types import IGNORE, Record, Visit

FILE = "gebc_data.json"


@pytest.fixture(scope="module", params=["folder", "file"])
def tokenizer(request, golden) -> Path:
    """The same words by transformers and by sentencepiece."""
    folder = golden("gebc_tokenizers") / "llama"
    return folder if request.param == "folder" else folder / "tokenizer.model"


def test_captions(load_golden):
    for case in load_golden(FILE)["blip_caption"]:
        assert blip_caption(case["in"]) == case["out"]


def test_frames_evenly_spread(load_golden):
    for name, want in load_golden(FILE)["uniform_indices_key_vlen_n"].items():
        num_frames, count = map(int, name.split(","))
        assert uniform_frames(num_frames, count).tolist() == want


def test_frames_of_both_halves(load_golden):
    for name, want in load_golden(FILE)["headtail_python_random_seed_eq_vlen_n8"].items():
        assert headtail_frames(int(name), 8, random.Random(int(name))).tolist() == want


def test_normalised_pixels(load_golden):
    golden = load_golden(FILE)["alpro_eval_norm"]
    assert (list(CLIP_COLOURS.mean), list(CLIP_COLOURS.std)) == (golden["mean"], golden["std"])
    draw = torch.Generator().manual_seed(golden["clip_u8_generator_seed"])
    clip = torch.randint(0, 256, golden["shape"], dtype=torch.uint8, generator=draw)
    assert clip.flatten()[:8].tolist() == golden["in_first8"]
    found = normalize(clip.float(), CLIP_COLOURS.mean, CLIP_COLOURS.std)
    assert found.flatten()[:8].tolist() == pytest.approx(golden["out_first8"], abs=1e-5)
    assert found.double().sum().item() == pytest.approx(golden["out_sum"], abs=1e-2)


def _places(ids: list[int], patch: int) -> tuple[list[int], int]:
    """(ids as ours have them, places of the video)."""
    return [0 if token == patch else token for token in ids], ids.count(patch)


def _config(tokenizer: Path, ids: list[int], patch: int, **settings) -> DialogueConfig:
    return DialogueConfig(tokenizer=tokenizer, num_video_tokens=_places(ids, patch)[1], **settings)


def _tokens(config: DialogueConfig, turns: list[dict[str, str]], media: Media):
    record = Record(
        key="k", shard="s", row=0, video=None, annotation={"conversations": turns}, num_frames=3, fps=0, decoders=()
    )
    return config._turns_tokens(record, media)


def _videochat(case) -> tuple[list[dict[str, str]], Media]:
    """As the source `instruct` gives VideoChat's rows."""
    turns = []
    for number, part in enumerate(case["QA"]):
        turns.append({"from": "human", "value": part["q"] if number else f"{PLACE}\n{part['q']}"})
        turns.append({"from": "gpt", "value": part["a"]})
    return turns, Media(False, case["msg"])


@pytest.mark.parametrize("template", ["vicuna_v0", "llama2"])
def test_dialogues_about_videos(load_golden, tokenizer, template):
    golden = load_golden(FILE)
    patch, name = golden["image_patch_token_id"], {"vicuna_v0": "vicuna", "llama2": "llama_v2"}[template]
    for case in golden["instruct_video"]:
        ids, labels = case[f"{name}_input_ids"], case[f"{name}_labels"]
        turns, media = _videochat(case)
        mask = "drift" if template == "vicuna_v0" else "exact"
        found = _tokens(_config(tokenizer, ids, patch, template=template, label_mask=mask), turns, media)
        assert list(found.ids) == _places(ids, patch)[0]
        assert list(found.labels) == labels


def test_dialogues_about_images(load_golden, tokenizer):
    golden = load_golden(FILE)
    case, patch = golden["instruct_llava"], golden["image_patch_token_id"]
    turns = [turn | {"value": turn["value"].replace("<image>", PLACE)} for turn in case["conversations"]]
    config = _config(tokenizer, case["input_ids"], patch, label_mask="drift")
    found = _tokens(config, turns, Media(is_image=True))
    assert list(found.ids) == _places(case["input_ids"], patch)[0]
    assert list(found.labels) == case["labels"]


def test_message_about_frames(load_golden):
    told = load_golden(FILE)["instruct_video"][0]["msg"]
    assert frames_message((0.0, 1.3, 2.5), 3) == told


def test_exact_labels_are_the_answers_and_their_ends(load_golden, tokenizer):
    """What the drift spoils: labels are the answers, whole, and the mark after each."""
    golden = load_golden(FILE)
    words = load_tokenizer(tokenizer)
    for case in golden["instruct_video"]:
        turns, media = _videochat(case)
        config = _config(tokenizer, case["vicuna_input_ids"], golden["image_patch_token_id"])
        found = _tokens(config, turns, media)
        learnt = words.decode([label for label in found.labels if label != IGNORE])
        assert learnt.split() == "".join(f" {part['a']}\n###" for part in case["QA"]).split()
        spoken = dialogue(turns, "vicuna_v0", "", media)
        assert len(spoken.answers) == len(case["QA"])


# LLMVA-GEBC -----------------------------------------------------------------------------------------------------------


def test_features_brought_to_one_length(load_golden):
    for name, want in load_golden("gebc_llmva_data.json")["resize_nearest_source_index"].items():
        length, count = map(int, name.split("->"))
        assert nearest_places(length, count).tolist() == want


def _array(values: torch.Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, values.numpy())
    return file.getvalue()


def _boundary_record(item: dict[str, Any], kind: str, text: str | None = None) -> Record:
    names = ("intern_video", "omni", "clip")
    others = dict(zip(names, item["other_features_list"], strict=True)) if "other_features_list" in item else {}
    members = {"q_former": item["image_query_tokens"], **others} if others else {}
    label = item["prompt"].removeprefix("This video describes the ").partition(".")[0]
    boundary = {
        "id": "v_0",
        "kind": label,
        "timestamp": item["timestamp"],
        "prev_timestamp": 0.0,
        "next_timestamp": item["boundary_duration"],
        **dict.fromkeys(KINDS, "-"),
        kind: item["text_input"],
    }
    return Record(
        key="v",
        shard="s",
        row=0,
        video=None,
        annotation={"duration": item["duration"], "boundaries": [boundary]},
        num_frames=-1,
        fps=0,
        decoders=(),
        members={f"{name}.npy": _array(values) for name, values in members.items()},
    )


def test_prompts_of_boundaries(load_golden):
    for label, kind, want in load_golden("gebc_llmva_data.json")["prompts"]:
        item = {"prompt": f"This video describes the {label}.", "timestamp": 1, "boundary_duration": 2, "duration": 3}
        asks = BoundaryConfig().asks(_boundary_record({**item, "text_input": "a"}, kind))
        assert asks[KINDS.index(kind)].question == want


def test_a_batch_of_boundaries(load_golden, golden):
    golden_file = load_golden("gebc_llmva.pt")
    sizes, given = golden_file["config"], golden_file["inputs"]
    want, items = given["batch"], given["raw_items"]
    _, frame_tokens, frame_dim = items[0]["image_query_tokens"].shape
    config = BoundaryConfig(
        tokenizer=golden("gebc_tokenizers") / "opt",
        frame_tokens=frame_tokens,
        frame_dim=frame_dim,
        num_video_tokens=sizes["num_video_query_token"] + sizes["num_other_feat_query_token"],
        other_dims=tuple(sizes["other_feat_dims"]),
        other_length=sizes["max_seq_len"],
        max_caption_length=sizes["max_txt_len"],
    )
    examples = []
    for item in items:
        kind = next(kind for kind in KINDS if item["prompt"].endswith(LEADS[kind]))
        record = _boundary_record(item, kind)
        examples += config.train(record, SampleRng(0), Visit(KINDS.index(kind), 0, ("caption",)))
    batch = config.collate(examples, SampleRng(0))
    assert torch.equal(batch.frame_tokens, want["image_query_tokens"].flatten(0, 1))
    assert batch.frame_counts == (len(want["image_query_tokens"][0]),) * len(items)
    assert torch.equal(batch.extra["other"], want["other_features_list"].squeeze(2))
    assert torch.equal(batch.extra["boundary"], want["reference_points"])
    rows = batch.views["caption"]
    ids, targets = rows.tokens.split(rows.lengths), rows.targets.split(rows.target_counts)
    prompts = given["prompt_ids_padded"]
    for number, (row, learnt) in enumerate(zip(ids, targets)):
        lead = [sizes["bos_token_id"], *given["video_prefix_ids"], *[0] * config.num_video_tokens]
        prompt = prompts[number][given["prompt_attention_mask"][number].bool()].tolist()
        text = [token for token in given["text_ids"][number].tolist() if token != sizes["pad_token_id"]]
        assert row.tolist() == lead + prompt + text
        assert learnt.tolist() == text


# Captions of Video-LLaMA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["stage2_caption", "stage1_no_prompt_trunc12"])
def test_rows_of_captions(load_golden, tokenizer, case):
    recorded = load_golden("gebc_videollama.pt")
    sizes, want = recorded["config"], recorded["outputs"]["cases"][case]
    asked = case == "stage2_caption"
    line = PLACE + want["prompt"].partition("</Image>")[2].removesuffix(" ###Assistant: ") if asked else ""
    config = DialogueConfig(
        tokenizer=tokenizer,
        num_video_tokens=sizes["num_video_query_token"],
        clean="none",
        prompts=(line,) if asked else (),
        caption_end=sizes["end_sym"] if asked else "\n",
        max_caption_length=sizes["max_txt_len"] if asked else max(map(len, want["text_ids"])),
    )
    lead = [sizes["bos_token_id"], *want.get("p_before_ids", []), *[0] * config.num_video_tokens]
    lead += want.get("p_after_ids", [])
    for caption, text in zip(recorded["inputs"]["captions"], want["text_ids"]):
        record = Record(
            key="k", shard="s", row=0, video=None, annotation={"caption": caption}, num_frames=1, fps=0, decoders=()
        )
        found = config._caption_tokens(record, Media(is_image=True), SampleRng(0))
        assert list(found.ids) == lead + text
        assert list(found.labels) == [IGNORE] * len(lead) + text
