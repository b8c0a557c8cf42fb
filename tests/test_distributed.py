"""Whoever starts the processes, they find each other."""

import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from vlm import distributed, starters
from vlm.distributed import share
from vlm.rendezvous import hashed_port
from vlm.starters import find_starter
from vlm.types import UserError

SCRIPT = """
from vlm.distributed import gather_objects, join, leave, share_object, sum_over_ranks
world = join()
total = sum_over_ranks([world.rank + 1.0, 10.0], world.device)
names = gather_objects(f"rank {world.rank}")
word = share_object("told" if world.is_main else None)
if world.is_main:
    print("RESULT", world.size, world.starter, total, names, word, flush=True)
leave()
"""


@pytest.fixture
def clean(monkeypatch):
    for name in (
        *starters.VARIABLES,
        *(name for name in os.environ if name.startswith("SLURM_")),
        "OMPI_COMM_WORLD_SIZE",
        "PMI_SIZE",
        "PMIX_RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def result_of(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(line for line in done.stdout.splitlines() if "RESULT" in line).split("RESULT ")[1]


def test_a_plain_process_is_a_world_of_one(clean, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert result_of([sys.executable, str(script)]) == "1 single [1.0, 10.0] ['rank 0'] told"


def test_torchrun(clean, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    assert result_of(command) == "2 torchrun [3.0, 20.0] ['rank 0', 'rank 1'] told"


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun (Debian: openmpi-bin libopenmpi3)")
def test_mpirun(clean, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    clean.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    clean.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, str(script)]
    assert result_of(command) == "2 mpi [3.0, 20.0] ['rank 0', 'rank 1'] told"


@pytest.fixture
def task(clean):
    """As in task 3 of a step of 4, started by srun alone."""
    for name, value in (
        ("JOB_ID", "42"),
        ("STEP_ID", "0"),
        ("NTASKS", "4"),
        ("PROCID", "3"),
        ("LOCALID", "1"),
        ("STEP_NODELIST", "localhost,b[1-2]"),
        ("LAUNCH_NODE_IPADDR", "203.0.113.9"),
    ):
        clean.setenv(f"SLURM_{name}", value)
    for name in starters.VARIABLES:  # so that what the function sets is undone
        clean.setenv(name, "x")
        clean.delenv(name)
    return clean


def seen():
    return [os.environ[name] for name in starters.VARIABLES]


def test_srun_alone_is_enough(task):
    assert find_starter() == "slurm"
    assert seen() == ["3", "4", "1", "localhost", str(hashed_port())]


def test_what_the_user_says_of_a_step_stays(task):
    task.setenv("MASTER_PORT", "1234")
    assert find_starter() == "slurm"
    assert seen() == ["3", "4", "1", "localhost", "1234"]


def test_a_step_without_hosts_is_told(task):
    task.delenv("SLURM_STEP_NODELIST")
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST is not set.*export MASTER_ADDR"):
        find_starter()


def test_the_shell_of_salloc_is_one_process(task):
    task.setenv("SLURM_STEP_NUM_TASKS", "1")  # of a job of four
    assert find_starter() == "single"
    assert seen()[:4] == ["0", "1", "0", "127.0.0.1"]


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),  # Open MPI's daemons are started by srun
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpi"),  # MPICH's too
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, "slurm"),  # srun --mpi=pmi2
        ({"PMIX_RANK": "3"}, "slurm"),
    ],
)
def test_mpirun_within_a_job_is_told_from_srun(task, variables, want):
    for name, value in variables.items():
        task.setenv(name, value)
    task.setattr(starters, "_from_mpi", lambda: None)
    assert find_starter() == want


def test_a_job_of_one_task_finds_itself(clean):
    for name, value in (("STEP_ID", "0"), ("NTASKS", "1"), ("PROCID", "0"), ("LOCALID", "0")):
        clean.setenv(f"SLURM_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # so that what the function sets is undone
        clean.setenv(name, "x")
        clean.delenv(name)
    clean.setenv("MASTER_ADDR", "host")
    clean.setenv("MASTER_PORT", "1234")
    assert find_starter() == "slurm"
    assert [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, "single"),  # MpiDefault=pmi2
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.42.0"}, "single"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpi"),  # MPICH's mpirun, whose daemon is the step's task
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "mpi"),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun-host-7@1"}, "mpi"),
    ],
)
def test_a_step_of_one_task_needs_no_mpi(task, variables, want):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", **variables}.items():
        task.setenv(name, value)
    task.setattr(starters, "_from_mpi", lambda: None)
    assert find_starter() == want


@pytest.mark.parametrize(
    ("local_rank", "seen", "starter", "together", "want"),
    [
        (3, 8, "slurm", "8", 3),
        (3, 1, "slurm", "8", 0),  # --gpus-per-task=1: each task sees its own alone
        (0, 1, "slurm", "8", 0),
        (1, 1, "slurm", "1", None),
        (1, 1, "slurm", "", None),
        (2, 2, "slurm", "8", None),
        (1, 1, "torchrun", "8", None),
    ],
)
def test_the_gpu_of_a_process(clean, local_rank, seen, starter, together, want):
    clean.setenv("SLURM_GPUS_ON_NODE", together)
    clean.setattr(torch.cuda, "device_count", lambda: seen)
    if want is None:
        with pytest.raises(UserError, match=f"has {seen} GPU.*process {local_rank}"):
            distributed._gpu_of(local_rank, starter)
    else:
        assert distributed._gpu_of(local_rank, starter) == want


def test_a_half_set_environment_is_refused(clean):
    clean.setenv("RANK", "0")
    with pytest.raises(UserError, match="only RANK"):
        find_starter()


@pytest.mark.parametrize("world", [1, 2, 3, 7, 4096])
@pytest.mark.parametrize("count", [0, 1, 5, 4096, 10_000])
def test_shares_cover_everything_once(count, world):
    parts = [share(count, world, rank) for rank in range(world)]
    assert parts[0][0] == 0
    assert parts[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


def test_processes_of_a_host_share_its_cores(clean: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    try:
        clean.delenv("OMP_NUM_THREADS", raising=False)
        clean.setenv("LOCAL_SIZE", str(cores))
        distributed._share_cores()
        assert torch.get_num_threads() == 1
        clean.setenv("LOCAL_SIZE", "1")
        distributed._share_cores()
        assert torch.get_num_threads() == cores
        clean.setenv("OMP_NUM_THREADS", "1")
        clean.setenv("LOCAL_SIZE", str(cores))
        distributed._share_cores()
        assert torch.get_num_threads() == cores, "what the user said is kept"
    finally:
        torch.set_num_threads(threads)
