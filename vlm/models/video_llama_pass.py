"""What Video-LLaMA's and LLMVA-GEBC's trained part, EVA and a Q-Former compute, for comparing two of their files.

Written from the published formulas with the published names, on plain tensors: it shares no code with the models here,
so that equal outputs say that names, merged biases and settings were understood. One block of EVA in fp32 at a time.

Letters: F frames, V videos, Q tokens of a frame, N queries, M tokens that are read, D width, E width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

Named = Mapping[str, Tensor]


def _linear(state: Named, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].float().T + state[f"{name}.bias"].float()


def _norm(state: Named, name: str, x: Tensor, epsilon: float) -> Tensor:
    return functional.layer_norm(
        x, x.shape[-1:], state[f"{name}.weight"].float(), state[f"{name}.bias"].float(), epsilon
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """(B, N, D), (B, M, D), (B, M, D) -> (B, N, D), without a mask."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


@torch.no_grad()
def eva(state: Named, frames: Tensor, heads: int) -> Tensor:
    """(F, 3, H, W) -> (F, 1 + patches, D): the last block's output. Names begin with `visual_encoder.`."""
    own = {name.removeprefix("visual_encoder."): t for name, t in state.items() if name.startswith("visual_encoder.")}
    weight = own["patch_embed.proj.weight"].float()
    size = weight.shape[-1]
    patches = functional.unfold(frames.float(), size, stride=size).transpose(1, 2)
    x = patches @ weight.flatten(1).T + own["patch_embed.proj.bias"].float()
    x = torch.cat([own["cls_token"].float().expand(len(x), -1, -1), x], 1) + own["pos_embed"].float()
    count = sum(name.endswith("attn.qkv.weight") for name in own)
    for number in range(count):
        block = {n.removeprefix(f"blocks.{number}."): t for n, t in own.items() if n.startswith(f"blocks.{number}.")}
        normed = _norm(block, "norm1", x, 1e-6)
        query, key, value = (normed @ block["attn.qkv.weight"].float().T).chunk(3, -1)
        query, value = query + block["attn.q_bias"].float(), value + block["attn.v_bias"].float()
        x = x + _linear(block, "attn.proj", _attend(query, key, value, heads))
        inner = functional.gelu(_linear(block, "mlp.fc1", _norm(block, "norm2", x, 1e-6)))
        x = x + _linear(block, "mlp.fc2", inner)
    return x


@torch.no_grad()
def ln_vision(state: Named, x: Tensor) -> Tensor:
    """LAVIS' norm behind EVA."""
    return _norm(state, "ln_vision", x, 1e-5)


@torch.no_grad()
def q_former(state: Named, name: str, queries: Tensor, memory: Tensor, heads: int) -> Tensor:
    """(B, N, D) queries and (B, M, width of memory) -> (B, N, D). Names begin with `name`.bert."""
    start = f"{name}.bert."
    own = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
    x = _norm(own, "embeddings.LayerNorm", queries, 1e-12)
    number = 0
    while any(n.startswith(f"encoder.layer.{number}.") for n in own):
        layer = {n.split(".", 3)[3]: t for n, t in own.items() if n.startswith(f"encoder.layer.{number}.")}
        for part in ("attention", "crossattention"):
            if f"{part}.self.query.weight" in layer:
                read = memory if part == "crossattention" else x
                query = _linear(layer, f"{part}.self.query", x)
                key, value = (_linear(layer, f"{part}.self.{role}", read) for role in ("key", "value"))
                made = _linear(layer, f"{part}.output.dense", _attend(query, key, value, heads))
                x = _norm(layer, f"{part}.output.LayerNorm", made + x, 1e-12)
        inner = functional.gelu(_linear(layer, "intermediate_query.dense", x))
        x = _norm(layer, "output_query.LayerNorm", _linear(layer, "output_query.dense", inner) + x, 1e-12)
        number += 1
    return x


@torch.no_grad()
def video_tokens(
    state: Named, frames: Tensor, heads: int, boundary: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """Tokens of one video's frames (F, Q, D) -> (1, N, width of the language model).

    Args:
        boundary: (2,) of LLMVA-GEBC: where it is, how long its surroundings are.
        other: (L, other_dim) other features of LLMVA-GEBC.
    """
    numbered = frames.float() + state["video_frame_position_embedding.weight"][: len(frames), None].float()
    memory = numbered.flatten(0, 1)[None]
    queries = state["video_query_tokens"].float()
    place = None if boundary is None else _place(boundary, queries.shape[-1])
    if place is not None:
        queries = queries + _norm(state, "temporal_pos_trans_norm", _linear(state, "temporal_pos_trans", place), 1e-5)
    made = [q_former(state, "video_Qformer", queries, memory, heads)]
    if other is not None:
        assert place is not None
        numbers = state["other_feat_position_embedding.weight"][: len(other)].float()
        memory = (_linear(state, "other_feat_linear", other.float()) + numbers)[None]
        where = _linear(state, "other_feat_temporal_pos_trans", place)
        queries = state["other_feat_query_tokens"].float() + _norm(
            state, "other_feat_temporal_pos_trans_norm", where, 1e-5
        )
        made.append(q_former(state, "other_feat_Qformer", queries, memory, heads))
    projection = next(n for n in ("llama_proj", "opt_proj", "llama_project") if f"{n}.weight" in state)
    return _linear(state, projection, torch.cat(made, 1))


def _place(boundary: Tensor, width: int) -> Tensor:
    """(2,) -> (1, 1, width): sines at even places, cosines at odd ones, of either number in turn."""
    halves = []
    for number in boundary.double().sigmoid().tolist():
        for k in range(width // 2):
            angle = number * 2 * math.pi / 10000 ** (2 * (k // 2) / (width // 2))
            halves.append(math.sin(angle) if k % 2 == 0 else math.cos(angle))
    return torch.tensor(halves, dtype=torch.float64).float()[None, None]
