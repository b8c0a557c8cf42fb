"""Writes RUN/report.html again from the other files of a run folder.

python tools/report.py runs/demo/vit_llama
python tools/report.py runs/preempted --beside runs/uninterrupted
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm.run.report import write_report
from vlm.types import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--beside", type=Path, metavar="OTHER", help="another run: both losses in one chart, and how far they agree"
    )
    args = parser.parse_args(arguments)
    try:
        print(f"report: {write_report(args.run, args.beside)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
