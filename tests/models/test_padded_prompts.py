"""Prompts padded as the original's: against a plain padded batch with a mask, in transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import small_video as s
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from vlm.data.packing import Row, pack
from vlm.models.llmva import Llmva
from vlm.models.padded_prompts import pad_prompts
from vlm.nn.language import ATTENTION
from vlm.types import IGNORE, Batch, TextRows

PROMPTS, TEXTS = (6, 9, 7), (4, 3, 5)


def numbers(seed: int, count: int) -> list[int]:
    return torch.randint(3, s.WORDS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def words(number: int) -> tuple[list[int], list[int]]:
    return numbers(number, PROMPTS[number]), numbers(50 + number, TEXTS[number])


def text_rows() -> TextRows:
    made = []
    for number in range(3):
        prompt, text = words(number)
        made.append(Row((*prompt, *text), (*[IGNORE] * len(prompt), *text)))
    return pack(made, 1)


def model_of(kind: str) -> Llmva:
    own: dict[str, Any] = {"prompt_pad": "right", "other_tokens": 0}
    return s.llmva(**own) if kind == "opt" else s.llmva(**own, opt=None, llama=s.llama())


@torch.no_grad()
def plainly(model: Llmva, kind: str) -> Tensor:
    """Loss of each token from a batch padded between prompt and text, and at the end, by transformers alone."""
    pad, longest, most = (1 if kind == "opt" else 0), max(PROMPTS), max(TEXTS)
    ids = torch.full((3, longest + most), pad)
    seen, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for number in range(3):
        prompt, text = words(number)
        ids[number, : len(prompt)] = torch.tensor(prompt)
        ids[number, longest : longest + len(text)] = torch.tensor(text)
        seen[number, : len(prompt)] = seen[number, longest : longest + len(text)] = 1
        labels[number, longest : longest + len(text)] = torch.tensor(text)
    # transformers 4.28: OPT counts what is seen, and a pad has -1; LLaMA counts everything
    positions = seen.cumsum(1) * seen - 1 if kind == "opt" else torch.arange(ids.shape[1]).expand(3, -1)
    llm = model.llm
    llm.set_attn_implementation("eager")
    try:
        logits = llm(
            inputs_embeds=llm.get_input_embeddings()(ids), attention_mask=seen, position_ids=positions, use_cache=False
        ).logits[:, :-1]
    finally:
        llm.set_attn_implementation(ATTENTION)
    learnt = labels[:, 1:] != IGNORE
    return functional.cross_entropy(logits[learnt].float(), labels[:, 1:][learnt], reduction="none")


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_losses_are_those_of_a_padded_batch(kind: str) -> None:
    model = model_of(kind)
    batch = model.arrange(Batch(keys=("a",), views={"caption": text_rows()}))
    rows = batch.views["caption"]
    with torch.no_grad():
        have = model.nll(model.read_at(["caption"], [rows], [rows.predictors], batch), [rows])[0]
    assert_close(have, plainly(model, kind), rtol=0, atol=1e-5)
    own = float(model(Batch(keys=("a",), views={"caption": text_rows()}))["caption"].total)
    assert own == pytest.approx(float(have.sum()), abs=1e-4)
    model.config.prompt_pad = "none"
    assert abs(float(model(Batch(keys=("a",), views={"caption": text_rows()}))["caption"].total) - own) > 1e-3


def test_only_the_first_target_of_a_shorter_prompt_changes_its_place() -> None:
    rows = text_rows()
    padded = pad_prompts(rows, 1, counted=False)
    assert padded.lengths == (6, 1, 4, 12, 7, 1, 5)
    assert padded.parents == (-1, 0, 0, -1, -1, 4, 4)
    assert padded.target_counts == (0, 0, 4, 3, 0, 0, 5)
    assert padded.targets.tolist() == rows.targets.tolist()
    assert padded.blind == (6, 30)
    assert padded.tokens[list(padded.blind)].tolist() == [1, 1]
    assert padded.positions[list(padded.blind)].tolist() == [-1, -1]
    firsts = [0, 4, 7]
    moved = {
        n for n, (a, b) in enumerate(zip(rows.predictors, padded.predictors)) if rows.tokens[a] != padded.tokens[b]
    }
    assert moved == {0, 7}
    assert padded.predictors[firsts].tolist() == [6, 19, 30]


def test_counted_pads_move_what_follows() -> None:
    padded = pad_prompts(text_rows(), 0, counted=True)
    assert padded.positions[list(padded.blind)].tolist() == [8, 8]
    assert padded.positions.split(padded.lengths)[2].tolist() == [9, 10, 11, 12]


def test_prompts_of_one_length_stay() -> None:
    rows = pack([Row((5, 6, 7), (IGNORE, IGNORE, 7)), Row((5, 6, 8, 9), (IGNORE, IGNORE, 8, 9))], 1)
    assert pad_prompts(rows, 1, counted=False) is rows


def test_rows_that_share_a_beginning() -> None:
    """As trees: the same losses as rows alone."""
    model = model_of("opt")
    start = numbers(7, 4)
    tails = [numbers(60 + n, 3 + n) for n in range(3)]
    texts = [numbers(80 + n, 3) for n in range(3)]
    alone = [Row((*start, *a, *b), (*[IGNORE] * (4 + len(a)), *b)) for a, b in zip(tails, texts)]
    shared = [
        Row(tuple(start), (IGNORE,) * 4),
        *(Row((*a, *b), (*[IGNORE] * len(a), *b), parent=0) for a, b in zip(tails, texts)),
    ]
    totals = [
        float(model(Batch(keys=("a",), views={"caption": rows}))["caption"].total)
        for rows in (pack(alone, 1), pack(shared, 1))
    ]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)
