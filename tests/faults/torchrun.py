"""Trials under torchrun: by its command line, in processes that import everything (15 s of a processor), or its agent
forked from this process, and the ranks from it (2 s). What launches, watches and ends the ranks is the same code.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.faults import faulty, jobs
from tests.faults.harness import Setting, Trial
from tests.faults.jobs import ROOT, Job

SHARE = 1 / 5
"""Of starts that are by the command line."""


def start(trial: Trial, setting: Setting, real: bool, **fault: Any) -> Job:
    """Start the run, or its continuation, with a fault as tests/faults/faulty.py has it (none: none)."""
    attempt = trial.attempts + 1
    files = {name: str(trial.folder / name) for name in ("struck", f"statuses-{attempt}")}
    spec = {"loaded": str(trial.loaded_file), "attempt": attempt, "struck": files["struck"], **fault}
    spec["statuses"] = files[f"statuses-{attempt}"]
    path = trial.folder / f"spec-{attempt}.json"
    path.write_text(json.dumps(spec))
    arguments = [str(path), *trial.arguments(setting)]
    if real:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        return trial.launch([*launcher, str(setting.world), str(ROOT / "tests/faults/faulty.py"), *arguments])
    trial.attempts = attempt
    return _fork_agent(arguments, setting.world, trial.folder / f"out-{attempt}")


def again(trial: Trial, setting: Setting, real: bool) -> str:
    """Start the run again, without a fault, to its end; what it printed."""
    job = start(trial, setting, real)
    statuses = job.wait()
    assert statuses == [0], f"started again, ended with {statuses}: {job.printed()[-1500:]}"
    return job.printed()


def own_statuses(trial: Trial) -> dict[int, int]:
    """rank -> exit status, of the ranks of the last start that ended by themselves."""
    path = trial.folder / f"statuses-{trial.attempts}"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {row["rank"]: row["status"] for row in rows}


def seen_statuses(job: Job) -> list[int]:
    """Exit statuses, negative for signals, that the agent tells of ranks that failed."""
    return [int(status) for status in re.findall(r"exitcode *: (-?\d+)", job.printed())]


def _fork_agent(arguments: Sequence[str], world: int, output: Path) -> Job:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _be_agent(arguments, world, output)
    return Job([pid], [output])


def _be_agent(arguments: Sequence[str], world: int, output: Path) -> NoReturn:
    """What `torchrun --standalone` does, to the end of this process."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.environ.update(jobs.environment())
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            *(1, 1, world),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="fork",
        )
        elastic_launch(config, faulty.forked)(*arguments)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
