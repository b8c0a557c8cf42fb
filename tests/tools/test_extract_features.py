"""The command line of extract_features, as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from encoded import damaged, encode, pictures, truncated
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from tools import extract_features, make_shards
from vlm.data.features import read_features
from vlm.data.shards import ShardSet
from vlm.data.video import decode
from vlm.models import glimpse
from vlm.sources import shapes
from vlm.sources.common_shapes import plan

REPOSITORY = Path(__file__).resolve().parents[2]
HEADER = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def extract(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command, run in this process; decoding in it too, unless said otherwise."""

    def run(*arguments: object, workers: int = 0) -> Done:
        capsys.readouterr()
        try:
            code = extract_features.main([*map(str, arguments), "--workers", str(workers)])
        except SystemExit as end:
            code = end.code
        return Done(code, *capsys.readouterr())

    return run


# The demo's encoder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    shapes.render(out, num_train=64, num_test=16, seed=1)
    return out


@pytest.fixture(scope="module")
def demo(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.safetensors and test.safetensors, by one encoder fitted on train."""
    out = tmp_path_factory.mktemp("features")
    for split, encoder in (("train", "demo"), ("test", out / "train.encoder.safetensors")):
        code = extract_features.main(["shapes", "--root", str(corpus), "--split", split, "--encoder", str(encoder),
                                      "--out", str(out / f"{split}.safetensors"), "--workers", "0"])  # fmt: skip
        assert code == 0
    return out


def test_features_of_two_seconds_at_four_a_second(corpus: Path, demo: Path) -> None:
    features = load_file(demo / "test.safetensors")
    encoder = glimpse.load(demo / "train.encoder.safetensors")
    assert list(features) == [clip.key for clip in plan("test", 16, 1)]
    for key, rows in features.items():
        frames = torch.from_numpy(decode(corpus / f"videos/test/{key}.mp4", range(0, 24, 3)))
        assert torch.equal(rows, encoder.join(encoder(frames).half()))
    assert rows.shape == (8, 38)


def test_features_come_from_pixels_alone(
    corpus: Path, demo: Path, tmp_path: Path, extract: Callable[..., Done]
) -> None:
    """Without a label, a caption or a question in the annotations, encoder and features are the same to the bit."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "videos").symlink_to(corpus / "videos")
    content = json.loads((corpus / "annotations/train.json").read_text())
    content["items"] = [{"key": item["key"], "video": item["video"]} for item in content["items"]]
    (tmp_path / "annotations/train.json").write_text(json.dumps(content))
    out = tmp_path / "train.safetensors"
    done = extract("shapes", "--root", tmp_path, "--split", "train", "--encoder", "demo", "--out", out)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "train.encoder.safetensors").read_bytes() == (demo / "train.encoder.safetensors").read_bytes()
    found, expected = load_file(out), load_file(demo / "train.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shards_of_the_corpus_hold_features(corpus: Path, demo: Path, tmp_path: Path) -> None:
    command = ["shapes", "--root", corpus, "--split", "test", "--out", tmp_path / "out", "--workers", "1", "--no-check"]
    assert make_shards.main([*map(str, command), "--annotations", str(demo / "test.safetensors")]) == 0
    shards, features = ShardSet(tmp_path / "out"), load_file(demo / "test.safetensors")
    for row in range(3):
        record = shards.read(row)
        np.testing.assert_array_equal(read_features(record), features[record.key].float().numpy())
        assert record.annotation["features"] == {"name": "test", "fps": 4.0}
        assert record.annotation["captions"] == {"shapes": record.annotation["caption"]}
        assert record.annotation["video"] == record.key
        assert [question["id"] for question in record.annotation["questions"]] == ["0", "1", "2"]


# CLIP on questions about videos --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14, projection_dim=24)  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


@pytest.fixture
def nextqa(tmp_path: Path) -> Path:
    """Videos of 1 to 3 seconds at 12 frames a second, one cut short, one that is none, one that is not there."""
    root = tmp_path / "nextqa"
    root.mkdir()
    files = {f"100{n}": encode(pictures(count, 48, 32, seed=n)) for n, count in enumerate((12, 30, 36, 13))}
    files |= {"2000": truncated(pictures(48, 160, 120))[1], "3000": damaged()["html"]}
    for name, data in files.items():
        (root / f"{name}.mp4").write_bytes(data)
    rows = [f"{name},9,9,9,what is this,1,{n},DO,a,b,c,d,e" for n, name in enumerate([*files, "4000"])]
    (root / "train.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return root


def test_features_are_those_of_transformers_and_go_into_shards(
    nextqa: Path, clip: Path, tmp_path: Path, extract: Callable[..., Done]
) -> None:
    out = tmp_path / "train.safetensors"
    command = ("nextqa", "--root", nextqa, "--split", "train", "--out", out, "--encoder", clip, "--batch-size", 4)
    refused = extract(*command)
    assert refused.returncode == 2
    assert (
        "2 of 7 items have no features, more than the share of 0.05 that --max-failed allows (3000: " in refused.stderr
    )
    assert not out.exists()
    done = extract(*command, "--max-failed", 0.3, "--pth", tmp_path / "clipvitl14.pth", workers=2)
    assert done.returncode == 0, done.stderr
    assert "features of 5 videos, 11 frames; 2 of 7 items rejected, 1 videos with warnings" in done.stdout
    features = load_file(out)
    assert {key: len(rows) for key, rows in features.items()} == {"1000": 1, "1001": 3, "1002": 3, "1003": 2, "2000": 2}
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    for key, rows in features.items():
        frames = decode(nextqa / f"{key}.mp4", range(0, 12 * len(rows), 12))
        with torch.no_grad():
            expected = model(**processor()(images=list(frames), return_tensors="pt")).image_embeds
        assert rows.dtype == torch.float16
        # float16 rounds to 1 part in 2048; before that the two agree to 2e-6.
        torch.testing.assert_close(rows.float(), expected, atol=1e-4, rtol=6e-4)
    report = json.loads((tmp_path / "train.rejected.json").read_text())
    assert report["counts"] == {"listed": 7, "kept": 5, "rejected": 2, "frames": 11, "warnings": 1}
    reasons = {row["key"]: row["reason"] for row in report["rejected"]}
    assert "HTML" in reasons["3000"]
    assert "no video file '4000'" in reasons["4000"]
    assert "header promises 48 frames" in report["warnings"]["2000"][0]
    assert not (tmp_path / "train.parts").exists()

    for file in (out, tmp_path / "clipvitl14.pth"):  # ours and the published layout
        shards = tmp_path / f"shards{file.suffix}"
        code = make_shards.main(["nextqa", "--root", str(nextqa), "--split", "train", "--out", str(shards), "--workers",
                                 "1", "--annotations", str(nextqa / "train.csv"), str(file)])  # fmt: skip
        assert code == 0
        records = [ShardSet(shards).read(row) for row in range(5)]
        for record in records:
            np.testing.assert_array_equal(read_features(record), features[record.key].float().numpy())
            assert record.annotation["features"]["fps"] == 1.0


@pytest.mark.parametrize(("which", "name"), [("patches:-2", "clip_patches"), ("cls:1", "clip_cls")])
def test_states_of_a_layer(
    nextqa: Path, clip: Path, tmp_path: Path, extract: Callable[..., Done], which: str, name: str
) -> None:
    """Of CLIP, by name, stored in bfloat16."""
    out = tmp_path / "states.safetensors"
    command = ("nextqa", "--root", nextqa, "--split", "train", "--out", out, "--encoder", clip, "--max-failed", 0.3)
    done = extract(*command, "--states", which, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    rows = load_file(out)[f"{name}/1001"]
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    pixels = processor()(images=list(decode(nextqa / "1001.mp4", range(0, 36, 12))), return_tensors="pt")
    with torch.no_grad():  # of two layers: the states behind the first are those two before the last
        layer = model(**pixels, output_hidden_states=True).hidden_states[1]
    expected = layer[:, 0] if name == "clip_cls" else layer[:, 1:]
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float(), expected, atol=1e-4, rtol=2**-7)
    again = extract(*command, "--states", which, "--dtype", "bfloat16")
    assert again.returncode == 0
    assert "1/1 videos (100 %)" in again.stderr  # only what cannot be read is tried again
    assert "layer 9 of an encoder of 2 layers" in extract(*command[:6], tmp_path / "x.safetensors", *command[7:],
                                                          "--states", "cls:9").stderr  # fmt: skip


def test_rate_goes_with_the_features(nextqa: Path, clip: Path, tmp_path: Path, extract: Callable[..., Done]) -> None:
    """A question's span is cut by the rate at which these were computed, not by the published one."""
    out = tmp_path / "f.safetensors"
    command = ("nextqa", "--root", nextqa, "--split", "train", "--out", out, "--encoder", clip, "--max-failed", 0.3)
    assert extract(*command, "--fps", 4).returncode == 0
    code = make_shards.main(["nextqa", "--root", str(nextqa), "--split", "train", "--out", str(tmp_path / "shards"),
                             "--workers", "1", "--annotations", str(nextqa / "train.csv"), str(out)])  # fmt: skip
    record = ShardSet(tmp_path / "shards").read(0)
    assert (code, record.annotation["features"], len(read_features(record))) == (0, {"name": "f", "fps": 4.0}, 4)
    other = extract(*command, "--fps", 2)
    assert other.returncode == 2
    assert "begun with other settings (tensors.features.frames.fps: 4.0 -> 2.0; there -> now)" in other.stderr
    torch.save(dict.fromkeys(["a"], torch.ones(1)), tmp_path / "no.pth")
    assert "written as .safetensors" in extract(*command[:6], tmp_path / "no.pth", *command[7:]).stderr


def test_mended_videos_join_a_finished_file(
    nextqa: Path, clip: Path, tmp_path: Path, extract: Callable[..., Done]
) -> None:
    out = tmp_path / "f.safetensors"
    command = ("nextqa", "--root", nextqa, "--split", "train", "--out", out, "--encoder", clip, "--max-failed", 0.3)
    assert extract(*command).returncode == 0
    before = load_file(out)
    stamp = out.stat().st_mtime_ns
    assert extract(*command).returncode == 0
    assert out.stat().st_mtime_ns == stamp  # nothing new: not written again
    shutil.copy(nextqa / "1001.mp4", nextqa / "3000.mp4")
    done = extract(*command)
    assert "1/1 videos (100 %)" in done.stderr
    after = load_file(out)
    assert after.keys() == {*before, "3000"}
    assert torch.equal(after["3000"], after["1001"])
    assert all(torch.equal(after[key], before[key]) for key in before)
    report = json.loads((tmp_path / "f.rejected.json").read_text())
    assert [row["key"] for row in report["rejected"]] == ["4000"]
    assert list(report["warnings"]) == ["2000"]


def test_errors_are_one_readable_message(
    nextqa: Path, clip: Path, tmp_path: Path, extract: Callable[..., Done]
) -> None:
    out = tmp_path / "f.safetensors"
    command = ("nextqa", "--root", nextqa, "--split", "train", "--out", out)
    for arguments, message in (
        (("--encoder", tmp_path / "gone"), "no such folder of an encoder"),
        (("--encoder", clip / "model.safetensors"), "as an encoder that `--encoder demo` fitted"),
        (("--encoder", clip, "--fps", 0), "--fps 0.0: frames a second"),
        (("--encoder", clip, "--fps", -1), "--fps -1.0: frames a second"),
        (("--encoder", clip, "--batch-size", 0), "--batch-size 0 must be at least 1"),
        (("--encoder", clip, "--max-failed", 2), "--max-failed 2.0 is not a share"),
        (("--encoder", "demo"), "11 frames are too few to fit"),
        (("--encoder", clip, "--split", "val"), "has no val.csv"),
    ):
        done = extract(*command, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.startswith("extract_features: ")
        assert not out.exists()
    assert "unknown source 'nextqb'" in extract("nextqb", *command[1:]).stderr


# Kill and resume -----------------------------------------------------------------------------------------------------


def test_killed_run_goes_on_where_it_was(
    corpus: Path, demo: Path, tmp_path: Path, extract: Callable[..., Done]
) -> None:
    """kill -9 while a pipe in place of a video holds the run up: what was done is kept, and all comes out the same."""
    root, out, parts = tmp_path / "corpus", tmp_path / "train.safetensors", tmp_path / "train.parts"
    shutil.copytree(corpus, root)
    command = ["shapes", "--root", str(root), "--split", "train", "--out", str(out), "--batch-size", "3",
               "--encoder", str(demo / "train.encoder.safetensors")]  # fmt: skip
    program = [sys.executable, str(REPOSITORY / "tools/extract_features.py"), *command, "--save-every", "0"]
    held_up = root / "videos/train/train-00040.mp4"
    data = held_up.read_bytes()
    with subprocess.Popen([*program, "--workers", "1"], stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (parts / "settings.json").exists(), process)  # by now the videos are listed
        held_up.unlink()
        os.mkfifo(held_up)
        wait_for(lambda: len(list(parts.glob("part-*"))) > 5, process)
        busy = extract(*command)
        process.send_signal(signal.SIGKILL)
    assert (busy.returncode, process.returncode) == (2, -signal.SIGKILL)
    assert f"another process is writing {out}" in busy.stderr
    os.close(os.open(held_up, os.O_RDWR | os.O_NONBLOCK))  # whoever still waits for it goes on, and ends
    held_up.unlink()
    held_up.write_bytes(data)
    assert not out.exists()
    other = extract(*command, "--fps", "2")
    assert (
        f"{parts} was begun with other settings (tensors.features.frames.fps: 4.0 -> 2.0; there -> now)" in other.stderr
    )
    kept = sum(len(load_file(part)) for part in parts.glob("part-*"))
    assert 0 < kept <= 41
    done = extract(*command, "--batch-size", "64")
    assert done.returncode == 0, done.stderr
    assert f"{64 - kept}/{64 - kept} videos (100 %)" in done.stderr
    found, expected = load_file(out), load_file(demo / "train.safetensors")
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not parts.exists()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.002)
