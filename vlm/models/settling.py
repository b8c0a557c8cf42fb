"""What a conversion asks of a model that was read: that it is the recipe's, that its frozen part is there or known.

Each kind of model has its own answer; all are given what the command line says and return what compares outputs of what
was written. The tool over it: tools/convert_ckpt.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.models import gated_files, video_chatgpt_fit, video_llama_fit
from vlm.models.formats import Model, model_config
from vlm.models.frozen_base import require_tensors, settle_frozen
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llama_facts import refuse_other_sizes
from vlm.models.llama_pass import fixed_tokens, meta_logits, transformers_logits
from vlm.models.published import GATED, HAS_FROZEN, KIND_TITLES, LLAMA, SEEING, VIDEO_CHATGPT
from vlm.models.released import input_settings, other_inputs, overrides, shown, trained_with
from vlm.models.system import System
from vlm.models.vamos import VamosConfig
from vlm.types import UserError
from vlm.weights import open_tensors

Compare = Callable[[Path, Model], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line says of a conversion."""

    source: Path
    from_format: str
    to_format: str
    holds_frozen: bool  # files of the target's format carry the frozen tensors
    recipe_name: str | None
    recipe: Any  # the loaded recipe; none: none was named
    base: Path | None
    trained_on: str | None
    layer: int | None
    keep_frozen: bool

    @property
    def subject(self) -> str:
        """Names checkpoint and recipe in messages."""
        return f"{self.source}{f' and recipe {self.recipe_name}' if self.recipe_name else ''}"


def settle(model: Model, request: Request) -> tuple[System | None, Compare | None]:
    """Fill in or strip what is frozen, compare with the recipe.

    Returns:
        the recipe's model without memory (of a ViT), and what compares outputs after writing; none: tensors alone are.
    Raises:
        UserError: what was read is not what was asked for.
    """
    settled = _settle(model, request)
    _put_learnt(model, request)
    return settled


def _settle(model: Model, request: Request) -> tuple[System | None, Compare | None]:
    if model.kind == LLAMA:
        return None, settle_llama(model, request)
    if model.kind in GATED:
        return None, settle_gated(model, request)
    if model.kind in (*SEEING, VIDEO_CHATGPT):
        model_settings = None if request.recipe is None else request.recipe.model
        wish = video_llama_fit.Wish(
            request.subject, model_settings, request.base, request.to_format, request.keep_frozen
        )
        fit = video_chatgpt_fit if model.kind == VIDEO_CHATGPT else video_llama_fit
        return None, fit.settle(model, wish)
    return settle_vit(model, request), None


def _put_learnt(model: Model, request: Request) -> None:
    """What a run trained of the frozen base takes its place in files that hold the base. UserError: these do not."""
    if not model.learnt:
        return
    count = len(model.learnt)
    named = f"{min(model.learnt)}{', …' * (count > 1)}"
    first = f"{count} tensor{'s' * (count > 1)} of the frozen base that the run trained too ({named})"
    if request.to_format == "vlm":
        model.notes.append(f"holds {first}")
    elif model.kind in HAS_FROZEN:
        model.tensors = {**model.tensors, **model.learnt}
        model.learnt = {}
        model.notes.append(f"{first} stand in the place of the base's")
    else:
        raise UserError(
            f"{request.source} holds {first}; files of the format {request.to_format} have no place for them beside a "
            f"{KIND_TITLES[model.kind]}, and without them it is another model. Mend: --to vlm, which launch/*.py read"
        )


def settle_llama(model: Model, request: Request) -> Compare:
    """Compare a whole LLaMA with the recipe's; returns what compares its logits with those of what was written."""
    config = model.llama
    assert config is not None
    if request.base is not None:
        raise UserError(f"--base {request.base}: a whole LLaMA has no other base; leave it out.")
    if request.recipe is not None:
        wanted = getattr(request.recipe.model, "llama", None)
        if not isinstance(wanted, LlamaBaseConfig):
            raise UserError(f"recipe {request.recipe_name} has no whole LLaMA to compare {request.source} with.")
        refuse_other_sizes(config, wanted, request.subject)
    tokens = fixed_tokens(config.vocab_size)

    def logits(form: str, path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
        if form == "meta_llama":
            return meta_logits(open_tensors(path), config, tokens)
        return transformers_logits(tensors, config, tokens)

    def verify(written: Path, again: Model) -> str:
        before = logits(request.from_format, request.source, model.tensors)
        after = logits(request.to_format, written, again.tensors)
        return gated_files.same_logits(before, after, f"{len(tokens)} random tokens: source and target")

    return verify


def settle_gated(model: Model, request: Request) -> Compare:
    """Refuse a checkpoint that is not its recipe's or its LLaMA's; returns what compares logits afterwards."""
    config = None
    if request.recipe is not None:
        config = request.recipe.model
        if not isinstance(config, VamosConfig):
            raise UserError(
                f"{request.source} is a {KIND_TITLES[model.kind]}; recipe {request.recipe_name} is another system."
            )
        config = replace(config, init_from=None)
        model.notes += other_inputs(model, request.recipe.inputs)
    needed = request.to_format == "vlm"
    fitted = gated_files.fit(model, config, request.base, request.subject, request.trained_on, needed)
    stated = shown(trained_with(model, fitted.config.llama if fitted else None))
    print(f"trained {stated} {' '.join(overrides(input_settings(model)))}".rstrip())
    if fitted is None:
        gated_files.require_shapes(model, request.subject)
        return lambda written, again: "not compared: no LLaMA was named (--base); the tensors were compared to the bit"
    return lambda written, again: fitted.compare(model, again)


def settle_vit(model: Model, request: Request) -> System | None:
    """Fill in or strip frozen layers, compare names and shapes; returns the recipe's model without memory, if any."""
    config = vit_config(model, request)
    with torch.device("meta"):
        system = None if config is None else config.build()
    source = str(request.source)
    form = request.to_format if request.holds_frozen else None
    settle_frozen(model, config, request.base, request.layer, source, form)
    require_tensors(model, system, source, request.recipe_name or "its own settings")
    return system


def vit_config(model: Model, request: Request) -> Any:
    """Settings of the model: of the recipe that was named, else those that a training checkpoint holds; or None."""
    if request.recipe is not None:
        config = request.recipe.model
        return replace(config, init_from=None) if getattr(config, "init_from", None) else config
    return model_config(model.kind, model.settings) if model.settings else None
