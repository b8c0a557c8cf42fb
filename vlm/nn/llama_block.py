"""Frozen LLaMA layers as a bidirectional visual encoder (arXiv 2310.12973, section 3: "Frozen transformers").

transformers' LlamaDecoderLayer without what belongs to text: no rotary embedding (cosine 1, sine 0), no causal mask, no
padding mask, no cache. The weights never train; gradients flow through them.

Quirk of the original, kept as the default: the RMSNorm that ends LLaMA follows the layers here too, but its weight is
all ones and is never loaded from the checkpoint. `norm_tensor` finds LLaMA's own weight for those who want it.

Letters: B batch, N tokens, D width of LLaMA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from vlm.nn.attention import attention
from vlm.types import UserError
from vlm.weights import META_LAYER_TABLE, Loader, diff_keys, rename

_LAYER = re.compile(r"(?:model\.|llama\.)?layers\.(\d+)\.(.+)")
_NORM = ("norm.weight", "model.norm.weight")
# Tables of the rotary embedding: constants, and not used here.
_ROTARY = re.compile(r"attention\.inner_attention\.rope\.freqs|self_attn\.rotary_emb\.inv_freq")


def hidden_size(dim: int, multiple_of: int) -> int:
    """Width of LLaMA's feed-forward part: int(2 * 4 dim / 3) rounded up to a multiple (dim 4096, 256 -> 11008)."""
    return -(-int(2 * (4 * dim) / 3) // multiple_of) * multiple_of


def _attention_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """`vlm.nn.attention` in the form transformers calls: (B, heads, N, head_dim) in, (B, N, heads, head_dim) out."""
    assert attention_mask is None
    # under autocast the rotary step leaves q and k in another precision than v
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = attention(query, key, value, dropout=dropout, causal=bool(module.is_causal), scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("vlm", _attention_for_transformers)


class FrozenLlama(nn.Module):
    """LLaMA layers one after the other, then RMSNorm; no parameter trains.

    Built without weights (on the meta device): `load` or `randomize` fills it. `dtype` is how weights are stored;
    inputs are cast to it and the output is fp32. bf16 halves the memory, fp32 is what the original computes with.
    """

    def __init__(
        self, *, dim: int, heads: int, num_layers: int, multiple_of: int, norm_eps: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=dim,
            intermediate_size=hidden_size(dim, multiple_of),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_hidden_layers=num_layers,
            rms_norm_eps=norm_eps,
        )
        config._attn_implementation = "vlm"
        self.dim, self.head_dim = dim, dim // heads
        with torch.device("meta"):
            layers = [LlamaDecoderLayer(config, number) for number in range(num_layers)]
            self.layers = nn.ModuleList(layers)
            self.norm = LlamaRMSNorm(dim, eps=norm_eps)
        for layer in layers:
            layer.self_attn.is_causal = False
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) any float -> (B, N, D) fp32."""
        x = x.to(self.norm.weight.dtype)
        cosine = torch.ones(1, 1, self.head_dim, dtype=x.dtype, device=x.device)
        for layer in self.layers:
            x = layer(x, position_embeddings=(cosine, torch.zeros_like(cosine)))
        return self.norm(x).float()

    def load(self, tensors: Mapping[str, Tensor], source: str, norm: Tensor | None = None) -> None:
        """Fill the layers, strictly: every tensor must be there, by the module's own names, and nothing else.

        Args:
            tensors: `layers.{j}.self_attn.q_proj.weight` …, j from 0, as `select_layers` gives; any dtype.
            source: what error messages call the weights.
            norm: (D,) weight of the final RMSNorm; None: ones, as in the original.
        Raises:
            UserError: names or shapes differ.
        """
        want = {name: value for name, value in self.state_dict().items() if name != "norm.weight"}
        diff_keys(tensors, want).require(f"{source}: frozen LLaMA layers of width {self.dim}")
        self._fill({**tensors, "norm.weight": torch.ones(self.dim, device="cpu") if norm is None else norm})

    def randomize(self, seed: int) -> None:
        """Fill with random weights that depend on `seed` alone: matrices uniform ±1/sqrt(fan-in), norms ones."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, value in self.state_dict().items():
            tensors[name] = filled = torch.ones(value.shape, device="cpu")
            if value.ndim == 2:
                bound = value.shape[1] ** -0.5
                filled.uniform_(-bound, bound, generator=generator)
        self._fill(tensors)

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        # a copy, never a view of the file that the tensors may be mapped from
        stored = {name: value.to(dtype=self.norm.weight.dtype, copy=True) for name, value in tensors.items()}
        self.load_state_dict(stored, assign=True)

    def flops(self, num_tokens: int) -> tuple[float, float]:
        """Forward FLOPs for one clip of N tokens: (products with frozen weights, scores and their use)."""
        weights = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))
        return 2.0 * num_tokens * weights, 4.0 * num_tokens**2 * self.dim * len(self.layers)


def select_layers(
    tensors: Mapping[str, Tensor | Loader], first_layer: int, num_layers: int, source: str
) -> dict[str, Tensor]:
    """`num_layers` layers of a LLaMA checkpoint from `first_layer` on, renamed to what `FrozenLlama.load` takes.

    Args:
        tensors: Meta's names (`layers.15.attention.wq.weight`) or transformers'
            (`model.layers.15.self_attn.q_proj.weight`) -> tensors, or functions that read them (vlm.weights).
            transformers renumbers the rows of q and k inside each head for its rotary embedding; without one, the
            order makes no difference, so both serve as they are.
        source: what error messages call the checkpoint.
    Raises:
        UserError: a layer or one of its tensors is missing, or a tensor in it is not LLaMA's.
    """
    ours = {name: name for _, name in META_LAYER_TABLE}
    table = (*META_LAYER_TABLE, *((re.escape(name), name) for name in ours))
    present = [(int(match[1]), match[2], name) for name in tensors if (match := _LAYER.fullmatch(name))]
    held = sorted({number for number, _, _ in present})
    selected: dict[str, Tensor] = {}
    for j in range(num_layers):
        number = first_layer + j
        inside = {part: name for at, part, name in present if at == number and not _ROTARY.fullmatch(part)}
        if not inside:
            what = f"layers {held[0]} to {held[-1]}" if held else "no LLaMA layers"
            raise UserError(
                f"{source}: layer {number} (counted from 0) was asked for, but it holds {what}. Mend: choose another "
                "model.llama.layer, or give the folder of the whole model as model.llama.path."
            )
        renamed = {new: inside[old] for old, new in rename(inside, table).items()}
        diff_keys(dict.fromkeys(renamed, ()), dict.fromkeys(ours, ())).require(f"{source}, layer {number}")
        for part in ours:
            selected[f"layers.{j}.{part}"] = _read(tensors[renamed[part]])
    return selected


def norm_tensor(tensors: Mapping[str, Tensor | Loader], source: str) -> Tensor:
    """LLaMA's own final RMSNorm weight, (D,). UserError where the checkpoint has none."""
    for name in _NORM:
        if name in tensors:
            return _read(tensors[name])
    raise UserError(f"{source}: has no {' or '.join(_NORM)}. Mend: set model.llama.final_norm=ones.")


def _read(value: Tensor | Loader) -> Tensor:
    return value if isinstance(value, Tensor) else value()
