"""Sizes of EVA, Q-Formers and what Video-LLaMA and LLMVA-GEBC train, as the shapes of their tensors tell them.

All but the numbers of attention heads, which are the published ones at the published widths. Names are ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.models.eva import Tower, TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llama_facts import read_json
from vlm.models.llmva import LlmvaConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.models.published import LLMVA
from vlm.models.video_llama import VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.types import UserError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

VISION_HEADS = {1408: 16}  # by width: ViT-g
QUERY_HEADS = {768: 12}  # by width: all published Q-Formers


def _of(shapes: Shapes, name: str, dimensions: int) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions:
        raise UserError(f"{name}: {'missing' if shape is None else f'has shape {list(shape)}'}; it tells the sizes.")
    return shape


def _count(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number in names that match."""
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)


def q_former_sizes(shapes: Shapes, start: str, heads: int | None) -> tuple[QFormerConfig, int]:
    """A Q-Former by the tensors that begin so, and the width of what it reads. UserError: tensors are missing."""
    dim = _of(shapes, f"{start}layernorm.weight", 1)[0]
    layer = f"{start}encoder.layer."
    crossed = sorted(
        {int(m[1]) for n in shapes if (m := re.match(rf"{re.escape(layer)}(\d+)\.crossattention\.", n))} or {0}
    )
    return QFormerConfig(
        dim=dim,
        heads=heads or QUERY_HEADS.get(dim, 1),
        hidden=_of(shapes, f"{layer}0.intermediate_query.dense.weight", 2)[0],
        layers=_count(shapes, rf"{re.escape(layer)}(\d+)\."),
        cross_every=crossed[1] if len(crossed) > 1 else 1,
    ), _of(shapes, f"{layer}0.crossattention.attention.key.weight", 2)[1]


# ------------------------------------------------------------------------------------------ EVA and Q-Former


def part_of(name: str) -> str:
    """Which part of the tower a tensor is of: parts are published in files of their own."""
    if name.startswith("tower.vision.post_layernorm."):
        return "norm"
    return name.split(".")[1]  # vision, qformer, query_tokens


def parts_of(shapes: Shapes) -> frozenset[str]:
    return frozenset(part_of(name) for name in shapes)


def tower_config(shapes: Shapes, heads: tuple[int | None, int | None] = (None, None)) -> TowerConfig:
    """The tower that has these tensors; of a part that is not there, sizes that take no memory.

    Args:
        heads: of EVA and of the Q-Former, where they are known.
    """
    parts = parts_of(shapes)
    values: dict[str, Any]
    if "qformer" in parts:
        former, memory = q_former_sizes(shapes, "tower.qformer.", heads[1])
        values = {"query_dim": former.dim, "query_layers": former.layers, "query_hidden": former.hidden}
        values |= {"query_heads": former.heads, "dim": memory}
    else:
        values = {"query_dim": 1, "query_layers": 1, "query_hidden": 1, "query_heads": 1}
    queries = _of(shapes, "tower.query_tokens", 3)[1] if "query_tokens" in parts else 1
    if "vision" in parts:
        _, _, dim = _of(shapes, "tower.vision.embeddings.class_embedding", 3)
        patch = _of(shapes, "tower.vision.embeddings.patch_embedding.weight", 4)[-1]
        places = _of(shapes, "tower.vision.embeddings.position_embedding", 3)[1]
        values |= {"dim": dim, "patch_size": patch, "image_size": patch * math.isqrt(places - 1)}
        values |= {"layers": _count(shapes, r"tower\.vision\.encoder\.layers\.(\d+)\.")}
        values |= {"hidden": _of(shapes, "tower.vision.encoder.layers.0.mlp.fc1.weight", 2)[0]}
        values |= {"heads": heads[0] or VISION_HEADS.get(dim, 1)}
    else:
        values |= {"layers": 1, "hidden": 1, "heads": 1, "patch_size": 1, "image_size": 1}
        if "norm" in parts:
            values |= {"dim": _of(shapes, "tower.vision.post_layernorm.weight", 1)[0]}
    return TowerConfig(queries=queries, **values)


def tower_shapes(config: TowerConfig, parts: frozenset[str]) -> dict[str, Shape]:
    """Name -> shape of every tensor of these parts."""
    with torch.device("meta"):
        state = Tower(replace(config, path=None, vision_path=None)).state_dict()
    shapes = {f"tower.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    return {name: shape for name, shape in shapes.items() if part_of(name) in parts}


def hf_config(config: TowerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of transformers' BLIP-2 for a tower without a language model."""
    return {
        "architectures": ["Blip2Model"],
        "model_type": "blip-2",
        "num_query_tokens": config.queries,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": config.dim,
            "intermediate_size": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
            "hidden_act": "gelu",
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": config.query_dim,
            "intermediate_size": config.query_hidden,
            "num_hidden_layers": config.query_layers,
            "num_attention_heads": config.query_heads,
            "cross_attention_frequency": 2,
            "encoder_hidden_size": config.dim,
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# ------------------------------------------------------------------------------------------ what trains


def projection_of(shapes: Mapping[str, Any]) -> str:
    """Name of the module that projects to the language model's width. UserError: there is none."""
    found = [name for name in ("llama_proj", "opt_proj", "llama_project") if f"{name}.weight" in shapes]
    if not found:
        raise UserError("llama_proj.weight, opt_proj.weight: missing; a trained file has one of them.")
    return found[0]


def branch_config(
    shapes: Shapes, kind: str, llm: Any = None, heads: int | None = None
) -> VideoLlamaConfig | LlmvaConfig:
    """The model that has these trained tensors.

    Args:
        llm: config of its language model; none: one of the right width that takes no memory, for shapes alone.
        heads: of its Q-Formers, where they are known.
    """
    projection = projection_of(shapes)
    width = _of(shapes, f"{projection}.weight", 2)[0]
    former, memory = q_former_sizes(shapes, "video_Qformer.", heads)
    values: dict[str, Any] = {
        "tower": None,
        "frame_dim": memory,
        "num_video_tokens": _of(shapes, "video_query_tokens", 3)[1],
        "max_frames": _of(shapes, "video_frame_position_embedding.weight", 2)[0],
        "qformer": former,
    }
    if kind != LLMVA:
        return VideoLlamaConfig(**values, llama=llm or _llama_of(width))
    other = "other_feat_query_tokens" in shapes
    values["other_tokens"] = _of(shapes, "other_feat_query_tokens", 3)[1] if other else 0
    if other:
        values["other_dim"] = _of(shapes, "other_feat_linear.weight", 2)[1]
        values["max_other"] = _of(shapes, "other_feat_position_embedding.weight", 2)[0]
    if projection == "llama_project":
        return LlmvaConfig(**values, opt=None, llama=llm or _llama_of(width))
    return LlmvaConfig(**values, opt=llm or OptBaseConfig(dim=width, layers=1, heads=1, hidden=1, vocab_size=8))


def _llama_of(width: int) -> LlamaBaseConfig:
    return LlamaBaseConfig(dim=width, layers=1, heads=1, hidden=1, vocab_size=8)


def branch_shapes(config: VideoLlamaConfig | LlmvaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor that trains."""
    state = build_empty(config).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not name.startswith(("llm.", "tower."))}


def build_empty(config: VideoLlamaConfig | LlmvaConfig) -> Any:
    """The model without weights, and without its tower."""
    with torch.device("meta"):
        return replace(fresh(config), tower=None).build().eval()


def fresh(config: Any) -> Any:
    """The same settings without a file that training would begin with."""
    changes = {"projection_from": None} if isinstance(config, VideoLlamaConfig) else {}
    return replace(config, init_from=None, **changes)


def opt_config(folder: Path) -> OptBaseConfig:
    """The OPT in a Hugging Face folder, by its config.json. UserError: none, or of another kind."""
    file = folder / "config.json"
    stated = read_json(file) if file.is_file() else {}
    if stated.get("model_type") != "opt":
        raise UserError(f"{folder}: is no Hugging Face folder of an OPT (config.json with model_type opt).")
    return OptBaseConfig(
        path=folder,
        dim=stated["hidden_size"],
        layers=stated["num_hidden_layers"],
        heads=stated["num_attention_heads"],
        hidden=stated["ffn_dim"],
        vocab_size=stated["vocab_size"],
        max_positions=stated["max_position_embeddings"],
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
