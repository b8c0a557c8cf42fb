"""Files that hold EVA and BLIP-2's Q-Former, read under our names (vlm.models.video_llama_names)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlm.models.name_tables import Pairs, table
from vlm.models.video_llama_names import BLIP2, CONSTANTS, TOWER
from vlm.types import UserError
from vlm.weights import Loader, open_tensors, rename

_OURS: Pairs = (("tower.{rest}", "tower.{rest}"),)
_EVA = re.compile(r"(cls_token|pos_embed|patch_embed\..*|blocks\.\d+\..*)")  # EVA's own file has no prefix
# of published files, what is no part of the tower: text halves, language models, what other systems train
_NOT_SEEING = re.compile(
    r"Qformer\.(cls\..*|bert\.embeddings\.(word|position)_embeddings\..*|bert\.encoder\.layer\.\d+\.(intermediate|output)"
    r"\..*)|t5_proj\..*|opt_proj\..*|vision_proj\..*|text_proj\..*|itm_head\..*|temp|(t5|opt|llama|language)_model\..*|"
    r"language_projection\..*|llama_proj\..*|video_.*|audio_.*|other_feat_.*|"
    r"(embeddings|itm_head|vision_projection|text_projection)\..*"
)


def tower_tensors(path: Path, vision_path: Path | None = None, layers: int = 39) -> dict[str, Loader]:
    """What each tensor of a `Tower` is read with.

    Args:
        path: a file or folder of ours, of LAVIS or Video-LLaMA, or a Hugging Face BLIP-2 folder.
        vision_path: EVA's own file, as published or converted, where `path` lacks it; its block behind the
            `layers` that are used is left out.
    Raises:
        UserError: names that no such file has.
    """
    loaders = _named(open_tensors(path), str(path))
    if vision_path is not None:
        stored = open_tensors(vision_path)
        own = {name: load for name, load in stored.items() if name.startswith("tower.vision.")}  # what was converted
        own = own or {f"visual_encoder.{name}": load for name, load in stored.items() if _EVA.match(name)}
        if not own:
            raise UserError(f"{vision_path}: holds nothing of EVA's ViT (cls_token, pos_embed, blocks.0. …)")
        own = {name: load for name, load in own.items() if not name.startswith(f"visual_encoder.blocks.{layers}.")}
        loaders |= _named(own, str(vision_path))
    return {name.removeprefix("tower."): load for name, load in loaders.items()}


def _named(tensors: Mapping[str, Loader], source: str) -> dict[str, Loader]:
    """Loaders under our names, whichever of the three ways theirs are."""
    pairs = next(
        (
            found
            for mark, found in (("tower.", _OURS), ("vision_model.", BLIP2))
            if any(n.startswith(mark) for n in tensors)
        ),
        TOWER,
    )
    kept = {n: load for n, load in tensors.items() if not (CONSTANTS.fullmatch(n) or _NOT_SEEING.fullmatch(n))}
    try:
        names = rename(kept, table(pairs, to_ours=True))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    renamed = {names[name]: load for name, load in kept.items()}
    for name in [name for name in renamed if name.endswith(".q_bias")]:
        stem = name.removesuffix("q_bias")
        if f"{stem}v_bias" not in renamed:
            raise UserError(f"{source}: has {name}, but not its v_bias: an incomplete file")
        renamed[f"{stem}qkv.bias"] = _Joined(renamed.pop(name), renamed.pop(f"{stem}v_bias"))
    return renamed


class _Joined:
    """The bias of q, k and v from those of q and v."""

    def __init__(self, query: Loader, value: Loader) -> None:
        self.query, self.value = query, value

    def __call__(self) -> Tensor:
        query = self.query()
        return torch.cat([query, torch.zeros_like(query), self.value()])
