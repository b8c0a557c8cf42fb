"""A file of Video-LLaMA, LLMVA-GEBC, EVA or a Q-Former meets the model that it must be: sizes, frozen base, outputs.

What trains was trained for one language model, and on another of the same width it would load without complaint and
write noise. So a checkpoint of ours holds the hash of the frozen weights (as `VideoSystem.frozen_hash` of the model
built from the recipe), which a released file does not state: it is taken from the folders that a person names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.config import from_dict, to_dict
from vlm.models import video_llama_names as names
from vlm.models import video_llama_pass as plain
from vlm.models.eva import Tower, TowerConfig
from vlm.models.formats import Model
from vlm.models.frozen_hashes import frozen_hash, language_model, own_hash
from vlm.models.llama_facts import llama_config
from vlm.models.llmva import LlmvaConfig
from vlm.models.published import BRANCHES, FAMILIES, KIND_TITLES, LLMVA, PROJECTION
from vlm.models.video_llama import VideoLlamaConfig
from vlm.models.video_llama_files import ASIDE, LONE_HEAD, leave
from vlm.models.video_llama_sizes import (
    QUERY_HEADS,
    VISION_HEADS,
    branch_config,
    branch_shapes,
    build_empty,
    fresh,
    hf_config,
    opt_config,
    parts_of,
    projection_of,
    shapes_of,
    tower_config,
    tower_shapes,
)
from vlm.nn.qformer import read_memory
from vlm.types import Batch, UserError
from vlm.weights import diff_keys

UNKNOWN = "unknown"
LARGEST_DIFFERENCE = 1e-3
"""Of outputs, as a part of the largest: fp32 passes of one model differ by less."""

Branch = VideoLlamaConfig | LlmvaConfig
Compare = Callable[[Path, Model], str]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line says of a conversion."""

    subject: str  # names checkpoint and recipe in messages
    recipe: Any  # a recipe's model settings, or none
    base: Path | None  # folder of the language model
    to_format: str
    keep_frozen: bool


def settle(model: Model, wish: Wish) -> Compare:
    """Leave behind what the target has no place for, compare names and shapes, note the frozen base.

    Returns:
        what compares the outputs of the model built from what was written with the published formulas.
    Raises:
        UserError: another model than the recipe's, other sizes, or a language model of another width.
    """
    if model.kind in BRANCHES and model.frozen_hash is None:
        model.frozen_hash = own_hash(model)
    leave_behind(model, wish)
    if model.kind in BRANCHES:
        return settle_branch(model, wish)
    own = {name: t for name, t in model.tensors.items() if not name.startswith(ASIDE)}
    if model.kind == PROJECTION:
        rows = own["llama_proj.weight"].shape[0]
        diff_keys(own, {"llama_proj.weight": own["llama_proj.weight"].shape, "llama_proj.bias": (rows,)}).require(
            wish.subject
        )
        return lambda written, again: "not compared: one linear map; its tensors were compared to the bit"
    config, known = tower_of(model, shapes_of(own), wish)
    diff_keys(own, tower_shapes(config, parts_of(shapes_of(own)))).require(
        f"{wish.subject} ({KIND_TITLES[model.kind]})"
    )
    if wish.to_format == "hf" and "config" not in model.source:
        _require_whole(model, known, wish)
        model.hf_config = hf_config(config, next(iter(own.values())).dtype)
        model.notes.append("transformers gives the norm behind EVA an epsilon of 1e-6; LAVIS and we have 1e-5")
    if not known:
        return lambda written, again: _unknown_heads()
    return lambda written, again: compare_towers(config, model, again)


def _require_whole(model: Model, known: bool, wish: Wish) -> None:
    """UserError where config.json of a Hugging Face folder would have to state what is not there."""
    absent = {"vision", "norm", "qformer", "query_tokens"} - _parts(model)
    if absent:
        raise UserError(
            f"{wish.subject}: a BLIP-2 folder holds EVA and Q-Former, and {', '.join(sorted(absent))} is missing "
            "here. Mend: --also with the other of LAVIS' two files."
        )
    if not known:
        raise UserError(f"{wish.subject}: config.json states numbers of heads, which no tensor tells. Mend: --recipe.")


def _parts(model: Model) -> frozenset[str]:
    return parts_of({name: () for name in model.tensors if not name.startswith(ASIDE)})


def leave_behind(model: Model, wish: Wish) -> None:
    """What is frozen beside a trained part, unless it is to be kept, and what the target has no place for."""
    if not wish.keep_frozen:
        if [name for name in model.tensors if name.startswith("llm.")] == [LONE_HEAD]:
            leave(model, lambda n: n == LONE_HEAD, f"{LONE_HEAD}, a frozen copy of the embedding")
        if model.kind in BRANCHES:
            leave(model, lambda n: n.startswith(("llm.", "tower.")), "the frozen language model and tower")
        leave(model, lambda n: n.startswith(f"{ASIDE}language_model."), "the language model")
    if wish.to_format not in ("vlm", model.source.get("format")):
        leave(model, lambda n: n.startswith(ASIDE), f"what {wish.to_format} has no place for")


def _unknown_heads() -> str:
    return "not compared: the number of attention heads is not in the tensors (--recipe tells it); equal to the bit"


# ------------------------------------------------------------------------------------------ EVA and Q-Former


def tower_of(model: Model, shapes: Mapping[str, tuple[int, ...]], wish: Wish) -> tuple[TowerConfig, bool]:
    """The tower's sizes, and whether its numbers of heads are known. UserError: a recipe without a tower."""
    if wish.recipe is not None:
        stated = getattr(wish.recipe, "tower", None)
        if not isinstance(stated, TowerConfig):
            raise UserError(f"{wish.subject}: the file is a {KIND_TITLES[model.kind]}; the recipe's model has none.")
        return replace(stated, path=None, vision_path=None), True
    config = model.source.get("config", {})
    heads = [config.get(part, {}).get("num_attention_heads") for part in ("vision_config", "qformer_config")]
    if "config" in model.source:  # transformers leaves out what is the published size
        heads = [stated or default for stated, default in zip(heads, (16, 12))]
    found = tower_config(shapes, (heads[0], heads[1]))
    parts = parts_of(shapes)
    known = ("vision" not in parts or heads[0] or found.dim in VISION_HEADS) and (
        "qformer" not in parts or heads[1] or found.query_dim in QUERY_HEADS
    )
    return found, bool(known)


@torch.no_grad()
def compare_towers(config: TowerConfig, model: Model, again: Model) -> str:
    """Tokens of a fixed random picture: published formulas on `again`, our tower on `model`'s, a block at a time."""
    if any(t[len(t) // 3 : -len(t) // 3].any() for n, t in model.tensors.items() if n.endswith("self_attn.qkv.bias")):
        return "not compared: EVA has a bias of k, which the published form has not; equal to the bit"
    parts = _parts(model)
    generator = torch.Generator().manual_seed(1)
    picture = torch.randn(1, 3, config.image_size, config.image_size, generator=generator)
    theirs = names.from_ours({n: t for n, t in again.tensors.items() if not n.startswith(ASIDE)}, names.TOWER)
    with torch.device("meta"):
        tower = Tower(config)
    shown = []
    seen = expected = torch.randn(1, 9, config.dim, generator=generator)
    if "vision" in parts:
        shown.append(f"a random picture of {config.image_size}")
        expected, seen = plain.eva(theirs, picture, config.heads), _see(tower, model.tensors, picture)
    if "norm" in parts:
        expected = plain.ln_vision(theirs, expected)
        norm = _filled(tower.vision.post_layernorm, model.tensors, "tower.vision.post_layernorm.")
        seen = norm(seen)
    if {"qformer", "query_tokens"} <= parts:
        shown.append(f"{config.queries} queries")
        queries = theirs["query_tokens"].float()
        expected = plain.q_former(theirs, "Qformer", queries, expected, config.query_heads)
        qformer = _filled(tower.qformer, model.tensors, "tower.qformer.")
        seen = read_memory(qformer, model.tensors["tower.query_tokens"].float(), seen, None)
    return same_outputs(expected, seen, " and ".join(shown) or "random tokens")


def _see(tower: Tower, tensors: Mapping[str, Tensor], picture: Tensor) -> Tensor:
    """Our ViT with one block's weights in memory at a time."""
    vision = tower.vision
    hidden = _filled(vision.embeddings, tensors, "tower.vision.embeddings.")(picture)
    for number, block in enumerate(vision.encoder.layers):
        hidden = _filled(block, tensors, f"tower.vision.encoder.layers.{number}.")(hidden)
        block.to("meta")
    return hidden


def _filled(module: Any, tensors: Mapping[str, Tensor], start: str) -> Any:
    state = {name.removeprefix(start): tensors[name].float() for name in tensors if name.startswith(start)}
    module.load_state_dict(state, assign=True)
    return module


def same_outputs(one: Tensor, other: Tensor, what: str) -> str:
    """A line that says how far two outputs are apart. UserError: too far."""
    difference, largest = float((one - other).abs().max()), float(one.abs().max())
    line = f"{what}: the published formulas and our model differ by at most {difference:.1e} (largest {largest:.3g})"
    if not difference <= LARGEST_DIFFERENCE * largest:
        raise UserError(f"outputs: {line}: not the same model, so nothing was written.")
    return line


# ------------------------------------------------------------------------------------------ what trains


def settle_branch(model: Model, wish: Wish) -> Compare:
    own = {name: t for name, t in model.trainable().items() if not name.startswith(ASIDE)}
    shapes = shapes_of(own)
    try:
        projection_of(shapes)
        config, known = branch_of(model, shapes, wish)
    except UserError as error:
        raise UserError(f"{wish.subject}: {error}") from error
    _refuse_width(shapes, config, wish)
    diff_keys(own, branch_shapes(config)).require(f"{wish.subject} ({KIND_TITLES[model.kind]})")
    note_frozen(model, config, wish)
    told = stated(model)
    if told:
        model.notes.append(f"trained with {told}")
    if not known:
        return lambda written, again: _unknown_heads()
    return lambda written, again: compare_branches(config, model, again)


def branch_of(model: Model, shapes: Mapping[str, tuple[int, ...]], wish: Wish) -> tuple[Branch, bool]:
    """The model's settings: of the recipe, of the checkpoint itself, else by its tensors; whether heads are known."""
    wanted = LlmvaConfig if model.kind == LLMVA else VideoLlamaConfig
    config: Branch
    known = True
    if wish.recipe is not None:
        if not isinstance(wish.recipe, wanted):
            raise UserError(f"it is a {KIND_TITLES[model.kind]}; the recipe is another system's.")
        config = wish.recipe
    elif model.settings:
        try:
            config = from_dict(wanted, {**model.settings, "init_from": None})
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"its own settings cannot be read ({error}). Mend: name its recipe (--recipe).") from error
    else:
        opt = projection_of(shapes) == "opt_proj"
        llm = None if wish.base is None else opt_config(wish.base) if opt else llama_config(wish.base)
        config = branch_config(shapes, model.kind, llm)
        known = config.qformer.dim in QUERY_HEADS
        if not known and llm is not None:
            raise UserError(
                f"the number of attention heads is not in the tensors, and width {config.qformer.dim} is no published "
                "Q-Former's. Mend: name the recipe it belongs to (--recipe)."
            )
    if wish.base is not None:
        name = "opt" if isinstance(config, LlmvaConfig) and config.opt is not None else "llama"
        config = replace(config, **{name: replace(getattr(config, name), path=wish.base)})
    return fresh(config), known


def _refuse_width(shapes: Mapping[str, tuple[int, ...]], config: Branch, wish: Wish) -> None:
    projection = projection_of(shapes)
    width, llm = shapes[f"{projection}.weight"][0], language_model(config)
    if width != llm.dim:
        sizes = {2560: "OPT-2.7B", 4096: "a 7B (or OPT-6.7B)", 5120: "a 13B"}
        names_ = [f"{w}{f', {sizes[w]}' if w in sizes else ''}" for w in (width, llm.dim)]
        raise UserError(
            f"{wish.subject}: {projection} was trained for a language model of width {names_[0]}; the one given has "
            f"{names_[1]}. Mend: the file for this language model, or --base / the recipe's path of the other one."
        )


def note_frozen(model: Model, config: Branch, wish: Wish) -> None:
    """Learn, or compare, the hash of the frozen weights that a checkpoint of ours is tied to.

    UserError: it was trained on others, or the folder that is named is not there.
    """
    given = wish.recipe is not None or wish.base is not None
    path = language_model(config).path
    if given and (wish.to_format == "vlm" or wish.base is not None) and path is not None and not path.exists():
        raise UserError(f"{wish.subject}: its language model {path} is not there. Mend: --base with its folder.")
    if given and (path is None or path.exists()):
        tower = config.tower
        if tower is not None and any(p is not None and not p.exists() for p in (tower.path, tower.vision_path)):
            model.notes.append(f"its tower {tower.path} is not there, so its base is the language model alone")
            config = replace(config, tower=None)
        found = frozen_hash(config)
        stated = model.frozen_hash
        pairs = [] if stated in (None, UNKNOWN) else zip(str(stated).split("+"), found.split("+"))
        if any(one != other for one, other in pairs):
            raise UserError(
                f"{wish.subject}: was trained on frozen weights of hash {stated}; those given have {found}: others, "
                "and what it writes would be noise. Mend: the folders that it was trained with."
            )
        model.frozen_hash, model.settings = found, to_dict(config)
    elif model.frozen_hash is None:
        model.frozen_hash = UNKNOWN
        if wish.to_format == "vlm":
            model.notes.append(
                "the language model that it belongs to is not known, so no recipe of the same system begins with it. "
                "Mend: --base with its folder, or --recipe whose path is there"
            )


_TOLD = (
    "llama_model",
    "opt_model",
    "num_video_query_token",
    "max_frame_pos",
    "max_txt_len",
    "end_sym",
    "prompt_template",
)


def stated(model: Model) -> str:
    """What the `config` of a released file says of the model it holds: which language model, which prompts."""
    config = model.source.get("rest", {}).get("config")
    own = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(own, Mapping):
        return ""
    return ", ".join(f"{name}={own[name]!r}" for name in _TOLD if name in own)


@torch.no_grad()
def compare_branches(config: Branch, model: Model, again: Model) -> str:
    """Video tokens of fixed random frames: published formulas on `again`, our model on `model`'s tensors."""
    generator = torch.Generator().manual_seed(1)
    count = min(4, config.max_frames)
    frames = torch.randn(count, config.frame_tokens, config.frame_dim, generator=generator)
    extra = {}
    if isinstance(config, LlmvaConfig):
        extra["boundary"] = torch.rand(1, 2, generator=generator)
        if config.other_tokens:
            extra["other"] = torch.randn(1, min(6, config.max_other), config.other_dim, generator=generator)
    system = build_empty(config)
    trained = {n: t.float() for n, t in model.trainable().items() if not n.startswith(ASIDE)}
    system.load_state_dict(trained, strict=False, assign=True)
    ours = system.encode_video(
        Batch(keys=("fixed",), frame_tokens=frames, frame_counts=(count,), extra=extra, views={})
    )
    own = {n: t for n, t in again.trainable().items() if not n.startswith(ASIDE)}
    family = "llmva" if model.kind == LLMVA else "video_llama"
    theirs = names.from_ours(own, FAMILIES[family].pairs[model.kind])
    other = extra["other"][0] if "other" in extra else None
    boundary = extra["boundary"][0] if extra else None
    expected = plain.video_tokens(theirs, frames, config.qformer.heads, boundary, other)
    return same_outputs(expected, ours, f"{count} random frames, {config.places} video tokens")
