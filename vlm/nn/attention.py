"""The one place that chooses an attention kernel.

`attention` runs FlashAttention where it is installed and the tensors are half precision on CUDA, else torch's
scaled_dot_product_attention; `choose_attention` probes at start-up that the kernel to be used agrees with `reference`
and falls back to the next one if it does not. Nothing else in the project imports flash_attn.

FlashAttention: Dao et al., arXiv 2205.14135. Letters: B batch, heads, N tokens, head_dim width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

# Largest difference of a probe's output, and of its gradients, from the reference (fp32 maths on the same inputs), seen
# as a share of the largest reference value; several times what the kernels' rounding gives.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Kernels that a probe has refused, with the precision in which it did.
_refused: set[tuple[str, torch.dtype]] = set()


class AttentionChoice(NamedTuple):
    """Which kernel a run uses, and the sentence that says so in its log."""

    name: str  # flash | sdpa | reference
    sentence: str


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale) v by the best kernel for these tensors.

    Args:
        q: (B, heads, N, head_dim).
        k, v: (B, heads, M, head_dim), same dtype and device as q.
        dropout: probability of dropping an attention weight; pass 0 in evaluation.
        causal: token i sees tokens 0 … i alone; needs M == N.
        scale: factor of the scores; None: head_dim ** -0.5.
    Returns:
        (B, heads, N, head_dim), in q's dtype.
    """
    assert not causal or q.shape[2] == k.shape[2], f"causal attention of {q.shape[2]} tokens over {k.shape[2]}"
    return KERNELS[_best(q.device, q.dtype, q.shape[3])](q, k, v, dropout, causal, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    """Plain attention, softmax in fp32: what every kernel is compared with. Arguments as `attention`."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = (q * factor) @ k.transpose(2, 3)
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = functional.dropout(scores.to(precision).softmax(dim=-1), dropout)
    return weights.to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # flash_attn wants (B, N, heads, head_dim)
    return flash_attn_func(q, k, v, dropout_p=dropout, softmax_scale=scale, causal=causal).transpose(1, 2)


Kernel = Callable[[Tensor, Tensor, Tensor, float, bool, float | None], Tensor]
KERNELS: dict[str, Kernel] = {"flash": _flash, "sdpa": _sdpa, "reference": reference}  # best first


def _can_run(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if name != "flash":
        return True
    is_half = dtype in (torch.float16, torch.bfloat16)
    return flash_attn_func is not None and device.type == "cuda" and is_half and head_dim % 8 == 0 and head_dim <= 256


def _best(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return next(name for name in KERNELS if _can_run(name, device, dtype, head_dim) and (name, dtype) not in _refused)


def choose_attention(device: torch.device | str, dtype: torch.dtype, head_dim: int = 64) -> AttentionChoice:
    """Probe the kernel that `attention` will use for `dtype` on `device`; a kernel that disagrees is not used again.

    Args:
        device, dtype: where and in which precision the model runs.
        head_dim: width of a head.
    Returns:
        the kernel's name, and a sentence for the log that says how close it came and what was refused before it.
    """
    device = torch.device(device)
    notes = []
    if flash_attn_func is None and device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        notes.append("flash-attn is not installed (pip install '.[flash]')")
    while True:
        name = _best(device, dtype, head_dim)
        where = f"{name} on {device.type} in {str(dtype).removeprefix('torch.')}"
        if name == "reference":
            return AttentionChoice(name, "; ".join([f"attention: {where}, which is slow", *notes]))
        try:
            error = probe(KERNELS[name], device, dtype, head_dim)
        except RuntimeError as failure:
            first_line = (str(failure).splitlines() or [type(failure).__name__])[0]
            notes.append(f"{name} was refused: it failed ({first_line})")
        else:
            limit = TOLERANCE[dtype]
            if error <= limit:
                return AttentionChoice(name, "; ".join([f"attention: {where}, {error:.1e} from the reference", *notes]))
            notes.append(f"{name} was refused: {error:.1e} from the reference, the limit is {limit:.0e}")
        _refused.add((name, dtype))


def probe(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> float:
    """Largest difference of a kernel from the reference: output and gradients, with and without the causal mask.

    Returns:
        the difference as a share of the largest reference value; infinite where a result is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 80, head_dim)
    inputs = [torch.randn(shape, generator=generator) for _ in range(4)]
    *parts, gradient = (torch.tensor(x.numpy(), device=device, dtype=dtype) for x in inputs)
    worst = 0.0
    for causal in (False, True):
        exact = torch.promote_types(dtype, torch.float32)
        want = _results(reference, [x.to(exact) for x in parts], gradient.to(exact), causal)
        have = _results(kernel, parts, gradient, causal)
        for a, b in zip(have, want):
            share = float((a.to(exact) - b).abs().max() / b.abs().max())
            worst = max(worst, share if share == share else float("inf"))
    return worst


def _results(kernel: Kernel, parts: list[Tensor], gradient: Tensor, causal: bool) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in parts)
    with torch.enable_grad():
        output = kernel(q, k, v, 0.0, causal, None)
        return [output.detach(), *torch.autograd.grad(output, (q, k, v), gradient)]
