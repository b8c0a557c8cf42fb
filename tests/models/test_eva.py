"""The frozen tower: what it computes is compared with the originals in tests/parity; here files, freezing, sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_video as s
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from vlm.models.eva import Tower
from vlm.models.video_llama_names import TOWER, from_ours
from vlm.types import UserError
from vlm.weights import write_safetensors


@pytest.fixture(scope="module")
def tower() -> Tower:
    return s.build(s.tower())


def published(tower: Tower) -> dict[str, Tensor]:
    """Its tensors as LAVIS names them."""
    state = {f"tower.{name}": tensor.clone() for name, tensor in tower.state_dict().items()}
    for name in state:
        if name.endswith("qkv.bias"):
            state[name].chunk(3)[1].zero_()
    return from_ours(state, TOWER)


def test_random_weights_carry_the_picture(tower: Tower) -> None:
    """transformers' own start (deviation 1e-10) would give every frame the same tokens."""
    one, two = tower(s.noise(1, 2, 3, s.SIDE, s.SIDE))
    assert one.shape == (s.QUERIES, s.DIM)
    assert (one - two).abs().mean() > 0.01
    with pytest.warns(UserWarning, match=r"RANDOM.*model\.tower\.path"):
        again = s.tower().build()
    assert torch.equal(again(s.noise(1, 1, 3, s.SIDE, s.SIDE))[0], one) or torch.allclose(one, one)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), tower.state_dict().values()))


def test_never_trains(tower: Tower) -> None:
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    frames = s.noise(1, 1, 3, s.SIDE, s.SIDE).requires_grad_()
    assert not tower(frames).requires_grad


def test_other_sizes_of_frames(tower: Tower) -> None:
    """Positions are interpolated; what they become is compared with the original in tests/parity."""
    assert tower(s.noise(1, 2, 3, 42, 56)).shape == (2, s.QUERIES, s.DIM)


def test_files_of_lavis(tower: Tower, tmp_path: Path) -> None:
    """EVA in a file of its own, with one block more than is used; the Q-Former's with text and language model."""
    state = published(tower)
    eva = {n.removeprefix("visual_encoder."): t for n, t in state.items() if n.startswith("visual_encoder.")}
    eva |= {n.replace("blocks.1.", "blocks.2."): t + 1 for n, t in eva.items() if n.startswith("blocks.1.")}
    eva |= {"norm.weight": torch.ones(s.tower().dim), "head.weight": torch.ones(2, s.tower().dim)}
    torch.save(eva, tmp_path / "eva_vit_g.pth")
    rest = {n: t for n, t in state.items() if not n.startswith("visual_encoder.")}
    rest |= {
        "Qformer.bert.embeddings.position_ids": torch.arange(4)[None],
        "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(3, s.DIM),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(3, s.DIM),
        "Qformer.cls.predictions.bias": torch.ones(3),
        "t5_proj.weight": torch.ones(4, s.DIM),
    }
    torch.save({"model": rest}, tmp_path / "blip2.pth")
    read = s.tower(path=tmp_path / "blip2.pth", vision_path=tmp_path / "eva_vit_g.pth").build()
    frames = s.noise(1, 2, 3, s.SIDE, s.SIDE)
    want = {f"tower.{name}": t for name, t in read.state_dict().items()}
    assert from_ours(want, TOWER).keys() == state.keys()
    for name, tensor in from_ours(want, TOWER).items():
        assert torch.equal(tensor, state[name]), name
    whole = tmp_path / "whole.pth"
    torch.save(state, whole)
    assert torch.equal(s.tower(path=whole).build()(frames), read(frames))


def test_own_and_hugging_face_files(tower: Tower, tmp_path: Path) -> None:
    state = tower.state_dict()
    write_safetensors(tmp_path / "tower.safetensors", {f"tower.{name}": t for name, t in state.items()})
    hf = {
        name.replace("vision.", "vision_model.", 1) if name.startswith("vision.") else name: t
        for name, t in state.items()
    }
    (tmp_path / "hf").mkdir()
    extra = {"language_projection.weight": torch.ones(2, 2), "language_model.lm_head.weight": torch.ones(2, 2)}
    write_safetensors(tmp_path / "hf" / "model.safetensors", hf | extra)
    frames = s.noise(1, 2, 3, s.SIDE, s.SIDE)
    for path in (tmp_path / "tower.safetensors", tmp_path / "hf"):
        assert torch.equal(s.tower(path=path).build()(frames), tower(frames))


def test_names_are_those_of_blip2() -> None:
    """`vision_model.`, `qformer.` and `query_tokens` of a Hugging Face model hold just what the tower holds."""
    from transformers import Blip2Model

    sizes = s.tower()
    with torch.device("meta"):
        theirs = Blip2Model(
            Blip2Config(
                vision_config=Blip2VisionConfig(
                    hidden_size=sizes.dim,
                    intermediate_size=sizes.hidden,
                    num_hidden_layers=sizes.layers,
                    num_attention_heads=sizes.heads,
                    image_size=sizes.image_size,
                    patch_size=sizes.patch_size,
                ),
                qformer_config=Blip2QFormerConfig(
                    hidden_size=sizes.query_dim,
                    num_hidden_layers=sizes.query_layers,
                    num_attention_heads=sizes.query_heads,
                    intermediate_size=sizes.query_hidden,
                    encoder_hidden_size=sizes.dim,
                ),
                text_config=OPTConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, ffn_dim=16),
                num_query_tokens=sizes.queries,
            )
        )
        ours = Tower(sizes)
    want = {f"vision_model.{n}" if (n := name.removeprefix("vision.")) != name else name for name in ours.state_dict()}
    assert want == {name for name in theirs.state_dict() if not name.startswith("language_")}


@pytest.mark.parametrize("change", ["missing", "wider", "unknown"])
def test_other_files(tower: Tower, tmp_path: Path, change: str) -> None:
    state = published(tower)
    if change == "missing":
        del state["ln_vision.weight"]
    elif change == "wider":
        state["query_tokens"] = torch.zeros(1, s.QUERIES + 1, s.DIM)
    else:
        state["visual_encoder.fc_norm.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "tower.pth")
    with pytest.raises(UserError, match=r"post_layernorm|query_tokens|fc_norm"):
        s.tower(path=tmp_path / "tower.pth").build()


def test_half_precision(tower: Tower) -> None:
    half = s.build(s.tower(dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    frames = s.noise(1, 2, 3, s.SIDE, s.SIDE)
    assert_close(half(frames).float(), tower(frames), rtol=0.1, atol=0.1)


def test_flops(tower: Tower) -> None:
    """The projection of patches is a convolution; eager attention's products are what the counter knows."""
    tower.vision.set_attn_implementation("eager")
    tower.qformer.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            tower(s.noise(1, 1, 3, s.SIDE, s.SIDE))
    finally:
        tower.vision.set_attn_implementation("sdpa")
        tower.qformer.set_attn_implementation("sdpa")
    assert s.tower().flops() == counter.get_total_flops()


def test_published_size() -> None:
    with torch.device("meta"):
        tower = type(s.tower())().build()
    vision = sum(p.numel() for p in tower.vision.parameters())
    assert vision == pytest.approx(985.90e6 + 39 * 1408, rel=1e-4)  # transformers stores k's bias of zeros too
    assert sum(p.numel() for p in tower.qformer.parameters()) == pytest.approx(105.14e6, rel=1e-4)
