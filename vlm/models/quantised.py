"""Frozen matrices in 8 or 4 bits, through bitsandbytes and transformers' use of it. Nothing else imports bitsandbytes.

pip install '.[quantise]'
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

Quantise = Literal["8bit", "4bit"] | None


def quantise(model: PreTrainedModel, kind: Quantise) -> None:
    """Give the blocks' matrices `kind`."""
    if kind is None:
        return
    raise NotImplementedError
