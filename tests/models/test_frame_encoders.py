"""Features of frames are those of transformers' own processor and model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encode, pictures
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from vlm.data.frame_pixels import CentreCrop
from vlm.data.video import frames_at
from vlm.models.frame_encoders import States, load_clip
from vlm.types import UserError

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14, "projection_dim": 24}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
        "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip


def tiny_clip(folder: Path) -> CLIPVisionModelWithProjection:
    """A folder as OpenAI's checkpoints are published: model and processor, random weights; returns the image part."""
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    processor(56).save_pretrained(folder)
    return model


def processor(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 101), (30, 40), (57, 56), (641, 359)])
def test_features_are_those_of_transformers(tmp_path: Path, width: int, height: int) -> None:
    model = tiny_clip(tmp_path)
    video = encode(pictures(6, width - width % 2, height - height % 2))
    frames = [frame[:height, :width] for frame in frames_at(video, 6.0, [])]
    inputs = processor(56)(images=[frame.copy() for frame in frames], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).image_embeds
        encoder = load_clip(tmp_path)
        found = encoder(torch.from_numpy(np.stack([encoder.prepare(frame) for frame in frames])))
    assert found.shape == (3, 24)
    assert encoder.width == 24
    assert found.dtype == torch.float32
    # Measured: equal to 1e-6 of a standard deviation of about 1; the pixels are the same to the last bit of uint8.
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert expected.std(0).mean() > 1e-3  # frames differ, so their features do


def test_pixels_are_those_of_transformers() -> None:
    """Odd margins too: the centre crop's rounding is theirs."""
    for width, height in (57, 91), (224, 224), (300, 17), (225, 231), (1000, 333):
        picture = pictures(1, width, height)[0]
        expected = processor(33)(images=picture, do_normalize=False, do_rescale=False)["pixel_values"][0]
        found = CentreCrop(short_side=33, crop=33)(picture)
        np.testing.assert_array_equal(found, np.asarray(expected).transpose(1, 2, 0))


def test_whole_clip_folder_gives_its_image_part(tmp_path: Path) -> None:
    """As openai/clip-vit-large-patch14: text and image in one file, the projection's width beside both."""
    config = {name: value for name, value in VISION.items() if name != "projection_dim"}
    CLIPModel(CLIPConfig(vision_config=config, text_config=TEXT, projection_dim=20)).save_pretrained(tmp_path)
    encoder = load_clip(tmp_path)
    stored = CLIPModel.from_pretrained(tmp_path).visual_projection.weight
    assert torch.equal(encoder.model.visual_projection.weight, stored)
    assert encoder.width == 20
    assert encoder.prepare == CentreCrop(short_side=56, crop=56)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of an encoder; CLIP's can be had by"):
        load_clip(tmp_path / "gone")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_clip(tmp_path)
    tiny_clip(tmp_path)
    processor_file = tmp_path / "preprocessor_config.json"
    steps = json.loads(processor_file.read_text())
    for change in ({"resample": 2}, {"do_center_crop": False}, {"size": {"height": 56, "width": 56}}):
        processor_file.write_text(json.dumps(steps | change))
        with pytest.raises(UserError, match="asks for other steps than CLIP's"):
            load_clip(tmp_path)
    processor_file.unlink()
    config_file = tmp_path / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"(?s)as CLIP's image encoder.*missing:.*layers\.2\."):
        load_clip(tmp_path)
    config_file.write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match="is of a 'llama', not of CLIP"):
        load_clip(tmp_path)


# States of its layers ------------------------------------------------------------------------------------------------


def frames(count: int = 3) -> torch.Tensor:
    return torch.from_numpy(pictures(count, 56, 56, seed=5))


def test_states_of_several_layers_behind_the_last_norm(tmp_path: Path) -> None:
    """Equal to transformers' hidden_states, of which the last class token is the pooler's output."""
    model = tiny_clip(tmp_path)
    wanted = {"all": States((0, 1, 2), "cls", normed=True), "raw": States((1, -1), "cls"), "one": States(-2, "patches")}
    encoder = load_clip(tmp_path, wanted)
    found = encoder(frames())
    with torch.no_grad():
        out = model.vision_model(pixel_values=encoder.normalised(frames()), output_hidden_states=True)
        expected = torch.stack([model.vision_model.post_layernorm(states[:, 0]) for states in out.hidden_states], 1)
    assert isinstance(found, dict)
    torch.testing.assert_close(found["all"], expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found["all"][:, -1], out.pooler_output, atol=2e-6, rtol=1e-5)
    raw = torch.stack([out.hidden_states[1][:, 0], out.hidden_states[2][:, 0]], 1)
    torch.testing.assert_close(found["raw"], raw, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found["one"], out.hidden_states[1][:, 1:], atol=2e-6, rtol=1e-5)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"all": (3, 3, 32), "raw": (3, 2, 32),
                                                                         "one": (3, 16, 32)}  # fmt: skip


def test_layers_above_those_asked_for_are_not_computed(tmp_path: Path) -> None:
    tiny_clip(tmp_path)
    encoder = load_clip(tmp_path, {"x": States(-2, "patches")})
    expected = encoder(frames())
    encoder.model.vision_model.encoder.layers[1].mlp.fc1.weight.data.fill_(float("nan"))
    assert torch.equal(encoder(frames())["x"], expected["x"])


def test_a_folder_of_the_image_encoder_alone_gives_states_but_no_embeddings(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path)
    model.vision_model.save_pretrained(tmp_path / "alone")
    assert load_clip(tmp_path / "alone", {"x": States(-1, "cls")})(frames())["x"].shape == (3, 32)
    with pytest.raises(UserError, match=r"(?s)missing:.*visual_projection"):
        load_clip(tmp_path / "alone")
