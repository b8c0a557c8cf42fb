"""make_shards under mpirun, as a Slurm array and with --reencode and --tokenizer: one set, the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from encoded import encode, pictures

from tools import make_shards
from vlm.data.shards import ShardSet, Task
from vlm.types import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "make_shards.py"
TOKENIZER = REPOSITORY / "tests" / "goldens" / "tiny_llama_tokenizer" / "tokenizer.model"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun (Debian: openmpi-bin libopenmpi3)")


@pytest.fixture(autouse=True)
def _no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI", "MPI_"))]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ssv2")
    for number in range(6):
        (root / f"clip{number}.mp4").write_bytes(encode(pictures(8, seed=number)))
    (root / "page.mp4").write_text("<html>")
    (root / "train.csv").write_text("".join(f"{path.name} 1\n" for path in sorted(root.glob("*.mp4"))))
    return root


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    return ["ssv2", "--root", str(root), "--split", "train", "--out", str(out), "--shard-samples", "2", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "set"
    assert make_shards.main(arguments(root, out, "--workers", "1", "--tasks", "1")) == 0
    return contents(out)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@needs_mpirun
def test_ranks_of_mpirun(root: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = subprocess.run(ranks(root, tmp_path / "set"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("6 records")
    assert len(done.stdout.strip().splitlines()) == 1  # of rank 0 alone
    assert "7/7 items (100 %)" in done.stderr
    assert contents(tmp_path / "set") == whole


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("whom", ["mpirun", "rank"])
def test_ranks_of_mpirun_killed_and_begun_again(whom: str, root: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """kill -9 when the source is listed ends the job; the same command then writes what one process does."""
    out = tmp_path / "set"
    plan, manifest = out / ".unfinished" / "plan.json", out / "manifest.json"
    for _ in range(9):  # where this process is slow to strike, the set may be complete
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen(ranks(root, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
            wait_for(lambda: plan.exists() or manifest.exists(), "no plan appears")
            if found := [job.pid] if whom == "mpirun" else _alive(out):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(max(found), signal.SIGKILL)
        wait_for(lambda: not _alive(out), "the ranks outlive mpirun")
        if not manifest.exists():
            break
    assert not manifest.exists()
    done = subprocess.run(ranks(root, out), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert contents(out) == whole


def ranks(root: Path, out: Path) -> list[str]:
    return [*MPIRUN, sys.executable, str(TOOL), *arguments(root, out)]


def _alive(out: Path) -> list[int]:
    """The processes of the tool that write into `out`, mpirun left out."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:2] == [str(TOOL).encode()] and str(out).encode() in words:
            found.append(int(process.name))
    return found


@needs_mpirun
@pytest.mark.slow
def test_errors_under_mpirun_end_all_ranks(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(ranks(root / "gone", tmp_path / "set"), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_array_script_builds_the_set(root: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """As Slurm starts it, from the folder where it was submitted; numbers need not begin at 0."""
    script = REPOSITORY / "slurm" / "make_shards.sbatch"
    for number in (11, 10):
        environment = os.environ | {
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_ARRAY_TASK_MIN": "10",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
        }
        command = ["bash", str(script), *arguments(root, tmp_path / "set")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        said = "this share is done; 2 shards are for other tasks" if number == 11 else "6 records"
        assert done.stdout.startswith(said)
    assert contents(tmp_path / "set") == whole


def test_array_script_asks_slurm_for_an_array_that_may_be_requeued() -> None:
    lines = (REPOSITORY / "slurm" / "make_shards.sbatch").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append"} <= set(asked)
    assert any(option.startswith("--array=0-") for option in asked)


@pytest.mark.parametrize(
    ("given", "words", "expected"),
    [
        ({}, (), None),
        ({}, ("--tasks", "1"), None),
        ({}, ("--task", "2", "--tasks", "5"), Task(2, 5)),
        ({"ID": "3", "COUNT": "8"}, (), Task(3, 8)),
        ({"ID": "3", "COUNT": "8"}, ("--tasks", "1"), None),
        ({"ID": "3", "COUNT": "8"}, ("--task", "0", "--tasks", "2"), Task(0, 2)),
        ({"ID": "7", "COUNT": "4", "MIN": "1", "STEP": "2"}, (), Task(3, 4)),
        ({"ID": "0", "COUNT": "1"}, (), None),
    ],
)
def test_shares(
    given: dict[str, str],
    words: tuple[str, ...],
    expected: Task | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert make_shards.find_task(make_shards.parse_arguments(arguments(tmp_path, tmp_path, *words))) == expected


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({}, ("--task", "1"), "belong together"),
        ({}, ("--tasks", "3"), "belong together"),
        ({}, ("--task", "3", "--tasks", "3"), "counted from 0 to 2"),
        ({}, ("--task", "1", "--tasks", "1"), "counted from 0 to 0"),
        ({"ID": "7", "COUNT": "2", "MIN": "3"}, (), "its numbers have gaps"),
    ],
)
def test_shares_that_cannot_be(
    given: dict[str, str], words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(UserError, match=message):
        make_shards.find_task(make_shards.parse_arguments(arguments(tmp_path, tmp_path, *words)))


def test_clips_encoded_again_and_tokens_counted(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    more = ("--reencode", "--short-side", "32", "--gop", "4", "--fps", "6", "--tokenizer", str(TOKENIZER))
    assert make_shards.main(arguments(root, out, "--workers", "1", *more)) == 0
    capsys.readouterr()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["arguments"]["reencode"] == {"short_side": 32, "gop": 4, "fps": 6.0, "crf": 20}
    assert manifest["arguments"]["tokenizer"]["file"] == str(TOKENIZER)
    found = ShardSet(out)
    assert found.num_frames.tolist() == [4] * 6  # 8 frames at 12 a second
    assert set(found.index["height"].tolist()) == {32}
    assert found.tokens is not None
    with pytest.raises(SystemExit):
        make_shards.parse_arguments(arguments(root, out, "--gop", "4"))
    assert "--gop says how to --reencode, which is not asked for" in capsys.readouterr().err
    assert make_shards.main(arguments(root, out, "--reencode", "--no-check")) == 2
    assert "leave out --no-check or --reencode" in capsys.readouterr().err


def test_workers_are_of_one_machine(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert make_shards.main(arguments(root, tmp_path / "set", "--workers", "2")) == 2
    assert "start more ranks" in capsys.readouterr().err
