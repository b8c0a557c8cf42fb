"""A way to start the real command lines in real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """As a user's shell, but one thread a process and no leftovers of an outer launcher."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    return {**env, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}


def start(arguments: list[str], processes: int = 1) -> subprocess.Popen:
    """Start a script of ours, as one process or under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> None:
    """End a script that hangs. torchrun, told to stop, ends its workers, which are in sessions of their own."""
    process.terminate()
    try:
        process.communicate(timeout=45)  # torchrun gives its workers 30 seconds before it kills them
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(arguments: list[str], processes: int = 1, expect: int = 0, timeout: float = 900) -> str:
    """Run a script of ours to its end and return what it printed."""
    process = start(arguments, processes)
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        raise
    assert process.returncode == expect, printed[-12000:]
    return printed


def train_arguments(shards: Path, run_dir: Path, *overrides: str, recipe: str = "vit_llama.debug") -> list[str]:
    """The command line of a tiny training run."""
    settings = [f"data.shards={shards / 'train'}", f"run_dir={run_dir}", "data.workers=0", "log_every=1"]
    if not recipe.startswith("video_mae"):
        settings += [f"eval.shards={shards / 'test'}", "eval.workers=0"]
    hardware = str(ROOT / "ds_configs" / "cpu.json")
    return [
        str(ROOT / "launch" / "train.py"),
        "--deepspeed_config",
        hardware,
        "--recipe",
        recipe,
        *settings,
        *overrides,
    ]
