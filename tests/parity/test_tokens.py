"""Prompts, token ids and labels against those that the originals made with the real tokenizers of LLaMA 1/2 and 3.

The tokenizer files cannot be shared, so the recordings hold every encoded string with its ids. A stand-in plays them
back. It does not know where a token lies in its string, so it says where the learned part begins by the published rules
(the answer is the last three tokens, a question begins behind "Question" and its colon); that these rules give the
recorded labels through the encoder, which goes by segments alone, is what is tested here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vlm.data.prompts import PromptEncoder
from vlm.data.views import VIEWS, Item, View, caption, find_caption, items, random_suffix, without_lead
from vlm.sources import intentqa, nextqa, perception_test, star, tvqa
from vlm.types import IGNORE, Sample

FILES = (
    "tokens_vamos_llama3.json",
    "tokens_vamos_llama12.json",
    "tokens_flipped_llama12.json",
    "tokens_vico_llama12.json",
)
NAMES = {"vqa": "answer", "vaq": "question", "qav": "video_order", "cap": "caption"}
SOURCES = {"nextqa": nextqa, "intentqa": intentqa, "ptest": perception_test, "star": star, "tvqa": tvqa}


class Replay:
    """A tokenizer that knows the recorded strings and no other."""

    def __init__(self, calls: Sequence[tuple[str, list[int]]], meta: dict[str, Any]) -> None:
        self.known = dict(calls)
        self.bos, self.eos, self.newline, self.vocab_size = meta["bos"], meta["eos"], meta["nl"], meta["n_words"]
        self.question = meta["question"]

    def encode(self, text: str) -> list[int]:
        return list(self.known[text])

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def tokens_before(self, text: str, end: int) -> int:
        ids = self.known[text]
        if end == len(text) - len("(A)"):
            return len(ids) - 3
        if text[:end].endswith("Question: "):
            return ids.index(self.question) + 2
        if text[:end] == "Description: ":
            return 2
        assert text.startswith("Video: "), f"no rule for the place behind {text[:end]!r}"
        return 0  # where a caption begins and ends matters to rows that are too long, of which there are none


def recorded_item(recorded: dict[str, Any], system: str) -> Item:
    """The question as the recording spells it."""
    text = recorded["text"]
    shown = text.get("c_text", "")
    return Item(
        question=text["q_text"].removeprefix("Question: ").removesuffix("\n"),
        options=tuple(line[4:] for line in text["o_text"].splitlines()[1:]),
        answer=recorded["answer"],
        context=shown if system == "vamos" else "",
        caption=shown.removeprefix("Description: ").removesuffix("\n") if system == "vico" else "",
        dialogue=text.get("d_text", "").removeprefix("Dialogue: ").removesuffix("\n"),
    )


def check_rows(recorded: dict[str, Any], item: Item, meta: dict[str, Any]) -> int:
    """Compare every row of one recorded sample; returns how many there are."""
    tokenizer = Replay(recorded["encode_calls"], meta)
    count = 0
    for name, objective in recorded["objectives"].items():
        encoder = PromptEncoder(
            tokenizer=tokenizer,
            num_video_tokens=recorded["flags"]["max_feats"],
            max_length=objective["padded_len"],
        )
        rows = objective["rows"]
        for choice, row in enumerate(rows):
            view: View = partial(caption, skip=3) if name == "cap" else VIEWS[NAMES[name]]
            tokens = encoder.encode(view(item, recorded["answer"] if len(rows) == 1 else choice))
            assert list(tokens.ids) == row["ids"]
            assert tokens.excess == 0
            learned = [place for place, label in enumerate(tokens.labels) if label != IGNORE]
            if name == "qav":
                assert list(range(*tokens.video)) == row["label_positions"]
                assert learned == []
            else:
                assert learned == row["label_positions"]
                assert [tokens.labels[place] for place in learned] == row["label_values"]
            assert tokens.video == (objective["video_start"], objective["video_start"] + encoder.num_video_tokens)
            count += 1
    return count


@pytest.mark.parametrize("file", FILES)
def test_ids_and_labels(file: str, load_golden: Callable[[str], Any]) -> None:
    recording = load_golden(file)
    meta = recording["meta"]
    rows = sum(check_rows(item, recorded_item(item, meta["system"]), meta) for item in recording["items"])
    assert rows == sum(len(view["rows"]) for item in recording["items"] for view in item["objectives"].values()) > 0


def _published(golden: Callable[[str], Path], recorded: dict[str, Any]) -> tuple[Item, dict[str, Any]]:
    """The question of a recorded sample as its source lists it, found by video and text; and its annotation."""
    for sample in SOURCES[recorded["dataset"]].read(golden(f"tiny_data/{recorded['dataset']}"), recorded["split"]):
        if isinstance(sample, Sample) and sample.key == recorded["vid"]:
            for item in items(sample.annotation):
                text = item.question.capitalize().strip()
                text = text if text.endswith("?") else f"{text}?"
                if recorded["text"]["q_text"] == f"Question: {text}\n" and item.answer == recorded["answer"]:
                    return item, sample.annotation
    raise AssertionError(f"{recorded['vid']} {recorded['text']['q_text']!r} is not in the source")


@pytest.mark.parametrize("file", FILES)
def test_from_published_files_to_ids(
    file: str, load_golden: Callable[[str], Any], golden: Callable[[str], Path]
) -> None:
    recording = load_golden(file)
    system = recording["meta"]["system"]
    draws: dict[tuple[str, str], random.Random] = {}
    for recorded in recording["items"]:
        asked, annotation = _published(golden, recorded)
        shown = taught = ""
        name = {
            "nextqa": "llava_v15_13b_n6",
            "intentqa": "blip2_n6",
            "ptest": "llava_13b_n6",
            "star": "star_caption_7B",
        }
        if system == "vamos" and recorded["flags"].get("use_cap"):
            shown = without_lead(find_caption(annotation, name[recorded["dataset"]]))
        elif system == "vico" and recorded["dataset"] == "intentqa":
            taught = without_lead(find_caption(annotation, "blip2_n6"))
        elif system == "vico":
            rng = draws.setdefault((recorded["dataset"], recorded["split"]), random.Random(0))
            taught = random_suffix(find_caption(annotation, name[recorded["dataset"]]), rng)
        found = items(annotation, context=shown, caption=taught)
        check_rows(recorded, next(item for item in found if item.id == asked.id), recording["meta"])
