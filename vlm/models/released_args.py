"""`args` for a checkpoint of ours that becomes a released file: the command line its original would have had.

Flags and their defaults are those of Vamos, Flipped-VQA and ViCo; what our recipe says is put in their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.models.formats import Model
from vlm.models.gated_sizes import sizes_of
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.published import VAMOS
from vlm.models.released import VAMOS_THETA, arguments_of, generation_in, generation_of
from vlm.types import UserError

_COMMON: dict[str, Any] = {
    "batch_size": 64, "epochs": 400, "accum_iter": 1, "llama_model_path": "./pretrained/llama/",
    "model": "llama7B_adapter", "adapter_layer": 32, "adapter_len": 10, "max_seq_len": 512, "max_feats": 10,
    "weight_decay": 0.05, "lr": None, "blr": 1e-3, "min_lr": 0.0, "warmup_epochs": 40, "dataset": "nextqa",
    "output_dir": "./output_dir", "device": "cuda", "seed": 0, "resume": "", "start_epoch": 0, "num_workers": 2,
    "pin_mem": True, "world_size": 1, "local_rank": -1, "dist_on_itp": False, "dist_url": "env://", "bias": 3.0,
    "tau": 100.0,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vamos": {
        **_COMMON, "project_name": "nextqa", "exp_name": None, "use_cap": False, "use_vis": False, "precision": "bf16",
        "proj_type": "linear", "cap_model": "13b", "vis_model": "clip", "alter_train": False,
    },
    "flipped": {**_COMMON, "vaq": False, "qav": False, "sub": False},
    "vico": {
        **_COMMON, "batch_size": 8, "model": "7B", "sub": False, "init_eval": False, "cap": 1.0, "max_cap_len": 256,
    },
}  # fmt: skip
_SETS = ("nextqa", "intentqa", "ptest", "star", "tvqa")


def released_args(family: str, model: Model) -> dict[str, Any]:
    """Flags of one of the originals, from the checkpoint's own recipe or, failing that, from another original's args.

    UserError: neither is there, or the recipe has what the original cannot do.
    """
    args = dict(_DEFAULTS[family])
    theirs = arguments_of(model)
    if not theirs and not model.settings:
        raise UserError(
            f"the checkpoint holds neither its recipe nor args, and {family}'s files have args. Mend: name the recipe "
            "it belongs to (--recipe)."
        )
    args |= {name: value for name, value in theirs.items() if name in args}
    if model.settings:
        args |= _of_model(family, model)
        if "llama" in model.settings:
            args |= _of_llama(LlamaBaseConfig(**model.settings["llama"]))
    inputs = model.run.get("inputs") or {}
    if family == "vamos" and inputs.get("use_video") is False and not inputs.get("blind_placeholders"):
        model.notes.append(
            f"its rows have no places for video; the original's keep {args['max_feats']} of them, filled with token "
            "0, so the same question is another row there (inputs.blind_placeholders trains with them)"
        )
    if model.run:
        args |= {name: value for name, value in _of_run(model.run).items() if name in args}
    return args


def _of_model(family: str, model: Model) -> dict[str, Any]:
    assert model.settings is not None
    settings = model.settings
    sizes = sizes_of(model.tensors, model.kind)
    prompted = settings.get("adapter_layer") or sizes.layers
    if prompted < sizes.layers and not settings.get("skip_lower_blocks"):
        raise UserError(
            f"model.adapter_layer is {prompted} of {sizes.layers} blocks and model.skip_lower_blocks false: the "
            "original never runs the blocks below the prompted ones, so no file of its would compute the same."
        )
    found = {"adapter_layer": prompted, "adapter_len": settings["adapter_len"], "max_feats": settings["num_frames"]}
    if family == "vamos":
        found |= {"proj_type": settings["projector"], "use_vis": settings["use_video"]}
    if model.kind != VAMOS:
        found |= {"bias": settings["video_bias"], "tau": settings["tau"]}
    theta = settings.get("rope_theta") or settings.get("llama", {}).get("rope_theta", 10_000.0)
    # no flag of the originals: they ignore it, and we read it again
    found["rope_theta"] = theta
    vocabulary = settings.get("llama", {}).get("vocab_size", 32000)
    would = VAMOS_THETA if family == "vamos" else 10_000.0
    if theta != would and (vocabulary == 32000 or family != "vamos"):
        model.notes.append(
            f"this model rotates with rope_theta {theta:g}, the original with {would:g} where params.json is silent: "
            + ('give it a params.json with "rope_theta"' if family == "vamos" else "the original has no setting for it")
        )
    return found


def _of_llama(llama: LlamaBaseConfig) -> dict[str, Any]:
    """llama_model_path and model: the folders of the LLaMA, if the original would then choose the right tokenizer."""
    generation = generation_of(llama)
    usual = {None: "llama", 1: "llama", 2: "llama2", 3: "llama3"}[generation]
    path = f"./pretrained/{usual}/"
    name = {4096: "8B" if generation == 3 else "7B", 5120: "13B", 6656: "33B", 8192: "65B"}.get(llama.dim, "7B")
    if llama.path is not None:
        folder = Path(llama.path)
        name = folder.name
        if generation_in(folder.parent) == generation:
            path = f"{folder.parent}/"
    return {"llama_model_path": path, "model": name}


def _of_run(run: dict[str, Any]) -> dict[str, Any]:
    """What a training run's recipe says beside the model."""
    inputs, views, optim = run.get("inputs") or {}, run.get("views") or {}, run.get("optim") or {}
    found: dict[str, Any] = {"vaq": "question" in views, "qav": "video_order" in views}
    if "caption" in views:
        found["cap"] = views["caption"]
    names = {
        "max_length": "max_seq_len",
        "max_caption_length": "max_cap_len",
        "dialogue": "sub",
        "alternate": "alter_train",
    }
    found |= {theirs: inputs[ours] for ours, theirs in names.items() if inputs.get(ours) is not None}
    if "use_video" in inputs:
        found |= {"use_vis": inputs["use_video"], "use_cap": inputs.get("caption") is not None}
    found |= {name: optim[name] for name in ("weight_decay", "lr", "min_lr") if name in optim}
    if "warmup_epochs" in optim:
        found["warmup_epochs"] = int(optim["warmup_epochs"])
    batch = run.get("global_batch_size")
    if batch:
        found |= {"batch_size": batch, "accum_iter": 1, "world_size": 1}
        if "lr" in optim:
            found["blr"] = optim["lr"] * 256 / batch
    if run.get("epochs"):
        found["epochs"] = int(run["epochs"])
    if "seed" in run:
        found["seed"] = run["seed"]
    shards = str((run.get("data") or {}).get("shards", ""))
    named = [name for name in _SETS if name in Path(shards).parts]
    return found | ({"dataset": named[0]} if named else {})
