"""What the recorded numbers of Vamos, Flipped-VQA and ViCo are checked with: goldens as our models, batches and rows.

Every size, seed and setting is read from the file. Tolerances are ten times what independent implementations were seen
to differ by (2e-6 losses, 1.5e-5 logits, 4e-6 gradients, 3e-6 relative gradient norms).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm.data.packing import Row, pack, pack_trees, share_prefixes
from vlm.models.llama_base import LlamaBaseConfig, read_llama
from vlm.models.vamos import Vamos, VamosConfig
from vlm.types import IGNORE, Batch, TextRows

LOSS = {"rtol": 0.0, "atol": 2e-5}
LOGITS = {"rtol": 0.0, "atol": 1.5e-4}
GRADIENTS = {"rtol": 0.0, "atol": 4e-5}
NORMS = {"rtol": 3e-5, "atol": 1e-7}

VIEWS = {"vqa": "answer", "vaq": "question", "qav": "video_order", "cap": "caption"}


def config_of(golden: Mapping[str, Any], adapter: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> VamosConfig:
    """Our settings for a recorded system."""
    args, params = golden["args"], golden["params_json"]
    system = golden["meta"]["system"]
    theta = params.get("rope_theta")
    llama = LlamaBaseConfig(
        dim=params["dim"],
        layers=params["n_layers"],
        heads=params["n_heads"],
        kv_heads=params.get("n_kv_heads"),
        hidden=base["layers.0.feed_forward.w1.weight"].shape[0],
        vocab_size=base["tok_embeddings.weight"].shape[0],
        norm_eps=params["norm_eps"],
        rope_theta=theta or 10000.0,
    )
    return VamosConfig(
        llama=llama,
        feature_dim=adapter[next(n for n in adapter if n.startswith("visual_proj") and n.endswith("weight"))].shape[1],
        num_frames=args["max_feats"],
        projector=args["proj_type"],
        temporal_embedding=system != "vamos",
        video_bias=None if system == "vamos" else args["bias"],
        tau=args["tau"],
        adapter_len=args["adapter_len"],
        adapter_layer=args["adapter_layer"],
        skip_lower_blocks=True,
        rope_theta=500000.0 if system == "vamos" and theta is None else None,
    )


def build(
    golden: Mapping[str, Any], base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], **changes: Any
) -> Vamos:
    """Our model with the recorded weights: the frozen LLaMA in Meta's names, the trained part in the original's."""
    config = config_of(golden, adapter, base)
    for name, value in changes.items():
        setattr(config, name, value)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")  # they are replaced below
        model = config.build()
    heads, kv_heads = config.llama.heads, config.llama.num_kv_heads
    loaders = {name: (lambda tensor=tensor: tensor) for name, tensor in base.items()}
    skipped = config.llama.layers - len(model.llm.model.layers)
    frozen = {}
    for name, load in read_llama(loaders, heads, kv_heads, "golden").items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match and int(match[1]) < skipped:
            continue
        new = name.replace(match[0], f"model.layers.{int(match[1]) - skipped}.", 1) if match else name
        frozen[f"llm.{new}"] = load()
    model.load_state_dict({**frozen, **adapter}, strict=True)
    return model


def rows_of(ids: Tensor, labels: Tensor, start: int, num_frames: int, sample: int, objective: str, video: bool) -> Row:
    """One recorded row without its padding. `labels` ignore 0 (the frame objective: -1)."""
    used = int(max(ids.nonzero().max(), start + num_frames - 1)) + 1
    ids, labels = ids[:used], labels[:used]
    if objective == "qav":
        labels = torch.zeros_like(labels)  # its targets are the frames themselves
    learnt = [int(label) if label else IGNORE for label in labels]
    place = (start, start + num_frames) if video else (0, 0)
    return Row(tuple(ids.tolist()), tuple(learnt), place, sample)


def split_of(recorded: Mapping[str, Any], objective: str, num_frames: int, video: bool) -> list[list[Row]]:
    """For each sample of a recorded batch the rows of its options (training: one)."""
    ids, labels = recorded["text_id"][objective], recorded["label"][objective]
    starts = recorded["video_start"][objective]
    return [
        [rows_of(ids[b, o], labels[b, o], int(starts[b]), num_frames, b, objective, video) for o in range(ids.shape[1])]
        for b in range(len(ids))
    ]


def batch_of(
    golden: Mapping[str, Any],
    recorded: Mapping[str, Any],
    objectives: list[str],
    *,
    video: bool,
    options: bool = False,
    shared: bool = False,
) -> Batch:
    """Our batch for a recorded one: a view an objective, or (options) the rows to choose from."""
    count = golden["args"]["max_feats"]

    def joined(objective: str) -> TextRows:
        questions = split_of(recorded, objective, count, video)
        if shared:
            return pack_trees([share_prefixes([rows]) for rows in questions], count)
        whole = [row for rows in questions for row in rows]
        leaves, first = [], 0
        for rows in questions:
            leaves.append(tuple(range(first, first + len(rows))))
            first += len(rows)
        return pack(whole, count, leaves)

    views = {} if options else {VIEWS[objective]: joined(objective) for objective in objectives}
    return Batch(
        keys=tuple(map(str, recorded["qid"])),
        features=recorded["video"].float() if video else None,
        views=views,
        options=joined("vqa") if options else None,
    )


def uses_video(golden: Mapping[str, Any]) -> bool:
    """Whether the recorded run put video tokens into its rows."""
    return golden["meta"]["system"] != "vamos" or golden["args"]["use_vis"]


def objectives_of(golden: Mapping[str, Any]) -> list[str]:
    """The objectives that the recorded run trained (Flipped-VQA lists those that are off with a loss of 0)."""
    extra = {"vamos": [], "flipped": [name for name in ("vaq", "qav") if golden["args"][name]], "vico": ["cap"]}
    return ["vqa", *extra[golden["meta"]["system"]]]


def weights_of(golden: Mapping[str, Any]) -> dict[str, float]:
    """View -> weight in the recorded objective."""
    return {VIEWS[name]: golden["args"]["cap"] if name == "cap" else 1.0 for name in objectives_of(golden)}
