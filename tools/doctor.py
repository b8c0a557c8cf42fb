"""Looks into what went wrong.

python tools/doctor.py ledger runs/ssv2/quarantine.jsonl    try each record of a quarantine ledger again

Each record is read anew by its place in its shard and decoded whole by every decoder that may be used on it, in a
process that is ended when it takes too long. Exit status 1 where some still cannot be used, 0 where none is left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlm.errors import UserError

_STATES = {"bad": "still bad", "readable": "readable now", "changed": "changed since"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return ledger(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def ledger(options: argparse.Namespace) -> int:
    """0: every record can be used again, or its set has it no more; 1: some still cannot."""
    if options.workers < 1 or not options.seconds > 0:
        raise UserError(f"--workers {options.workers} --seconds {options.seconds:g}: both must be more than 0")
    from vlm.data.ledger import as_json, read_ledger, recheck

    rows = read_ledger(options.file, options.shards)
    counts = Counter(dict.fromkeys(_STATES, 0))
    found = []
    for finding in recheck(rows, workers=min(options.workers, max(1, len(rows))), seconds=options.seconds):
        counts[finding.state] += 1
        if options.json:
            found.append(as_json(finding))
            continue
        row = finding.row
        was = f" (was: {row.reason})" if finding.state != "bad" and row.reason else ""
        print(f"{_STATES[finding.state]}: {row.key} ({row.place()}): {finding.now}{was}", flush=True)
    if options.json:
        print(json.dumps({"ledger": str(options.file), **counts, "rows": found}, indent=1))
    else:
        told = ", ".join(f"{counts[state]} {words}" for state, words in _STATES.items())
        print(f"{options.file}: {len(rows)} records: {told}")
    return 1 if counts["bad"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ledger")
    one = commands.add_parser("ledger", help="try each record of a quarantine ledger again")
    one.add_argument("file", type=Path, metavar="FILE", help="quarantine.jsonl of a run")
    one.add_argument("--shards", metavar="DIR", help="where the shard set lies now (default: where the ledger says)")
    one.add_argument("--workers", type=int, default=min(4, len(os.sched_getaffinity(0))), metavar="N",
                     help="processes (default: %(default)s)")  # fmt: skip
    one.add_argument("--seconds", type=float, default=60.0, metavar="S",
                     help="for reading a record, and for each decoder (default: %(default)g)")  # fmt: skip
    one.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
