"""Video-ChatGPT (arXiv 2306.05424), and its variant that says what happens when in Breakfast and 50Salads.

Numbers are those of the published commands; `docs/migrating.md` has them flag by flag. All start from LLaVA-Lightning
7B and the projector that its folder holds. Where files are expected is what each recipe says (`--help-all`): a path is
changed on the command line.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlm.data.chats import ChatConfig
from vlm.models.generation_config import GenerationConfig
from vlm.models.glimpse import GlimpseEncoder
from vlm.models.llama_base import LlamaBaseConfig, llama
from vlm.models.story_segments import PLACES
from vlm.models.text_base import segment_base
from vlm.models.video_chatgpt import VideoChatGptConfig, breakfast_variant
from vlm.recipe import EvalConfig, OptimConfig, Recipe, TrainData

_LLAVA = Path("pretrained/llava-lightning-7b")
_WORDS = 32_003  # of it: LLaMA's and three of images


# Breakfast and 50Salads -----------------------------------------------------------------------------------------------


def breakfast() -> Recipe:
    """The variant on Breakfast: 1000 frames, all 25 states of CLIP's class token with an encoding of their place, a sum
    of each added behind a block of the LLaMA, of which the first and last block, norm and head train too."""
    return Recipe(
        model=breakfast_variant(llama=_llava(), projection_from=_LLAVA, activation_checkpointing=True),
        inputs=ChatConfig(
            tokenizer=_LLAVA,
            words=_WORDS,
            features="clip_states",
            num_video_tokens=1000,
            frame_tokens=25,
        ),
        data=TrainData(shards="data/breakfast/shards/train"),
        optim=_optim(2e-4),
        views={"dialogue": 1.0},
        global_batch_size=2,
        epochs=1,
        eval=_segment_test("data/breakfast/shards/test"),
        run_dir=Path("runs/video_chatgpt/breakfast"),
        checkpoint_every=1000,
        checkpoint_keep=3,
        log_every=100,
        seed=42,
    )


def breakfast_base() -> Recipe:
    """Breakfast with nothing but Video-ChatGPT's own trained part: the projector and the rows of the two marks, on the
    last state of 1000 frames. 2 MB of features a video instead of 51, and no part of the LLaMA trains."""
    recipe = breakfast()
    return dataclasses.replace(
        recipe,
        model=VideoChatGptConfig(
            llama=_llava(), num_video_tokens=1000, projection_from=_LLAVA, activation_checkpointing=True
        ),
        inputs=dataclasses.replace(recipe.inputs, features="clip_cls", frame_tokens=1),
        run_dir=Path("runs/video_chatgpt/breakfast_base"),
    )


def salads() -> Recipe:
    """The later form of the variant on 50Salads: the last state alone, without sums behind the blocks; of its 50 videos
    questions for segments are repeated 150 times, others 90 times."""
    recipe = breakfast()
    return dataclasses.replace(
        recipe,
        model=breakfast_variant(
            llama=_llava(),
            projection_from=_LLAVA,
            activation_checkpointing=True,
            frame_tokens=1,
            fusion=False,
        ),
        inputs=dataclasses.replace(recipe.inputs, features="clip_cls", frame_tokens=1, repeats=(150, 90)),
        data=TrainData(shards="data/salads/shards/train"),
        epochs=3,
        eval=_segment_test("data/salads/shards/test"),
        run_dir=Path("runs/video_chatgpt/salads"),
    )


# VideoInstruct-100K ---------------------------------------------------------------------------------------------------


def instruct() -> Recipe:
    """Video-ChatGPT on VideoInstruct-100K: features of 100 frames, pooled over time and over space."""
    return Recipe(
        model=VideoChatGptConfig(llama=_llava(), projection_from=_LLAVA, activation_checkpointing=True),
        inputs=ChatConfig(tokenizer=_LLAVA, words=_WORDS, repeats=(1, 1), task="caption"),
        data=TrainData(shards="data/video_instruct/shards/train"),
        optim=_optim(2e-5),
        views={"dialogue": 1.0},
        global_batch_size=32,
        epochs=3,
        eval=EvalConfig(
            shards="data/video_instruct/shards/test",
            at_end=False,
            batch_size=4,
            metric="rouge_l",
            generation=_writing(top_k=50),  # that of transformers, where the published code says none
        ),
        run_dir=Path("runs/video_chatgpt/instruct"),
        checkpoint_every=3000,
        checkpoint_keep=3,
        log_every=100,
        seed=42,
    )


# The demo -------------------------------------------------------------------------------------------------------------


def demo() -> Recipe:
    """What happens when in videos of several actions of moving shapes. A tiny LLaMA that learnt it from text alone
    (tools/pretrain_text.py --speech segments) stays as it is; projector and marks make it see."""
    base, width = Path("data/demo/llama_segments"), GlimpseEncoder.width
    return Recipe(
        model=VideoChatGptConfig(llama=segment_base().llama(base), frame_dim=width, num_video_tokens=PLACES),
        inputs=ChatConfig(
            tokenizer=base / "tokenizer.model",
            features="glimpse",
            frame_dim=width,
            num_video_tokens=PLACES,
            question_side="before",
            repeats=(1, 0),
        ),
        data=TrainData(shards="data/demo/sequences/train", workers=1),
        # so much decay: the projector is to forget form, colour and place, of which the answers need nothing
        optim=OptimConfig(lr=4e-2, warmup_steps=20, betas=(0.9, 0.99), weight_decay=1.0, max_grad_norm=1.0),
        views={"dialogue": 1.0},
        global_batch_size=32,
        steps=300,
        eval=EvalConfig(
            shards="data/demo/sequences/test",
            workers=1,
            batch_size=16,
            metric="mof",
            probes=("blind",),
            generation=GenerationConfig(max_new_tokens=48),
        ),
        run_dir=Path("runs/demo/video_chatgpt"),
        checkpoint_every=100,
        log_every=25,
    )


# For tests ------------------------------------------------------------------------------------------------------------


def debug() -> Recipe:
    """The variant with tiny random weights, a tokenizer of bytes, a few steps: for tests."""
    words = 259
    return Recipe(
        model=breakfast_variant(
            llama=LlamaBaseConfig(dim=32, layers=2, heads=2, hidden=64, vocab_size=words),
            frame_tokens=2,
            frame_dim=16,
            num_video_tokens=8,
        ),
        inputs=ChatConfig(features="clip_states", num_video_tokens=8, frame_tokens=2, frame_dim=16, repeats=(2, 1)),
        data=TrainData(shards="data/demo/sequences/train", workers=0),
        optim=_optim(1e-3),
        views={"dialogue": 1.0},
        global_batch_size=4,
        steps=4,
        eval=dataclasses.replace(
            _segment_test("data/demo/sequences/test"),
            workers=0,
            generation=GenerationConfig(max_new_tokens=4),
        ),
        run_dir=Path("runs/debug/video_chatgpt"),
        log_every=1,
    )


# Shared ---------------------------------------------------------------------------------------------------------------


def _llava() -> LlamaBaseConfig:
    return llama("llava_lightning_7b", path=_LLAVA, dtype="bfloat16")


def _optim(lr: float) -> OptimConfig:
    """Warmup over 0.03 of all steps, then a cosine to 0, as transformers' Trainer has them."""
    return OptimConfig(lr=lr, warmup_share=0.03, warmup_peak_twice=False, weight_decay=0.0, max_grad_norm=1.0)


def _segment_test(shards: str) -> EvalConfig:
    """Segments asked of each test video, and once more without seeing it; training does not test, as published."""
    return EvalConfig(
        shards=shards, at_end=False, batch_size=4, metric="mof", probes=("blind",), generation=_writing(top_k=25)
    )


def _writing(top_k: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=1024, sample=True, temperature=0.2, top_k=top_k)
