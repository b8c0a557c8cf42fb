"""A Slurm cluster of several nodes on this machine, for tests: a controller, a slurmd a node and a munged, which only
this folder's files know and which end with the `with` block. Nothing in /etc is read or written."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
NO_SLURM = "needs Slurm (Debian: slurmctld slurmd slurm-client munge)"

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,defer=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=10
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
# Whole nodes only, so that two jobs meet where both want one. A job of `main` that makes room has `GraceTime` seconds.
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 OverSubscribe=EXCLUSIVE
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF OverSubscribe=EXCLUSIVE
"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]


class Cluster:
    """A running cluster. Its nodes are `node1`, `node2`, …, all on this machine, each of 64 cores and 8 GPUs on paper.

    Attributes:
        folder: configuration, state and logs.
        environment: variables with which sbatch, srun and the like find the cluster.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        own = {name: text for name, text in os.environ.items() if name not in outer and not name.startswith("SLURM_")}
        self.environment = {
            **own,
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "WANDB_MODE": "disabled",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = {"key-file": key, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={self.folder / place}" for name, place in munge.items()]
        self._start("munged", "--foreground", "--force", *options, f"--seed-file={self.folder / 'munge.seed'}")
        until((self.folder / "munge.sock").exists, 60, self.logs)
        self._configure()
        self._start("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        until(lambda: all(self.node_state(node) == "IDLE" for node in self.nodes), 180, self.logs)

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(1 + len(self.nodes))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        text = CONFIG.format(host=host, port=ports[0], user=user, folder=self.folder)
        for node, port in zip(self.nodes, ports[1:], strict=True):
            size = "CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=65536 Gres=gpu:8"
            text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size} State=UNKNOWN\n"
            (self.folder / f"spool-{node}").mkdir()
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(text + PARTITIONS)
        for number in range(8):  # what stands for GPUs
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")

    def down(self) -> None:
        """End all jobs and daemons, and whatever process of theirs is left."""
        try:
            self.call("scancel", "--signal=KILL", "--full", "--user", str(os.getuid()), check=False)
            self.call("scancel", "--user", str(os.getuid()), check=False)
            until(lambda: not self.call("squeue", "--noheader", check=False), 90, self.logs)
        finally:
            for name in list(reversed(self._daemons)):
                self._end(name)
            for process in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _start(self, name: str, *options: str, node: str = "") -> None:
        program = shutil.which(name, path=self.environment["PATH"])
        assert program is not None
        with (self.folder / f"{node or name}.out").open("ab") as out:
            # It ends with the tests, also with those that were killed.
            ends = ["setpriv", "--pdeathsig", "TERM"]
            self._daemons[node or name] = subprocess.Popen(
                [*ends, program, *options], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def _end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def start_node(self, node: str) -> None:
        """Start a node's slurmd (again)."""
        self._start("slurmd", "-D", "-N", node, node=node)

    def kill_node(self, node: str) -> None:
        """As if the machine lost its power: slurmd and every process of a job on it."""
        self._end(node, signal.SIGKILL)
        tasks = self.processes(SLURMD_NODENAME=node)
        for process in {*tasks, *filter(None, map(slurm_parent, tasks))}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def call(self, *command: str, check: bool = True, **variables: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=180,
        )
        if check and done.returncode:
            raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stderr or done.stdout}\n{self.logs()}")
        return done.stdout.strip()

    def submit(self, job: str, *arguments: str, options: Sequence[str] = (), **variables: str) -> str:
        """The number of a job of slurm/, submitted as a user does; its output is `output(number)`."""
        out = f"--output={self.folder}/%j.job"
        return self.call("sbatch", "--parsable", out, *options, f"slurm/{job}.sbatch", *arguments, **variables)

    def output(self, number: str) -> str:
        """What a job printed so far."""
        file = self.folder / f"{number}.job"
        return file.read_text(errors="replace") if file.is_file() else ""

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: `JobState`, `Restarts`, `NumNodes`, …"""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split(" ")
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def node_state(self, node: str) -> str:
        """`IDLE`, `DOWN`, `IDLE*` (does not answer), …"""
        words = self.call("scontrol", "--oneliner", "show", "node", node).split(" ")
        return next(word.removeprefix("State=") for word in words if word.startswith("State="))

    def wait(self, number: str, *states: str, seconds: float = 450) -> dict[str, str]:
        """The job once it is in one of `states` (default: COMPLETED); an error where it ends otherwise."""
        wanted = states or ("COMPLETED",)
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}
        end = time.monotonic() + seconds
        while (about := self.job(number))["JobState"] not in wanted:
            said = f"job {number} is {about['JobState']} ({about.get('Reason')}), not {wanted}:\n"
            ended = about["JobState"] in over or time.monotonic() > end
            assert not ended, said + self.output(number) + self.logs()
            time.sleep(0.3)
        return about

    def processes(self, **variables: str) -> list[int]:
        """Processes of this machine that a job of this cluster has started, with these variables."""
        wanted = {f"{name}={text}".encode() for name, text in variables.items()}
        found = self._processes().items()
        return [
            number
            for number, given in found
            if wanted <= given and any(text.startswith(b"SLURM_JOB_ID=") for text in given)
        ]

    def _processes(self) -> dict[int, set[bytes]]:
        """{number: variables} of what belongs to this cluster, daemons too."""
        own, found = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                given = set((folder / "environ").read_bytes().split(b"\0"))
                if own in given:
                    found[int(folder.name)] = given
        return found

    def logs(self) -> str:
        """The last lines of the daemons, for a message."""
        tails = [f"{file.name}:\n" + "\n".join(tail(file)) for file in sorted(self.folder.glob("slurm*.log"))]
        return "\n".join(tails)


def tail(file: Path, lines: int = 15) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-lines:]


def slurm_parent(process: int) -> int | None:
    """The slurmstepd that started a task."""
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        return parent if "slurmstepd" in Path(f"/proc/{parent}/cmdline").read_text() else None
    return None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(holds: Callable[[], object], seconds: float, told: Callable[[], str] = str) -> None:
    """Wait until something holds; AssertionError, with what is told then, after some seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} seconds\n{told()}"
        time.sleep(0.2)


@contextlib.contextmanager
def running(nodes: int = 3) -> Iterator[Cluster]:
    """A cluster, up."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's name has 108 bytes at most
    folder.chmod(0o755)
    cluster = Cluster(folder, nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
