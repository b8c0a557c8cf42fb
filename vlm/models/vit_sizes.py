"""Sizes of ViT-family models as the shapes of their tensors tell them, the shapes such sizes ask for, and config.json.

Names are ours (`vlm/models/published.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm.models.published import LLAMA_LAYER_NAMES, PRETRAIN, VIT_LLAMA
from vlm.types import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the tensors' shapes tell of a model; 0 where its kind has no such part."""

    width: int
    depth: int
    mlp_width: int
    channels: int
    tubelet: int
    patch: int
    num_classes: int = 0
    qv_bias: bool = True
    layer_scale: bool = False  # gamma_1, gamma_2; Hugging Face's classes have no such thing
    pooled: bool = True  # fc_norm over the mean of tokens; else norm over all, as masked pretraining has it
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_mlp_width: int = 0
    decoder_output: int = 0
    llama_width: int = 0
    llama_hidden: int = 0
    llama_layers: int = 0


def sizes_of(state: Mapping[str, Tensor], kind: str) -> Sizes:
    """Sizes of a model from its tensors by our names. UserError: a tensor that every such model has is not there."""
    stem = "encoder." if kind == PRETRAIN else ""
    width, channels, tubelet, patch, _ = _shape(state, f"{stem}patch_embed.proj.weight", 5)
    facts: dict[str, Any] = {
        "width": width, "channels": channels, "tubelet": tubelet, "patch": patch,
        "depth": _count(state, f"{stem}blocks."), "mlp_width": _shape(state, f"{stem}blocks.0.mlp.fc1.weight", 2)[0],
    }  # fmt: skip
    facts["qv_bias"] = f"{stem}blocks.0.attn.q_bias" in state
    facts["layer_scale"] = f"{stem}blocks.0.gamma_1" in state
    if kind == PRETRAIN:
        output, decoder_width = _shape(state, "decoder.head.weight", 2)
        facts |= {
            "pooled": False, "decoder_width": decoder_width, "decoder_output": output,
            "decoder_depth": _count(state, "decoder.blocks."),
            "decoder_mlp_width": _shape(state, "decoder.blocks.0.mlp.fc1.weight", 2)[0],
        }  # fmt: skip
    else:
        facts |= {"num_classes": _shape(state, "head.weight", 2)[0], "pooled": "norm.weight" not in state}
    if kind == VIT_LLAMA:
        facts["llama_width"] = _shape(state, "llama_dim_mapper1.weight", 2)[0]
        facts["llama_layers"] = _count(state, "llama.layers.")
        if facts["llama_layers"]:
            facts["llama_hidden"] = _shape(state, "llama.layers.0.mlp.gate_proj.weight", 2)[0]
    return Sizes(**facts)


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    tensor = state.get(name)
    if tensor is None or tensor.ndim != dimensions:
        raise UserError(
            f"{name}: {'missing' if tensor is None else f'has shape {list(tensor.shape)}'}; it tells the sizes."
        )
    return tuple(tensor.shape)


def _count(state: Mapping[str, Tensor], stem: str) -> int:
    return 1 + max((int(name[len(stem) :].split(".")[0]) for name in state if name.startswith(stem)), default=-1)


def expected_shapes(sizes: Sizes, kind: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model of these sizes, by our names, in the models' own order."""
    stem = "encoder." if kind == PRETRAIN else ""
    patches = (sizes.width, sizes.channels, sizes.tubelet, sizes.patch, sizes.patch)
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, sizes.decoder_width)} if kind == PRETRAIN else {}
    shapes |= {f"{stem}patch_embed.proj.weight": patches, f"{stem}patch_embed.proj.bias": (sizes.width,)}
    shapes |= _block_shapes(f"{stem}blocks.", sizes.depth, sizes.width, sizes.mlp_width, sizes)
    shapes |= _norm(f"{stem}{'fc_norm' if sizes.pooled else 'norm'}", sizes.width)
    if kind == PRETRAIN:
        shapes |= _block_shapes(
            "decoder.blocks.", sizes.decoder_depth, sizes.decoder_width, sizes.decoder_mlp_width, sizes
        )
        shapes |= _norm("decoder.norm", sizes.decoder_width)
        shapes |= _linear("decoder.head", sizes.decoder_output, sizes.decoder_width)
        shapes["encoder_to_decoder.weight"] = (sizes.decoder_width, sizes.width)
        return shapes
    shapes |= _linear("head", sizes.num_classes, sizes.width)
    if kind == VIT_LLAMA:
        for number in range(sizes.llama_layers):
            shapes |= llama_layer_shapes(f"llama.layers.{number}.", sizes.llama_width, sizes.llama_hidden)
        shapes |= {"llama.norm.weight": (sizes.llama_width,)} if sizes.llama_layers else {}
        shapes["llama_dim_mapper1.weight"] = (sizes.llama_width, sizes.width)
        shapes["llama_dim_mapper2.weight"] = (sizes.width, sizes.llama_width)
    return shapes


def llama_layer_shapes(stem: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one LLaMA layer without grouped queries."""
    square, up, down, vector = (width, width), (hidden, width), (width, hidden), (width,)
    by_name = {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    return {
        f"{stem}{n}": vector if "norm" in n else by_name.get(n.removesuffix(".weight"), square)
        for n in LLAMA_LAYER_NAMES
    }


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _block_shapes(stem: str, depth: int, width: int, mlp_width: int, like: Sizes) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(depth):
        block = f"{stem}{number}."
        shapes |= {f"{block}gamma_1": (width,), f"{block}gamma_2": (width,)} if like.layer_scale else {}
        shapes |= _norm(f"{block}norm1", width)
        shapes |= {f"{block}attn.q_bias": (width,), f"{block}attn.v_bias": (width,)} if like.qv_bias else {}
        shapes |= {f"{block}attn.qkv.weight": (3 * width, width), **_linear(f"{block}attn.proj", width, width)}
        shapes |= _norm(f"{block}norm2", width)
        shapes |= _linear(f"{block}mlp.fc1", mlp_width, width) | _linear(f"{block}mlp.fc2", width, mlp_width)
    return shapes


_STANDARD_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}  # ViT-S, B, L, H
_STANDARD_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
_STANDARD_DEPTHS = {384: 12, 768: 12, 1024: 24, 1280: 32}


def standard_heads(sizes: Sizes) -> tuple[int | None, int | None]:
    """Attention heads of encoder and decoder in the published models of this width; None: not a published width."""
    return _STANDARD_HEADS.get(sizes.width), _STANDARD_DECODER_HEADS.get(sizes.decoder_width)


def unusual_depth(sizes: Sizes) -> str | None:
    """A sentence when the depth is not the published one for this width (a cut file shows so), else None."""
    usual = _STANDARD_DEPTHS.get(sizes.width)
    if usual in (None, sizes.depth):
        return None
    return f"{sizes.depth} blocks, where every published model of width {sizes.width} has {usual}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What tensors do not tell and config.json wants."""

    num_heads: int
    decoder_heads: int | None = None
    image_size: int = 224
    num_frames: int = 16
    norm_pix_loss: bool = True


def hf_config(sizes: Sizes, kind: str, settings: Settings) -> dict[str, Any]:
    """config.json of a Hugging Face folder: transformers' `VideoMAEConfig` (and what is ours, for ViT-LLaMA).

    LayerNorm's eps is 1e-6 in the originals and here; transformers applies the config's value everywhere but in
    `fc_norm` and `decoder.norm`, which keep torch's 1e-5 whatever the file says.
    """
    config: dict[str, Any] = {
        "architectures": ["VideoMAEForPreTraining" if kind == PRETRAIN else "VideoMAEForVideoClassification"],
        "model_type": "videomae",
        "image_size": settings.image_size, "patch_size": sizes.patch, "num_channels": sizes.channels,
        "num_frames": settings.num_frames, "tubelet_size": sizes.tubelet,
        "hidden_size": sizes.width, "num_hidden_layers": sizes.depth, "num_attention_heads": settings.num_heads,
        "intermediate_size": sizes.mlp_width, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-06,
        "qv_bias": sizes.qv_bias, "use_mean_pooling": sizes.pooled,
    }  # fmt: skip
    if kind == PRETRAIN:
        return config | {
            "decoder_hidden_size": sizes.decoder_width, "decoder_num_hidden_layers": sizes.decoder_depth,
            "decoder_num_attention_heads": settings.decoder_heads, "decoder_intermediate_size": sizes.decoder_mlp_width,
            "norm_pix_loss": settings.norm_pix_loss,
        }  # fmt: skip
    labels = {str(index): f"LABEL_{index}" for index in range(sizes.num_classes)}
    config |= {"id2label": labels, "label2id": {name: int(index) for index, name in labels.items()}}
    if kind == VIT_LLAMA:  # no such class in transformers: the folder is for reading by name
        config |= {
            "architectures": ["ViTLlama"], "model_type": "vit_llama", "llama_hidden_size": sizes.llama_width,
            "llama_intermediate_size": sizes.llama_hidden, "llama_num_layers": sizes.llama_layers,
        }  # fmt: skip
    return config
