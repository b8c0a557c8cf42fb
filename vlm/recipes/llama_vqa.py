"""LLaMA-VQA (Flipped-VQA, arXiv 2310.15747): answer, question and order of frames from one frozen LLaMA.

Learning rates are base * batch / 256, written out. NExT-QA, STAR and TVQA are the published runs on LLaMA-1 7B; another
LLaMA is another `model.llama` and its tokenizer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlm.data.questions import QuestionConfig
from vlm.models.llama_base import LlamaBaseConfig, llama
from vlm.models.vamos import llama_vqa
from vlm.recipe import EvalConfig, OptimConfig, Recipe, TrainData

NEXTQA_KINDS = {"C": ("CH", "CW"), "T": ("TN", "TC", "TP"), "D": ("DL", "DC", "DO")}
"""NExT-QA's causal, temporal and descriptive questions."""


def nextqa() -> Recipe:
    """NExT-QA (72.0 published; C 72.7, T 69.2, D 75.8)."""
    return Recipe(
        model=llama_vqa(llama=llama("llama1_7b", path=Path("pretrained/llama/7B"))),
        inputs=QuestionConfig(tokenizer=Path("pretrained/llama/tokenizer.model"), max_length=128),
        data=TrainData(shards="data/nextqa/shards/train"),
        optim=_optim(base_lr=9e-2, batch=64, weight_decay=0.14),
        views={"answer": 1.0, "question": 1.0, "video_order": 1.0},
        global_batch_size=64,
        epochs=5,
        eval=EvalConfig(shards="data/nextqa/shards/val", kinds=NEXTQA_KINDS, metric="accuracy", every=534),
        run_dir=Path("runs/llama_vqa/nextqa"),
        checkpoint_every=534,
    )


def star() -> Recipe:
    """STAR (65.4 published)."""
    recipe = nextqa()
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, video_bias=3.0),
        data=TrainData(shards="data/star/shards/train"),
        optim=_optim(base_lr=9e-2, batch=32, weight_decay=0.16),
        global_batch_size=32,
        eval=EvalConfig(shards="data/star/shards/val", metric="accuracy", every=1430),
        run_dir=Path("runs/llama_vqa/star"),
        checkpoint_every=1430,
    )


def tvqa() -> Recipe:
    """TVQA with subtitles (82.2 published)."""
    recipe = nextqa()
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, video_bias=3.0),
        inputs=dataclasses.replace(recipe.inputs, max_length=650, dialogue=True),
        data=TrainData(shards="data/tvqa/shards/train"),
        optim=_optim(base_lr=7e-2, batch=32, weight_decay=0.02),
        global_batch_size=32,
        eval=EvalConfig(shards="data/tvqa/shards/val", metric="accuracy", every=3814),
        run_dir=Path("runs/llama_vqa/tvqa"),
        checkpoint_every=3814,
    )


def debug() -> Recipe:
    """Tiny random weights, a tokenizer of bytes, a few steps: for tests."""
    return Recipe(
        model=llama_vqa(
            llama=LlamaBaseConfig(dim=32, layers=2, heads=2, hidden=64, vocab_size=320), num_frames=4, feature_dim=8
        ),
        inputs=QuestionConfig(num_frames=4, feature_dim=8, max_length=640),
        data=TrainData(shards="data/demo/shards_features/train", workers=0),
        optim=_optim(base_lr=9e-2, batch=4, weight_decay=0.14),
        views={"answer": 1.0, "question": 1.0, "video_order": 1.0},
        global_batch_size=4,
        steps=4,
        eval=EvalConfig(
            shards="data/demo/shards_features/test",
            workers=0,
            batch_size=2,
            metric="accuracy",
            probes=("blind",),
            kinds=NEXTQA_KINDS,
        ),
        run_dir=Path("runs/debug/llama_vqa"),
        log_every=1,
    )


def _optim(base_lr: float, batch: int, weight_decay: float) -> OptimConfig:
    """The schedule of all three systems: two epochs of warmup, cosine to 0, betas of LLaMA-Adapter."""
    return OptimConfig(
        lr=base_lr * batch / 256,
        warmup_epochs=2,
        warmup_peak_twice=False,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
    )
