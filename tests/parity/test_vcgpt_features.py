"""Features of Video-ChatGPT and of its variant for Breakfast, against those that the published scripts wrote.

Measured on decord's frames of the recorded videos, which PyAV gives to the bit: of the pooled features 998 in 1,000
numbers are equal and the rest off by the last bit of float16; states differ by 6e-5 at most. Another decoder may be off
by one level of colour: 2e-2, as the recording says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tools import extract_features
from vlm.data.feature_files import read_settings
from vlm.data.frame_pixels import Nearest
from vlm.data.sampling import middle_frames
from vlm.data.video import count_frames, decode
from vlm.models.encoders import open_layout, pooled_layout, states_layout
from vlm.models.frame_encoders import load_clip
from vlm.models.frame_pools import SpatioTemporal
from vlm.run.encode_one import encode_video_file
from vlm.weights import open_tensors

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def recording(load_golden: Load) -> Any:
    return load_golden("vcgpt_clip_features.pt")


@pytest.fixture(scope="module")
def clip(recording: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded encoder as a folder: without a projection, as its layers' states need none."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "config.json").write_text(json.dumps(recording["clip_config"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(recording["image_processor"]))
    state = {name: tensor.contiguous() for name, tensor in recording["clip_state_dict"].items()}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def videos(recording: Any, golden: Callable[[str], Path]) -> dict[str, Path]:
    folder = golden(recording["videos"]["dir"])
    return {Path(name).stem: folder / name for name in recording["videos"]["decord_first5_sha256"]}


def tolerance(recording: Any, video: Path) -> float:
    """What features may differ by: less where our decoder gives the recorded frames."""
    frames = decode(video, range(5))
    same = hashlib.sha256(frames.tobytes()).hexdigest() == recording["videos"]["decord_first5_sha256"][video.name]
    return 1e-3 if same else 2e-2


def recorded_tree(recording: Any, videos: dict[str, Path]) -> dict[str, Path]:
    """Names in the recording, such as P03_cereals_cam01, and their videos: those of so many frames."""
    by_count = {count_frames(video): video for video in videos.values()}
    return {name: by_count[count] for name, count in recording["fork_vid_frames"].items()}


def close(found: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    assert found.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected.float(), atol=allowed, rtol=2e-3)


def test_frame_indices(load_golden: Load) -> None:
    for name, expected in load_golden("vcgpt_pooling.pt")["frame_indices"].items():
        num_frames, count = map(int, name.split("_"))
        assert middle_frames(num_frames, count).tolist() == list(expected), name


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_pooling(load_golden: Load, batch: int) -> None:
    """In batches of any size: to the bit in float16, whose sums are float32 there too."""
    for name, case in load_golden("vcgpt_pooling.pt")["pooling"].items():
        pool = SpatioTemporal(100)
        for rows in case["input"].split(batch):
            pool.add(rows)
        found, expected = pool.finish(), case["output_numpy"]
        assert found.dtype == expected.dtype
        if found.dtype == torch.float16:
            assert torch.equal(found, expected), name
        else:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(found.half(), case["output_torch_inference"]), name


def test_pictures(recording: Any, clip: Path) -> None:
    generator = np.random.default_rng(0)
    encoder = load_clip(clip, pooled_layout().states)
    for name, case in recording["preprocessing"].items():
        height, width = map(int, name.split("x"))
        pictures = generator.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        if case["input"] is not None:
            np.testing.assert_array_equal(pictures, case["input"])
        resize = Nearest(width=224, height=224)
        made = np.stack([resize(pictures[index]) for index in case["frame_idx"]])
        np.testing.assert_array_equal(made[:, [0, 111, 223]], case["resized_rows_0_111_223"])
        assert hashlib.sha256(made.tobytes()).hexdigest() == case["resized_sha256"]
        kept = np.stack([encoder.prepare(picture) for picture in made])
        np.testing.assert_array_equal(kept, made)  # CLIP's own steps leave a picture of its size as it is
        pixels = encoder.normalised(torch.from_numpy(made))
        rows = pixels[:, :, [0, 223]]
        torch.testing.assert_close(rows, case["pixel_values_rows_0_223"], atol=1e-6, rtol=1e-6)
        assert pixels.double().sum().item() == pytest.approx(case["pixel_sum"], rel=1e-6)


def test_pooled_features(recording: Any, clip: Path, videos: dict[str, Path]) -> None:
    chosen = open_layout(clip, pooled_layout())
    for name, expected in recording["base_features"].items():
        found = encode_video_file(videos[name], chosen, apart=False)["clip_pooled"]
        close(found, expected, tolerance(recording, videos[name]))


def test_states_of_all_layers_and_of_the_last(recording: Any, clip: Path, videos: dict[str, Path]) -> None:
    count, expected = recording["fork_num_frames"], recording["fork_features"]
    for name, video in recorded_tree(recording, videos).items():
        layers = expected[f"{name}_all"].shape[1]
        layout = states_layout({"clip_states": tuple(range(layers)), "clip_cls": layers - 1}, count)
        found = encode_video_file(video, open_layout(clip, layout), apart=False)
        close(found["clip_states"], expected[f"{name}_all"], tolerance(recording, video))
        close(found["clip_cls"], expected[name], tolerance(recording, video))


def test_breakfast_tree_through_the_command(
    recording: Any, clip: Path, videos: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the published script walked it: P03/cam01/…avi and stereo's second channel; here with their labels."""
    count, expected = recording["fork_num_frames"], recording["fork_features"]
    keys = {}  # ours -> the recording's
    for name, video in recorded_tree(recording, videos).items():
        stem, _, camera = name.rpartition("_")
        person, short = stem.partition("_")[0], stem.removesuffix("_ch1")
        file = tmp_path / person / camera / f"{stem}.avi"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(video.read_bytes())
        file.with_name(f"{file.name}.labels").write_text("1-6 SIL \n6-13 take_bowl \n")
        keys[f"{person}_{camera}{'01' if camera == 'stereo' else ''}_{short}"] = name
    out = tmp_path / "clip.safetensors"
    command = ["breakfast", "--root", str(tmp_path), "--split", "all", "--out", str(out), "--workers", "0"]
    done = extract_features.main([*command, "--encoder", str(clip), "--layout", "breakfast", "--frames", str(count)])
    assert done == 0, capsys.readouterr().err
    stored = {name: load() for name, load in open_tensors(out).items()}
    assert stored.keys() == {f"clip_states/{key}" for key in keys}
    for key, name in keys.items():
        allowed = max(tolerance(recording, video) for video in videos.values())
        close(stored[f"clip_states/{key}"], expected[f"{name}_all"], allowed)
    said = read_settings(out)["tensors"]["clip_states"]["frames"]
    assert said == {
        "num_frames": count,
        "fill": True,
        "sampling": "middle",
        "pictures": {"Nearest": {"width": 224, "height": 224}},
    }
