"""The other jobs of slurm/: accepted as they stand, three in a chain, an array that makes shards."""

import json
from pathlib import Path

import pytest
from training import ONE_A_NODE

from tests.slurm_cluster import Cluster, until
from vlm.data.shards import ShardSet
from vlm.sources import shapes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("job", ["pretrain", "finetune", "evaluate", "make_shards"])
def test_accepted_as_they_stand(cluster: Cluster, job: str) -> None:
    """By nodes of 64 cores and 8 GPUs: no option of the #SBATCH lines is unknown or cannot be met."""
    cluster.call("sbatch", "--test-only", f"slurm/{job}.sbatch")


def test_a_chain(cluster: Cluster, shape_shards: Path, tmp_path: Path) -> None:
    """One command: pretraining, fine-tuning that begins with it, evaluation; on two nodes each."""
    settings = [f"data.shards={shape_shards / 'train'}", f"eval.shards={shape_shards / 'test'}"]
    settings += ["eval.at_end=false"]
    recipe = "video_llama.debug"
    first, second = ([recipe, *settings, f"run_dir={tmp_path / name}"] for name in "ab")
    out = cluster.call(
        *("slurm/chain.sh", f"--output={cluster.folder}/%j.job", "--nodes=2", *ONE_A_NODE),
        *(*first, "steps=2", *second, "steps=3"),
    )
    names, jobs = zip(*(line.split() for line in out.splitlines()), strict=True)
    assert names == ("pretrain", "finetune", "evaluate")
    cluster.wait(jobs[2], seconds=900)
    assert [cluster.job(job)["JobState"] for job in jobs] == ["COMPLETED"] * 3
    record = json.loads((tmp_path / "b" / "recipe.json").read_text())
    assert record["config"]["model"]["init_from"] == str(tmp_path / "a")
    assert (record["config"]["steps"], record["world_size"]) == (3, 2)
    tested = json.loads((tmp_path / "b_test" / "recipe.json").read_text())
    assert tested["checkpoint"].startswith(str(tmp_path / "b" / "checkpoints"))
    assert tested["world_size"] == 2
    assert json.loads((tmp_path / "b_test" / "metrics.json").read_text())


def test_a_chain_ends_where_a_job_fails(cluster: Cluster, tmp_path: Path) -> None:
    """The error is the user's: the job is not queued again, and those that wait for it are cancelled."""
    words = [f"data.shards={tmp_path / 'nowhere'}", f"run_dir={tmp_path / 'a'}", "video_llama.debug"]
    out = cluster.call(
        *("slurm/chain.sh", f"--output={cluster.folder}/%j.job", "--nodes=2", *ONE_A_NODE),
        *("video_llama.debug", *words, f"run_dir={tmp_path / 'b'}"),
    )
    first, *others = (line.split()[1] for line in out.splitlines())
    assert cluster.wait(first, "FAILED")["Restarts"] == "0"
    assert "there is no such folder; make the shards" in cluster.output(first)
    for job in others:
        cluster.wait(job, "CANCELLED", seconds=240)


def test_an_array_makes_shards(cluster: Cluster, tmp_path: Path) -> None:
    """Three tasks, on a node each, one set."""
    shapes.render(tmp_path / "corpus", num_train=8, num_test=8, seed=0, workers=1)
    arguments = ("shapes", "--root", f"{tmp_path}/corpus", "--split", "train", "--out", f"{tmp_path}/set")
    options = ("--array=0-2", "--cpus-per-task=1", f"--output={tmp_path}/%a.job")
    job = cluster.submit("make_shards", *arguments, "--shard-samples=2", options=options)
    until(lambda: not cluster.call("squeue", "--noheader", "--job", job), 480, cluster.logs)
    said = [(tmp_path / f"{task}.job").read_text() for task in range(3)]
    made = ShardSet(tmp_path / "set")
    assert len(made) == 8, said
    assert len(list((tmp_path / "set").glob("shard-*.tar"))) == 4
    whole = ["8 records" in text for text in said]
    assert any(whole), "the last task to finish completes the set"
    assert all(done or "this share is done" in text for done, text in zip(whole, said, strict=True))
