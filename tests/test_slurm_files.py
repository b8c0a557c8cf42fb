"""The jobs of slurm/: which command they run in their tasks, and what they tell it. Slurm itself is played by scripts;
a real one is the business of another test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
JOBS = ("pretrain", "finetune", "evaluate")

SRUN = """#!/usr/bin/env bash
set -euo pipefail
[[ $1 == --kill-on-bad-exit=1 ]] && shift
SLURM_STEP_ID=0 SLURM_PROCID=${TASK:-0} "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1 $2" == "show hostnames" ]]; then printf 'first\\nsecond\\n'; else
echo "NodeName=$3 Arch=x86_64"; echo "   NodeAddr=127.0.0.1 NodeHostName=host Version=1"; fi
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@"
env | grep -E '^(MASTER_|OMP_NUM|SRUN_CPUS|NCCL_SOCKET|GLOO_SOCKET)' | sort
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository whose Python prints how it was called."""
    (tmp_path / "slurm").symlink_to(REPOSITORY / "slurm")
    for name, content in (("bin/srun", SRUN), ("bin/scontrol", SCONTROL), (".venv/bin/python", PYTHON)):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o755)
    return tmp_path


def submit(place: Path, job: str, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """(arguments of Python, variables that it saw) of one task of a job."""
    own = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "3",
        **variables,
    }
    script = REPOSITORY / "slurm" / f"{job}.sbatch"
    done = subprocess.run(
        ["bash", str(script), *arguments], env=own, cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if re.match(r"[A-Z_]+=", line))
    return lines[:first], dict(line.split("=", 1) for line in lines[first:])


@pytest.mark.parametrize(
    ("job", "arguments", "want"),
    [
        ("pretrain", (), "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_llama.pretrain"),
        (
            "pretrain",
            ("video_mae.ssv2_s", "steps=7"),
            "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_mae.ssv2_s steps=7",
        ),
        (
            "pretrain",
            ("steps=7",),
            "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_llama.pretrain steps=7",
        ),
        ("finetune", (), "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_llama.finetune"),
        (
            "evaluate",
            (),
            "launch/evaluate.py --recipe video_llama.finetune --checkpoint runs/video_llama/finetune "
            "run_dir=runs/video_llama/finetune_test",
        ),
        (
            "evaluate",
            ("eval.batch_size=4",),
            "launch/evaluate.py --recipe video_llama.finetune --checkpoint runs/video_llama/finetune "
            "run_dir=runs/video_llama/finetune_test eval.batch_size=4",
        ),
        (
            "evaluate",
            ("video_llama.gebc_opt13b", "run_dir=x"),
            "launch/evaluate.py --recipe video_llama.gebc_opt13b --checkpoint runs/video_llama/gebc_opt13b run_dir=x",
        ),
        (
            "evaluate",
            ("video_llama.finetune", "--untrained", "run_dir=x"),
            "launch/evaluate.py --recipe video_llama.finetune --untrained run_dir=x",
        ),
        (
            "evaluate",
            ("vico.star", "--checkpoint=c"),
            "launch/evaluate.py --recipe vico.star --checkpoint=c",
        ),
        (
            "evaluate",
            ("vico.star", "--checkpoint", "a b"),
            "launch/evaluate.py --recipe vico.star --checkpoint a b",
        ),
    ],
)
def test_what_a_job_runs(place: Path, job: str, arguments: tuple[str, ...], want: str) -> None:
    found, _ = submit(place, job, *arguments)
    assert " ".join(found) == want
    if "a b" in arguments:
        assert "a b" in found, "an argument stays one"


def test_another_file_of_settings(place: Path) -> None:
    for job, script in (("pretrain", "train"), ("evaluate", "evaluate")):
        found, _ = submit(place, job, VLM_DS_CONFIG="ds configs/x.json")
        assert found[:3] == [f"launch/{script}.py", "--deepspeed_config", "ds configs/x.json"]


def test_where_tasks_meet(place: Path) -> None:
    _, first = submit(place, "pretrain")
    _, again = submit(place, "finetune", TASK="1")
    assert first == again, "the same for every task of a job"
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert 15000 <= int(first["MASTER_PORT"]) < 30000
    assert first["OMP_NUM_THREADS"] == first["SRUN_CPUS_PER_TASK"] == "3"
    if shutil.which("ip"):
        assert first["GLOO_SOCKET_IFNAME"] == first["NCCL_SOCKET_IFNAME"] == "lo", "the interface of that address"
    ports = {submit(place, "pretrain", SLURM_JOB_ID=str(job))[1]["MASTER_PORT"] for job in range(42, 48)}
    assert len(ports) == 6
    assert submit(place, "pretrain", SLURM_RESTART_COUNT="1")[1]["MASTER_PORT"] != first["MASTER_PORT"]
    _, own = submit(place, "pretrain", MASTER_ADDR="there", MASTER_PORT="7", NCCL_SOCKET_IFNAME="ib0")
    assert (own["MASTER_ADDR"], own["MASTER_PORT"], own["NCCL_SOCKET_IFNAME"]) == ("there", "7", "ib0")


def test_one_node_needs_no_interface(place: Path) -> None:
    _, seen = submit(place, "pretrain", SLURM_JOB_NUM_NODES="1")
    assert "NCCL_SOCKET_IFNAME" not in seen


@pytest.mark.parametrize("job", JOBS)
def test_a_task_a_gpu_and_nothing_lost_in_a_requeue(job: str) -> None:
    lines = (REPOSITORY / "slurm" / f"{job}.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    assert {"requeue", "open-mode"} <= options.keys()
    assert len(lines) < 32, "thin: what jobs share is in env.sh"
