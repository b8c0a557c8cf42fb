"""extract_features in the layouts of Video-ChatGPT and its Breakfast variant: files, shard sets, altered copies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import damaged, encode, pictures
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tools import extract_features, make_shards
from vlm.data.feature_files import FeatureFiles, read_settings
from vlm.data.features import read_tensor
from vlm.data.frame_pixels import CentreCrop, Nearest
from vlm.data.frame_variants import VARIANTS, variant
from vlm.data.sampling import middle_frames
from vlm.data.shards import ShardSet
from vlm.data.video import decode
from vlm.weights import open_tensors

FRAMES = {"P03_cam01_P03_cereals": 30, "P04_webcam01_P04_tea": 9, "P05_stereo01_P05_tea": 12}
SALADS = {"rgb-01-1": 10, "rgb-01-2": 14}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14, projection_dim=24)  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """breakfast/: P03/cam01/P03_cereals.avi and its like, labels beside; salads/: rgb-01-1.avi, MS-TCN's labels."""
    root = tmp_path_factory.mktemp("tree")
    for number, (key, count) in enumerate(FRAMES.items()):
        person, camera, _, activity = key.split("_")
        camera = camera if camera != "stereo01" else "stereo"
        stem = f"{person}_{activity}{'_ch1' if camera == 'stereo' else ''}"
        file = root / "breakfast" / person / camera / f"{stem}.avi"
        file.parent.mkdir(parents=True)
        file.write_bytes(encode(pictures(count, 64, 48, seed=number), container="avi", codec="mpeg4", rate=15))
        file.with_name(f"{file.name}.labels").write_text(f"1-5 SIL \n5-{count} take_bowl \n")
    (root / "salads/groundTruth").mkdir(parents=True)
    for number, (key, count) in enumerate(SALADS.items()):
        (root / f"salads/{key}.avi").write_bytes(encode(pictures(count, 64, 48, seed=9 + number), container="avi",
                                                        codec="mpeg4"))  # fmt: skip
        lines = ["action_start"] * 3 + ["cut_tomato"] * (count - 3)
        (root / f"salads/groundTruth/{key}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def extract(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command: its code, and what it wrote to stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = extract_features.main([*map(str, arguments), "--workers", "0"])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


Extract = Callable[..., tuple[int, str]]


def expected(clip: Path, pixels: np.ndarray, normed: bool) -> list[Tensor]:
    """Hidden states of transformers' own model: class tokens behind the last norm, or patches as they are."""
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval().vision_model
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    given = ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = model(pixel_values=given, output_hidden_states=True).hidden_states
        return [model.post_layernorm(state[:, 0]) if normed else state[:, 1:] for state in states]


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, atol=2e-3, rtol=2e-3)


def tensors(file: Path) -> dict[str, Tensor]:
    return {name: load() for name, load in open_tensors(file).items()}


def pixels_of(tree: Path, key: str, count: int, prepare: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    person, _, _, activity = key.split("_")
    (file,) = (tree / "breakfast" / person).glob(f"*/{person}_{activity}*.avi")
    return np.stack([prepare(frame) for frame in decode(file, middle_frames(FRAMES[key], count).tolist())])


NEAREST = Nearest(width=28, height=28)


def test_pooled_layout_of_a_tree(clip: Path, tree: Path, tmp_path: Path, extract: Extract) -> None:
    out = tmp_path / "clip.safetensors"
    command = ("breakfast", "--root", tree / "breakfast", "--split", "all", "--out", out, "--encoder", clip)
    code, said = extract(*command, "--layout", "video-chatgpt")
    assert code == 0, said
    stored = tensors(out)
    assert stored.keys() == {f"clip_pooled/{key}" for key in FRAMES}
    for key, count in FRAMES.items():
        patches = expected(clip, pixels_of(tree, key, count, NEAREST), normed=False)[-2]
        found = stored[f"clip_pooled/{key}"]
        assert found.shape == (100 + 4, 16)
        close(found[:count], patches.mean(1))
        assert not found[count:100].any()
        close(found[100:], patches.mean(0))


@pytest.mark.parametrize("source", ["breakfast", "salads"])
def test_a_tree_without_labels(clip: Path, tree: Path, tmp_path: Path, extract: Extract, source: str) -> None:
    """Features need none: all videos are listed, under the keys that they have with labels."""
    bare = tmp_path / "bare"
    for file in (tree / source).rglob("*.avi"):
        place = bare / file.relative_to(tree / source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
        if "_ch1" in place.name:
            place.with_name(place.name.replace("_ch1", "_ch0")).write_bytes(b"the other channel")
    made = []
    for root in (tree / source, bare):
        out = tmp_path / f"{root.name}.safetensors"
        command = (source, "--root", root, "--out", out, "--encoder", clip, "--layout", "breakfast", "--frames", 4)
        code, said = extract(*command, "--split", "all")
        assert code == 0, said
        made.append({name: tensor.tolist() for name, tensor in tensors(out).items()})
    assert made[0] == made[1]
    assert len(made[0]) == len(FRAMES if source == "breakfast" else SALADS)
    assert extract(*command, "--split", "train.split1")[0] == 2, "no list and no labels say which they are"


@pytest.mark.parametrize(
    ("layers", "shapes"),
    [
        ([], {"clip_states": (12, 3, 16)}),
        (["2"], {"clip_cls": (12, 16)}),
        (["1-2", "0"], {"clip_states": (12, 2, 16), "clip_cls": (12, 16)}),
    ],
)
def test_states_layout_of_a_tree(
    clip: Path, tree: Path, tmp_path: Path, extract: Extract, layers: list[str], shapes: dict[str, tuple[int, ...]]
) -> None:
    out = tmp_path / "clip.safetensors"
    command = ("breakfast", "--root", tree / "breakfast", "--split", "all", "--out", out, "--encoder", clip)
    more = ("--layers", *layers) if layers else ()
    code, said = extract(*command, "--layout", "breakfast", "--frames", 12, *more)
    assert code == 0, said
    stored = tensors(out)
    for key in FRAMES:
        states = torch.stack(expected(clip, pixels_of(tree, key, 12, NEAREST), normed=True), 1)
        assert {name: tuple(stored[f"{name}/{key}"].shape) for name in shapes} == shapes
        if not layers:
            close(stored[f"clip_states/{key}"], states)
        elif layers == ["2"]:
            close(stored[f"clip_cls/{key}"], states[:, 2])
        else:
            close(stored[f"clip_states/{key}"], states[:, 1:])
            close(stored[f"clip_cls/{key}"], states[:, 0])


def test_pictures_as_clip_has_them(clip: Path, tree: Path, tmp_path: Path, extract: Extract) -> None:
    out = tmp_path / "clip.safetensors"
    command = ("breakfast", "--root", tree / "breakfast", "--split", "all", "--out", out, "--encoder", clip)
    code, said = extract(*command, "--layout", "breakfast", "--frames", 4, "--layers", 2, "--resize", "clip")
    assert code == 0, said
    key = next(iter(FRAMES))
    cropped = pixels_of(tree, key, 4, CentreCrop(short_side=28, crop=28))
    close(tensors(out)[f"clip_cls/{key}"], expected(clip, cropped, normed=True)[2])
    assert list(read_settings(out)["tensors"]["clip_cls"]["frames"]["pictures"]) == ["CentreCrop"]
    again = extract(*command, "--layout", "breakfast", "--frames", 4, "--layers", 2)
    assert again[0] == 2
    assert "begun with other settings" in again[1]


def test_salads_from_shards_with_copies(clip: Path, tree: Path, tmp_path: Path, extract: Extract) -> None:
    """Members of the same records, each copy under its name; the same from a file; all eleven by `all`."""
    shards, out, file = tmp_path / "shards", tmp_path / "out", tmp_path / "f.safetensors"
    root = tree / "salads"
    made = ["salads", "--root", str(root), "--split", "all", "--out", str(shards), "--workers", "1"]
    assert make_shards.main(made) == 0
    layout = ("--encoder", clip, "--layout", "breakfast", "--frames", 6, "--augment", "flip", "sharp", "compress_flip")
    code, said = extract("--shards", shards, "--out", out, *layout)
    assert code == 0, said
    assert extract("salads", "--root", root, "--split", "all", "--out", file, *layout)[0] == 0
    opened, stored = ShardSet(out), tensors(file)
    names = ["clip_states", "clip_states_compress_flip", "clip_states_flip", "clip_states_sharp"]
    assert opened.members == ("video", *(f"{name}.safetensors" for name in names), "json")
    assert opened.read(0).video is None
    for row, (key, count) in enumerate(SALADS.items()):
        record = opened.read(row)
        assert (record.key, record.num_frames) == (key, count)
        frames = decode(root / f"{key}.avi", middle_frames(count, 6).tolist())
        for name in names:
            copy = name.removeprefix("clip_states").removeprefix("_")
            alter = variant(copy, key) if copy else np.asarray
            pixels = np.stack([NEAREST(alter(frame)) for frame in frames])
            found = read_tensor(record, name)
            close(found, torch.stack(expected(clip, pixels, normed=True), 1))
            torch.testing.assert_close(stored[f"{name}/{key}"], found, atol=1e-3, rtol=1e-3)  # other batches
    said_of = opened.manifest["arguments"]["tensors"]
    assert "altered" not in said_of["clip_states"]["frames"]
    assert said_of["clip_states_flip"]["frames"]["altered"] == "flip"
    every = tmp_path / "all"
    assert extract("--shards", shards, "--out", every, *layout[:6], "--augment", "all")[0] == 0
    assert len(ShardSet(every).members) == len(VARIANTS) + 3


def test_a_finished_video_is_not_done_again(clip: Path, tree: Path, tmp_path: Path, extract: Extract) -> None:
    """Unlike the published script, which began anew: features are written video by video."""
    root = tmp_path / "breakfast"
    (root / "P03/cam01").mkdir(parents=True)
    for name, data in (
        ("P03_tea", damaged()["html"]),
        ("P03_milk", encode(pictures(9), container="avi", codec="mpeg4")),
    ):
        (root / f"P03/cam01/{name}.avi").write_bytes(data)
        (root / f"P03/cam01/{name}.avi.labels").write_text("1-5 SIL \n")
    command = ("breakfast", "--root", root, "--split", "all", "--out", tmp_path / "f.safetensors", "--encoder", clip,
               "--layout", "breakfast", "--frames", 5, "--augment", "flip")  # fmt: skip
    refused = extract(*command)
    assert refused[0] == 2
    assert "1 of 2 items have no features" in refused[1]
    (root / "P03/cam01/P03_tea.avi").write_bytes(encode(pictures(7), container="avi", codec="mpeg4"))
    code, said = extract(*command)
    assert code == 0, said
    assert "1/1 videos (100 %)" in said
    assert len(tensors(tmp_path / "f.safetensors")) == 4


def test_a_recipe_says_which(
    clip: Path, tree: Path, tmp_path: Path, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published, but for the sizes of a tiny CLIP."""
    load = extract_features.recipes.load
    sizes = [
        "inputs.num_video_tokens=6",
        "inputs.frame_tokens=3",
        "inputs.frame_dim=16",
        "inputs.augmented=clip_states_flip",
    ]
    monkeypatch.setattr(extract_features.recipes, "load", lambda name: load(name, sizes))
    out = tmp_path / "f.safetensors"
    command = ("breakfast", "--root", tree / "breakfast", "--split", "all", "--encoder", clip, "--out", out)
    code, said = extract(*command, "--recipe", "video_chatgpt.breakfast")
    assert code == 0, said
    assert {tuple(tensor.shape) for tensor in tensors(out).values()} == {(6, 3, 16)}
    assert set(read_settings(out)["tensors"]) == {"clip_states", "clip_states_flip"}


def test_bounded_memory_of_parts(
    clip: Path, tree: Path, tmp_path: Path, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits to be written is written when it is much, not only after a time."""
    written: list[int] = []
    write = FeatureFiles.write_part
    monkeypatch.setattr("vlm.run.extract.PART_BYTES", 1)

    def count(self: FeatureFiles, videos: Mapping[str, Any], warnings: Any) -> None:
        written.append(len(videos))
        write(self, videos, warnings)

    monkeypatch.setattr(FeatureFiles, "write_part", count)
    command = ("breakfast", "--root", tree / "breakfast", "--split", "all", "--out", tmp_path / "f.safetensors")
    assert extract(*command, "--encoder", clip, "--layout", "breakfast", "--frames", 4)[0] == 0
    assert written == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "breakfast", "--fps", 2), "--fps says nothing beside --layout breakfast"),
        (("--layout", "breakfast", "--states", "cls:1"), "--states says nothing beside --layout breakfast"),
        (("--layout", "video-chatgpt", "--layers", "1"), "--layers says nothing beside --layout video-chatgpt"),
        (("--layout", "breakfast", "--recipe", "video_chatgpt.breakfast"), "--layout says nothing beside --recipe"),
        (("--augment", "flip"), "--augment says nothing beside"),
        (("--frames", 3, "--fps", 2), "--fps says nothing beside --frames"),
        (("--layout", "breakfast", "--layers", "2-1"), "--layers 2-1: expected one layer, such as 2"),
        (("--layout", "breakfast", "--layers", "0-3"), "layer 3 of an encoder of 2 layers"),
        (("--layout", "breakfast", "--layers", "0", "1"), "clip_cls would be two tensors"),
        (("--recipe", "video_chatgpt.instruct"), "vectors of 16 numbers, inputs.frame_dim is 1024"),
        (("--recipe", "video_chatgpt.breakfast"), "inputs.frame_tokens is 25, but CLIP in"),
        (("--augment", "upside_down", "--layout", "breakfast"), "invalid choice: 'upside_down'"),
    ],
)
def test_errors_are_one_readable_message(
    clip: Path, tree: Path, tmp_path: Path, extract: Extract, arguments: tuple[object, ...], message: str
) -> None:
    command = ("breakfast", "--root", tree / "breakfast", "--split", "all", "--out", tmp_path / "f.safetensors")
    code, said = extract(*command, "--encoder", clip, *arguments)
    assert code == 2
    assert message in said
    assert not (tmp_path / "f.safetensors").exists()


def test_so_many_frames_of_any_video_without_a_layout(clip: Path, tree: Path, tmp_path: Path, extract: Extract) -> None:
    out = tmp_path / "f.safetensors"
    command = ("breakfast", "--root", tree / "breakfast", "--split", "all", "--out", out, "--encoder", clip)
    assert extract(*command, "--frames", 5)[0] == 0
    assert {tuple(tensor.shape) for tensor in tensors(out).values()} == {(5, 24)}
    assert json.loads((tmp_path / "f.rejected.json").read_text())["counts"]["frames"] == 15
