"""Frozen matrices in 8 and 4 bits. Without bitsandbytes, what is said of its absence is all there is to test."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import small_video as s
import torch

from vlm.models import quantised
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.quantised import is_quantised
from vlm.models.trained import persistent_buffers
from vlm.types import UserError


def settings(kind: str, bits: str | None) -> dict[str, Any]:
    sizes = {"dim": 64, "heads": 4, "hidden": 96, "quantise": bits}
    return {"opt": s.opt(**sizes)} if kind == "opt" else {"opt": None, "llama": s.llama(**sizes)}


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_missing_library_is_named_with_its_mend(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes, which is not installed. Mend: pip install '\.\[quantise\]'"):
        s.llmva(**settings(kind, "8bit"))


def test_off_by_default() -> None:
    assert LlamaBaseConfig().quantise is None
    assert not is_quantised(s.llmva())


if find_spec("bitsandbytes") is not None:

    @pytest.mark.parametrize("kind", ["opt", "llama"])
    @pytest.mark.parametrize(
        ("bits", "dtype", "most", "alike"), [("8bit", torch.int8, 0.02, 0.99), ("4bit", torch.uint8, 0.15, 0.8)]
    )
    def test_matrices_of_blocks_are_stored_so_and_nothing_else(
        kind: str, bits: str, dtype: torch.dtype, most: float, alike: float
    ) -> None:
        """The loss and its gradient are near the unquantised model's; hash and checkpoint are the same."""
        batch = s.features((2, 1), s.rows([14, 12], s.PLACES + s.OTHER))
        results = []
        for wanted in (None, bits):
            model = s.llmva(**settings(kind, wanted)).to("cpu")  # the move is what quantises
            assert is_quantised(model) == (wanted is not None)
            assert not persistent_buffers(model)
            term = model(batch)["caption"]
            term.total.backward()
            gradient = model.video_query_tokens.grad
            assert gradient is not None
            results.append((model, float(term.total.detach()) / term.count, gradient))
        (plain, want, exact), (small, have, gradient) = results
        assert small.frozen_hash() == plain.frozen_hash()
        matrices = {n for n, p in plain.llm.named_parameters() if ".layers." in n and p.ndim == 2}
        assert {n for n, p in small.llm.named_parameters() if p.dtype == dtype} == matrices
        assert have != want
        assert have == pytest.approx(want, rel=most)
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > alike
