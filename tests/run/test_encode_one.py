"""Features of one video file: as the command makes a dataset's, in the form in which recipes' inputs read them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoded import damaged, encode, pictures
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vlm import recipe as recipes
from vlm.data.features import read_features, read_tensor
from vlm.data.video import DecodeError, decode
from vlm.models import glimpse
from vlm.models.encoders import CLS, POOLED, STATES, Chosen, augmented_of, layout_for, open_for
from vlm.run.encode_one import encode_record, encode_video_file, look_into
from vlm.types import UserError

FRAMES = 20


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14, projection_dim=24)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("video") / "a b.mp4"
    file.write_bytes(encode(pictures(FRAMES, 64, 48), rate=10))
    return file


def inputs(**said: Any) -> Any:
    return SimpleNamespace(**{"frame_dim": 16, "frame_tokens": 1, **said})


@pytest.mark.parametrize(
    ("said", "shape"),
    [
        ({"features": POOLED, "num_video_tokens": 12}, (12, 16)),  # 8 frames and 4 patches
        ({"features": STATES, "num_video_tokens": 30, "frame_tokens": 3}, (30, 3, 16)),
        ({"features": CLS, "num_video_tokens": 5}, (5, 16)),
    ],
)
def test_what_a_recipe_reads(clip: Path, video: Path, said: dict[str, Any], shape: tuple[int, ...]) -> None:
    chosen = open_for(None, inputs(**said), clip)
    apart, here = (encode_video_file(video, chosen, apart=apart) for apart in (True, False))
    name = said["features"]
    assert apart.keys() == here.keys() == {name}
    assert (here[name].dtype, here[name].shape) == (torch.float16, shape)
    assert torch.equal(apart[name], here[name])
    record = encode_record(video, chosen, {"name": "tea"}, apart=False)
    assert torch.equal(read_tensor(record, name), here[name])
    assert (record.key, record.num_frames, record.fps, record.video) == ("a b", FRAMES, 10.0, None)
    assert record.annotation == {"name": "tea"}


def test_states_are_of_the_last_layer_where_one_is_read(clip: Path, video: Path) -> None:
    several = encode_video_file(
        video, open_for(None, inputs(features=STATES, num_video_tokens=5, frame_tokens=3), clip), apart=False
    )
    one = encode_video_file(video, open_for(None, inputs(features=CLS, num_video_tokens=5), clip), apart=False)
    assert torch.equal(several[STATES][:, -1], one[CLS])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"features": POOLED, "num_video_tokens": 4}, "4 patches of CLIP"),
        ({"features": STATES, "num_video_tokens": 5, "frame_tokens": 2}, "has 3 states a frame: 1"),
        (
            {"features": CLS, "num_video_tokens": 5, "frame_dim": 1024},
            "vectors of 16 numbers, inputs.frame_dim is 1024",
        ),
    ],
)
def test_what_does_not_fit_is_told(clip: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_for(None, inputs(**said), clip)


def test_shipped_recipes_have_a_layout(tmp_path: Path) -> None:
    """Of CLIP ViT-L/14 as it is published."""
    sizes = '{"num_hidden_layers": 24, "hidden_size": 1024, "image_size": 224, "patch_size": 14}'
    (tmp_path / "config.json").write_text(f'{{"model_type": "clip", "vision_config": {sizes}}}')
    published = {
        "instruct": (100, False, (-2,)),
        "breakfast": (1000, True, tuple(range(25))),
        "salads": (1000, True, (-1,)),
    }
    for name, expected in published.items():
        recipe = recipes.load(f"video_chatgpt.{name}")
        layout = layout_for(recipe.inputs, tmp_path)
        (states,) = layout.states.values()
        layers = states.layers if isinstance(states.layers, tuple) else (states.layers,)
        assert (layout.num_frames, layout.fill, layers) == expected
        assert layout.states.keys() == {recipe.inputs.features}


def test_copies_that_inputs_read() -> None:
    assert augmented_of(inputs(features=STATES, augmented=("clip_states_flip", "clip_states_sharp_flip"))) == (
        "flip",
        "sharp_flip",
    )
    assert augmented_of(inputs(features=STATES)) == ()
    with pytest.raises(UserError, match="clip_states_upside is not clip_states_ and one of flip, bright"):
        augmented_of(inputs(features=STATES, augmented=("clip_states_upside",)))


@pytest.fixture
def eyes(tmp_path: Path) -> Path:
    file = tmp_path / "train.encoder.safetensors"
    glimpse.save(glimpse.fit(torch.from_numpy(pictures(60, glimpse.WIDTH, glimpse.HEIGHT))), file)
    return file


def test_the_demos_encoder_for_inputs_of_so_many_places(eyes: Path, video: Path) -> None:
    said = inputs(features="seen", num_video_tokens=7, frame_dim=glimpse.GlimpseEncoder.width)
    found = encode_video_file(video, open_for(None, said, eyes), apart=False)["seen"]
    encoder = glimpse.load(eyes)
    frames = decode(video, [1, 4, 6, 9, 12, 15, 17])  # the middles of 7 parts of 19 frames
    pixels = torch.stack([torch.from_numpy(encoder.prepare(frame).copy()) for frame in frames])
    assert torch.equal(found, encoder.join(encoder(pixels).half()))


def test_features_at_a_rate_are_those_of_questions(eyes: Path, video: Path) -> None:
    """Vamos reads features.npy, and Video-LLaMA's demo the same; both videos of any number of frames."""
    for name in ("vamos.demo", "video_llama.demo"):
        recipe = recipes.load(name)
        chosen = open_for(recipe.model, recipe.inputs, eyes, fps=4.0)
        record = encode_record(video, chosen, apart=False)
        assert record.annotation["features"] == {"name": "features", "fps": 4.0}
        assert read_features(record).shape == (8, 38)
        assert set(record.members) <= set(recipe.inputs.members)


def test_a_recipe_with_a_tower_needs_no_encoder(video: Path) -> None:
    recipe = recipes.load("video_llama.debug", ["inputs.source=features", "inputs.features=q_former"])
    with pytest.warns(UserWarning, match="RANDOM"):
        chosen = open_for(recipe.model, recipe.inputs)
    found = encode_video_file(video, chosen, apart=False)["q_former"]
    tower = recipe.model.tower
    assert found.shape == (recipe.inputs.num_frames, tower.queries, tower.query_dim)
    with pytest.raises(UserError, match=r"no model\.tower"):
        open_for(None, inputs(features=CLS, num_video_tokens=5))


def test_without_an_encoder_a_record_has_the_video(video: Path) -> None:
    record = encode_record(video, None, apart=False)
    assert record.video == video.read_bytes()
    assert not record.members


def test_files_that_are_no_videos_are_told(clip: Path, tmp_path: Path) -> None:
    chosen: Chosen = open_for(None, inputs(features=CLS, num_video_tokens=5), clip)
    (tmp_path / "a.mp4").write_bytes(damaged()["html"])
    for apart in (True, False):
        with pytest.raises(DecodeError, match="HTML"):
            look_into(tmp_path / "a.mp4", apart=apart)
    with pytest.raises(DecodeError, match="HTML"):
        encode_video_file(tmp_path / "a.mp4", chosen, apart=False)
