"""The same run, started in each of the ways that docs/cluster.md names: the same batches, the same losses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host
from tests.run import launching
from tests.slurm_cluster import NO_SLURM, Cluster, missing, running
from vlm import rendezvous

pytestmark = pytest.mark.slow
STEPS = 6
PROGRAMS = Path(sys.executable).parent  # of the environment: deepspeed, torchrun


def arguments(shards: Path, run_dir: Path) -> list[str]:
    settings = (f"steps={STEPS}", "eval=none", "checkpoint_every=0")
    return [word for word in launching.train_arguments(shards, run_dir, *settings) if not word.startswith("eval.")]


def curve(run_dir: Path) -> list[tuple[object, ...]]:
    """What a run did, step by step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    recipe = json.loads((run_dir / "recipe.json").read_text())
    assert recipe["world_size"] == 2
    return [(row["step"], row["batch_digest"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]


def environment() -> dict[str, str]:
    return {**launching.environment(), "DS_ACCELERATOR": "cpu", "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}


def run(*commands: list[str], env: dict[str, str], timeout: float = 900) -> str:
    """Run commands at the same time, each to its end; what the first printed."""
    started = [
        subprocess.Popen(
            command,
            cwd=launching.ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    return finished(started, timeout)


def finished(started: list[subprocess.Popen[str]], timeout: float = 900) -> str:
    printed = []
    try:
        for process in started:
            printed.append(process.communicate(timeout=timeout)[0])
            assert process.returncode == 0, printed[-1][-8000:]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return printed[0]


@pytest.fixture(scope="module")
def wanted(shape_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    """The curve of the run that torchrun starts."""
    run_dir = tmp_path_factory.mktemp("torchrun") / "run"
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    said = run([*torchrun, *arguments(shape_shards, run_dir)], env=environment())
    assert "world size 2 (started by torchrun)" in said
    found = curve(run_dir)
    assert [row[0] for row in found] == [*range(1, STEPS + 1)]
    assert len({row[2] for row in found}) == STEPS, "the loss moves"
    return found


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if missing():
        pytest.skip(f"{NO_SLURM}: no {', '.join(missing())}")
    with running(nodes=2) as cluster:
        yield cluster


def hostfile(folder: Path, *names: str, slots: int = 1) -> Path:
    file = folder / "hostfile"
    file.write_text("".join(f"{name} slots={slots}\n" for name in names))
    return file


def deepspeed_on_each(file: Path, rank: int, address: str, port: int, command: list[str]) -> list[str]:
    """What is typed on host `rank`, where no host may log in to another."""
    options = f"--hostfile={file} --no_ssh --node_rank={rank} --master_addr={address} --master_port={port}"
    return ["deepspeed", *options.split(), *command]


def test_deepspeed_with_a_hostfile(shape_shards: Path, tmp_path: Path, wanted: list[tuple[object, ...]]) -> None:
    file, port = hostfile(tmp_path, "first", "second"), rendezvous.free_port()
    command = arguments(shape_shards, tmp_path / "run")
    both = [deepspeed_on_each(file, rank, "127.0.0.1", port, command) for rank in (0, 1)]
    said = run(*both, env=environment())
    assert "world size 2 (started by deepspeed)" in said
    assert curve(tmp_path / "run") == wanted


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun (Debian: openmpi-bin libopenmpi3)")
@pytest.mark.parametrize("starter", ["mpirun", "deepspeed"])
def test_mpirun_and_deepspeed_by_it(
    starter: str, shape_shards: Path, tmp_path: Path, wanted: list[tuple[object, ...]]
) -> None:
    options = {
        "mpirun": ["mpirun", "--oversubscribe", "-n", "2", sys.executable],
        "deepspeed": [
            *("deepspeed", f"--hostfile={hostfile(tmp_path, 'localhost', slots=2)}", "--force_multi"),
            *("--launcher=openmpi", "--no_ssh_check", "--master_addr=127.0.0.1"),
            "--launcher_args=--oversubscribe --allow-run-as-root",
        ],
    }[starter]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    said = run([*options, *arguments(shape_shards, tmp_path / "run")], env={**environment(), **root})
    assert "world size 2 (started by mpi)" in said
    assert curve(tmp_path / "run") == wanted


def test_bare_srun(slurm: Cluster, shape_shards: Path, tmp_path: Path, wanted: list[tuple[object, ...]]) -> None:
    """Neither address nor port nor any other variable: all is found from the step."""
    command = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable]
    said = run([*command, *arguments(shape_shards, tmp_path / "run")], env=slurm.environment)
    assert "world size 2 (started by slurm)" in said
    assert curve(tmp_path / "run") == wanted


def test_sbatch(slurm: Cluster, shape_shards: Path, tmp_path: Path, wanted: list[tuple[object, ...]]) -> None:
    _, _, hardware, _, recipe, *settings = arguments(shape_shards, tmp_path / "run")
    options = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none")
    job = slurm.submit("pretrain", recipe, *settings, options=options, VLM_DS_CONFIG=hardware)
    slurm.wait(job, seconds=900)
    assert "world size 2 (started by slurm)" in slurm.output(job)
    assert curve(tmp_path / "run") == wanted


@pytest.mark.parametrize("starter", ["deepspeed", "torchrun"])
def test_hosts_that_are_really_apart(
    starter: str, two_hosts: list[Host], shape_shards: Path, tmp_path: Path, wanted: list[tuple[object, ...]]
) -> None:
    first, command = two_hosts[0].name, arguments(shape_shards, tmp_path / "run")
    file = hostfile(tmp_path, *(host.name for host in two_hosts))
    started = []
    for rank, host in enumerate(two_hosts):
        line = deepspeed_on_each(file, rank, first, 23456, command)
        if starter == "torchrun":
            options = f"--nnodes=2 --nproc_per_node=1 --node_rank={rank} --master_addr={first} --master_port=23457"
            line = ["torchrun", *options.split(), *command]
        started.append(host.start(line, environment(), launching.ROOT))
    said = finished(started)
    assert f"world size 2 (started by {starter})" in said
    assert curve(tmp_path / "run") == wanted


SSH = ("ssh", "sshd", "ssh-keygen", "pdsh")
NO_SSH = [name for name in SSH if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]


@pytest.fixture
def logins(two_hosts: list[Host], tmp_path: Path) -> Iterator[str]:
    """An ssh server on each host; what ssh is to be told so that it logs in there without a password."""
    for key in ("user", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = [f"AuthorizedKeysFile={tmp_path}/user.pub", "StrictModes=no", "PermitRootLogin=yes", "UsePAM=no"]
    server = [shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"), "-D", "-e", "-f", "/dev/null"]
    words = [*server, "-h", str(tmp_path / "host"), "-o", "PidFile=none", *(w for o in options for w in ("-o", o))]
    running = [host.start(words, environment(), tmp_path) for host in two_hosts]
    yield f"-F /dev/null -i {tmp_path}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    for process in running:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.skipif(bool(NO_SSH), reason=f"no {', '.join(NO_SSH)} (Debian: openssh-client openssh-server pdsh)")
def test_deepspeed_that_logs_in_to_the_hosts_of_its_hostfile(
    logins: str, two_hosts: list[Host], shape_shards: Path, tmp_path: Path, wanted: list[tuple[object, ...]]
) -> None:
    """One command on the first host, as on a cluster without Slurm. Variables go along in a file of deepspeed's."""
    variables = tmp_path / "variables"
    variables.write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nWANDB_MODE=disabled\n")
    file = hostfile(tmp_path, *(host.name for host in two_hosts))
    options = ["deepspeed", f"--hostfile={file}", f"--master_addr={two_hosts[0].name}", "--no_ssh_check"]
    env = {**environment(), "PDSH_SSH_ARGS_APPEND": logins, "DS_ENV_FILE": str(variables)}
    said = finished([two_hosts[0].start([*options, *arguments(shape_shards, tmp_path / "run")], env, launching.ROOT)])
    assert "world size 2 (started by deepspeed)" in said
    assert curve(tmp_path / "run") == wanted
