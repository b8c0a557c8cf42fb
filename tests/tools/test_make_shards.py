"""The command line of make_shards, as a user meets it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from encoded import damaged, encode, jpeg, pictures, truncated

from vlm.data.shards import ShardSet

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "make_shards.py"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def make_shards(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command, run in this process."""
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = module.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good, unusual and damaged clips with VideoMAE's list of them and of one more that is missing."""
    root = tmp_path_factory.mktemp("ssv2")
    files = {f"good{number}": encode(pictures(8, seed=number)) for number in range(4)} | damaged()
    files |= {
        "truncated": truncated(pictures(48, 160, 120))[1],
        "webm_named": encode(pictures(8), container="webm", codec="libvpx"),
        "jpeg_named": jpeg(pictures(1)[0]),
        "single_frame": encode(pictures(1)),
        "one_pixel": encode(pictures(5, 1, 1), pix_fmt="yuv444p"),
        "rotated": encode(pictures(8), rotation=90),
    }
    for name, data in files.items():
        (root / f"{name}.mp4").write_bytes(data)
    lines = [f"{name}.mp4 {number % 3}" for number, name in enumerate([*files, "missing"])]
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    return root


def test_list_of_clips_becomes_shards(clips: Path, tmp_path: Path, make_shards: Callable[..., Done]) -> None:
    out = tmp_path / "out"
    arguments = ("ssv2", "--root", clips, "--split", "train", "--out", out, "--workers", 2, "--shard-samples", 6)
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("10 records (0.00 h) in 3 shards")
    assert "6 of 16 items rejected, 3 warnings" in last
    assert last.endswith(f"see {out / 'manifest.json'}")
    assert "15/15 items (100 %)" in done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert {row["key"] for row in manifest["rejected"]} == {*damaged(), "missing"}
    assert all(row["reason"] for row in manifest["rejected"])
    assert manifest["arguments"]["root"] == str(clips)
    shards = ShardSet(out)
    frames = {shards.key(row): int(shards.num_frames[row]) for row in range(len(shards))}
    assert (frames["single_frame"], frames["jpeg_named"], frames["one_pixel"], frames["good0"]) == (1, 1, 5, 8)
    assert any(f"48 frames, {frames['truncated']} decode" in row["warning"] for row in manifest["warnings"])
    again = make_shards(*arguments)
    assert (again.returncode, again.stdout.startswith("already complete, nothing written")) == (0, True)
    other = make_shards(*arguments[:-1], 5)
    assert other.returncode == 2
    assert "shard_samples was 6, now 5" in other.stderr


def test_no_check_keeps_all_but_missing_files(clips: Path, tmp_path: Path, make_shards: Callable[..., Done]) -> None:
    done = make_shards("ssv2", "--root", clips, "--split", "train", "--out", tmp_path / "out", "--no-check")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [row["key"] for row in manifest["rejected"]] == ["missing"]
    assert set(ShardSet(tmp_path / "out").num_frames.tolist()) == {-1}


def test_no_check_does_not_pack_what_a_list_fetches_from_elsewhere(
    clips: Path, tmp_path: Path, make_shards: Callable[..., Done]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "passwd.mp4").symlink_to("/etc/passwd")
    (root / "page.mp4").write_text("<html>kept: --no-check was asked for")
    up = "../" * len(root.resolve().parts) + "etc/passwd"
    (root / "train.csv").write_text(f"{up} 0\npasswd.mp4 1\npage.mp4 2\n{clips / 'good0.mp4'} 1\n")
    done = make_shards("ssv2", "--root", root, "--split", "train", "--out", tmp_path / "out", "--no-check")
    assert done.returncode == 0, done.stderr
    assert "2 of 4 items rejected, 0 warnings, 1 of the records from outside --root" in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [Path(row["file"]).name for row in manifest["rejected"]] == ["passwd", "passwd.mp4"]
    assert "root:" not in json.dumps(manifest)
    assert not any(b"root:x:" in tar.read_bytes() for tar in (tmp_path / "out").glob("*.tar"))


def test_annotations_may_be_given_together_or_apart(
    clips: Path, tmp_path: Path, make_shards: Callable[..., Done]
) -> None:
    (tmp_path / "labels.json").write_text('{"up": 0, "down": 1, "left": "2"}')
    together = ("--annotations", clips / "train.csv", tmp_path / "labels.json")
    apart = (*together[:2], "--annotations", together[2])
    for number, flags in enumerate((together, apart)):
        out = tmp_path / f"out{number}"
        done = make_shards("ssv2", "--root", clips, "--split", "train", "--out", out, "--no-check", *flags)
        assert done.returncode == 0, done.stderr
        assert ShardSet(out).read(1).annotation == {"label": 1, "name": "down"}


def test_errors_are_one_readable_message(clips: Path, tmp_path: Path, make_shards: Callable[..., Done]) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        (("ssv3", "--root", clips, "--split", "train"), "unknown source 'ssv3': there are "),
        (("ssv2", "--root", clips / "gone", "--split", "train"), "no such folder"),
        (("ssv2", "--root", clips, "--split", "val"), "no annotation files for split 'val'"),
        (("ssv2", "--root", clips, "--split", "train", "--workers", 0), "workers 0 must be at least 1"),
    ):
        done = make_shards(*arguments, "--out", out)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.startswith("make_shards: ")
        assert not out.exists()
    done = make_shards("ssv2", "--root", clips, "--split", "train", "--out", out, "--shard-size", "big")
    assert "'big' is not a size such as 512M" in done.stderr


def test_ctrl_c_stops_cleanly_and_the_same_command_continues(
    clips: Path, tmp_path: Path, make_shards: Callable[..., Done]
) -> None:
    """Ctrl-C reaches the whole process group, as a terminal sends it. A pipe in place of a clip holds the run up."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("good0", "good1"):
        (root / f"{name}.mp4").write_bytes((clips / f"{name}.mp4").read_bytes())
    (root / "train.csv").write_text("good0.mp4 0\ngood1.mp4 1\n")
    out = tmp_path / "out"
    command = [sys.executable, str(TOOL), "ssv2", "--root", str(root), "--split", "train", "--out", str(out),
               "--shard-samples", "1", "--workers", "1"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        _wait_for(out / ".unfinished" / "plan.json")
        data = (root / "good1.mp4").read_bytes()
        (root / "good1.mp4").unlink()
        os.mkfifo(root / "good1.mp4")
        _wait_for(out / ".unfinished" / "shard-000000.json")
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "stopped; finished shards stay in" in stderr
    assert "Traceback" not in stderr
    (root / "good1.mp4").unlink()
    (root / "good1.mp4").write_bytes(data)
    assert (make_shards(*command[2:]).returncode, len(ShardSet(out))) == (0, 2)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.005)


def test_real_clips_and_bad_ones(realdata: Path, tmp_path: Path, make_shards: Callable[..., Done]) -> None:
    """Every undecodable file is in the manifest with its reason; what bad/README.md says decodes is kept."""
    clips = ["decord__video_0.mov", "derived__yoga.ts", "moviepy__bitmap.mp4", "torchcodec__h265_video.mp4",
             "torchvision__TrumanShow_wave_f_nm_np1_fr_med_26.avi", "derived__juggling.ogv"]  # fmt: skip
    paths = [f"videos/{name}" for name in clips] + [
        f"bad/{path.name}" for path in sorted((realdata / "bad").glob("*.mp4"))
    ]
    (tmp_path / "list.csv").write_text("".join(f"{path} {number % 5}\n" for number, path in enumerate(paths)))
    out = tmp_path / "out"
    done = make_shards(
        "ssv2", "--root", realdata, "--split", "val", "--out", out, "--annotations", tmp_path / "list.csv"
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    reasons = {row["key"][:2]: row["reason"] for row in manifest["rejected"]}
    assert reasons.keys() == {"02", "03", "07", "12"}
    for name, reason in (("02", "empty file"), ("03", "HTML"), ("07", "no video stream"), ("12", "git-lfs")):
        assert reason in reasons[name]
    shards = ShardSet(out)
    records = {record.key[:2]: record for record in map(shards.read, range(len(shards)))}
    kept = {name: records[name].num_frames for name in ("01", "05", "08", "10", "17")}
    assert kept == {"01": 137, "05": 24, "08": 1, "10": 30, "17": 1}
    warnings = [(row["key"], row["warning"]) for row in manifest["warnings"]]
    assert ("01_truncated_faststart", "header promises 303 frames, 137 decode") in warnings
    assert len(shards) == len(clips) + 5
