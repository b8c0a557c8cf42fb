"""Writes RUN/report.html again from the other files of a run folder.

python tools/report.py runs/demo/vit_llama
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
    args = parser.parse_args(arguments)
    try:
        print(f"report: {write_report(args.run)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
