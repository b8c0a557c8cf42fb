"""What a Vamos, LLaMA-VQA or ViCo checkpoint was trained with, compared with what a recipe says.

Released files hold trained tensors and `args`, the command line; checkpoints of ours hold their recipe. Either tells
the LLaMA underneath (size by shapes; 1, 2 or 3 by `args.llama_model_path`) and the settings without which the tensors
mean something else. What contradicts the recipe is refused with both values; a checkpoint on another LLaMA loads
without complaint otherwise, and answers at chance.

    overrides(trained_with(model))      # ["model.num_frames=6", "model.adapter_layer=32", …]: the recipe to use for it
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config import to_dict
from vlm.models.formats import Model
from vlm.models.gated_sizes import sizes_of
from vlm.models.llama_base import SIZES, LlamaBaseConfig
from vlm.models.published import LLAMA_VQA, VAMOS
from vlm.models.vamos import VamosConfig, decisive_settings
from vlm.types import UserError

VAMOS_THETA = 500_000.0
"""Base of the rotary embedding in Vamos' code where params.json is silent, as LLaMA 1's and 2's is."""
GENERATIONS = ("llama1", "llama2", "llama3")


@dataclass(frozen=True, slots=True)
class Stated:
    """One setting, and where it is stated."""

    value: Any
    where: str


# ------------------------------------------------------------------------------------------ which LLaMA


def generation_of(config: LlamaBaseConfig) -> int | None:
    """1, 2 or 3: which LLaMA a recipe names, by vocabulary, epsilon and size, else by its path; None: unclear."""
    if config.vocab_size >= 100_000:
        return 3
    if config.vocab_size == 32000 and config.norm_eps == 1e-6:
        return 1
    if config.vocab_size == 32000 and (config.dim, config.num_kv_heads) != (8192, 64):  # LLaMA 1 65B has 1e-5 as well
        return 2
    named = None if config.path is None else generation_in(config.path)
    if named is not None:
        return named
    return 3 if config.rope_theta == VAMOS_THETA else None


def generation_in(path: str | Path) -> int | None:
    """1, 2 or 3 by the folders of a path: `pretrained/llama/7B` is 1, as the originals lay them out; None: unclear.

    `llama3` anywhere in it is LLaMA 3: by this very test the originals choose the tokenizer.
    """
    if "llama3" in str(path):
        return 3
    for part in reversed(Path(path).parts):
        match = re.fullmatch(r"(?i)llama[-_.]?(v?[123])?([-_.]\d+b.*)?", part)
        if match:
            return int(match[1][-1]) if match[1] else 1
    return None


def describe_llama(config: LlamaBaseConfig) -> str:
    """A recipe's LLaMA in words."""
    generation = generation_of(config)
    name = f"LLaMA {generation}" if generation else "LLaMA of an unpublished size"
    return (
        f"{name} (vocabulary {config.vocab_size}, norm_eps {config.norm_eps:g}, dim {config.dim}, {config.layers} "
        f"layers, {config.heads} heads{f', {config.path}' if config.path else ''})"
    )


# ------------------------------------------------------------------------------------------ what a checkpoint says


def arguments_of(model: Model) -> dict[str, Any]:
    """The command line in a released file, also after it has become ours; empty: none."""
    return dict(model.source.get("rest", {}).get("args") or {})


def trained_with(model: Model, llama: LlamaBaseConfig | None = None) -> dict[str, Stated]:
    """Setting of the recipe -> what the checkpoint was trained with, by its tensors, its args, or its own recipe.

    Args:
        model: kind `VAMOS` or `LLAMA_VQA`.
        llama: the LLaMA it is to run on, where known: whether its params.json states rope_theta.
    UserError: the checkpoint contradicts itself.
    """
    sizes = sizes_of(model.tensors, model.kind)
    stated = {
        "model.llama.dim": Stated(sizes.dim, "adapter_query.weight"),
        "model.llama.layers": Stated(sizes.layers, "its gates"),
        "model.llama.heads": Stated(sizes.heads, "its gates"),
    }
    if sizes.feature_dim:
        stated["model.feature_dim"] = Stated(sizes.feature_dim, "visual_proj")
        stated["model.projector"] = Stated(sizes.projector, "visual_proj")
    stated["model.temporal_embedding"] = Stated(sizes.frames > 0, "temporal_emb")
    if sizes.frames:
        stated["model.num_frames"] = Stated(sizes.frames, "temporal_emb")
    args = arguments_of(model)
    found = _of_args(model, args, llama) if args else _of_recipe(model.settings or {})
    if model.kind == VAMOS:
        found["model.video_bias"] = Stated(None, "its gates: Vamos has no bias, whatever args.bias says")
    elif "model.video_bias" in found and found["model.video_bias"].value is None:
        raise UserError(f"the gates have a video bias (gate2), but {found['model.video_bias'].where} says none.")
    for name, other in found.items():
        if name in stated and stated[name].value != other.value:
            tensors = stated[name]
            raise UserError(
                f"{other.where} is {other.value}, but its tensors say {tensors.value} ({tensors.where}): args and "
                "tensors are not of one checkpoint."
            )
    stated |= found
    rows = [stated.get(f"model.{name}") for name in ("adapter_len", "adapter_layer")]
    if rows[0] and rows[1] and rows[0].value * rows[1].value != sizes.rows:
        raise UserError(
            f"adapter_query.weight has {sizes.rows} rows, but {rows[0].where} x {rows[1].where} is {rows[0].value} x "
            f"{rows[1].value}: args and tensors are not of one checkpoint."
        )
    return stated


def _of_args(model: Model, args: Mapping[str, Any], llama: LlamaBaseConfig | None) -> dict[str, Stated]:
    """Settings by the flags of the originals."""
    family = model.source.get("format")
    flags = {"max_feats": "num_frames", "adapter_len": "adapter_len", "adapter_layer": "adapter_layer"}
    if family == "vamos":
        flags["proj_type"] = "projector"
    if model.kind == LLAMA_VQA:
        flags["bias"] = "video_bias"
        if args.get("qav"):
            flags["tau"] = "tau"
    found = {
        f"model.{ours}": Stated(args[theirs], f"args.{theirs}") for theirs, ours in flags.items() if theirs in args
    }
    layers = sizes_of(model.tensors, model.kind).layers
    if args.get("adapter_layer", layers) < layers:
        where = f"args.adapter_layer {args['adapter_layer']} of {layers} blocks: the originals do not run the others"
        found["model.skip_lower_blocks"] = Stated(True, where)
    if "rope_theta" in args:  # no flag of theirs: written with checkpoints of ours
        found["model.rope_theta"] = Stated(float(args["rope_theta"]), "args.rope_theta")
    elif model.kind == LLAMA_VQA:
        found["model.rope_theta"] = Stated(10_000.0, "LLaMA-VQA's and ViCo's code")
    elif generation_in(args.get("llama_model_path", "")) != 3 and not (llama and states_theta(llama)):
        found["model.rope_theta"] = Stated(VAMOS_THETA, "Vamos' default where LLaMA's params.json is silent")
    return found


def states_theta(llama: LlamaBaseConfig) -> bool:
    """Whether the LLaMA's own params.json has rope_theta (LLaMA 3's has; a Hugging Face folder does not tell)."""
    file = None if llama.path is None else llama.path / "params.json"
    return file is not None and file.is_file() and "rope_theta" in json.loads(file.read_text())


_OF_RECIPE = ("video_bias", "projector", "feature_dim", "temporal_embedding")  # besides what is decisive


def _of_recipe(settings: Mapping[str, Any]) -> dict[str, Stated]:
    """Settings by the recipe that one of our checkpoints holds."""
    if not settings:
        return {}
    found = {f"model.{n}": Stated(settings[n], f"its recipe's model.{n}") for n in _OF_RECIPE if n in settings}
    try:
        decisive = decisive_settings(settings)
    except (KeyError, TypeError) as error:
        raise UserError(f"its own settings are of another version ({error}); name its recipe") from error
    found |= {f"model.{n}": Stated(v, f"its recipe's model.{n}") for n, v in decisive.items()}
    if not settings.get("use_video", True):
        found = {n: s for n, s in found.items() if n not in ("model.feature_dim", "model.projector")}
    return found


def input_settings(model: Model) -> dict[str, Stated]:
    """Setting of `inputs` -> how the rows were made that a released file was trained on; empty for ours."""
    args, family = arguments_of(model), model.source.get("format")
    if not args or "rope_theta" in args:  # no args, or made by us
        return {}
    flags = {"max_feats": "num_frames", "max_seq_len": "max_length"}
    if family == "vico":
        flags["max_cap_len"] = "max_caption_length"
    if family in ("flipped", "vico"):
        flags["sub"] = "dialogue"
    found = {
        f"inputs.{ours}": Stated(args[theirs], f"args.{theirs}") for theirs, ours in flags.items() if theirs in args
    }
    if family == "vico":
        found["inputs.caption_skip"] = Stated(3, "ViCo's code")
    if family == "vamos" and "use_vis" in args:
        found["inputs.use_video"] = Stated(args["use_vis"], "args.use_vis")
        if "alter_train" in args:
            found["inputs.alternate"] = Stated(args["alter_train"], "args.alter_train")
    if family == "vamos" and "use_cap" in args:
        file = "blip2_n6" if args.get("dataset") == "intentqa" else f"llava_v15_{args.get('cap_model', '13b')}_n6"
        found["inputs.caption"] = Stated(file if args["use_cap"] else None, "args.use_cap")
    if family == "vamos" and (args.get("alter_train") or args.get("use_vis") is False):
        where = "args.alter_train" if args.get("alter_train") else "args.use_vis"
        found["inputs.blind_placeholders"] = Stated(True, where)
    return found


def other_inputs(model: Model, inputs: Any) -> list[str]:
    """A sentence on what of a recipe's `inputs` is not what the checkpoint was trained with. Nothing is refused: rows
    are made when it runs, and a conversion does not touch them."""
    other = {
        name: s
        for name, s in input_settings(model).items()
        if (field := name.removeprefix("inputs.")) and hasattr(inputs, field) and getattr(inputs, field) != s.value
    }
    if not other:
        return []
    told = ", ".join(f"{n} {text(s.value)} ({s.where})" for n, s in other.items())
    return [f"its rows were made otherwise than the recipe's: {told}. To run it, add {' '.join(overrides(other))}"]


# ------------------------------------------------------------------------------------------ against a recipe


def refuse_mismatch(
    model: Model,
    config: VamosConfig,
    subject: str,
    trained_on: str | None = None,
    named: str = "the recipe's LLaMA",
) -> list[str]:
    """Refuse a checkpoint that is not of the recipe's LLaMA, or was trained with other settings.

    Args:
        subject: names checkpoint and recipe in messages.
        trained_on: one of `GENERATIONS`, where a person knows better than `args`.
        named: what to call the config's LLaMA.
    Returns:
        what could not be told, as sentences for the person.
    UserError: names both facts of everything that contradicts.
    """
    try:
        stated = trained_with(model, config.llama)
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error
    notes = _refuse_other_llama(model, config, stated, subject, trained_on, named)
    wrong = {n: s for n, s in stated.items() if not _same(s.value, _setting(config, n)) and not _free(n, config)}
    if wrong:
        lines = "\n".join(
            f"  {name}: the checkpoint has {text(s.value)} ({s.where}), the recipe {text(_setting(config, name))}"
            for name, s in wrong.items()
        )
        raise UserError(f"{subject}: was trained with other settings.\n{lines}\nMend: add {' '.join(overrides(wrong))}")
    return notes


def _refuse_other_llama(
    model: Model,
    config: VamosConfig,
    stated: Mapping[str, Stated],
    subject: str,
    trained_on: str | None,
    named: str,
) -> list[str]:
    sizes = {name: stated[f"model.llama.{name}"].value for name in ("dim", "layers", "heads")}
    wanted = {name: getattr(config.llama, name) for name in sizes}
    if sizes != wanted:
        raise UserError(
            f"{subject}: was trained on {_size(sizes)}, {named} is {_size(wanted)}: prompts and gates of one "
            "size fit no other. Mend: the recipe and --base of the LLaMA that it was trained on."
        )
    args = arguments_of(model)
    path = args.get("llama_model_path")
    of_recipe = (model.settings or {}).get("llama")
    where = "nothing in it says so"
    trained: int | None = None
    if trained_on is not None:
        trained, where = GENERATIONS.index(trained_on) + 1, f"--trained-on {trained_on}"
    elif of_recipe and model.frozen_hash:  # ours: the hash is compared besides
        its = LlamaBaseConfig(**of_recipe)
        trained, where = generation_of(its), f"its own recipe: {describe_llama(its)}"
    elif path is not None:
        trained, where = generation_in(path), f"args.llama_model_path = {path!r}"
    wants = generation_of(config.llama)
    mend = "Mend: the recipe and --base of the LLaMA that it was trained on"
    if trained is not None and wants is not None and trained != wants:
        why = (
            "their tokenizers number words differently"
            if 3 in (trained, wants)
            else "same sizes and words, other weights"
        )
        raise UserError(
            f"{subject}: was trained on LLaMA {trained} ({where}), but {named} is {describe_llama(config.llama)}: "
            f"{why}, and its answers would be noise. {mend}; or, where the path misleads, --trained-on llama{wants}."
        )
    if trained is None and path is not None and wants == 3:
        raise UserError(
            f"{subject}: was trained on LLaMA 1 or 2 ({where} does not have 'llama3' in it, by which the original "
            f"chose the tokenizer), but {named} is {describe_llama(config.llama)}. {mend}, or --trained-on llama3."
        )
    if of_recipe and model.frozen_hash and trained is None:
        return []  # by hash alone
    if trained is not None or wants is None:
        return [] if trained is not None else [f"which LLaMA it was trained on is not compared: {where}"]
    told = "LLaMA 1 or 2" if path is not None else "LLaMA 1, 2 or 3"
    return [
        f"WARNING: it cannot be told whether this checkpoint was trained on {told} ({where}); {named} is "
        f"{describe_llama(config.llama)}. On another one it answers at chance. --trained-on states it"
    ]


def _size(sizes: Mapping[str, int]) -> str:
    names = [n for n, row in SIZES.items() if row[:3] == (sizes["dim"], sizes["layers"], sizes["heads"])]
    known = f" (as {' and '.join(names)})" if names else ""
    return f"a LLaMA of dim {sizes['dim']}, {sizes['layers']} layers, {sizes['heads']} heads{known}"


def _setting(config: VamosConfig, name: str) -> Any:
    """What the recipe says, with what it leaves to its LLaMA filled in."""
    filled = decisive_settings(to_dict(config))
    name = name.removeprefix("model.")
    if name in filled:
        return filled[name]
    group, _, last = name.rpartition(".")
    return getattr(config.llama if group else config, last)


def _free(name: str, config: VamosConfig) -> bool:
    """Whether the recipe has no use for what this setting describes: a model without video has no projector."""
    return not config.use_video and name in ("model.feature_dim", "model.projector", "model.num_frames")


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None or isinstance(one, str):
        return one == other
    return abs(float(one) - float(other)) < 1e-9


def overrides(stated: Mapping[str, Stated]) -> list[str]:
    """Settings as `key=value` for a recipe's command line."""
    return [f"{name}={text(s.value)}" for name, s in stated.items()]


def text(value: Any) -> str:
    """A value as the command line has it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def shown(stated: Mapping[str, Stated], left_out: Sequence[str] = ()) -> str:
    """One line: the overrides of a checkpoint, without those of a recipe's own LLaMA."""
    return " ".join(
        overrides({n: s for n, s in stated.items() if not n.startswith("model.llama.") and n not in left_out})
    )
