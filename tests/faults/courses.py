"""What runs leave behind, as far as trials compare it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Course:
    """What a run that came to its end left behind."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict[str, Any]
    rows: list[dict[str, Any]]  # metrics.jsonl
    loaded: dict[int, list[str]]  # step (from 0) -> keys that it really trained on, in order of ranks


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without a half-written last line."""
    path, rows = run_dir / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def loaded_of(path: Path) -> dict[int, list[str]]:
    """What counts of the notes of `jobs.observe`: of each step, the last attempt."""
    attempts: dict[int, dict[int, dict[int, Any]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        attempts.setdefault(row["step"], {}).setdefault(row["attempt"], {})[row["rank"]] = row
    loaded = {}
    for step, tried in sorted(attempts.items()):
        ranks = tried[max(tried)]
        assert len(ranks) == ranks[0]["world"], f"step {step}: only ranks {sorted(ranks)} had samples"
        loaded[step] = [key for rank in sorted(ranks) for key in ranks[rank]["keys"]]
    return loaded
