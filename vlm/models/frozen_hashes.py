"""Hashes of the frozen weights under Video-LLaMA and LLMVA-GEBC, without building the models.

They are `VideoSystem.frozen_hash` of the built model: the language model's and, with a tower, `+` and the tower's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm.models.eva import TowerConfig
from vlm.models.formats import Model
from vlm.models.llama_base import LlamaBaseConfig, read_llama
from vlm.models.llama_files import Tensors
from vlm.models.opt_base import OptBaseConfig, read_opt
from vlm.models.tower_files import tower_tensors
from vlm.models.video_llama_files import LONE_HEAD
from vlm.weights import Loader, open_tensors, state_hash


def language_model(config: Any) -> LlamaBaseConfig | OptBaseConfig:
    """The frozen one of a `VideoLlamaConfig` or `LlmvaConfig`."""
    return config.language_model if hasattr(config, "language_model") else config.llama


def own_hash(model: Model) -> str | None:
    """The hash of the frozen weights that a whole file holds itself; none: it holds no language model."""
    llm = {name: t for name, t in model.tensors.items() if name.startswith("llm.") and name != LONE_HEAD}
    if not llm:
        return None
    if LONE_HEAD in model.tensors and not any(name.startswith("llm.model.decoder.") for name in llm):
        llm[LONE_HEAD] = model.tensors[LONE_HEAD]  # of a LLaMA, no copy
    tower = {name: t for name, t in model.tensors.items() if name.startswith("tower.")}
    return "+".join(state_hash(part) for part in (llm, tower) if part)


def frozen_hash(config: Any) -> str:
    """`VideoSystem.frozen_hash` of the built model, with one tensor in memory at a time where there are files."""
    parts = [_llm_hash(language_model(config))]
    if config.tower is not None:
        parts.append(_tower_hash(config.tower))
    return "+".join(parts)


def _llm_hash(llm: LlamaBaseConfig | OptBaseConfig) -> str:
    if llm.path is None:
        return state_hash({f"llm.{name}": p for name, p in replace(llm, quantise=None).build().named_parameters()})
    stored = open_tensors(llm.path)
    if isinstance(llm, OptBaseConfig):
        loaders = read_opt(stored, str(llm.path))
    else:
        loaders = read_llama(stored, llm.heads, llm.num_kv_heads, str(llm.path))
    return _streamed({f"llm.{name}": load for name, load in loaders.items()}, llm.dtype)


def _tower_hash(tower: TowerConfig) -> str:
    if tower.path is None:
        return state_hash({f"tower.{name}": p for name, p in tower.build().named_parameters()})
    loaders = tower_tensors(tower.path, tower.vision_path, tower.layers)
    return _streamed({f"tower.{name}": load for name, load in loaders.items()}, tower.dtype)


def _streamed(loaders: Mapping[str, Loader], dtype: str) -> str:
    return state_hash(Tensors({n: partial(_rounded, load, getattr(torch, dtype)) for n, load in loaders.items()}))


def _rounded(load: Loader, dtype: torch.dtype) -> Tensor:
    return load().to(dtype)
