"""Released files of Vamos, Flipped-VQA and ViCo (.pth: trained tensors and `args`), and how they meet their LLaMA.

A checkpoint of ours holds the same tensors under the same names, and the hash of the LLaMA that they belong to; the
LLaMA itself comes from its own files. What has to fit: `vlm/models/released.py`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from vlm.config import from_dict, to_dict
from vlm.data.packing import pack
from vlm.models.formats import Model, read_pth
from vlm.models.gated_sizes import expected_shapes, sizes_of
from vlm.models.llama_base import LlamaBaseConfig, read_llama
from vlm.models.llama_facts import expected_shapes as llama_shapes
from vlm.models.llama_facts import llama_config
from vlm.models.llama_files import Tensors, to_meta
from vlm.models.llama_pass import Trained, fixed_tokens, meta_logits
from vlm.models.published import KIND_TITLES, LLAMA_VQA, from_ours
from vlm.models.released import arguments_of, describe_llama, refuse_mismatch, trained_with
from vlm.models.released_args import released_args
from vlm.models.vamos import Vamos, VamosConfig
from vlm.types import IGNORE, Batch, Row, UserError
from vlm.weights import Loader, atomic_file, diff_keys, open_tensors, state_hash

FAMILIES = ("vamos", "flipped", "vico")
LARGEST_DIFFERENCE = 1e-3
"""Of logits, as a part of the largest: two fp32 passes through a 7B LLaMA differ by less, other numbering by more."""

# ------------------------------------------------------------------------------------------ .pth files


def read(family: str, path: Path, key: str | None) -> Model:
    """A released file. UserError: names or shapes that the family does not have, or `args` of another one."""
    model = read_pth(family, path, key)
    require_shapes(model, f"{path} ({KIND_TITLES[model.kind]})")
    args = arguments_of(model)
    for other, flag in (("vico", "cap"), ("flipped", "vaq")):
        mine = {"vico": "vaq", "flipped": "cap"}[other]
        if family in ("flipped", "vico") and other != family and flag in args and mine not in args:
            model.notes.append(f"args has {flag}, which only {other}'s command line has: is this file {other}'s?")
    return model


def require_shapes(model: Model, subject: str) -> None:
    """Every tensor has a place and the shape that the others ask for; UserError with the nearest names otherwise."""
    try:
        sizes = sizes_of(model.tensors, model.kind)
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error
    if model.kind == LLAMA_VQA and not sizes.frames and model.source.get("format") in FAMILIES:
        sizes = replace(sizes, frames=int(arguments_of(model).get("max_feats", 10)))
    known = {name: t for name, t in model.tensors.items() if not name.startswith("selector.")}
    diff_keys(known, expected_shapes(sizes, model.kind)).require(subject)


def write(family: str, path: Path, model: Model) -> None:
    """A file that the original loads: `model`, what else the source had (or `args` made from its recipe)."""
    named = from_ours(_in_order(model), family, model.kind)
    # a tensor cut from a larger storage would drag the whole storage into the file
    tensors = {n: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t.detach() for n, t in named.items()}
    same = model.source.get("format") == family
    rest = dict(model.source["rest"]) if same else {"args": released_args(family, model)}
    if isinstance(rest.get("args"), Mapping):
        rest["args"] = argparse.Namespace(**rest["args"])
    container = model.source["container"] if same else "model"
    with atomic_file(path) as file:
        torch.save(tensors if container is None else {container: tensors, **rest}, file)


def _in_order(model: Model) -> dict[str, Tensor]:
    order = model.source.get("order", [])
    if set(order) != set(model.tensors):
        order = list(expected_shapes(sizes_of(model.tensors, model.kind), model.kind))
    return {name: model.tensors[name] for name in [*order, *(n for n in model.tensors if n not in order)]}


# ------------------------------------------------------------------------------------------ with its LLaMA


@dataclass(slots=True)
class Fitted:
    """A checkpoint with the model that it was checked against."""

    config: VamosConfig
    system: Vamos | None  # None: no LLaMA at hand, or it is larger than memory
    why_not: str = ""

    def compare(self, model: Model, again: Model) -> str:
        """Logits of the published formulas on the tensors `again` and of our model on `model`'s; a line that says it.

        UserError: they differ.
        """
        if self.system is None:
            return f"not compared: {self.why_not}; the tensors were compared to the bit"
        return compare_logits(self.system, model, again)


def fit(
    model: Model, config: VamosConfig | None, base: Path | None, subject: str, trained_on: str | None, needed: bool
) -> Fitted | None:
    """Refuse a checkpoint that is not of its recipe and LLaMA; else learn, or compare, the hash of that LLaMA.

    Args:
        config: the model of a recipe; none: that of the checkpoint's own settings, or by its tensors, args and `base`.
        base: folder of the LLaMA; none: the config's.
        subject: names checkpoint and recipe in messages.
        trained_on: what a person states about it ("llama1", …).
        needed: whether there is no result without a LLaMA.
    Returns:
        none where nothing is known but the tensors.
    """
    named = "the LLaMA given" if config is None else "the recipe's LLaMA"
    if config is None and model.settings:
        config = stored_config(model.settings, subject)
    if config is None and base is not None:
        config = derived_config(model, llama_config(base), subject)
    if config is None:
        if needed:
            raise UserError(
                f"{subject}: a checkpoint of ours is tied to its LLaMA by hash, so the LLaMA has to be known. Mend: "
                "--base with its folder (Meta or Hugging Face), or --recipe whose model.llama.path is there."
            )
        return None
    if base is not None:
        config = replace(config, llama=replace(config.llama, path=base))
    model.notes += refuse_mismatch(model, config, subject, trained_on, named)
    path = config.llama.path
    if path is not None and not path.is_dir():
        if needed or base is not None:
            raise UserError(
                f"{subject}: its LLaMA {path} is not there. Mend: --base with the folder of "
                f"{describe_llama(config.llama)}."
            )
        return Fitted(config, None, f"its LLaMA {path} is not there (--base names one)")
    need, have = _bytes_of(config), int(0.9 * psutil.virtual_memory().total)
    system = _build(model, config, subject, as_shapes=need > have)
    if need > have:
        return Fitted(config, None, f"the LLaMA in fp32 takes {need / 1e9:.0f} GB, this machine has {have / 1e9:.0f}")
    return Fitted(config, system)


def _bytes_of(config: VamosConfig) -> int:
    """Memory of the LLaMA as it is stored and, for comparing logits, in fp32."""
    count = sum(math.prod(shape) for shape in llama_shapes(config.llama).values())
    return count * {"float32": 4, "bfloat16": 6}[config.llama.dtype]


def _build(model: Model, config: VamosConfig, subject: str, as_shapes: bool) -> Vamos:
    """The model with the checkpoint's tensors in it; its LLaMA's hash is noted or compared.

    `as_shapes`: without memory for any tensor, so that names, shapes and hash are all that is compared.
    """
    with torch.random.fork_rng(), torch.device("meta" if as_shapes else "cpu"):
        system = config.build().eval()
    want = {name: t for name, t in system.state_dict().items() if not name.startswith("llm.")}
    if not config.use_video:
        model.unused = frozenset(name for name in model.tensors if name.startswith("visual_proj."))
        if model.unused:
            model.notes.append("the recipe reads no video; the projector is kept aside for the way back")
    held = {name: t for name, t in model.tensors.items() if name not in model.unused}
    diff_keys(held, want).require(f"{subject} ({KIND_TITLES[model.kind]})")
    found = stored_hash(config) if as_shapes else system.frozen_hash()
    if model.frozen_hash not in (None, found):
        its = (model.settings or {}).get("llama")
        of = f", {describe_llama(LlamaBaseConfig(**its))}" if its else ""
        raise UserError(
            f"{subject}: was trained on a LLaMA of hash {model.frozen_hash}{of}; {describe_llama(config.llama)} has "
            f"hash {found} stored as {config.llama.dtype}: other weights, and its answers would be noise. Mend: --base "
            "with the LLaMA that it was trained on."
        )
    model.frozen_hash, model.settings = found, to_dict(config)
    if not as_shapes:
        system.load_state_dict(held, strict=False)
    return system


def stored_hash(config: VamosConfig) -> str:
    """What `frozen_hash` of the built model would be, with one tensor of its LLaMA in memory at a time."""
    skipped = config.llama.layers - config.prompted if config.skip_lower_blocks else 0

    def renamed(name: str) -> str | None:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return f"llm.{name}"
        number = int(match[1]) - skipped
        return None if number < 0 else f"llm.model.layers.{number}.{match[2]}"

    dtype = getattr(torch, config.llama.dtype)
    loaders = _llama_loaders(config)
    return state_hash(
        Tensors({new: partial(_rounded, load, dtype) for n, load in loaders.items() if (new := renamed(n))})
    )


def _llama_loaders(config: VamosConfig) -> dict[str, Loader]:
    assert config.llama.path is not None
    stored = open_tensors(config.llama.path)
    return read_llama(stored, config.llama.heads, config.llama.num_kv_heads, str(config.llama.path))


def stored_config(settings: Mapping[str, Any], subject: str) -> VamosConfig:
    """The config that a checkpoint of ours holds. UserError: of another version."""
    try:
        return from_dict(VamosConfig, {**settings, "init_from": None})
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{subject}: its own settings cannot be read ({error}). Mend: name its recipe (--recipe)."
        ) from error


def derived_config(model: Model, llama: LlamaBaseConfig, subject: str) -> VamosConfig:
    """The config that a released file's tensors and args ask for on this LLaMA. UserError: args do not say enough."""
    try:
        stated = trained_with(model, llama)
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error
    values = {n.removeprefix("model."): s.value for n, s in stated.items() if not n.startswith("model.llama.")}
    missing = [name for name in ("adapter_len", "num_frames") if name not in values]
    if missing:
        raise UserError(
            f"{subject}: has no args that say {' and '.join(missing)}. Mend: name the recipe it belongs to (--recipe)."
        )
    # sizes are compared afterwards, with a message of their own
    values["adapter_layer"] = min(values.get("adapter_layer", llama.layers), llama.layers)
    return VamosConfig(llama=llama, **values)


# ------------------------------------------------------------------------------------------ logits


@torch.no_grad()
def compare_logits(system: Vamos, model: Model, again: Model) -> str:
    """Logits on fixed random tokens and features: published formulas on `again`, our model on `model`'s tensors."""
    config = system.config
    if config.llama.path is None and config.skip_lower_blocks:
        return "not compared: the LLaMA is random; the tensors were compared to the bit"
    if getattr(config, "selector", None) is not None:
        return "not compared: no original has a token bottleneck; the tensors were compared to the bit"
    start, count = 4, config.num_frames if config.use_video else 0
    tokens = fixed_tokens(config.llama.vocab_size, start + count + 16)
    features = None
    if config.use_video:
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(count, config.feature_dim, generator=generator)
    trained = Trained(
        tensors=again.tensors,
        adapter_len=config.adapter_len,
        adapter_layer=config.prompted,
        skip_lower=config.skip_lower_blocks,
        features=features,
        start=start,
    )
    if config.llama.path is None:
        llama: Mapping[str, Tensor] = {
            name.removeprefix("llm."): t for name, t in system.state_dict().items() if name.startswith("llm.")
        }
    else:
        llama = Tensors(_llama_loaders(config))
    dtype = getattr(torch, config.llama.dtype)
    meta: dict[str, Loader] = {n: partial(_rounded, load, dtype) for n, load in to_meta(llama, config.llama).items()}
    published = meta_logits(meta, config.llama, tokens, trained, config.rope_theta)
    system.llm.float()
    row = Row(tuple(tokens.tolist()), (IGNORE,) * len(tokens), (start, start + count) if count else (0, 0), 0)
    rows = pack([row], count or 1)
    batch = Batch(keys=("fixed",), features=None if features is None else features[None], views={"answer": rows})
    ours = system.logits(system.read(["answer"], [rows], batch))
    shown = f"{len(tokens)} random tokens{f', {count} of them video' if count else ''}"
    return same_logits(published, ours, f"{shown}: the published formulas and our model")


def same_logits(one: Tensor, other: Tensor, what: str) -> str:
    """A line that says how far two (S, V) logits are apart. UserError: too far."""
    difference, largest = float((one - other).abs().max()), float(one.abs().max())
    line = f"{what} differ by at most {difference:.1e} (largest logit {largest:.3g})"
    if not difference <= LARGEST_DIFFERENCE * largest:
        raise UserError(f"logits: {line}: not the same model, so nothing was written.")
    return line


def _rounded(load: Loader, dtype: torch.dtype) -> Tensor:
    return load().to(dtype)
