"""A frozen LLaMA's blocks with less to do: the last one works only where its output is read.

transformers' own layers, names and numbers; what differs:

* `Wanted`: the last block's queries, output projection and feed-forward part run at the places that are read (a loss
  reads 4 of some 90 tokens); its keys and values need all places. Exact, and a good part of a block saved.
* `Additions`: a vector of a row's video is added to what each block gives (vlm.models.video_chatgpt).
* RMSNorm and the rotary embedding have backward passes of their own, with a third of autograd's passes over memory;
  RMSNorm's is used while its weight is frozen.
* A block works in the precision of its own weights, so that trained fp32 blocks may stand among frozen bf16 ones.

Letters: S tokens, Z places that are read, H heads, G key heads, E width of a head, D width, V videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm

from vlm.nn.language import ATTENTION, Wanted, blocks_of, causal_attention


def use_lean_layers(model: PreTrainedModel) -> None:
    """Put these layers in the place of a LLaMA's own. Call it before there are weights (meta device)."""
    config: Any = model.config
    body: Any = model.base_model
    body.layers = nn.ModuleList(LeanLayer(config, number) for number in range(config.num_hidden_layers))
    body.norm = LeanNorm(config.hidden_size, config.rms_norm_eps)


def can_narrow(model: PreTrainedModel) -> bool:
    """Whether the model's last block takes `wanted`."""
    return isinstance(blocks_of(model)[-1], LeanLayer)


def last_block_savings(model: PreTrainedModel) -> int:
    """Weights of the last block's linear maps that a narrowed pass uses at the places that are read alone."""
    body: Any = model.base_model
    layer = body.layers[-1]
    used_everywhere = (layer.self_attn.k_proj, layer.self_attn.v_proj)
    linear = [m for m in layer.modules() if isinstance(m, nn.Linear) and m not in used_everywhere]
    return sum(m.in_features * m.out_features for m in linear)


class Additions(NamedTuple):
    """What blocks add to what they give: to all tokens of a row the vector of the row's video."""

    vectors: Tensor  # (J, V, D): block number i adds those of min(i, J - 1)
    shares: Tensor  # (S, V) of packed tokens, or (B, V) of a batch's rows: 1 where its row has this video, else 0
    packed: bool = True

    def in_batch(self, lengths: Sequence[int]) -> Additions:
        """The same for packed rows of these lengths that become rows of a batch, alone."""
        starts = [0]
        for length in lengths[:-1]:
            starts.append(starts[-1] + length)
        return self._replace(shares=self.shares[starts], packed=False)

    def to(self, hidden: Tensor, number: int, places: Tensor | None) -> Tensor:
        """What block `number` gives, (1, S, D), (1, Z, D) at `places` (Z,) or (B * beams, L, D), with the additions."""
        vectors = self.vectors[min(number, len(self.vectors) - 1)].to(hidden.dtype)
        # a product, since its backward pass sums in one order on every device, unlike that of picking rows
        added = self.shares.to(hidden.dtype) @ vectors
        if self.packed:
            return hidden + (added if places is None else added[places])
        return hidden + added.repeat_interleave(len(hidden) // len(added), dim=0)[:, None]


class LeanLayer(LlamaDecoderLayer):
    """A block; as the last one it returns only the places that are wanted."""

    def __init__(self, config: LlamaConfig, number: int) -> None:
        super().__init__(config, number)
        self.self_attn = LeanAttention(config, number)
        self.input_layernorm = LeanNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LeanNorm(config.hidden_size, config.rms_norm_eps)
        self.number = number
        self.is_last = number == config.num_hidden_layers - 1

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        wanted: Wanted | None = None,
        additions: Additions | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(1, S, D) -> (1, S, D), or (1, Z, D) from the last block where `wanted` is given."""
        dtype = self.input_layernorm.weight.dtype
        hidden_states = hidden_states.to(dtype)
        if position_embeddings is not None:
            cosines, sines = position_embeddings
            kwargs["position_embeddings"] = (cosines.to(dtype), sines.to(dtype))
        places = None
        if wanted is None or not self.is_last:
            hidden = super().forward(hidden_states, *args, **kwargs)
        else:
            places = wanted.places
            mixed, _ = self.self_attn(self.input_layernorm(hidden_states), *args, wanted=wanted, **kwargs)
            hidden = hidden_states[:, places] + mixed
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden if additions is None else additions.to(hidden, self.number, places)


class LeanAttention(LlamaAttention):
    """Attention with `causal_attention`; another implementation in the config, or a cache, runs transformers' code."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        wanted: Wanted | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D), or (1, Z, D) where `wanted` is given; None for the weights."""
        if past_key_values is not None or self.config._attn_implementation != ATTENTION:
            assert wanted is None
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        assert position_embeddings is not None
        cosines, sines = position_embeddings
        asking = hidden_states if wanted is None else hidden_states[:, wanted.places]
        at = slice(None) if wanted is None else wanted.places
        query = rotate(self._heads(self.q_proj(asking)), cosines[:, at], sines[:, at])
        key = rotate(self._heads(self.k_proj(hidden_states)), cosines, sines)
        value = self._heads(self.v_proj(hidden_states))
        mixed, _ = causal_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=float(self.attention_dropout or 0) if self.training else 0.0,
            scaling=self.scaling,
            wanted=wanted,
            **kwargs,
        )
        return self.o_proj(mixed.flatten(2)), None

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, heads * E) -> (B, heads, S, E)."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class LeanNorm(LlamaRMSNorm):
    """RMSNorm, worked out in fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype times the weight's."""
        if self.weight.requires_grad:
            return super().forward(hidden_states)
        return _FrozenNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square().div(x.shape[-1]).add(epsilon).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        wide, gradient = x.float(), (gradients[0] * weight).float()
        along = torch.linalg.vecdot(gradient, wide).unsqueeze(-1) * scale.pow(3) / -x.shape[-1]
        return gradient.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, S, E) by cosines and sines (B, S, E), both halves of which are equal."""
    return _Rotation.apply(x, cosines[:, None], sines[:, None])


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turn(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turn(gradients[0], cosines, -sines), None, None


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cosines
    out[..., :half].addcmul_(x[..., half:], sines[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sines[..., half:])
    return out
