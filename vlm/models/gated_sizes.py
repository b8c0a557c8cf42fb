"""Sizes of what Vamos, LLaMA-VQA and ViCo train, as the shapes of their tensors tell them, and the shapes they ask for.

Released files hold these tensors alone. Names are ours, which are the originals' (`vlm/models/published.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vlm.models.published import LLAMA_VQA
from vlm.types import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedSizes:
    """What the shapes tell of the trained part and of the LLaMA it belongs to."""

    dim: int  # width of the LLaMA (D)
    layers: int  # its blocks: each has gates, the skipped ones too
    heads: int  # its attention heads
    rows: int  # prompt rows of all blocks together
    feature_dim: int  # width of a frame's features; 0: no projector
    projector: str  # linear or mlp
    frames: int  # rows of the embedding of frame numbers; 0: there is none


def sizes_of(state: Mapping[str, Tensor], kind: str) -> GatedSizes:
    """Sizes from the tensors by our names. UserError: no prompts or no gates, which every such file has."""
    gate = "gate1" if kind == LLAMA_VQA else "gate"
    found = {int(m[1]): n for n in state if (m := re.fullmatch(rf"layers\.(\d+)\.attention\.{gate}", n))}
    if not found:
        raise UserError(f"layers.0.attention.{gate}: missing; the gates tell how many blocks and heads LLaMA has.")
    heads = _shape(state, found[min(found)], 4)[1]
    rows, dim = _shape(state, "adapter_query.weight", 2)
    projector = "mlp" if any(name.startswith("visual_proj.0.") for name in state) else "linear"
    matrix = {"linear": "visual_proj.weight", "mlp": "visual_proj.0.weight"}[projector]
    has_projector = any(name.startswith("visual_proj.") for name in state)
    return GatedSizes(
        dim=dim,
        layers=1 + max(found),
        heads=heads,
        rows=rows,
        feature_dim=_shape(state, matrix, 2)[1] if has_projector else 0,
        projector=projector,
        frames=_shape(state, "temporal_emb.weight", 2)[0] if "temporal_emb.weight" in state else 0,
    )


def expected_shapes(sizes: GatedSizes, kind: str) -> dict[str, Shape]:
    """Name -> shape of every tensor of such sizes, in the order of the originals' files."""
    dim = sizes.dim
    shapes: dict[str, Shape] = {"adapter_query.weight": (sizes.rows, dim)}
    if sizes.feature_dim and sizes.projector == "linear":
        shapes["visual_proj.weight"] = (dim, sizes.feature_dim)
    elif sizes.feature_dim:
        shapes |= {"visual_proj.0.weight": (dim, sizes.feature_dim), "visual_proj.0.bias": (dim,)}
        shapes |= {"visual_proj.2.weight": (dim, dim), "visual_proj.2.bias": (dim,)}
    if sizes.frames:
        shapes["temporal_emb.weight"] = (sizes.frames, dim)
    for number in range(sizes.layers):
        for gate in ("gate1", "gate2") if kind == LLAMA_VQA else ("gate",):
            shapes[f"layers.{number}.attention.{gate}"] = (1, sizes.heads, 1, 1)
    return shapes


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> Shape:
    tensor = state.get(name)
    if tensor is None or tensor.ndim != dimensions:
        raise UserError(
            f"{name}: {'missing' if tensor is None else f'has shape {list(tensor.shape)}'}; it tells the sizes."
        )
    return tuple(tensor.shape)
