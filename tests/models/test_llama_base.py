"""One LLaMA from Meta's files or a Hugging Face folder, checked against what the recipe says it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_llama
import torch

from vlm.models.llama_base import SIZES, LlamaBaseConfig, llama
from vlm.types import UserError
from vlm.weights import META_LAYER_TABLE, halves_to_pairs

PARAMS = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "vocab_size": -1,
    "multiple_of": 16,
}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path, torch.nn.Module]:
    """(Meta's folder, Hugging Face folder, model): the same random weights."""
    with pytest.warns(UserWarning, match="RANDOM"):
        model = small_llama.base(random_seed=5).build()
    state = model.state_dict()
    meta = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
        "rope.freqs": torch.zeros(4),
    }
    for number in range(3):
        for theirs, ours in META_LAYER_TABLE:
            tensor = state[f"model.layers.{number}.{ours}"]
            if ours in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                tensor = halves_to_pairs(tensor, 4 if "q_proj" in ours else 2)
            meta[f"layers.{number}.{theirs}".replace("\\", "")] = tensor
    folder = tmp_path / "meta"
    folder.mkdir()
    # two shards, as a model of 13B has
    split = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}
    for part in range(2):
        shard = {
            name: tensor if (cut := split.get(name.split(".")[-2])) is None else tensor.chunk(2, cut)[part].clone()
            for name, tensor in meta.items()
        }
        torch.save(shard, folder / f"consolidated.0{part}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path / "hf")
    return folder, tmp_path / "hf", model


def outputs(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 40)[None]).logits


def test_both_forms_are_the_same_model(written: tuple[Path, Path, torch.nn.Module]) -> None:
    meta, hf, model = written
    for folder in (meta, hf):
        loaded = small_llama.base(path=folder).build()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), f"{folder.name}: {name}"
        torch.testing.assert_close(outputs(loaded), outputs(model), atol=2e-5, rtol=0)
        assert not any(p.requires_grad for p in loaded.parameters())


def test_lower_blocks_left_out(written: tuple[Path, Path, torch.nn.Module]) -> None:
    loaded = small_llama.base(path=written[0]).build(skip=2)
    assert len(loaded.model.layers) == 1
    want = written[2].model.layers[2].state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.model.layers[0].state_dict().items())


def test_stored_precision(written: tuple[Path, Path, torch.nn.Module]) -> None:
    loaded = small_llama.base(path=written[0], dtype="bfloat16").build()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_one_matrix_for_both_ends(tmp_path: Path, written: tuple[Path, Path, torch.nn.Module]) -> None:
    """Small Hugging Face models store the embedding alone."""
    state = {n: t.clone() for n, t in written[2].state_dict().items() if n != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = small_llama.base(path=tmp_path).build()
    assert torch.equal(loaded.lm_head.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"dim": 64}, ("dim 64", "model.layers.0.self_attn.q_proj.weight", "[32, 32]")),
        ({"hidden": 64}, ("mlp.up_proj.weight",)),
        ({"vocab_size": 61}, ("vocabulary 61", "model.embed_tokens.weight", "[60, 32]")),
        ({"norm_eps": 1e-5}, ("params.json", "norm_eps = 1e-06", "model.llama.norm_eps = 1e-05", "Mend")),
        ({"layers": 4}, ("n_layers = 3", "model.llama.layers = 4")),
        ({"heads": 8}, ("n_heads = 4", "model.llama.heads = 8")),
    ],
)
def test_another_llama_is_refused(
    written: tuple[Path, Path, torch.nn.Module], change: dict[str, float], parts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        small_llama.base(**{"path": written[0], **change}).build()
    assert all(part in str(caught.value) for part in (*parts, str(written[0])))


def test_hugging_face_config_is_compared_too(written: tuple[Path, Path, torch.nn.Module]) -> None:
    with pytest.raises(UserError, match=r"config\.json: says rms_norm_eps = 1e-06.*norm_eps = 1e-05"):
        small_llama.base(path=written[1], norm_eps=1e-5).build()
    with pytest.raises(UserError, match=r"rope_theta = 10000\.0"):
        small_llama.base(path=written[1], rope_theta=5e5).build()


def test_scaled_rotary_is_refused(written: tuple[Path, Path, torch.nn.Module]) -> None:
    (written[0] / "params.json").write_text(json.dumps({**PARAMS, "use_scaled_rope": True}))
    with pytest.raises(UserError, match=r"LLaMA 3\.1"):
        small_llama.base(path=written[0]).build()


def test_damaged_files_are_named(written: tuple[Path, Path, torch.nn.Module]) -> None:
    (written[0] / "params.json").write_text("{")
    with pytest.raises(UserError, match=r"params\.json"):
        small_llama.base(path=written[0]).build()
    (written[0] / "params.json").unlink()
    for part in range(2):
        shard = torch.load(written[0] / f"consolidated.0{part}.pth", weights_only=True)
        shard["layers.0.attention.wx.weight"] = shard["norm.weight"]
        torch.save(shard, written[0] / f"consolidated.0{part}.pth")
    with pytest.raises(UserError, match=r"wx"):
        small_llama.base(path=written[0]).build()


@pytest.mark.parametrize("name", list(SIZES))
def test_published_sizes(name: str) -> None:
    config = llama(name)
    with torch.device("meta"):
        model = config.build()
    assert config.hidden % 256 == 0
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(
        {"7b": 6.74, "13b": 13.0, "33b": 32.5, "65b": 65.3, "8b": 8.03}[name.split("_")[1]], rel=0.01
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"dim": 30}, "even width"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"vocab_size": 0}, "vocab"),
    ],
)
def test_impossible_sizes(change: dict[str, int], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        LlamaBaseConfig(**{"dim": 32, "heads": 4, **change})


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="llama4"):
        llama("llama4_1b")
