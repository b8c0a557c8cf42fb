"""Names of published tensors: every family maps to ours and back to the bit, and refuses what it does not know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VideoMAEConfig as HfConfig
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import LlmvaConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.models.published import (
    FAMILIES,
    FINETUNE,
    FROZEN,
    LLAMA,
    LLAMA_VQA,
    LLMVA,
    PRETRAIN,
    VAMOS,
    VIDEO_LLAMA,
    VIT_LLAMA,
    from_ours,
    kind_of,
    to_ours,
)
from vlm.models.system import System
from vlm.models.vamos import llama_vqa, vamos
from vlm.models.video_llama import VideoLlamaConfig
from vlm.models.video_mae import VideoMAEConfig
from vlm.models.vit_llama import LlamaLayerConfig, ViTLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.types import UserError

TINY = {"dim": 12, "depth": 11, "heads": 3, "image_size": 32, "patch_size": 16, "num_frames": 4}
CLASSIFIER = ViTLlamaConfig(**TINY, num_classes=5)
SMALL = LlamaBaseConfig(dim=16, layers=11, heads=2, hidden=24, vocab_size=30)
SEEN = {"frame_dim": 12, "qformer": QFormerConfig(dim=12, heads=3, hidden=20, layers=11)}
CONFIGS: dict[str, Any] = {
    PRETRAIN: VideoMAEConfig(**TINY, decoder_dim=8, decoder_depth=2, decoder_heads=2),
    FINETUNE: CLASSIFIER,
    VIT_LLAMA: ViTLlamaConfig(
        **TINY, num_classes=5, llama=LlamaLayerConfig(dim=16, heads=2, num_layers=2, multiple_of=8)
    ),
    VAMOS: vamos(llama=SMALL, projector="mlp"),
    LLAMA_VQA: llama_vqa(llama=SMALL),
    VIDEO_LLAMA: VideoLlamaConfig(tower=None, **SEEN, llama=SMALL),
    LLMVA: LlmvaConfig(**SEEN, other_dim=10, opt=OptBaseConfig(dim=16, layers=1, heads=2, hidden=24, vocab_size=30)),
}


def model(kind: str) -> System:
    with torch.device("meta"):
        return CONFIGS[kind].build()


def values(kind: str) -> dict[str, Tensor]:
    """What our checkpoints hold of a model, with other numbers in each tensor, in the model's order."""
    generator = torch.Generator().manual_seed(3)
    state = {name: t for name, t in model(kind).state_dict().items() if not name.startswith("llm.")}
    return {name: torch.randn(t.shape, generator=generator) for name, t in state.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_kind_is_seen_in_every_family(kind: str) -> None:
    for family, row in FAMILIES.items():
        if kind in row.pairs:
            assert kind_of(from_ours(values(kind), family, kind)) == kind
    assert kind_of(model(kind).state_dict()) == kind


def test_gated_kinds_are_told_by_their_gates() -> None:
    assert kind_of({"tok_embeddings.weight": 0}) == kind_of({"model.embed_tokens.weight": 0}) == LLAMA
    assert kind_of({"layers.11.attention.gate": 0}) == kind_of({"adapter_query.weight": 0}) == VAMOS
    assert kind_of({"adapter_query.weight": 0, "layers.11.attention.gate2": 0}) == LLAMA_VQA
    with pytest.raises(UserError, match=r"Vamos' \.pth has no form for a LLaMA-VQA or ViCo"):
        to_ours(values(LLAMA_VQA), "vamos", LLAMA_VQA)
    with pytest.raises(UserError, match=r"attention\.gates.*nearest: layers\.0\.attention\.gate"):
        to_ours({**values(VAMOS), "layers.3.attention.gates": torch.zeros(1)}, "vamos", VAMOS)


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match=r"no known kind.*begins with: embeddings\.word"):
        kind_of({"embeddings.word": 0})


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f, row in FAMILIES.items() for k in row.pairs if k in CONFIGS])
def test_round_trip(family: str, kind: str) -> None:
    ours = values(kind)
    theirs = from_ours(ours, family, kind)
    back = to_ours(theirs, family, kind)
    assert list(back) == list(ours)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in ours.items())
    again = from_ours(back, family, kind)
    assert list(again) == list(theirs)
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


GOLDEN_KINDS = {
    "vit_small_patch16_224": ("videomae", FINETUNE),
    "vit_base_patch16_224": ("videomae", FINETUNE),
    "vit_llama_small_patch16_224": ("vit_llama", VIT_LLAMA),
    "vit_llama_base_patch16_224": ("vit_llama", VIT_LLAMA),
    "pretrain_videomae_small_patch16_224": ("videomae", PRETRAIN),
    "pretrain_videomae_base_patch16_224": ("videomae", PRETRAIN),
}


@pytest.mark.parametrize("name", GOLDEN_KINDS)
def test_every_published_name_is_known(golden: Callable[[str], Path], name: str) -> None:
    """The originals' full-size names, as recorded from their code, map to our names and back without a rest."""
    family, kind = GOLDEN_KINDS[name]
    shapes = json.loads(golden("vitllama_state_dict_shapes.json").read_text())[name]["state_dict"]
    theirs = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert kind_of(theirs) == kind
    ours = to_ours(theirs, family, kind)
    back = from_ours(ours, family, kind)
    assert {key: list(t.shape) for key, t in back.items()} == shapes
    frozen = [n for n in ours if re.fullmatch(FROZEN[kind], n)]
    assert len(frozen) == (10 if kind == VIT_LLAMA else 0)


@pytest.mark.parametrize("kind", [FINETUNE, PRETRAIN])
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_names_are_those_of_the_installed_transformers(kind: str, mean_pooling: bool) -> None:
    """Read from the classes themselves: what we write has exactly the names that a model of theirs has."""
    config = HfConfig(
        hidden_size=12, num_hidden_layers=11, num_attention_heads=3, intermediate_size=48, image_size=32, num_frames=4,
        decoder_hidden_size=8, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=32,
        use_mean_pooling=mean_pooling and kind == FINETUNE, num_labels=5,
    )  # fmt: skip
    with torch.device("meta"):
        cls = VideoMAEForPreTraining if kind == PRETRAIN else VideoMAEForVideoClassification
        theirs = {name: list(t.shape) for name, t in cls(config).state_dict().items()}
    ours = values(kind)
    if kind == FINETUNE and not mean_pooling:
        ours = {name.replace("fc_norm.", "norm."): t for name, t in ours.items()}
    written = {name: list(t.shape) for name, t in from_ours(ours, "hf", kind).items()}
    spelled = {n.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias"): s for n, s in written.items()}
    assert spelled == theirs
    both = [{n: torch.zeros(s) for n, s in names.items()} for names in (written, spelled)]
    assert to_ours(both[0], "hf", kind).keys() == to_ours(both[1], "hf", kind).keys() == ours.keys()


def test_hugging_face_thirds() -> None:
    ours = values(FINETUNE)
    theirs = from_ours(ours, "hf", FINETUNE)
    stem = "videomae.encoder.layer.10.attention.attention"
    parts = [theirs[f"{stem}.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), ours["blocks.10.attn.qkv.weight"])
    del theirs[f"{stem}.key.weight"]
    with pytest.raises(UserError, match=r"blocks\.10\.attn\.qkv\.weight: its part blocks\.10\.attn\.k\.weight is not"):
        to_ours(theirs, "hf", FINETUNE)


def test_unknown_names_are_listed_with_the_nearest() -> None:
    theirs = from_ours(values(FINETUNE), "videomae", FINETUNE)
    theirs["block.0.norm1.weight"] = theirs.pop("blocks.0.norm1.weight")
    with pytest.raises(UserError, match=r"(?s)1 tensors.*block\.0\.norm1\.weight  \(nearest: blocks\.0\.norm1"):
        to_ours(theirs, "videomae", FINETUNE)


def test_two_spellings_of_one_bias() -> None:
    theirs = from_ours(values(FINETUNE), "hf", FINETUNE)
    stem = "videomae.encoder.layer.0.attention.attention"
    theirs[f"{stem}.query.bias"] = theirs[f"{stem}.q_bias"]
    with pytest.raises(UserError, match=r"q_bias and .*query\.bias would both become blocks\.0\.attn\.q_bias"):
        to_ours(theirs, "hf", FINETUNE)


def test_a_family_without_the_kind() -> None:
    with pytest.raises(UserError, match=r"VideoMAE's \.pth has no form for a ViT video classifier with frozen LLaMA"):
        from_ours(values(VIT_LLAMA), "videomae", VIT_LLAMA)


def test_layer_scale_has_no_place_in_hugging_face() -> None:
    with torch.device("meta"):
        scaled = ViTLlamaConfig(**TINY, num_classes=5, init_values=0.1).build()
    state = {name: torch.zeros(t.shape) for name, t in scaled.state_dict().items()}
    assert from_ours(state, "videomae", FINETUNE).keys() == state.keys()
    with pytest.raises(UserError, match=r"22 tensors have names.*\n  blocks\.0\.gamma_1"):
        from_ours(state, "hf", FINETUNE)
