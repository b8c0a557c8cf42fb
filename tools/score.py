"""Recomputes RUN/metrics.json from RUN/predictions.jsonl, prints it, and says how it differs from what stood there.

python tools/score.py runs/demo/vit_llama           write metrics.json
python tools/score.py runs/demo/vit_llama --check   only compare: exit status 1 where metrics.json is missing or differs
python tools/score.py runs/gebc --spice corenlp     captions: by SPICE too (docs/captions.md says what it needs)
python tools/score.py runs/gebc_test --submission gebc.zip      what the boundary captioning challenge takes; the same
                                                    for the run on the other split adds it to the file;
                                                    --boundaries test_timestamp.json: no boundary is missing
python tools/score.py --segments groundTruth results    labels of frames in files of others, as MS-TCN's evaluation
                                                    takes them; --list test.split1.bundle: of these videos
python tools/score.py --segments Predictions_Breakfast.json     texts of "Video Llama on Breakfast" (docs/segments.md)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.config import differences
from vlm.files import write_json
from vlm.metrics import segments, submission
from vlm.metrics.segments import BACKGROUND
from vlm.run.run_folder import kinds_of, metrics_of, read_json, read_predictions
from vlm.run.segment_files import read_frames, read_texts
from vlm.types import UserError, Writing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", nargs="?", help="folder of a run")
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
    parser.add_argument(
        "--segments", type=Path, nargs="+", metavar="PATH", help="segmentations of others: two folders, or a JSON file"
    )
    parser.add_argument(
        "--list", type=Path, metavar="BUNDLE", help="the videos that count; one without a prediction is all wrong"
    )
    parser.add_argument(
        "--background",
        nargs="*",
        default=BACKGROUND,
        metavar="LABEL",
        help="labels that count in MoF alone, as bg_class of MS-TCN's evaluation (default: background)",
    )
    args = parser.parse_args(arguments)
    try:
        if args.segments is not None:
            return others(args)
        if args.run is None:
            raise UserError("give the folder of a run, or --segments with files of others")
        if args.list is not None or args.background is not BACKGROUND:
            raise UserError("--list and --background are said of files of others; give --segments too")
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


def others(args: argparse.Namespace) -> int:
    """Print what segmentations in files of others are worth. Nothing is written."""
    given = {name: getattr(args, name) for name in ("run", "check", "spice", "submission", "boundaries")}
    for name, value in given.items():
        if value:
            raise UserError(f"--segments prints figures of files of others, and {name} is said of a run: leave one out")
    if len(args.segments) > 2:
        raise UserError("--segments takes the folders of truth and predictions, or a JSON file that has both")
    texts = None
    if len(args.segments) == 2:
        rows, notes = read_frames(*args.segments, args.list)
    elif args.segments[0].is_dir():
        raise UserError(f"--segments {args.segments[0]}: give the folder of the truth, then that of the predictions")
    else:
        if args.list is not None:
            raise UserError("--list is said of folders of labels of frames, not of a JSON file")
        (rows, texts), notes = read_texts(args.segments[0]), []
    notes += [f"{row.key}: {row.problem}: scored as an empty prediction" for row in rows if row.problem]
    for note in notes[:20]:
        print(note, file=sys.stderr)
    if len(notes) > 20:
        print(f"… and {len(notes) - 20} more", file=sys.stderr)
    print(json.dumps(segments.score(rows, tuple(args.background), texts), indent=1))
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
