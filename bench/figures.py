"""Figures of several benchmarks in one file: `make bench BENCH_ARGS='--json FILE'` hands the same FILE to each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def add_figures(file: Path, figures: dict[str, Any], under: str = "") -> None:
    """Writes figures beside those that another benchmark left in the file; its own of an earlier run are replaced.

    Args:
        file: JSON, made with its folder where it is not there.
        figures: by name.
        under: the key that holds them; "": they stand at the top.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | ({under: figures} if under else figures), indent=1) + "\n")
