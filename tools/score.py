"""Recomputes RUN/metrics.json from RUN/predictions.jsonl, prints it, and says how it differs from what stood there.

python tools/score.py runs/demo/vit_llama           write metrics.json
python tools/score.py runs/demo/vit_llama --check   only compare: exit status 1 where metrics.json is missing or differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.config import differences
from vlm.files import write_json
from vlm.run.run_folder import kinds_of, metrics_of, read_json, read_predictions
from vlm.types import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--check", action="store_true", help="only compare metrics.json with the predictions")
    args = parser.parse_args(arguments)
    try:
        return score(args.run, args.check)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def score(run: Path, check: bool) -> int:
    """Returns 0; with `check`, 1 where metrics.json is missing or is not what the predictions give."""
    path = run / "metrics.json"
    metrics = metrics_of(read_predictions(run / "predictions.jsonl"), kinds_of(run))
    print(json.dumps(metrics, indent=1))
    wrong = _what_is_wrong(path, metrics)
    if not wrong:
        print(f"{path}: equal to what its predictions give")
        return 0
    if check:
        print(f"{path}: {wrong}; without --check it is written anew", file=sys.stderr)
        return 1
    write_json(path, metrics)
    print(f"{path}: written (before: {wrong})")
    return 0


def _what_is_wrong(path: Path, metrics: dict[str, float]) -> str:
    """Why metrics.json is not what the predictions give; "" where it is."""
    if not path.exists():
        return "missing"
    try:
        changed = differences(read_json(path), metrics)
    except UserError as error:
        return f"damaged ({error})"
    return f"differs from its predictions ({'; '.join(changed)})" if changed else ""


if __name__ == "__main__":
    sys.exit(main())
