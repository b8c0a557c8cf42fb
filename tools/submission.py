"""The zip that the LOVEU boundary captioning challenge takes, from the texts of two evaluations.

python tools/submission.py --val runs/gebc_val --test runs/gebc_test --out submission.zip \\
    --val-annotation valset_highest_f1.json --test-annotation test_timestamp.json

A run is the folder that launch/evaluate.py wrote (predictions.jsonl). With the annotation of a split every boundary in
it is submitted; a text that was not written is empty, as the challenge has it, and is told here. One split alone may be
given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.files import replace_file
from vlm.metrics.submission import SPLITS, Submission, archive, empty, submission
from vlm.run.run_folder import read_json, read_predictions
from vlm.types import UserError, Writing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--val", type=Path, metavar="RUN", help="folder with the texts of the validation split")
    parser.add_argument("--test", type=Path, metavar="RUN", help="folder with the texts of the test split")
    parser.add_argument("--val-annotation", type=Path, metavar="FILE", help="boundaries of the validation split (JSON)")
    parser.add_argument("--test-annotation", type=Path, metavar="FILE", help="boundaries of the test split (JSON)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the zip to write")
    args = vars(parser.parse_args(arguments))
    try:
        given = [split for split in SPLITS if args[split] is not None]
        for split in SPLITS:
            if args[f"{split}_annotation"] is not None and split not in given:
                raise UserError(f"--{split}-annotation without --{split}: nothing would be compared with it")
        if not given:
            raise UserError("give --val RUN, --test RUN or both")
        texts = {split: _read(split, args[split], args[f"{split}_annotation"]) for split in given}
        return _write(texts, args["out"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _read(split: str, run: Path, annotation: Path | None) -> Submission:
    path = run / "predictions.jsonl"
    rows = [row for row in read_predictions(path) if isinstance(row, Writing)]
    if not rows:
        raise UserError(f"{path}: holds no texts, but scores: the recipe of this run does not write captions")
    try:
        texts = submission(rows, None if annotation is None else boundaries(annotation))
    except UserError as error:
        raise UserError(f"{path} ({split}): {error}") from error
    lacking = empty(texts)
    print(f"{split}: {len(texts):,} boundaries, {3 * len(texts) - len(lacking):,} texts, {len(lacking):,} empty")
    for line in lacking[:5]:
        print(f"  empty: {line}", file=sys.stderr)
    return texts


def boundaries(path: Path) -> list[str]:
    """The ids in an annotation file of the challenge: an object of video -> list of boundaries with `boundary_id`.

    Raises:
        UserError: it cannot be read, or is not of that form.
    """
    content = read_json(path)
    found = []
    for video, parts in content.items():
        if not isinstance(parts, list) or not all(isinstance(p, dict) and "boundary_id" in p for p in parts):
            raise UserError(f"{path}: video {video!r} is not a list of boundaries that have a boundary_id")
        found += [str(part["boundary_id"]) for part in parts]
    return found


def _write(texts: dict[str, Submission], out: Path) -> int:
    try:
        replace_file(out, archive(texts))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    lacking = [split for split in SPLITS if split not in texts]
    print(f"{out}: written" + "".join(f", without submit_{split}.pkl (no --{split})" for split in lacking))
    return 0


if __name__ == "__main__":
    sys.exit(main())
