"""The attention kernels agree, and a kernel that does not is found out and left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlm.nn import attention as module
from vlm.nn.attention import KERNELS, TOLERANCE, attention, choose_attention, probe, reference

HAS_GPU = torch.cuda.is_available()
PLACES = [
    pytest.param(name, device, dtype, id=f"{name}-{device}-{str(dtype).removeprefix('torch.')}")
    for name, device, dtypes in (
        ("sdpa", "cpu", (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        ("sdpa", "cuda", (torch.float32, torch.bfloat16, torch.float16)),
        ("flash", "cuda", (torch.bfloat16, torch.float16)),
    )
    for dtype in dtypes
]


@pytest.fixture(autouse=True)
def _nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_refused", set())


def _inputs(shape: tuple[int, ...] = (2, 3, 17, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(("name", "device", "dtype"), PLACES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_kernels_agree_with_the_reference(name: str, device: str, dtype: torch.dtype, head_dim: int) -> None:
    if device == "cuda" and not HAS_GPU:
        pytest.skip("needs CUDA")
    if name == "flash" and module.flash_attn_func is None:
        pytest.skip("needs CUDA with flash-attn installed")
    assert probe(KERNELS[name], torch.device(device), dtype, head_dim) <= TOLERANCE[dtype]


def test_reference_is_the_formula() -> None:
    q, k, v = _inputs()
    out = reference(q, k, v, 0.0, False, 0.3)
    for b, h, i in ((0, 0, 0), (1, 2, 16)):
        weights = torch.softmax(torch.stack([0.3 * (q[b, h, i] * key).sum() for key in k[b, h]]), 0)
        torch.testing.assert_close(out[b, h, i], sum(w * value for w, value in zip(weights, v[b, h])))
    first = reference(q, k, v, 0.0, True, None)[:, :, 0]
    torch.testing.assert_close(first, v[:, :, 0])  # a causal first token sees itself alone


def test_keys_may_be_fewer_than_queries() -> None:
    q, k, v = _inputs()
    torch.testing.assert_close(
        attention(q, k[:, :, :5], v[:, :, :5]), reference(q, k[:, :, :5], v[:, :, :5], 0.0, False, None)
    )
    with pytest.raises(AssertionError, match="causal attention of 17 tokens over 5"):
        attention(q, k[:, :, :5], v[:, :, :5], causal=True)


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_dropout_keeps_the_mean(name: str) -> None:
    torch.manual_seed(0)
    q, k, _ = _inputs((4, 4, 64, 8))
    out = KERNELS[name](q, k, torch.ones_like(q), 0.25, False, None)
    assert out.std() > 0.01
    assert out.mean() == pytest.approx(1.0, abs=0.02)


def test_choice_says_what_it_measured() -> None:
    name, sentence = choose_attention("cpu", torch.float32)
    assert name == "sdpa"
    assert sentence.startswith("attention: sdpa on cpu in float32, ")
    assert "refused" not in sentence


def _wrong(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    return reference(q, k, v, dropout, False, scale)  # forgets the causal mask


def _not_finite(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    return reference(q, k, v, dropout, causal, scale) * float("nan")


def _failing(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("broken", [_wrong, _not_finite, _failing])
def test_a_broken_kernel_is_refused(broken: module.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_can_run", lambda *place: True)  # as if the first kernel could run here
    monkeypatch.setitem(KERNELS, "flash", broken)
    name, sentence = choose_attention("cpu", torch.float32)
    assert name == "sdpa"
    assert "flash was refused" in sentence
    q, k, v = _inputs()
    torch.testing.assert_close(attention(q, k, v, causal=True), reference(q, k, v, 0.0, True, None))


def test_with_everything_broken_the_reference_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", _failing)
    name, sentence = choose_attention("cpu", torch.float32)
    assert name == "reference"
    assert "sdpa was refused" in sentence
    assert "slow" in sentence


def test_flash_is_never_asked_for_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "flash_attn_func", _failing)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    best = module._best
    assert best(gpu, torch.bfloat16, 64) == "flash"
    assert best(gpu, torch.float32, 64) == "sdpa"
    assert best(cpu, torch.bfloat16, 64) == "sdpa"
    assert best(gpu, torch.float16, 20) == "sdpa"
    assert best(gpu, torch.float16, 512) == "sdpa"
