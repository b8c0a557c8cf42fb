"""A checkpoint's sizes in one line, for any kind of model that is converted."""

from __future__ import annotations

from collections import Counter

from vlm.models import gated_sizes, video_llama_sizes, vit_sizes
from vlm.models.formats import Model
from vlm.models.published import BRANCHES, GATED, LLAMA, PROJECTION, TOWER, VIDEO_CHATGPT
from vlm.models.released import describe_llama


def describe(model: Model) -> str:
    """Sizes, number of tensors and of parameters, dtypes."""
    dtypes: Counter[str] = Counter()
    parameters = 0
    for tensor in model.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
        parameters += tensor.numel()
    if model.kind == LLAMA:
        assert model.llama is not None
        sizes = describe_llama(model.llama)
    elif model.kind == VIDEO_CHATGPT:
        sizes = _chatgpt(model)
    elif model.kind in (*BRANCHES, TOWER, PROJECTION):
        sizes = _seeing(model)
    else:
        sizes = _gated(model) if model.kind in GATED else _vit(model)
    return f"{sizes}; {len(model.tensors)} tensors, {parameters:,} parameters, {', '.join(dtypes)}"


def _gated(model: Model) -> str:
    sizes = gated_sizes.sizes_of(model.tensors, model.kind)
    parts = [f"LLaMA of width {sizes.dim}, {sizes.layers} layers, {sizes.heads} heads", f"{sizes.rows} prompt rows"]
    parts += [f"{sizes.projector} projector of {sizes.feature_dim}"] if sizes.feature_dim else ["no projector"]
    parts += [f"{sizes.frames} frames"] if sizes.frames else []
    return ", ".join(parts)


def _seeing(model: Model) -> str:
    own = {name: tuple(t.shape) for name, t in model.trainable().items() if name not in model.unused}
    if model.kind == PROJECTION:
        return "projection of {1} to {0}".format(*own["llama_proj.weight"])
    if model.kind == TOWER:
        held, tower = video_llama_sizes.parts_of(own), video_llama_sizes.tower_config(own)
        parts = [f"EVA of width {tower.dim}, {tower.layers} blocks, size {tower.image_size}"] * ("vision" in held)
        parts += [f"Q-Former of width {tower.query_dim}, {tower.query_layers} layers"] * ("qformer" in held)
        return ", ".join([*parts, *([f"{tower.queries} queries"] * ("query_tokens" in held))])
    config = video_llama_sizes.branch_config(own, model.kind)
    projection = video_llama_sizes.projection_of(own)
    parts = [f"Q-Former of width {config.qformer.dim}, {config.qformer.layers} layers", f"{config.max_frames} frames"]
    return ", ".join([*parts, f"{config.places} video tokens", f"{projection} to {own[f'{projection}.weight'][0]}"])


def _chatgpt(model: Model) -> str:
    own = {name: tuple(t.shape) for name, t in model.tensors.items() if name not in model.unused}
    parts = ["projector of {1} to {0}".format(*own["mm_projector.weight"])]
    parts += ["rows of <vid_start> and <vid_end>"] if "video_marks" in own else ["no rows of marks"]
    states = sum(name.startswith("reducers.") and name.endswith(".weight") for name in own)
    parts += [f"fusion of {states} states"] if states else []
    encodings = own.get("pes.0.positional_encodings")
    parts += [f"encodings of {encodings[0]} places"] if encodings else []
    held = sum(name.startswith("llm.") for name in own)
    return ", ".join([*parts, *([f"{held} tensors of the language model"] if held else [])])


def _vit(model: Model) -> str:
    sizes = vit_sizes.sizes_of(model.tensors, model.kind)
    parts = [f"width {sizes.width}", f"depth {sizes.depth}", f"cubes {sizes.tubelet}x{sizes.patch}x{sizes.patch}"]
    parts += [f"{sizes.num_classes} classes"] if sizes.num_classes else []
    parts += [f"decoder width {sizes.decoder_width}, depth {sizes.decoder_depth}"] if sizes.decoder_width else []
    if sizes.llama_width:
        held = f"{sizes.llama_layers} layer(s)" if sizes.llama_layers else "layers not included"
        parts.append(f"LLaMA width {sizes.llama_width}, {held}")
    return ", ".join(parts)
