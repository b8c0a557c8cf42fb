"""Released-looking files of Video-LLaMA, LLMVA-GEBC, MiniGPT-4, LAVIS and BLIP-2, for the tests of the converter.

Names are written out here as the originals have them, not made by our tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration

QUERY, HIDDEN, SEEN, LLM = 24, 40, 16, 32  # widths: of Q-Formers, of their feed-forward part, of EVA, of the LLM
QUERY_HEADS, SEEN_HEADS = 3, 2
FRAMES, TOKENS, OTHER, WORDS = 5, 4, 3, 12

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def q_former(name: str, layers: int, every: int, memory: int, text: bool = False) -> Shapes:
    shapes = _norm(f"{name}.bert.embeddings.LayerNorm", QUERY)
    if text:
        shapes[f"{name}.bert.embeddings.word_embeddings.weight"] = (WORDS, QUERY)
    for number in range(layers):
        stem = f"{name}.bert.encoder.layer.{number}."
        for part, width in (("attention", QUERY), *([("crossattention", memory)] * (number % every == 0))):
            shapes |= _linear(f"{stem}{part}.self.query", QUERY, QUERY)
            shapes |= _linear(f"{stem}{part}.self.key", QUERY, width) | _linear(
                f"{stem}{part}.self.value", QUERY, width
            )
            shapes |= _linear(f"{stem}{part}.output.dense", QUERY, QUERY)
            shapes |= _norm(f"{stem}{part}.output.LayerNorm", QUERY)
        for end in ("_query", *([""] * text)):
            shapes |= _linear(f"{stem}intermediate{end}.dense", HIDDEN, QUERY)
            shapes |= _linear(f"{stem}output{end}.dense", QUERY, HIDDEN) | _norm(f"{stem}output{end}.LayerNorm", QUERY)
    return shapes


def eva(blocks: int, prefix: str = "") -> Shapes:
    shapes: Shapes = {"cls_token": (1, 1, SEEN), "pos_embed": (1, 5, SEEN)}
    shapes |= {"patch_embed.proj.weight": (SEEN, 3, 2, 2), "patch_embed.proj.bias": (SEEN,)}
    for number in range(blocks):
        stem = f"blocks.{number}."
        shapes |= _norm(f"{stem}norm1", SEEN) | {f"{stem}attn.q_bias": (SEEN,), f"{stem}attn.v_bias": (SEEN,)}
        shapes |= {f"{stem}attn.qkv.weight": (3 * SEEN, SEEN)} | _linear(f"{stem}attn.proj", SEEN, SEEN)
        shapes |= _norm(f"{stem}norm2", SEEN)
        shapes |= _linear(f"{stem}mlp.fc1", 20, SEEN) | _linear(f"{stem}mlp.fc2", SEEN, 20)
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def video(queries: str = "video_query_tokens") -> Shapes:
    shapes = {queries: (1, TOKENS, QUERY), "video_frame_position_embedding.weight": (FRAMES, QUERY)}
    return shapes | q_former("video_Qformer", 2, 1, QUERY)


def video_llama(width: int = LLM) -> Shapes:
    return video() | _linear("llama_proj", width, QUERY)


def llmva(projection: str = "opt_proj", other: bool = True) -> Shapes:
    shapes = video() | _linear("temporal_pos_trans", QUERY, QUERY) | _norm("temporal_pos_trans_norm", QUERY)
    if other:
        shapes |= {"other_feat_query_tokens": (1, OTHER, QUERY), "other_feat_position_embedding.weight": (9, QUERY)}
        shapes |= _linear("other_feat_linear", QUERY, 10)
        shapes |= _linear("other_feat_temporal_pos_trans", QUERY, QUERY)
        shapes |= _norm("other_feat_temporal_pos_trans_norm", QUERY) | q_former("other_feat_Qformer", 2, 1, QUERY)
    return shapes | _linear(projection, LLM, QUERY)


def random(shapes: Shapes, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def positions(*formers: str) -> dict[str, Tensor]:
    """Buffers that the originals' filter of frozen parameters lets through."""
    return {f"{name}.bert.embeddings.position_ids": torch.arange(7)[None] for name in formers}


def rotary(layers: int) -> dict[str, Tensor]:
    table = 10000.0 ** -(torch.arange(4) / 4)
    return {f"llama_model.model.layers.{n}.self_attn.rotary_emb.inv_freq": table.half() for n in range(layers)}


def released(path: Path, state: dict[str, Tensor], llm: str = "ckpt/vicuna-7b", **changes: Any) -> dict[str, Any]:
    """A file as their runner saves it; its content."""
    content = {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "config": {"model": {"arch": "video_llama", "llama_model": llm, "end_sym": "###"}, "run": {"seed": 42}},
        "scaler": {"scale": 65536.0, "growth_interval": 2000},
        "epoch": 4,
        **changes,
    }
    torch.save(content, path)
    return content


def blip2_folder(path: Path, layers: int = 3, max_shard_size: str = "5GB", key_bias: bool = False) -> Path:
    """A tiny BLIP-2 as transformers saves it, with a language model. `key_bias`: as after training its EVA."""
    vision = {"hidden_size": SEEN, "intermediate_size": 20, "num_hidden_layers": layers, "image_size": 4}
    former = {"hidden_size": QUERY, "intermediate_size": HIDDEN, "num_hidden_layers": 4, "encoder_hidden_size": SEEN}
    text = {"model_type": "opt", "hidden_size": LLM, "ffn_dim": 40, "num_hidden_layers": 1, "vocab_size": 30}
    config = Blip2Config(
        vision_config={**vision, "num_attention_heads": SEEN_HEADS, "patch_size": 2},
        qformer_config={**former, "num_attention_heads": QUERY_HEADS, "vocab_size": 30, "max_position_embeddings": 8},
        text_config={**text, "num_attention_heads": 2, "word_embed_proj_dim": LLM, "max_position_embeddings": 16},
        num_query_tokens=TOKENS,
    )
    model = Blip2ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("language_model."):
                value.copy_(torch.randn(value.shape, generator=generator))
            if name.endswith("self_attn.qkv.bias") and not key_bias:
                value[SEEN : 2 * SEEN] = 0
    model.save_pretrained(path, max_shard_size=max_shard_size)
    (path / "preprocessor_config.json").write_text("{}")
    return path
