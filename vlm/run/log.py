"""What a run tells: a console line for people, metrics.jsonl (always, every step), wandb (never in the way)."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.files import write_text
from vlm.types import UserError

_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "flash-attn",
    "webdataset",
    "av",
    "decord",
    "einops",
    "numpy",
    "pillow",
    "safetensors",
    "wandb",
    "mpi4py",
)


class RunLog:
    """Rank 0's log of a run; on other ranks every call does nothing.

    Args:
        run_dir: where metrics.jsonl goes.
        first_step: lines of steps after it are dropped first (they belong to work that was lost and is done again).
        total_steps: for the time left.
        wandb_mode: "offline", "online" or "disabled".
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        active: bool,
        first_step: int,
        total_steps: int,
        every: int,
        wandb_mode: str,
        name: str,
        config: dict[str, Any],
    ) -> None:
        self.active, self.every, self.total_steps = active, every, total_steps
        self.first_step, self.started = first_step, time.monotonic()
        self.wandb: Any = None
        if not active:
            return
        path = run_dir / "metrics.jsonl"
        drop_after(path, first_step)
        try:
            self.stream = path.open("a", buffering=1)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        self.wandb = _start_wandb(wandb_mode, run_dir, name, config)

    def step(self, row: dict[str, Any]) -> None:
        """Record one optimizer step; `row` has at least step, loss, lr, grad_norm, skipped, step_time, data_wait.

        A number that is not finite is null in the file, which every reader of JSON understands.
        """
        if not self.active:
            return
        told = plain(row)
        try:
            self.stream.write(json.dumps(told, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.stream.name}: step {row['step']} could not be written ({error.strerror}): make room, then the "
                "same command goes on from the last checkpoint"
            ) from error
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in told.items() if isinstance(v, (int, float))}, row["step"])
        if row["step"] % self.every == 0 or row["step"] in (1, self.total_steps):
            self.say(self._line(row))

    def _line(self, row: dict[str, Any]) -> str:
        done = row["step"] - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (self.total_steps - row["step"])
        waits = 100 * row["data_wait"] / max(row["step_time"], 1e-9)
        return (
            f"step {row['step']:>6}/{self.total_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
            f"grad {row['grad_norm']:.2f}  {row['samples_per_s']:.1f} samples/s  data wait {waits:.0f} %  "
            f"left {_duration(left)}"
            + (f"  quarantined {row['quarantined']}" if row["quarantined"] else "")
            + ("  skipped" if row["skipped"] else "")
        )

    def say(self, text: str) -> None:
        """A line on rank 0's console."""
        if self.active:
            print(text, flush=True)

    def close(self) -> None:
        """Flush and close; wandb gets ten seconds."""
        if self.active:
            self.stream.close()
            if self.wandb is not None:
                self.wandb.finish()


def plain(value: Any, say: Callable[[float], str] | None = None) -> Any:
    """A value for strict JSON: in it, what is not finite is null, or what `say` makes of it ("nan", "inf": str)."""
    if isinstance(value, dict):
        return {name: plain(one, say) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one, say) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if say is None else say(value)
    return value


def drop_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step` of a .jsonl file; a half-written last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Wandb:
    """wandb behind a wall: no call may raise or wait into the run."""

    def __init__(self, run: Any) -> None:
        self.run: Any = run

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.run is not None:
            try:
                self.run.log(row, step=step)
            except Exception as error:  # wandb raises many kinds; none may end a run
                print(f"wandb: logging stopped ({error}); metrics.jsonl goes on", flush=True)
                self.run = None

    def finish(self) -> None:
        if self.run is not None:
            closing = threading.Thread(target=self._finish, daemon=True)
            closing.start()
            closing.join(timeout=10)

    def _finish(self) -> None:
        try:
            self.run.finish()
        except Exception as error:  # as above
            print(f"wandb: did not close ({error}); metrics.jsonl has everything", flush=True)


def _start_wandb(mode: str, run_dir: Path, name: str, config: dict[str, Any]) -> _Wandb | None:
    """wandb in `mode` (WANDB_MODE in the environment decides over the recipe), or None with a sentence why not."""
    mode = os.environ.get("WANDB_MODE", mode)
    if mode == "disabled":
        return None
    try:
        import wandb

        settings = wandb.Settings(init_timeout=20, silent=True, console="off", x_disable_stats=True)
        run = wandb.init(project="vlm", name=name, dir=str(run_dir), mode=mode, config=config, settings=settings)  # type: ignore[arg-type]
        return _Wandb(run)
    except Exception as error:  # not installed, no key, no network, no disk: the run goes on
        print(f"wandb: off ({type(error).__name__}: {error}); metrics.jsonl has everything", flush=True)
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of every package that decides a result ("-" where not installed)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def git_commit(root: Path = _ROOT) -> str:
    """The commit of the code that runs, with "+changes" where the tree differs from it; "unknown" outside git."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def command_line() -> list[str]:
    """The command as typed, without what the launcher appended."""
    return [Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
