"""The ledger of trials: tests/faults/ledger.jsonl, a row a trial, only ever appended to.

Rows: {kind, seed, survived, detail, commit, seconds}. `detail` says what was injected where, or what did not hold.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.jobs import ROOT, append
from vlm.run.log import git_commit

LEDGER = ROOT / "tests" / "faults" / "ledger.jsonl"
_MADE = ("tests/faults/ledger.jsonl", "docs/reliability.md")  # of trials, so no change of what they try


@dataclass(frozen=True, slots=True)
class Row:
    """One trial."""

    kind: str
    seed: int
    survived: bool
    detail: str
    commit: str
    seconds: float


def read(path: Path = LEDGER) -> list[Row]:
    """All rows of a ledger; none where there is no file."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def write(row: Row, path: Path = LEDGER) -> None:
    """Append a row; several processes may at once."""
    append(path, json.dumps(asdict(row), ensure_ascii=False) + "\n")


def without_places(text: str, folder: Path) -> str:
    """A detail as it reads on any machine: paths begin in the trials' folder, the repository or the packages."""
    for place in (folder, Path(sysconfig.get_path("purelib")), ROOT):
        text = text.replace(f"{place}/", "")
    return text


def commit_of_trials(root: Path = ROOT) -> str:
    """The commit that trials try, with "+changes" where files differ from it, besides the ledger and its page."""
    commit = git_commit(root)
    if not commit.endswith("+changes"):
        return commit
    left_out = [f":(exclude){path}" for path in _MADE]
    command = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", *left_out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return commit if done.stdout.strip() else commit.removesuffix("+changes")


def known(commit: str, path: Path = LEDGER) -> dict[tuple[str, int], Row]:
    """(kind, seed) -> the row of each trial of this very tree; none where it has changes: nobody can say which."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return {}
    return {(row.kind, row.seed): row for row in read(path) if row.commit == commit}


def series(kinds: Sequence[str], seed: int, count: int) -> Iterator[tuple[str, int]]:
    """`count` trials (kind, seed): all kinds in random order, then all in another, and so on. The same for the same
    arguments, and those of a smaller count come first."""
    rng = random.Random(seed)
    while count > 0:
        order = sorted(kinds)
        rng.shuffle(order)
        for kind in order[:count]:
            yield kind, rng.randrange(10**9)
        count -= len(order)
