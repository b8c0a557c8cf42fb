"""Video-ChatGPT asked for segments: what it has learnt by heart is written, read and scored; what it makes of nothing
is listed. No demo: the videos are those of training, and the language model trains too."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.encoded import encode, pictures
from tools import score
from vlm.data import loader
from vlm.data.chats import ChatConfig
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet, write_shards
from vlm.distributed import World
from vlm.models.generation_config import GenerationConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.video_chatgpt import VideoChatGptConfig
from vlm.recipe import EvalConfig, OptimConfig, Recipe, TrainData
from vlm.run import evaluate
from vlm.run.eval_tasks import task_of
from vlm.run.report import write_report
from vlm.run.standalone import Replica, evaluate_checkpoint
from vlm.sources.common_chat import make_chat
from vlm.types import Record, Sample, Visit

PLACES, DIM, FRAMES, VIDEOS = 8, 4, 24, 3
LABELS = ("cut", "stir_it")
WORLD = World(0, 1, 0, torch.device("cpu"), "single")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower in several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of which one thing happens first, then another; the features say which where."""
    folder, samples = tmp_path_factory.mktemp("chat"), []
    for number in range(VIDEOS):
        border, first = (6, 12, 18)[number], number % 2
        segments = [
            {"start": start, "end": end, "label": label, "name": LABELS[label]}
            for start, end, label in ((0, border, first), (border, FRAMES, 1 - first))
        ]
        features = np.zeros((PLACES, DIM), np.float16)
        for place in range(PLACES):
            features[place, first if place < border // 3 else 1 - first] = 3
        np.save(folder / f"{number}.npy", features)
        (folder / f"{number}.mp4").write_bytes(encode(pictures(FRAMES, 28, 28, seed=number)))
        annotation = {"name": "salad", "segments": segments, "chat": make_chat(f"v{number}", segments, "salad")[:1]}
        samples.append(
            Sample(key=f"v{number}", video=folder / f"{number}.mp4", annotation=annotation,
                   members={"clip_pooled.npy": folder / f"{number}.npy"})
        )  # fmt: skip
    write_shards(samples, folder / "shards", arguments={"source": "none"})
    return folder / "shards"


def recipe(shards: Path, folder: Path) -> Recipe:
    inputs = ChatConfig(num_video_tokens=PLACES, frame_dim=DIM, system="", question_side="after", repeats=(1, 1))
    llama = LlamaBaseConfig(dim=48, layers=2, heads=4, hidden=96, vocab_size=inputs.vocab_size - 3)
    return Recipe(
        model=VideoChatGptConfig(
            llama=llama, num_video_tokens=PLACES, frame_dim=DIM, train_also=("embeddings", "layers", "norm", "lm_head")
        ),
        inputs=inputs,
        data=TrainData(shards=str(shards)),
        optim=OptimConfig(lr=1e-2),
        views={"dialogue": 1.0},
        global_batch_size=VIDEOS,
        steps=1,
        eval=EvalConfig(
            shards=str(shards), workers=0, metric="mof", probes=("blind",),
            generation=GenerationConfig(max_new_tokens=40),
        ),
        run_dir=folder,
    )  # fmt: skip


def model_of(settings: Recipe) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        return settings.model.build()


def learn(model: Any, settings: Recipe, steps: int) -> float:
    """Learn all videos by heart; the loss of a token in the end."""
    inputs, data = settings.inputs, ShardSet(Path(settings.data.shards))
    rng = SampleRng(0)
    examples = [inputs.train(data.read(row), rng, Visit(part=0, views=("dialogue",)))[0] for row in range(len(data))]
    batch = inputs.collate(examples, rng)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    model.train()
    for _ in range(steps):
        term = model(batch)["dialogue"]
        loss = term.total / term.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_what_was_learnt_is_written_read_and_scored(shards: Path, tmp_path: Path) -> None:
    settings, told = recipe(shards, tmp_path), []
    model = model_of(settings)
    assert learn(model, settings, 150) < 0.05
    metrics = evaluate.run(settings, Replica(model, WORLD, torch.float32), WORLD, tmp_path, told.append)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["0-2 cut\n2-8 stir it", "0-4 stir it\n4-8 cut", "0-6 cut\n6-8 stir it"]
    for row in rows:
        assert row["prediction"] == row["truth"]
        assert (row["num_frames"], row["kind"], row["problem"]) == (FRAMES, "salad", "")
        assert row["question"] == "List down all the segments. action is salad"
    assert [metrics[name] for name in ("mof", "edit", "f1_10", "f1_25", "f1_50", "mof_salad")] == [1.0] * 6
    assert metrics["unparsable"] == metrics["num_unparsable"] == 0
    assert metrics["mof_blind"] < 1  # nothing but the video tells these apart
    assert len({row["probes"]["blind"]["text"] for row in rows}) == 1
    assert metrics["chance"] == 36 / 72
    assert score.main([str(tmp_path), "--check"]) == 0
    assert write_report(tmp_path).read_text().count('<svg class="timeline"') == VIDEOS


def test_a_model_that_knows_nothing_is_scored_all_the_same(shards: Path, tmp_path: Path) -> None:
    settings, told = recipe(shards, tmp_path), []
    metrics = evaluate.run(settings, Replica(model_of(settings), WORLD, torch.float32), WORLD, tmp_path, told.append)
    assert metrics["unparsable"] == 1
    assert [metrics[name] for name in ("mof", "edit", "f1_10", "f1_25", "f1_50")] == [0.0] * 5
    about = json.loads((tmp_path / "evaluation.json").read_text())
    assert [one["key"] for one in about["unparsable"]] == ["v0", "v1", "v2"]
    assert metrics["fork_errors"] == VIDEOS
    assert score.main([str(tmp_path), "--check"]) == 0


def test_an_old_projector_is_tested_as_it_is(shards: Path, tmp_path: Path) -> None:
    """launch/evaluate.py --checkpoint mm_projector.bin writes what a model with these weights does."""
    settings = recipe(shards, tmp_path / "old")
    settings = replace(
        settings,
        model=replace(settings.model, marks=False, train_also=(), llama=replace(settings.model.llama, vocab_size=259)),
        inputs=replace(settings.inputs, marks=False),
    )
    model = model_of(settings)
    with torch.no_grad():
        for parameter in model.mm_projector.parameters():
            parameter.normal_(0, 3)
    evaluate.run(settings, Replica(model, WORLD, torch.float32), WORLD, tmp_path, lambda text: None)
    old = {f"model.mm_projector.{name}": tensor for name, tensor in model.mm_projector.state_dict().items()}
    torch.save(old, tmp_path / "mm_projector.bin")
    texts = []
    for name, source in (("old", tmp_path / "mm_projector.bin"), ("new", None)):
        here = replace(settings, run_dir=tmp_path / name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
            evaluate_checkpoint(here, "video_chatgpt.debug", [], {}, source, WORLD)
        texts.append((tmp_path / name / "predictions.jsonl").read_text())
    assert texts[0] == (tmp_path / "predictions.jsonl").read_text()
    assert texts[1] != texts[0]


@pytest.mark.parametrize("num_frames", [1, 2, 7, 99, 186, 999, 1000, 1001, 1500, 9745, 18_151])
def test_what_training_teaches_is_what_tests_want(shards: Path, tmp_path: Path, num_frames: int) -> None:
    """The answer that is learnt, read as an answer of the test, is the truth: to half a place at each border."""
    settings = replace(recipe(shards, tmp_path), inputs=ChatConfig(num_video_tokens=1000))
    task = task_of(settings, None, WORLD)
    for seed in range(5):
        draw = random.Random(seed)
        borders = sorted({0, num_frames, *(draw.randrange(num_frames) for _ in range(6))})
        segments = [
            {"start": start, "end": end, "name": draw.choice(("take_cup", "pour_milk", "SIL"))}
            for start, end in pairwise(borders)
        ]
        chat = make_chat("v", segments, "milk", background=("SIL",))
        record = Record(key="v", shard="", row=0, video=None, annotation={"chat": chat, "segments": segments},
                        num_frames=num_frames, fps=15.0, decoders=())  # fmt: skip
        (ask,) = settings.inputs.asks(record)
        row = task.row(loader.TestItem("v", (ask,), {}), ask, {"": ask.references[0], "blind": ""})
        assert row.problem == ""
        labels = [np.full(num_frames, "", object) for _ in range(2)]
        for painted, spans in zip(labels, (row.truth, row.prediction)):
            for start, end, label in spans:
                painted[start:end] = label
        wrong = int((labels[0] != labels[1]).sum())
        assert wrong <= (len(borders) - 2) * num_frames / 2000
        if num_frames <= 1000:
            assert row.prediction == row.truth
