"""Tiny LLaMAs in Meta's layout and released-looking checkpoints on them, for the tests of the converter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_weight_files import cut
from tools import convert_ckpt
from vlm.models.gated_sizes import GatedSizes, expected_shapes
from vlm.models.published import LLAMA_VQA, VAMOS

DIM, LAYERS, HEADS, KEY_HEADS, HIDDEN, WORDS, WIDTH, FRAMES = 16, 3, 2, 1, 48, 40, 12, 4
KIND_OF = {"vamos": VAMOS, "flipped": LLAMA_VQA, "vico": LLAMA_VQA}


def llama_state(dim: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A LLaMA under Meta's names, grouped keys, with the table that LLaMA 1's and 2's files have."""
    keys = dim // HEADS * KEY_HEADS
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (WORDS, dim), "norm.weight": (dim,)}
    shapes["output.weight"] = (WORDS, dim)
    for n in range(LAYERS):
        shapes |= {f"layers.{n}.attention.w{part}.weight": (dim, dim) for part in "qo"}
        shapes |= {f"layers.{n}.attention.w{part}.weight": (keys, dim) for part in "kv"}
        shapes |= {f"layers.{n}.feed_forward.w{part}.weight": (HIDDEN, dim) for part in (1, 3)}
        shapes |= {f"layers.{n}.feed_forward.w2.weight": (dim, HIDDEN)}
        shapes |= {f"layers.{n}.{name}.weight": (dim,) for name in ("attention_norm", "ffn_norm")}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t.to(dtype) for name, t in state.items()} | {"rope.freqs": torch.rand(4).to(dtype)}


def llama_folder(folder: Path, shards: int = 1, *, words_cut: bool = False, **params: Any) -> Path:
    """Meta's folder. `params`: of params.json, and `seed`, `dim` of the weights."""
    folder.mkdir(parents=True)
    state = llama_state(params.get("dim", DIM), params.pop("seed", 0), params.pop("dtype", torch.float16))
    for number in range(shards):
        part = cut(state, number, shards, embedding=0 if words_cut else 1)
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    stated = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KEY_HEADS, "multiple_of": 8}
    (folder / "params.json").write_text(json.dumps({**stated, "norm_eps": 1e-6, "vocab_size": -1, **params}) + "\n")
    return folder


def tensors(family: str, seed: int = 1, **sizes: Any) -> dict[str, Tensor]:
    """What a released file holds under `model`: open gates, all blocks with gates."""
    known: dict[str, Any] = {
        "dim": DIM,
        "layers": LAYERS,
        "heads": HEADS,
        "rows": 3 * LAYERS,
        "feature_dim": WIDTH,
        "projector": "linear",
    }
    known |= {"frames": 0 if family == "vamos" else FRAMES}
    shapes = expected_shapes(GatedSizes(**{**known, **sizes}), KIND_OF[family])
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    """A command line of the originals."""
    args: dict[str, Any] = {
        "batch_size": 8, "adapter_layer": LAYERS, "adapter_len": 3, "max_seq_len": 128, "max_feats": FRAMES, "lr": None,
        "bias": 3.5, "tau": 100.0, "llama_model_path": "./pretrained/llama/", "model": "7B", "resume": "",
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "vamos": {"use_vis": True, "use_cap": False, "proj_type": "linear", "alter_train": False},
        "flipped": {"vaq": True, "qav": True, "sub": False},
        "vico": {"cap": 0.5, "max_cap_len": 64, "sub": False, "init_eval": False},
    }
    return {**args, **own[family], **changes}


def released(path: Path, family: str, args: dict[str, Any] | None = None, **sizes: Any) -> dict[str, Any]:
    """A file as the originals save it; its content. `args`: changes of the command line."""
    content = {
        "model": dict(reversed(tensors(family, **sizes).items())),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "epoch": 4,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(**arguments(family, **(args or {}))),
    }
    torch.save(content, path)
    return content


def convert(*words: str | Path) -> None:
    assert convert_ckpt.main([str(word) for word in words]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Message of a conversion that must fail."""
    capsys.readouterr()
    assert convert_ckpt.main([str(word) for word in words]) == 1
    return capsys.readouterr().err
