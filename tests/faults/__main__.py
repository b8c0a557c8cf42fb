"""Inject faults and write down what survived: `make faults N=1000 [SEED=…] [JSON=FILE]`, or

    python -m tests.faults --number 20 --seed 7
    python -m tests.faults --kind kill_fsync --seed 123456      # one trial again, as its row in the ledger says

With --seed the trials are the same each time; those that the ledger has of this very commit are not run again, so a
long series may be cut short and goes on. Exit status 1: something did not survive.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled"}


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    from tests.faults import ledger
    from tests.faults.harness import Workshop, load_kinds

    kinds = load_kinds()
    chosen = options.kind or [name for name, one in kinds.items() if not (options.quick and one.process)]
    unknown = sorted(set(chosen) - set(kinds))
    if unknown:
        print(f"no such kind: {', '.join(unknown)}; there are {', '.join(sorted(kinds))}")
        return 2
    seed = time.time_ns() % 10**6 if options.seed is None else options.seed
    trials = [(options.kind[0], seed)] if options.number is None else list(ledger.series(chosen, seed, options.number))
    commit = ledger.commit_of_trials()
    print(f"{len(trials)} trials of {len(set(chosen))} kinds, SEED={seed}, commit {commit}", flush=True)
    known = ledger.known(commit, options.ledger)
    rows = [known[trial] for trial in trials if trial in known and options.seed is not None and options.number]
    todo = [trial for trial in trials if trial not in {(row.kind, row.seed) for row in rows}]
    if rows:
        print(f"{len(rows)} of them are in the ledger already", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="vlm-faults-"))
    try:
        workshop = Workshop(folder)
        assert workshop.shards.is_dir()
        _preload(workshop)
        for number, (name, trial_seed) in enumerate(todo, 1):
            row = _try(workshop, kinds[name], trial_seed, commit, keep=options.keep)
            ledger.write(row, options.ledger)
            rows.append(row)
            verdict = f"{'survived' if row.survived else 'DID NOT SURVIVE'} ({row.seconds} s): {row.detail}"
            print(f"{number}/{len(todo)} {name} seed {trial_seed}: {verdict}", flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        if options.json:  # also of a series that is broken off
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")
    lost = [row for row in rows if not row.survived]
    print(f"survived {len(rows) - len(lost)} of {len(rows)}, SEED={seed}")
    return 1 if lost else 0


def _options() -> argparse.Namespace:
    from tests.faults.ledger import LEDGER

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, help="trials, over all kinds (or the given ones) in turn")
    parser.add_argument("--seed", type=int, help="of the series; with --kind and no --number: of the trial")
    parser.add_argument("--kind", action="append", help="only this one; may be given several times")
    parser.add_argument("--quick", action="store_true", help="only kinds that take seconds: no real two-process jobs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of this series there")
    parser.add_argument("--ledger", type=Path, default=LEDGER, metavar="FILE", help="append rows there")
    parser.add_argument("--keep", action="store_true", help="leave the folders of trials that did not survive")
    options = parser.parse_args()
    if options.number is None and (options.kind is None or len(options.kind) != 1 or options.seed is None):
        parser.error("give --number N, or one --kind NAME with its --seed")
    return options


def _preload(workshop) -> None:  # type: ignore[no-untyped-def]
    """Import once what every run needs: what one run, in a process of its own, was seen to import (1 s of each)."""
    import importlib

    import deepspeed  # noqa: F401
    import torch

    import vlm.run.train
    from tests.faults.harness import Setting, Trial

    torch.set_num_threads(1)
    assert vlm.run.train
    folder = workshop.folder / "first"
    folder.mkdir()

    def note(rank: int) -> None:
        atexit.register(lambda: (folder / "modules").write_text("\n".join(sys.modules)))

    Trial(workshop, "first", 0, folder).run(Setting(stage=3), note)
    for name in (folder / "modules").read_text().split():
        with contextlib.suppress(Exception):  # names that modules made up for themselves
            importlib.import_module(name)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "runs cannot be forked from a process with threads"


def _try(workshop, kind, seed: int, commit: str, keep: bool):  # type: ignore[no-untyped-def]
    """One trial: its row."""
    from tests.faults.harness import Trial
    from tests.faults.ledger import Row, without_places

    folder = workshop.folder / f"{kind.name}-{seed}"
    folder.mkdir()
    trial, began = Trial(workshop, kind.name, seed, folder), time.monotonic()
    try:
        detail, survived = kind.run(trial), True
    except Exception as error:
        survived = False
        detail = f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            traceback.print_exc()
    finally:
        trial.end()
    if survived or not keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"left for a look: {folder}", flush=True)
    detail = without_places(detail, workshop.folder)[-3000:]
    return Row(kind.name, seed, survived, detail, commit, round(time.monotonic() - began, 1))


if __name__ == "__main__":
    sys.exit(main())
