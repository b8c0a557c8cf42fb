"""Recomputes RUN/metrics.json from RUN/predictions.jsonl, prints it, and says whether the file agrees.

python tools/score.py runs/demo/vit_llama           exit status 1 where metrics.json is missing or differs
python tools/score.py runs/demo/vit_llama --write   write metrics.json anew
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
    parser.add_argument("--write", action="store_true", help="write the recomputed metrics.json")
    args = parser.parse_args(arguments)
    try:
        return score(args.run, args.write)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def score(run: Path, write: bool) -> int:
    """0: metrics.json agrees with the predictions (or was written); 1: it does not, or is missing."""
    path = run / "metrics.json"
    metrics = metrics_of(read_predictions(run / "predictions.jsonl"), kinds_of(run))
    print(json.dumps(metrics, indent=1))
    if write:
        write_json(path, metrics)
        print(f"{path}: written")
        return 0
    if not path.exists():
        print(f"{path}: missing; --write makes it", file=sys.stderr)
        return 1
    changed = differences(read_json(path), metrics)
    if changed:
        print(f"{path}: differs from its predictions ({'; '.join(changed)}); --write replaces it", file=sys.stderr)
        return 1
    print(f"{path}: equal to what its predictions give")
    return 0


if __name__ == "__main__":
    sys.exit(main())
