"""Recorded models of Video-ChatGPT and of its variant as ours: sizes, weights and rows are read from the goldens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.data.packing import Row, pack
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.video_chatgpt import VideoChatGpt, VideoChatGptConfig
from vlm.types import IGNORE, Batch, TextRows

LOSS = {"rtol": 0.0, "atol": 1e-5}
LOGITS = {"rtol": 0.0, "atol": 5e-5}
GRADIENTS = {"rtol": 0.0, "atol": 1e-5}
NORMS = {"rtol": 3e-5, "atol": 1e-7}

PARTS = ("embeddings", "first_layer", "last_layer", "norm", "lm_head")
EMBEDDING = "llm.model.embed_tokens.weight"


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 20,
    "rms_norm_eps": 1e-6,
    "mm_hidden_size": 8,
}


def config_of(c: Mapping[str, Any], places: int, **settings: Any) -> VideoChatGptConfig:
    """Our settings for a recorded model."""
    llama = LlamaBaseConfig(
        dim=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        norm_eps=c["rms_norm_eps"],
    )
    return VideoChatGptConfig(llama=llama, frame_dim=c["mm_hidden_size"], num_video_tokens=places, **settings)


def build(c: Mapping[str, Any], state: Mapping[str, Tensor], places: int, **settings: Any) -> VideoChatGpt:
    """A recorded model, in evaluation mode."""
    config = config_of(c, places, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")  # they are replaced
        model = config.build()
    model.load_state_dict(to_ours(state, config.marks), strict=True)
    return model.eval()


def to_ours(state: Mapping[str, Tensor], marks: bool) -> dict[str, Tensor]:
    """Recorded names as ours; the last two rows of the embedding are the marks."""
    ours = {}
    for name, tensor in state.items():
        own = name.removeprefix("model.")
        if name.endswith("inv_freq"):
            continue
        is_ours = own.split(".")[0] in ("mm_projector", "pes", "reducers", "projecters")
        ours[own if is_ours else f"llm.{name}"] = tensor
    if marks:
        ours["video_marks"] = state["model.embed_tokens.weight"][-2:]
    return ours


def rows(inputs: Mapping[str, Tensor], patch: int) -> TextRows:
    """Recorded rows (B, L) without their padding; the video stands where `patch` is."""
    made, places = [], 0
    for number, seen in enumerate(inputs["attention_mask"].bool()):
        ids, labels = inputs["input_ids"][number][seen], inputs["labels"][number][seen]
        slots = (ids == patch).nonzero()[:, 0].tolist()
        video = (slots[0], slots[-1] + 1) if slots else (0, 0)
        places = max(places, len(slots))
        made.append(Row(tuple(ids.masked_fill(ids == patch, 0).tolist()), tuple(labels.tolist()), video, number))
    return pack(made, places)


def prompt(ids: Tensor, patch: int) -> TextRows:
    """One recorded row (1, L) to go on from."""
    inputs = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "attention_mask": torch.ones_like(ids)}
    return rows(inputs, patch)


def batch(features: Tensor, text: TextRows | None, prompts: TextRows | None = None) -> Batch:
    """Recorded features (B, N, D) or (B, N, Q, D) and their rows."""
    states = features if features.ndim == 4 else features[:, :, None]
    return Batch(
        keys=tuple(map(str, range(len(features)))),
        frame_tokens=states.flatten(0, 1),
        frame_counts=(features.shape[1],) * len(features),
        views={} if text is None else {"dialogue": text},
        prompts=prompts,
    )


def learn(model: VideoChatGpt, given: Batch) -> float:
    """The mean loss, with its gradients in the model."""
    model.zero_grad()
    term = model(given)["dialogue"]
    assert model.counts(given) == {"dialogue": term.count}
    loss = term.total / term.count
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def logits(model: VideoChatGpt, given: Batch, length: int) -> Tensor:
    """(B, length, words) of all tokens of all rows; 0 in padding."""
    text = given.views["dialogue"]
    parts = model.logits(model.read(["dialogue"], [text], given)).split(text.lengths)
    return torch.stack([torch.nn.functional.pad(part, (0, 0, 0, length - len(part))) for part in parts])


def gradient_norms(model: VideoChatGpt) -> dict[str, float]:
    """By recorded names; marks are rows of the embedding."""
    found = {name: p.grad.double().norm() for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: found[name] for name in found if name != "video_marks"}
    if "video_marks" in found:
        norms[EMBEDDING] = torch.hypot(found["video_marks"], norms.get(EMBEDDING, torch.zeros(()).double()))
    return {recorded(name): float(norm) for name, norm in norms.items()}


def recorded(name: str) -> str:
    return name.removeprefix("llm.") if name.startswith("llm.") else f"model.{name}"


def embedding_row_norms(model: VideoChatGpt, only: Sequence[int]) -> Tensor:
    """Norms of gradients of the embedding's rows."""
    whole = model.get_parameter(EMBEDDING).grad
    rows = torch.zeros_like(model.get_parameter(EMBEDDING)) if whole is None else whole.clone()
    if model.config.marks:
        assert not rows[-2:].any()
        rows[-2:] = model.video_marks.grad
    return rows[list(only)].norm(dim=1)
