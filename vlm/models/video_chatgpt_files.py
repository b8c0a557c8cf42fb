"""Files of LLaVA and Video-ChatGPT (projector, and the embedding where marks were trained), of its Breakfast variant
(the whole model).

All become a `Model` under our names (vlm/models/video_chatgpt.py). An embedding's last two rows are the marks,
`video_marks`; its other rows, which training leaves as they were, are kept as `published.…`, so that a file returns
whole, or are taken from the language model on the way back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.models.formats import Model, save_published, source_of
from vlm.models.name_tables import table
from vlm.models.published import FAMILIES, VIDEO_CHATGPT
from vlm.types import UserError
from vlm.weights import read_checkpoint, rename

FAMILY = "video_chatgpt"
ASIDE = "published."
MARKS = "video_marks"
EMBEDDING = "model.embed_tokens.weight"
ROWS = ASIDE + EMBEDDING
"""The embedding without its last two rows."""
PATCH = f"{ASIDE}vid_patch"
"""The row of <vid_patch> alone, where the others are the language model's own."""
_CONSTANTS = re.compile(r".*rotary_emb\.inv_freq")
_BEFORE = "model."


def read(path: Path, key: str | None) -> Model:
    """A .bin of torch. UserError: damaged, code in it, or names that it should not have."""
    found = read_checkpoint(path, key)
    named = {name: t for name, t in found.tensors.items() if not _CONSTANTS.fullmatch(name)}
    constants = {name: t for name, t in found.tensors.items() if name not in named}
    bare = "mm_projector.weight" in named  # LLaVA's own spelling in some versions
    whole = {name if name.startswith((_BEFORE, "lm_head.")) else _BEFORE + name: t for name, t in named.items()}
    if bare and len(whole) < len(named):
        raise UserError(f"{path}: holds tensors both with and without `model.` before their names")
    try:
        tensors = to_ours(whole)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    source, dropped = source_of(FAMILY, path, found, list(found.tensors), constants)
    source["bare"] = bare
    return Model(kind=VIDEO_CHATGPT, tensors=tensors, source=source, dropped=dropped, unused=aside(tensors))


def check_sound(tensors: Mapping[str, Tensor], where: str) -> None:
    """UserError where weights that are to be used are none: whole numbers, sparse, or not finite."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(
                f"{where}: {name} is no matrix of finite numbers ({tensor.layout}, {tensor.dtype}), so all that is "
                "written would be noise: the file is damaged, or its training came to nothing"
            )


def aside(tensors: Mapping[str, Any]) -> frozenset[str]:
    """Names of what is kept for the way back alone."""
    return frozenset(name for name in tensors if name.startswith(ASIDE))


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by published names under ours. UserError: unknown names, no projector, half of one."""
    own = {name: t for name, t in state.items() if name != EMBEDDING}
    names = rename(own, FAMILIES[FAMILY].table(VIDEO_CHATGPT, to_ours=True))
    tensors = {names[name]: t for name, t in own.items()}
    missing = {"mm_projector.weight", "mm_projector.bias"} - tensors.keys()
    if missing:
        raise UserError(f"has no model.{min(missing)}, so it is no file of LLaVA's or Video-ChatGPT's")
    if EMBEDDING in state:
        rows = state[EMBEDDING]
        if rows.ndim != 2 or len(rows) < 3 or rows.shape[1] != tensors["mm_projector.weight"].shape[0]:
            raise UserError(
                f"{EMBEDDING} is {list(rows.shape)}, but the projector makes tokens of width "
                f"{tensors['mm_projector.weight'].shape[0]}"
            )
        tensors[ROWS], tensors[MARKS] = rows[:-2], rows[-2:]
    return tensors


def write(path: Path, model: Model) -> None:
    """A .bin as the original has it: the source's container, order and further entries where it was one."""
    named = published(model)
    same = model.source.get("format") == FAMILY
    if same and model.source["bare"]:
        named = {name.removeprefix(_BEFORE): t for name, t in named.items()}
    save_published(path, named, model, FAMILY, container=None)


def published(model: Model) -> dict[str, Tensor]:
    """The tensors by published names."""
    tensors = dict(model.tensors)
    rows, marks, patch = (tensors.pop(name, None) for name in (ROWS, MARKS, PATCH))
    assert patch is None, "the language model's rows stand before it (video_chatgpt_fit.fill_embedding)"
    own = {name: t for name, t in tensors.items() if not name.startswith(ASIDE)}
    names = rename(own, table(FAMILIES[FAMILY].pairs[VIDEO_CHATGPT], to_ours=False))
    named = {names[name]: t for name, t in own.items()}
    named |= {name.removeprefix(ASIDE): t for name, t in tensors.items() if name.startswith(ASIDE)}
    if marks is not None:
        assert rows is not None, "an embedding of marks alone"
        named[EMBEDDING] = torch.cat([rows, marks.to(rows.dtype)])
    return named
