"""Training on several nodes of a real Slurm: by the files of slurm/, preempted, out of time, cancelled, and with a node
that dies. What comes out is the curve of the run that nothing happened to."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training import STEPS, Run, column

from tests.slurm_cluster import Cluster, until

pytestmark = pytest.mark.slow
LONG = (f"steps={2 * STEPS}",)  # so long that it is not over when something happens to it


@pytest.fixture(scope="module")
def whole(cluster: Cluster, shape_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two nodes, ZeRO-2, undisturbed."""
    run = Run(cluster, shape_shards, tmp_path_factory.mktemp("whole") / "run")
    cluster.wait(run.submit("--nodes=2"))
    return run


@pytest.fixture
def run(cluster: Cluster, shape_shards: Path, tmp_path: Path) -> Iterator[Run]:
    """Another; its jobs end with the test."""
    run = Run(cluster, shape_shards, tmp_path / "run")
    yield run
    for job in run.jobs:
        cluster.call("scancel", job, check=False)
        until(lambda job=job: not cluster.call("squeue", "--noheader", "--job", job, check=False), 120)  # type: ignore[misc]


def same_course(run: Run, whole: Run, steps: int = STEPS, precision: float = 1e-6) -> None:
    """Every step once, of the same samples; losses as close as sums in another order allow."""
    found, want = run.rows()[:steps], whole.rows()[:steps]
    assert column(found, "step") == list(range(1, steps + 1))
    assert column(found, "batch_digest") == column(want, "batch_digest")
    assert column(found, "loss") == pytest.approx(column(want, "loss"), rel=precision)


@pytest.fixture
def high(cluster: Cluster) -> Iterator[Callable[[int], str]]:
    """Submits a job that takes this many nodes from others, until the test ends."""
    jobs: list[str] = []

    def submit(nodes: int) -> str:
        options = ("--parsable", "--partition=high", f"--nodes={nodes}", f"--output={cluster.folder}/%j.job")
        jobs.append(cluster.call("sbatch", *options, "--wrap=sleep 600"))
        return jobs[-1]

    yield submit
    cluster.call("scancel", *jobs)


def test_two_nodes(whole: Run) -> None:
    assert "world size 2 (started by slurm)" in whole.said()
    assert column(whole.rows(), "step") == list(range(1, STEPS + 1))
    assert whole.cluster.job(whole.jobs[0])["Restarts"] == "0"


def test_two_nodes_zero3(whole: Run, run: Run) -> None:
    run.stage, run.settings = 3, ("steps=12",)
    run.cluster.wait(run.submit("--nodes=2"))
    assert "ZeRO stage 3" in run.said()
    same_course(run, whole, 12)


def test_preempted_and_on_fewer_nodes_and_on_more(whole: Run, run: Run, high: Callable[[int], str]) -> None:
    """Two nodes, then one, then three: a job that waits to go on takes what its owner gives it."""
    run.settings = LONG
    job = run.submit("--nodes=2")
    run.reach(10)
    others = [high(2)]
    run.restarted(1)
    run.give(1)
    run.reach(len(run.rows()) + 10)
    others.append(high(1))
    run.restarted(2)
    run.give(3)
    run.cluster.call("scancel", *others)
    run.cluster.wait(job)
    assert [row["world_size"] for row in run.resumed()] == [1, 3]
    assert run.said().count("stopped: SIGTERM came; saved at step") == 2
    assert run.said().count("slurm: stopped by a signal, and saved: job") == 2
    same_course(run, whole)


def test_out_of_time_then_cancelled(whole: Run, run: Run) -> None:
    """The time limit comes: saved, queued again, gone on. Cancelled: not queued again, nothing left, the next start
    goes on."""
    cluster, run.settings = run.cluster, ("steps=100000",)
    job = run.submit("--nodes=2", "--signal=B:USR1@40")
    run.reach(5)
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    limit = (hours * 3600 + minutes * 60 + seconds + 50) // 60 + 1  # in 50 to 110 seconds, of which 40 are for saving
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    run.restarted(1, seconds=300)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    saved = len(run.rows())
    assert "slurm: told to stop" in run.said()
    assert f"stopped: SIGUSR1 came; saved at step {saved}" in run.said()
    run.reach(saved + 5)
    cluster.call("scancel", job)
    cluster.wait(job, "CANCELLED")
    until(lambda: not cluster.processes(SLURM_JOB_ID=job), 120)
    time.sleep(2)
    assert cluster.job(job)["JobState"] == "CANCELLED", "and stays so"
    before = len(run.rows())
    run.submit("--nodes=2")
    run.reach(before + 5)
    first, second = (row["step"] for row in run.resumed())
    assert first == saved
    assert second >= saved
    same_course(run, whole, min(STEPS, before))


def test_a_node_dies(whole: Run, run: Run) -> None:
    """Its slurmd and all processes on it, killed: the job is queued again, and finishes on the nodes that are left."""
    cluster, run.settings = run.cluster, LONG
    job = run.submit("--nodes=2")
    run.reach(30)
    until(lambda: run.saved(25), 60, run.said)
    lost = "node2"
    assert lost in cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).splitlines()
    cluster.kill_node(lost)
    try:
        run.restarted(1)
        about = cluster.wait(job)
        assert lost not in cluster.call("scontrol", "show", "hostnames", about["NodeList"]).splitlines()
    finally:
        cluster.start_node(lost)
    until(lambda: cluster.node_state(lost) == "IDLE", 240, cluster.logs)
    assert run.resumed()[0]["step"] >= 25, "no more is lost than was made since the last checkpoint"
    same_course(run, whole)
