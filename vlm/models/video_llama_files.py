"""Files of Video-LLaMA, MiniGPT-4 and LLMVA-GEBC (what trains), of LAVIS and BLIP-2 (EVA and Q-Former).

All become a `Model` under our names (vlm/models/video_llama_names.py). What our models have no use for (text halves of
a Q-Former, EVA's 40th block, projections to other language models) is kept as `published.<its name>`, so that a file
returns whole; buffers that are worked out anew are kept as numbers in `source`. The audio branch is left behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.models import video_llama_names as names
from vlm.models.formats import Model, save_published, source_of
from vlm.models.llama_facts import read_json
from vlm.models.llama_files import Tensors, shared_out
from vlm.models.name_tables import table
from vlm.models.published import BRANCHES, FAMILIES, LLMVA, TOWER, kind_of
from vlm.types import UserError
from vlm.weights import Loader, atomic_file, open_tensors, read_checkpoint, rename, write_safetensors

PTH_FAMILIES = ("video_llama", "llmva", "lavis")
ASIDE = "published."
LONE_HEAD = "llm.lm_head.weight"
"""OPT's output layer is its embedding, which LLMVA-GEBC's filter of frozen tensors did not see."""
_AUDIO = re.compile(r"audio_.*")
_TEXT_HALF = r"encoder\.layer\.\d+\.(intermediate|output)\..+"
_ASIDE = re.compile(
    rf"Qformer\.(cls\..+|bert\.(pooler|embeddings\.(word|position)_embeddings)\..+|bert\.{_TEXT_HALF})|temp|"
    rf"(t5_proj|opt_proj|llm_proj|vision_proj|text_proj|itm_head|t5_model|llm_model)\..+|qformer\.{_TEXT_HALF}|"
    r"(language_model|language_projection|embeddings|itm_head|vision_projection|text_projection)\..+|mask_token|"
    r"(norm|fc_norm|head|lm_head)\..+"
)
_EVA = "visual_encoder."
_EVA_BLOCKS = 39
"""Of ViT-g's 40: the features are what the last but one gives (BLIP-2)."""


# ------------------------------------------------------------------------------------------ reading


def read(family: str, path: Path, key: str | None) -> Model:
    """A .pth of Video-LLaMA, LLMVA-GEBC or LAVIS. UserError: names it has not, or nothing but the audio branch."""
    found = read_checkpoint(path, key)
    audio = [name for name in found.tensors if _AUDIO.fullmatch(name)]
    own = {name: tensor for name, tensor in found.tensors.items() if name not in audio}
    constants = {name: tensor for name, tensor in own.items() if names.CONSTANTS.fullmatch(name)}
    own = {name: tensor for name, tensor in own.items() if name not in constants}
    if audio and not own:
        raise UserError(
            f"{path}: holds the audio branch alone ({len(audio)} tensors, {audio[0]} among them). It hangs on "
            "ImageBind, whose weights are for non-commercial use, and is not part of this project. Mend: the file of "
            "the vision branch (VL_…, pretrain-… or finetune-… without audio in its name)."
        )
    try:
        kind = kind_of(own)
        FAMILIES[family].table(kind, to_ours=True)
        tensors = _to_ours(own, family, kind)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    dropped = [f"{len(audio)} tensors of the audio branch (audio_…)"] if audio else []
    order = [name for name in found.tensors if name not in audio]
    source, lost = source_of(family, path, found, order, constants)
    dropped += lost
    model = Model(kind=kind, tensors=tensors, source=source, dropped=dropped, unused=aside(tensors))
    if constants:
        shown = ", ".join(sorted(constants)[:2]) + " …" * (len(constants) > 2)
        model.notes.append(f"no tensors of ours, since they are worked out anew: {len(constants)} buffers ({shown})")
    return model


def aside(tensors: Mapping[str, Any]) -> frozenset[str]:
    """Names of what is kept for the way back alone."""
    return frozenset(name for name in tensors if name.startswith(ASIDE))


def _to_ours(own: Mapping[str, Tensor], family: str, kind: str) -> dict[str, Tensor]:
    """Published tensors without constants and audio -> ours; what has no use here under `published.`."""
    eva = "cls_token" in own  # EVA's own file has no prefix
    blocks = {int(m[1]) for name in own if (m := re.match(r"blocks\.(\d+)\.", name))}
    last = re.compile(rf"blocks\.{_EVA_BLOCKS}\..+" if len(blocks) == _EVA_BLOCKS + 1 else r"(?!)")
    kept, tensors = {}, {}
    for name, tensor in own.items():
        trained = kind in BRANCHES and name.startswith("opt_proj.")
        if not trained and (_ASIDE.fullmatch(name) or last.fullmatch(name)):
            tensors[ASIDE + name] = tensor
        else:
            kept[f"{_EVA}{name}" if eva else name] = tensor
    return names.to_ours(kept, FAMILIES[family].pairs[kind]) | tensors


def read_blip2(path: Path) -> Model:
    """A Hugging Face BLIP-2 folder, its tensors read when they are needed. UserError: names that no such folder has."""
    stored = open_tensors(path)
    own = {name: load for name, load in stored.items() if not _ASIDE.fullmatch(name)}
    loaders: dict[str, Loader] = {ASIDE + name: load for name, load in stored.items() if name not in own}
    try:
        renamed = rename(own, table(names.BLIP2, to_ours=True))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tensors = Tensors({renamed[name]: load for name, load in own.items()} | loaders)
    weights = r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|config\.json"
    dropped = sorted(p.name for p in path.iterdir() if not re.fullmatch(weights, p.name))
    source = {"format": "hf", "file": path.name, "config": read_json(path / "config.json")}
    return Model(kind=TOWER, tensors=tensors, source=source, dropped=dropped, unused=aside(tensors))


def leave(model: Model, left: Callable[[str], bool], what: str) -> None:
    """Take the tensors of such names out of a model, and say so."""
    gone = [name for name in model.tensors if left(name)]
    if not gone:
        return
    if isinstance(model.tensors, Tensors):
        model.tensors = Tensors({name: load for name, load in model.tensors.loaders.items() if name not in gone})
    else:
        model.tensors = {name: tensor for name, tensor in model.tensors.items() if name not in gone}
    model.unused = aside(model.tensors)
    model.dropped.append(f"{what} ({len(gone)} tensor{'s' * (len(gone) > 1)})")


def is_blip2_folder(path: Path) -> bool:
    """Whether a Hugging Face folder says that it holds a BLIP-2."""
    file = path / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "blip-2"


def join(model: Model, other: Model, subject: str) -> None:
    """Add a file's tensors to another's: EVA and Q-Former are published in two. UserError: both have one tensor."""
    if model.kind != TOWER or other.kind != TOWER:
        raise UserError(f"{subject}: --also joins EVA's file and a Q-Former's, and one of these is neither.")
    twice = sorted(model.tensors.keys() & other.tensors.keys())
    if twice:
        raise UserError(f"{subject}: both hold {twice[0]}; which one counts cannot be told.")
    model.tensors = {**model.tensors, **other.tensors}
    model.unused = aside(model.tensors)
    model.dropped += other.dropped
    model.notes += other.notes
    rest = {name: value for part in (other, model) for name, value in part.source.get("rest", {}).items()}
    constants = {**model.source["constants"], **other.source["constants"]}
    file = f"{model.source['file']} and {other.source['file']}"
    container = model.source["container"] or other.source["container"]
    model.source = {"format": "lavis", "file": file, "container": container, "rest": rest, "constants": constants}


# ------------------------------------------------------------------------------------------ writing


def published(family: str, model: Model) -> dict[str, Tensor]:
    """The tensors by a family's names, without constants. UserError: a family that has no such kind."""
    FAMILIES[family].table(model.kind, to_ours=False)
    pairs = names.BLIP2 if family == "hf" else FAMILIES[family].pairs[model.kind]
    if model.kind == LLMVA and "opt_proj.weight" in model.tensors:
        pairs = [pair for pair in pairs if pair[1] != "llama_model.{rest}"]
    own = {name: model.tensors[name] for name in model.tensors if name not in model.unused}
    named = names.from_ours(own, pairs)
    if family == "lavis" and all(name.startswith(_EVA) for name in named):
        named = {name.removeprefix(_EVA): tensor for name, tensor in named.items()}
    return named | {name.removeprefix(ASIDE): model.tensors[name] for name in sorted(model.unused)}


def write(family: str, path: Path, model: Model) -> None:
    """A .pth as the original has it: the source's container, order, buffers and further entries where it was one."""
    save_published(path, published(family, model), model, family)


def write_blip2(path: Path, model: Model) -> None:
    """A Hugging Face folder: the source's config.json, else one that is made; files of at most 5 GB."""
    stated = model.source["config"] if model.source.get("format") == "hf" else model.hf_config
    assert stated is not None
    path.mkdir()
    with atomic_file(path / "config.json") as file:
        file.write((json.dumps(stated, indent=2) + "\n").encode())
    named = published("hf", model)
    parts = shared_out({name: tensor.nbytes for name, tensor in named.items()})
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        write_safetensors(path / name, {tensor: named[tensor] for tensor in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in named.values())}, "weight_map": weight_map}
        with atomic_file(path / "model.safetensors.index.json") as file:
            file.write((json.dumps(index, indent=2) + "\n").encode())
