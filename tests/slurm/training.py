"""A small training run, as a job of the cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.slurm_cluster import Cluster, until

STEPS = 100
# A rate that does not change, so that runs of other lengths begin alike; no mixing, which depends on who has a sample.
RECIPE = (
    *("vit_llama.debug", "optim.warmup_steps=0", "optim.lr=1e-3", "optim.min_lr=1e-3", "data.workers=0"),
    *("log_every=1", "eval.at_end=false", "checkpoint_every=25", f"steps={STEPS}"),
)
ONE_A_NODE = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gres=gpu:1")


@dataclass
class Run:
    """A run folder, and the jobs that train in it.

    Attributes:
        settings: beyond `RECIPE`.
        stage: of ZeRO, in float32: then other numbers of processes change sums in their last digits only.
    """

    cluster: Cluster
    shards: Path
    folder: Path
    settings: tuple[str, ...] = ()
    stage: int = 2
    jobs: list[str] = field(default_factory=list)

    def submit(self, *options: str) -> str:
        """Submit slurm/pretrain.sbatch, one task a node."""
        hardware = self.folder.with_suffix(".json")
        zero = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": self.stage}}
        hardware.write_text(json.dumps(zero))
        places = (f"data.shards={self.shards / 'train'}", f"run_dir={self.folder}")
        arguments = (*RECIPE, *places, *self.settings)
        options = (*ONE_A_NODE, *options)
        self.jobs.append(self.cluster.submit("pretrain", *arguments, options=options, VLM_DS_CONFIG=str(hardware)))
        return self.jobs[-1]

    def rows(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text() if file.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def reach(self, step: int, seconds: float = 360) -> None:
        """Wait until a step is made."""
        until(lambda: len(self.rows()) >= step, seconds, self.said)

    def saved(self, step: int) -> bool:
        """Whether a checkpoint of this step, or of a later one, is complete: it is written beside the steps."""
        file = self.folder / "checkpoints" / "latest"
        return file.is_file() and int(file.read_text().strip().removeprefix("step-")) >= step

    def restarted(self, times: int, seconds: float = 240) -> None:
        """Wait until the job has been queued again this often, and no process of it is left."""

        def waits() -> bool:
            about = self.cluster.job(self.jobs[-1])
            return about["Restarts"] == str(times) and about["JobState"] != "COMPLETING"

        until(waits, seconds, self.said)

    def give(self, nodes: int) -> None:
        """Other nodes for a job that waits. Slurm 22.05 keeps the number of cores that it once had: hence NumCPUs."""
        changes = (f"NumNodes={nodes}-{nodes}", f"NumTasks={nodes}", f"NumCPUs={nodes}")
        self.cluster.call("scontrol", "update", f"JobId={self.jobs[-1]}", *changes)

    def said(self) -> str:
        """All that its jobs printed."""
        return "\n".join(f"job {job}:\n{self.cluster.output(job)}" for job in self.jobs)

    def resumed(self) -> list[dict[str, Any]]:
        """What recipe.json says of each time that it went on: `step`, `world_size`, …"""
        found: list[dict[str, Any]] = json.loads((self.folder / "recipe.json").read_text()).get("resumed") or []
        return found


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]
