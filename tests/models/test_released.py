"""What released checkpoints say of the LLaMA under them and of their settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import released as r
from vlm.data.questions import QuestionConfig
from vlm.models.formats import Model
from vlm.models.llama_base import SIZES, LlamaBaseConfig, llama
from vlm.models.released import (
    generation_in,
    generation_of,
    input_settings,
    other_inputs,
    overrides,
    refuse_mismatch,
    trained_with,
)
from vlm.models.vamos import VamosConfig, vamos, vico
from vlm.recipe import load
from vlm.types import UserError


def model(family: str, args: dict[str, object] | None = None, **sizes: object) -> Model:
    source = {"format": family, "rest": {"args": r.arguments(family, **(args or {}))}}
    return Model(kind=r.KIND_OF[family], tensors=r.tensors(family, **sizes), source=source)


@pytest.mark.parametrize(
    ("path", "generation"),
    [
        ("./pretrained/llama/", 1),
        ("./pretrained/llama2/", 2),
        ("./pretrained/llama3/", 3),
        ("/data/Meta-llama3-8B/original/", 3),
        ("pretrained/llama/7B", 1),
        ("weights/Llama-2-7b-hf", 2),
        ("weights/llama-7b", 1),
        ("weights/LLaMA_v2/13B", 2),
        ("/data/models/", None),
        ("/data/llama-adapter/weights/", None),
        ("", None),
    ],
)
def test_generation_by_path(path: str, generation: int | None) -> None:
    assert generation_in(path) == generation


@pytest.mark.parametrize("name", SIZES)
def test_generation_of_published_sizes(name: str) -> None:
    """By the numbers alone; only LLaMA-1 65B looks like neither, with its 1e-5, and needs its path."""
    unclear = name == "llama1_65b"
    assert generation_of(llama(name)) == (None if unclear else int(name[5]))
    assert generation_of(llama(name, path=Path(f"pretrained/{name[:6]}/x"))) == int(name[5])


def test_the_settings_of_released_files() -> None:
    stated = trained_with(model("vamos", {"adapter_layer": 2, "llama_model_path": "./pretrained/llama2/"}, rows=6))
    assert set(overrides(stated)) == {
        "model.llama.dim=16", "model.llama.layers=3", "model.llama.heads=2", "model.feature_dim=12",
        "model.projector=linear", "model.temporal_embedding=false", "model.num_frames=4", "model.adapter_len=3",
        "model.adapter_layer=2", "model.skip_lower_blocks=true", "model.rope_theta=500000.0", "model.video_bias=none",
    }  # fmt: skip
    third = trained_with(model("vamos", {"llama_model_path": "./pretrained/llama3/"}))
    assert "model.rope_theta" not in third  # LLaMA 3's own params.json has it
    assert "model.skip_lower_blocks" not in third
    biased = trained_with(model("vico", {"bias": 3.0, "qav": True}))
    assert (biased["model.video_bias"].value, biased["model.rope_theta"].value) == (3.0, 10000.0)
    assert biased["model.temporal_embedding"].value is True


def test_params_json_that_states_theta(tmp_path: Path) -> None:
    """Vamos reads it where it is there, so nothing has to be overridden."""
    for name, params, expected in (("said", {"rope_theta": 1e4}, False), ("silent", {}, True)):
        base = LlamaBaseConfig(path=r.llama_folder(tmp_path / name, **params))
        assert ("model.rope_theta" in trained_with(model("vamos"), base)) == expected


def test_rows_of_released_files() -> None:
    """How rows were made is told where the recipe makes them otherwise; nothing is refused for it."""
    said = input_settings(model("vico"))
    assert {n: s.value for n, s in said.items()} == {
        "inputs.num_frames": 4, "inputs.max_length": 128, "inputs.max_caption_length": 64, "inputs.dialogue": False,
        "inputs.caption_skip": 3,
    }  # fmt: skip
    text_only = model("vamos", {"use_vis": False, "use_cap": True, "cap_model": "7b"})
    inputs = QuestionConfig(num_frames=4, use_video=False, caption="llava_v15_13b_n6")
    (told,) = other_inputs(text_only, inputs)
    assert "To run it, add inputs.caption=llava_v15_7b_n6 inputs.blind_placeholders=true" in told
    assert not other_inputs(text_only, replace(inputs, blind_placeholders=True, caption="llava_v15_7b_n6"))
    assert not other_inputs(Model(kind="vamos", tensors=r.tensors("vamos")), inputs)


def test_every_setting_is_a_field_of_the_recipes() -> None:
    """What is advised can be given: all names exist in the recipes."""
    for family, recipe in (("vamos", "vamos.nextqa_vis_cap"), ("flipped", "llama_vqa.nextqa"), ("vico", "vico.nextqa")):
        it = model(family, {"adapter_layer": 2, "alter_train": True, "use_cap": True, "qav": True}, rows=6)
        load(recipe, overrides({n: s for n, s in trained_with(it).items() if not n.startswith("model.llama.")}))
        load(recipe, overrides(input_settings(it)))


def sized(generation: int, **settings: object) -> VamosConfig:
    """A config of published vocabulary and epsilon, but these files' sizes."""
    own = {1: (32000, 1e-6, 1e4), 2: (32000, 1e-5, 1e4), 3: (128256, 1e-5, 5e5)}[generation]
    names = ("vocab_size", "norm_eps", "rope_theta")
    base = LlamaBaseConfig(dim=r.DIM, layers=r.LAYERS, heads=r.HEADS, hidden=r.HIDDEN, **dict(zip(names, own)))
    return VamosConfig(llama=base, num_frames=r.FRAMES, feature_dim=r.WIDTH, adapter_len=3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", [1, 2, 3])
@pytest.mark.parametrize("recipe", [1, 2, 3])
def test_each_generation_against_each(trained: int, recipe: int) -> None:
    path = {1: "./pretrained/llama/", 2: "./pretrained/llama2/", 3: "./pretrained/llama3/"}[trained]
    theta = 500000.0 if trained < 3 else None
    it = model("vamos", {"llama_model_path": path})
    if trained == recipe:
        assert refuse_mismatch(it, sized(recipe, rope_theta=theta), "x") == []
        return
    with pytest.raises(UserError) as caught:
        refuse_mismatch(it, sized(recipe, rope_theta=theta), "x")
    assert f"x: was trained on LLaMA {trained} (args.llama_model_path = '{path}')" in str(caught.value)
    assert f"but the recipe's LLaMA is LLaMA {recipe} (vocabulary" in str(caught.value)


def test_full_sizes_are_named() -> None:
    with pytest.raises(UserError, match=r"dim 16, 3 layers.*dim 4096, 32 layers, 32 heads \(as llama1_7b and"):
        refuse_mismatch(model("vamos"), vamos(), "x")
    with pytest.raises(UserError, match=r"dim 5120, 40 layers, 40 heads \(as llama1_13b and llama2_13b\)"):
        refuse_mismatch(model("vico"), vico(llama=llama("llama1_13b")), "x")
