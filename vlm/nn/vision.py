"""Parts of a video ViT: cubes to tokens, the fixed sine table, stochastic depth, the pre-norm block.

Written from VideoMAE (arXiv 2203.12602) and, for the attention with a bias on q and v but none on k, BEiT
(arXiv 2106.08254). Parameter names are those of the released VideoMAE weights.

Letters: B batch, C channels, T frames, H height, W width, N tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlm.nn.attention import attention


class PatchEmbed(nn.Module):
    """A clip cut into cubes, each mapped to one token by a linear map (written as a convolution without overlap)."""

    def __init__(self, *, image_size: int, patch_size: int, tubelet_size: int, num_frames: int, dim: int) -> None:
        super().__init__()
        self.input_shape = (3, num_frames, image_size, image_size)
        cube = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, kernel_size=cube, stride=cube)

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, N, D); token index = t * (H/p * W/p) + h * (W/p) + w, counted in cubes.

        Raises:
            ValueError: the clip is not of the size that the model was made for.
        """
        if tuple(video.shape[1:]) != self.input_shape:
            raise ValueError(
                f"a clip of shape {tuple(video.shape[1:])} (channels, frames, height, width) reached a model made for "
                f"{self.input_shape}: the fixed position table has one row for each of its tokens; set the recipe's "
                "clips and model to the same num_frames and size"
            )
        return self.proj(video.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


@lru_cache(maxsize=16)
def sinusoid_table(num_tokens: int, dim: int, device: torch.device) -> Tensor:
    """The fixed position table over the flat token index, (1, N, D) fp32 ("Attention is all you need", section 3.5).

    angle(p, j) = p / 10000^(2 floor(j/2) / D); sine in even columns, cosine in odd ones. Worked out in float64. It is
    no parameter and no buffer: it belongs to no checkpoint and no precision.
    """
    columns = np.arange(dim)
    angles = np.arange(num_tokens)[:, None] / np.power(10000.0, 2 * (columns // 2) / dim)
    table = np.where(columns % 2 == 0, np.sin(angles), np.cos(angles))
    with torch.inference_mode(False):  # the cached table must also serve training
        return torch.tensor(table[None], dtype=torch.float32, device=device)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch for whole samples, scales the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> (B, …)."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device).add(keep).floor()
        return x * (mask / keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Attention(nn.Module):
    """Self-attention over all tokens; q and v have a bias, k has none (its bias would cancel in the softmax)."""

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]).to(qkv.dtype)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, dropout=self.attention_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))


class Mlp(nn.Module):
    """Linear, GELU (exact), Linear, dropout."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.drop(self.fc2(functional.gelu(self.fc1(x))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch with stochastic depth and an optional scale."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim)) if init_values > 0 else None
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim)) if init_values > 0 else None
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, qkv_bias=qkv_bias, attention_dropout=attention_dropout, dropout=dropout)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        attended = self.attn(self.norm1(x))
        x = x + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        mixed = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed if self.gamma_2 is None else self.gamma_2 * mixed)


def make_blocks(depth: int, dim: int, heads: int, *, drop_path: float = 0.0, **settings: float) -> nn.ModuleList:
    """`depth` blocks whose stochastic depth grows linearly from 0 to `drop_path`; `settings` as `Block`."""
    rates = np.linspace(0.0, drop_path, depth).tolist()
    return nn.ModuleList([Block(dim, heads, drop_path=rate, **settings) for rate in rates])  # type: ignore[arg-type]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *, recompute: bool) -> Tensor:
    """Blocks one after the other, (B, N, D) -> (B, N, D).

    `recompute`: keep only each block's input and work the rest out again in the backward pass (non-reentrant: the
    reentrant kind turns gradients off in silence where the input needs none).
    """
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
    return x


def block_flops(num_tokens: int, dim: int, mlp_ratio: float) -> float:
    """Forward FLOPs of one block on one clip (2 a multiply-add): its four matrices, and scores and their use."""
    return 2.0 * num_tokens * dim * dim * (4 + 2 * mlp_ratio) + 4.0 * num_tokens**2 * dim


def init_truncated_normal(module: nn.Module, std: float = 0.02) -> None:
    """VideoMAE's fine-tuning initialisation of one module, for `Module.apply`.

    Linear weights normal(0, std) cut at ±2 (absolute, so hardly cut at all), biases 0; LayerNorm is 1 and 0 as built;
    convolutions keep torch's own.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std, a=-2.0, b=2.0)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_xavier(module: nn.Module) -> None:
    """VideoMAE's pretraining initialisation of one module, for `Module.apply`: Linear Xavier uniform, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
