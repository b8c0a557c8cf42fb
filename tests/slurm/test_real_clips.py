"""Two nodes train on shards of real clips, once undisturbed and once preempted; the report shows both curves."""

from pathlib import Path

import pytest
from training import Run, column

from tests.slurm_cluster import Cluster, until
from tools.make_shards import main as make_shards
from tools.report import main as report

pytestmark = pytest.mark.slow
STEPS = 60


def test_the_curve_of_a_run_that_was_preempted(cluster: Cluster, realdata: Path, tmp_path: Path) -> None:
    """Clips of many containers and codecs: what the preemption changes is nothing, to the last digit."""
    clips = sorted(file for file in (realdata / "videos").iterdir() if file.stat().st_size < 300_000)
    listing = tmp_path / "train.csv"
    listing.write_text("".join(f"videos/{file.name} {number % 8}\n" for number, file in enumerate(clips)))
    arguments = ["ssv2", "--root", str(realdata), "--split", "train", "--annotations", str(listing), "--workers", "1"]
    assert make_shards([*arguments, "--out", str(tmp_path / "shards" / "train")]) == 0
    whole, run = (
        Run(cluster, tmp_path / "shards", tmp_path / name, (f"steps={STEPS}",)) for name in ("undisturbed", "preempted")
    )
    cluster.wait(whole.submit("--nodes=2"), seconds=900)
    job = run.submit("--nodes=2")
    run.reach(STEPS // 4)
    options = ("--parsable", "--partition=high", "--nodes=3", f"--output={cluster.folder}/%j.job")
    other = cluster.call("sbatch", *options, "--wrap=sleep 600")
    until(lambda: cluster.job(other)["JobState"] == "RUNNING", 240, run.said)
    cluster.call("scancel", other)
    assert cluster.wait(job, seconds=900)["Restarts"] == "1"
    (resumed,) = run.resumed()
    assert STEPS // 4 <= resumed["step"] < STEPS
    for name in ("step", "batch_digest", "loss", "grad_norm"):
        assert column(run.rows(), name) == column(whole.rows(), name), name
    assert report([str(run.folder), "--beside", str(whole.folder)]) == 0
    page = (run.folder / "report.html").read_text()
    assert f"{STEPS} steps are told by both" in page
    assert "losses differ in no digit" in page
