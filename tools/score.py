"""Recomputes RUN/metrics.json from RUN/predictions.jsonl, prints it, and says how it differs from what stood there.

python tools/score.py runs/demo/vit_llama           write metrics.json
python tools/score.py runs/demo/vit_llama --check   only compare: exit status 1 where metrics.json is missing or differs
python tools/score.py runs/gebc --spice corenlp     captions: by SPICE too (docs/captions.md says what it needs)
python tools/score.py runs/gebc_test --submission gebc.zip      what the boundary captioning challenge takes; the same
                                                    for the run on the other split adds it to the file;
                                                    --boundaries test_timestamp.json: no boundary is missing
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.config import differences
from vlm.files import write_json
from vlm.metrics import submission
from vlm.run.run_folder import kinds_of, metrics_of, read_json, read_predictions
from vlm.types import UserError, Writing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--check", action="store_true", help="only compare metrics.json with the predictions")
    parser.add_argument(
        "--spice", type=Path, metavar="DIR", help="score captions by SPICE too, with the CoreNLP 3.6.0 in DIR"
    )
    parser.add_argument(
        "--submission", type=Path, metavar="FILE.zip", help="write the captions of boundaries as GEBC's challenge wants"
    )
    parser.add_argument(
        "--boundaries", type=Path, metavar="JSON", help="the split's annotation: all its boundaries are submitted"
    )
    args = parser.parse_args(arguments)
    try:
        if args.submission is not None and args.check:
            raise UserError(
                "--check only compares and writes nothing, --submission writes a file: leave one of them out"
            )
        if args.submission is not None:
            submit(args.run, args.submission, args.boundaries)
        elif args.boundaries is not None:
            raise UserError("--boundaries is what --submission is to hold; give both")
        return score(args.run, args.check, args.spice)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def score(run: Path, check: bool, spice: Path | None = None) -> int:
    """Returns 0; with `check`, 1 where metrics.json is missing or is not what the predictions give."""
    path = run / "metrics.json"
    metrics = metrics_of(read_predictions(run / "predictions.jsonl"), kinds_of(run), spice)
    if not metrics:
        return _without_metrics(path, check)
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


def submit(run: Path, file: Path, annotation: Path | None = None) -> None:
    """Put the texts of a run into a submission to the boundary captioning challenge.

    Texts that have references are of the validation split, others of the test split.
    """
    path = run / "predictions.jsonl"
    rows = read_predictions(path)
    writings = [row for row in rows if isinstance(row, Writing)]
    if len(writings) < len(rows):
        raise UserError(f"{run}: its predictions are no texts, so there is nothing to submit")
    try:
        texts = submission.submission(writings, None if annotation is None else boundaries(annotation))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    name = submission.VALIDATION if any(row.references for row in writings) else submission.TEST
    parts = submission.add(texts, name, file)
    missing = sorted({submission.VALIDATION, submission.TEST} - set(parts))
    print(f"{file}: {name} written" + "".join(f"; {other} is still to come" for other in missing))
    lacking = submission.empty(texts)
    print(f"{name}: {len(texts):,} boundaries, {3 * len(texts) - len(lacking):,} texts, {len(lacking):,} empty")
    for line in lacking[:5]:
        print(f"empty: {line}", file=sys.stderr)


def boundaries(path: Path) -> list[str]:
    """The ids in an annotation file of the challenge: an object of video -> list of boundaries with `boundary_id`.

    Raises:
        UserError: it cannot be read, or is not of that form.
    """
    found = []
    for video, parts in read_json(path).items():
        if not isinstance(parts, list) or not all(isinstance(p, dict) and "boundary_id" in p for p in parts):
            raise UserError(f"{path}: video {video!r} is not a list of boundaries that have a boundary_id")
        found += [str(part["boundary_id"]) for part in parts]
    return found


def _without_metrics(path: Path, check: bool) -> int:
    """Texts that nothing published can be compared with: a metrics.json would be of something else."""
    print(f"{path.parent / 'predictions.jsonl'}: texts without published captions, so there is nothing to score")
    if not path.exists():
        return 0
    if check:
        print(f"{path}: is there all the same; without --check it is removed", file=sys.stderr)
        return 1
    path.unlink()
    print(f"{path}: removed, since it is not of these predictions")
    return 0


def _what_is_wrong(path: Path, metrics: dict[str, float]) -> str:
    """Why metrics.json is not what the predictions give; "" where it is."""
    if not path.exists():
        return "missing"
    try:
        stored = read_json(path)
        changed = differences(stored, metrics)
    except UserError as error:
        return f"damaged ({error})"
    hint = "; it has SPICE: give --spice DIR" if "spice" in stored and "spice" not in metrics else ""
    return f"differs from its predictions ({'; '.join(changed)}{hint})" if changed else ""


if __name__ == "__main__":
    sys.exit(main())
