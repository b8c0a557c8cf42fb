"""A tiny LLaMA and rows for it, for the tests of causal systems."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from vlm.data.packing import Row, pack
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.vamos import Vamos, VamosConfig
from vlm.types import IGNORE, Batch

WORDS, FRAMES, WIDTH = 60, 3, 12


def base(**settings: Any) -> LlamaBaseConfig:
    sizes = {"dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "hidden": 48, "vocab_size": WORDS}
    return LlamaBaseConfig(**{**sizes, **settings})


def system(llama: LlamaBaseConfig | None = None, **settings: Any) -> Vamos:
    """A model whose gates are open, so that every trained tensor matters."""
    config = VamosConfig(
        **{"llama": llama or base(), "feature_dim": WIDTH, "num_frames": FRAMES, "adapter_len": 4, **settings}
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
        model = config.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate", "gate1")):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def row(seed: int, length: int, learnt: int, sample: int = 0, video: bool = True, start: int = 2) -> Row:
    """`length` random tokens, the last `learnt` of them to be predicted."""
    ids = torch.randint(3, WORDS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [IGNORE] * (length - learnt) + ids[length - learnt :]
    return Row(tuple(ids), tuple(labels), (start, start + FRAMES) if video else (0, 0), sample)


def features(count: int = 2) -> torch.Tensor:
    return torch.randn(count, FRAMES, WIDTH, generator=torch.Generator().manual_seed(9))


def batch(views: tuple[str, ...] = ("answer",), samples: int = 2) -> Batch:
    """Rows of unequal length for each view."""
    made = {
        name: pack([row(10 * n + i, 9 + 3 * i + n, 3 + i, sample=i) for i in range(samples)], FRAMES)
        for n, name in enumerate(views)
    }
    return Batch(keys=tuple(map(str, range(samples))), features=features(samples), views=made)
