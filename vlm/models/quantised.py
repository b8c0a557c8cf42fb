"""Frozen matrices in 8 or 4 bits, by bitsandbytes as transformers uses it. Nothing else imports bitsandbytes.

LLM.int8() (arXiv 2208.07339), or NF4 with its scales quantised too (QLoRA, arXiv 2305.14314). Gradients go through to
what trains; the matrices themselves must be frozen. They become so few bits when the model moves to its device, so
the hash of frozen weights is that of what was read, and checkpoints fit the model with and without.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from vlm.types import UserError

Quantise = Literal["8bit", "4bit"] | None


def quantise(model: PreTrainedModel, kind: Quantise) -> None:
    """Have the matrices of a model's blocks stored in so few bits from its move to a device on.

    UserError: bitsandbytes is not installed.
    """
    if kind is None:
        return
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantise={kind} needs bitsandbytes, which is not installed. Mend: pip install '.[quantise]', or "
            "quantise=none"
        )
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every cast to fp16
    settings = BitsAndBytesConfig(
        load_in_8bit=kind == "8bit",
        load_in_4bit=kind == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    head = model.get_output_embeddings()
    held = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    kept = [name for name, m in model.named_modules() if m is head]
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    for name, old in held.items():
        new: Any = model.get_submodule(name)
        empty = new.weight
        attributes = {key: value for key, value in vars(empty).items() if key not in ("data", "SCB", "CB")}
        new.weight = type(empty)(old.weight.data, requires_grad=False, **attributes)
        new.bias = old.bias
        if kind == "4bit":  # computed in the precision of what comes in
            new.compute_dtype, new.compute_type_is_set = None, False


def is_quantised(model: nn.Module) -> bool:
    """Whether some matrices are stored in so few bits, or will be."""
    return any(type(m).__module__.startswith("bitsandbytes.") for m in model.modules())
