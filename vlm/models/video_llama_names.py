"""How Video-LLaMA, LLMVA-GEBC, LAVIS and transformers' BLIP-2 name their tensors, and how each name maps to ours.

Our names: `tower.vision.` + transformers' Blip2VisionModel, `tower.qformer.` + its Blip2QFormerModel,
`tower.query_tokens` (frozen); `llm.` + transformers' LlamaForCausalLM or OPTForCausalLM (frozen); what trains has the
published names, but inside a Q-Former (`video_Qformer.`, `other_feat_Qformer.`) those of Blip2QFormerModel.

Sources: Video-LLaMA (arXiv 2306.02858), LLMVA-GEBC (2306.10354), BLIP-2 (2301.12597) checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vlm.models.name_tables import Pairs, same, table, under
from vlm.types import UserError
from vlm.weights import rename

QFORMER: Pairs = (
    ("layernorm.{p}", "bert.embeddings.LayerNorm.{p}"),
    *under(
        "encoder.layer.{i}.",
        "bert.encoder.layer.{i}.",
        (
            ("attention.attention.{rest}", "attention.self.{rest}"),
            ("crossattention.attention.{rest}", "crossattention.self.{rest}"),
            *same("attention.output.{rest}", "crossattention.output.{rest}"),
            *same("intermediate_query.dense.{p}", "output_query.{rest}"),
        ),
    ),
)
"""A Q-Former without text, after `Qformer.` there."""

# their q_bias and v_bias are one qkv.bias here, with zeros for k: `_merge_bias` stands between
VISION: Pairs = (
    ("embeddings.patch_embedding.{p}", "visual_encoder.patch_embed.proj.{p}"),
    ("embeddings.class_embedding", "visual_encoder.cls_token"),
    ("embeddings.position_embedding", "visual_encoder.pos_embed"),
    *under(
        "encoder.layers.{i}.",
        "visual_encoder.blocks.{i}.",
        (
            ("layer_norm1.{p}", "norm1.{p}"),
            ("layer_norm2.{p}", "norm2.{p}"),
            ("self_attn.qkv.weight", "attn.qkv.weight"),
            ("self_attn.q_bias", "attn.q_bias"),
            ("self_attn.v_bias", "attn.v_bias"),
            ("self_attn.projection.{p}", "attn.proj.{p}"),
            *same("mlp.fc1.{p}", "mlp.fc2.{p}"),
        ),
    ),
    ("post_layernorm.{p}", "ln_vision.{p}"),
)
"""EVA ViT-g/14 with LAVIS' norm behind it."""

TOWER: Pairs = (
    *under("tower.vision.", "", VISION),
    *under("tower.qformer.", "Qformer.", QFORMER),
    ("tower.query_tokens", "query_tokens"),
)
"""The frozen part that sees, in LAVIS' and Video-LLaMA's files."""

BLIP2: Pairs = (
    ("tower.vision.{rest}", "vision_model.{rest}"),
    ("tower.qformer.{rest}", "qformer.{rest}"),
    ("tower.query_tokens", "query_tokens"),
)
"""The same in a Hugging Face BLIP-2 folder, whose language model and `language_projection` are no part of it."""

VIDEO: Pairs = (
    *same("video_query_tokens", "video_frame_position_embedding.weight"),
    *under("video_Qformer.", "video_Qformer.", QFORMER),
)
"""What both systems train."""

VIDEO_LLAMA: Pairs = (*VIDEO, *same("llama_proj.{p}"))
"""What Video-LLaMA trains (vision branch)."""

LLMVA: Pairs = (
    *VIDEO,
    *same("temporal_pos_trans.{p}", "temporal_pos_trans_norm.{p}", "opt_proj.{p}", "llama_project.{p}"),
    *same("other_feat_query_tokens", "other_feat_position_embedding.weight", "other_feat_linear.{p}"),
    *same("other_feat_temporal_pos_trans.{p}", "other_feat_temporal_pos_trans_norm.{p}"),
    *under("other_feat_Qformer.", "other_feat_Qformer.", QFORMER),
)
"""What LLMVA-GEBC trains; the form with a LLaMA has `llama_project` and none of `other_feat_`."""

LLM: Pairs = (("llm.{rest}", "llama_model.{rest}"), ("llm.{rest}", "opt_model.{rest}"))
"""The frozen language model; only the way to ours is unique."""

CONSTANTS = re.compile(r".*embeddings\.position_ids|.*rotary_emb\.inv_freq")
"""Buffers in published files that are worked out anew."""


def to_ours(state: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """Published tensors under our names, constants left out. UserError: unknown names, or half of a bias missing."""
    kept = {name: tensor for name, tensor in state.items() if not CONSTANTS.fullmatch(name)}
    names = rename(kept, table(pairs, to_ours=True))
    return merge_bias({names[name]: tensor for name, tensor in kept.items()})


def from_ours(state: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """The inverse of `to_ours`, to the bit, where the bias of k is zero."""
    split = split_bias(state) if any(theirs.endswith("attn.q_bias") for _, theirs in pairs) else dict(state)
    names = rename(split, table(pairs, to_ours=False))
    return {names[name]: tensor for name, tensor in split.items()}


def merge_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`self_attn.q_bias` and `.v_bias` (D,) -> `self_attn.qkv.bias` (3 D,), zeros for k."""
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem = name.removesuffix("q_bias").removesuffix("v_bias")
        if stem == name:
            merged[name] = tensor
        elif name == f"{stem}q_bias":
            value = state.get(f"{stem}v_bias")
            if value is None:
                raise UserError(f"{name} is there, {stem}v_bias is not: an incomplete file")
            merged[f"{stem}qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), value])
        elif f"{stem}q_bias" not in state:
            raise UserError(f"{name} is there, {stem}q_bias is not: an incomplete file")
    return merged


def split_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `merge_bias`. UserError: a bias of k that is not zero, which the published form cannot hold."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.endswith("self_attn.qkv.bias"):
            split[name] = tensor
            continue
        query, key, value = tensor.chunk(3)
        if key.any():
            raise UserError(f"{name}: the bias of k is not zero, and the published form has no place for it")
        stem = name.removesuffix("qkv.bias")
        split |= {f"{stem}q_bias": query.clone(), f"{stem}v_bias": value.clone()}
    return split
