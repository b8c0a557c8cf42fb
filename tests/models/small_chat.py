"""Tiny models of Video-ChatGPT and its variant, and batches for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.data.packing import Row, pack
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.video_chatgpt import VideoChatGpt, VideoChatGptConfig
from vlm.types import IGNORE, Batch, TextRows

WORDS, PLACES, DIM, WIDTH, STATES = 60, 5, 12, 32, 2
PATCH, START, END = WORDS, WORDS + 1, WORDS + 2
FUSED = {"frame_tokens": STATES, "positional_encodings": True, "fusion": True}
PARTS = ("first_layer", "last_layer", "norm", "lm_head")


def llama(**settings: Any) -> LlamaBaseConfig:
    return LlamaBaseConfig(**{"dim": WIDTH, "layers": 3, "heads": 4, "hidden": 48, "vocab_size": WORDS, **settings})


def config(**settings: Any) -> VideoChatGptConfig:
    return VideoChatGptConfig(**{"llama": llama(), "frame_dim": DIM, "num_video_tokens": PLACES, **settings})


def build(**settings: Any) -> VideoChatGpt:
    """In evaluation mode, the same each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
        return config(**settings).build().eval()


def fused(**settings: Any) -> VideoChatGpt:
    """The variant, with a fusion that changes what is said."""
    return build(**{**FUSED, "fusion_scale": 3.0, **settings})


def row(seed: int, length: int, learnt: int = 0, video: int = 0, marks: bool = True) -> Row:
    """Random tokens with the video after the second, marked; the last `learnt` to be predicted. `video` -1: none."""
    ids = torch.randint(3, WORDS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    place = (0, 0)
    if video >= 0:
        filled = [START, *[0] * PLACES, END] if marks else [0] * PLACES
        first = 2 + marks
        ids[2:2] = filled
        place = (first, first + PLACES)
    labels = [IGNORE] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    return Row(tuple(ids), tuple(labels), place, max(video, 0))


def states(videos: int, count: int = 1, seed: int = 1) -> Tensor:
    """(V, N, Q, D) in fp16, as stored."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(videos, PLACES, count, DIM, generator=draw).half()


def batch(given: Tensor | None, rows: Sequence[Row] | TextRows = (), view: str = "dialogue") -> Batch:
    """Stored states (V, N, Q, D) and rows about them."""
    text = rows if isinstance(rows, TextRows) else pack(list(rows), PLACES)
    videos = 0 if given is None else len(given)
    return Batch(
        keys=tuple(f"video{number}" for number in range(max(1, videos))),
        frame_tokens=None if given is None else given.flatten(0, 1),
        frame_counts=(PLACES,) * videos,
        views={view: text} if view not in ("prompts", "options") else {},
        prompts=text if view == "prompts" else None,
        options=text if view == "options" else None,
    )
