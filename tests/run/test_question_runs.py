"""Systems that answer questions, run as a user runs them; shared questions give the losses of separate ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import ROOT, run, train_arguments
from question_shards import shards

from vlm.config import override
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.recipe import load
from vlm.types import Visit

CAPTION = "llava_v15_13b_n6"
FILES = ("recipe.json", "metrics.jsonl", "metrics.json", "predictions.jsonl", "report.html")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return shards(tmp_path_factory.mktemp("questions"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_vamos_trains_and_is_tested_in_two_processes(folder, tmp_path):
    """Captions and frames by turns; tested before training, at the end, and alone from the same initial weights."""
    out = tmp_path / "run"
    settings = [f"inputs.caption={CAPTION}", "inputs.max_length=700", "inputs.alternate=true", "steps=6"]
    printed = run(
        train_arguments(folder, out, *settings, "eval.at_start=true", recipe="vamos.debug"),
        processes=2,
    )
    assert "6 records with 18 questions" in printed
    assert "audit: 4 trainable tensors all had gradients" in printed
    assert [name for name in FILES if not (out / name).is_file()] == []
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 18
    assert {"kind", "question", "options", "video", "id"} <= rows[0].keys()
    metrics = read(out / "metrics.json")
    assert {"accuracy", "chance", "accuracy_blind", "accuracy_CH", "accuracy_C"} <= metrics.keys()
    assert metrics["chance"] == pytest.approx(0.2)
    assert run([str(ROOT / "tools" / "score.py"), str(out)]).strip().endswith("equal to what its predictions give")

    again = tmp_path / "again"
    recipe = ["--recipe", "vamos.debug", *settings, f"eval.shards={folder / 'test'}", f"run_dir={again}"]
    run([str(ROOT / "launch" / "evaluate.py"), "--untrained", *recipe])
    before = (out / "before_training" / "predictions.jsonl").read_text().splitlines()
    alone = (again / "predictions.jsonl").read_text().splitlines()
    for first, second in zip(map(json.loads, before), map(json.loads, alone), strict=True):
        assert first["key"] == second["key"]
        assert first["scores"] == pytest.approx(second["scores"], abs=2e-5)


def test_rows_that_were_cut_are_told(folder, tmp_path):
    settings = [f"inputs.caption={CAPTION}", "inputs.max_length=220", "steps=2", "eval.at_end=false"]
    run(train_arguments(folder, tmp_path / "run", *settings, recipe="vamos.debug"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rows_shortened"] for line in lines] == [4, 4]
    assert all(line["tokens_dropped"] > 0 for line in lines)


def test_a_tokenizer_of_another_llama_is_refused(folder, tmp_path):
    settings = ["model.llama.vocab_size=258"]
    printed = run(train_arguments(folder, tmp_path / "run", *settings, recipe="vamos.debug"), expect=2)
    assert "has 259 words" in printed
    assert "Give the tokenizer.model that came with this LLaMA" in printed


@pytest.mark.parametrize("name", ["vamos.debug", "llama_vqa.debug", "vico.debug"])
def test_shared_questions_give_the_same_losses_and_gradients(folder, name):
    text = {"vamos": f"inputs.caption={CAPTION}", "llama_vqa": "seed=1", "vico": f"inputs.caption_target={CAPTION}"}
    recipe = override(load(name), [text[name.split(".")[0]], "inputs.max_length=700"])
    separate, shared = recipe.inputs, replace(recipe.inputs, share_questions=True)
    records = [ShardSet(folder / "train").read(row) for row in (1, 4)]
    views = tuple(recipe.views)
    torch.manual_seed(0)
    model = recipe.model.build()
    with torch.no_grad():  # open gates, so that everything gets a gradient
        for layer in model.layers:
            for gate in layer.attention.parameters():
                gate.fill_(0.3)

    def losses(examples, inputs):
        model.zero_grad(set_to_none=True)
        batch = inputs.collate(examples, SampleRng(0))
        terms = model(batch)
        sum(term.total / term.count for term in terms.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        read = sum(sum(rows.lengths) for rows in batch.views.values())
        return {n: (float(t.total), t.count) for n, t in terms.items()}, gradients, read

    alone = [separate.train(record, SampleRng(0), Visit(part, 1, views))[0] for record in records for part in range(3)]
    together = [shared.train(record, SampleRng(0), Visit(None, 1, views))[0] for record in records]
    whole, gradients, tokens = losses(alone, separate)
    tree, same, fewer = losses(together, shared)
    assert fewer < tokens
    for view in views:
        assert tree[view] == pytest.approx(whole[view], rel=1e-5)
    assert same.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert torch.allclose(same[parameter], gradient, atol=2e-6), parameter
