"""docs/reliability.md from the ledger: `python -m tests.faults.report` writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.harness import CHANGED, SAME, Kind, load_kinds
from tests.faults.jobs import ROOT
from tests.faults.ledger import Row, read

PAGE = ROOT / "docs" / "reliability.md"
_NAMED = {SAME: "A", CHANGED: "B"}  # what most kinds check, said once above the table


def page(rows: Sequence[Row], kinds: Mapping[str, Kind]) -> str:
    """The page, as Markdown. Of a trial that was run again, the last row counts."""
    mended, rows = _mended(rows), list({(row.kind, row.seed): row for row in rows}.values())
    survived, tried = sum(row.survived for row in rows), len({row.kind for row in rows})
    return "\n".join(
        [
            "# Reliability: what runs survive",
            "",
            f"**{survived} of {len(rows)} trials of {tried} kinds of faults survived{_later(mended)}.** {_bound(rows)}",
            "",
            "Each trial is a training run (tiny: ViT-LLaMA or Vamos, 1 to 4 processes, any ZeRO stage, fp32 or bf16)",
            "into which one fault is injected at a random moment, and which is then started again by the same command.",
            "It survives if all that its kind checks holds:",
            "",
            f"- **A**: {SAME}.",
            f"- **B**: {CHANGED}.",
            "",
            "The samples are those that were really trained on, noted by each rank at each step, not those that",
            "were planned. *At most one interval of work lost* is counted from the last step whose state was copied",
            "to be saved: it is written in the background while training goes on, for another interval at most. A",
            "finished checkpoint that the fault itself destroys costs its interval besides.",
            "",
            "| kind | runs | survived | what is injected | what is checked |",
            "|---|---:|---:|---|---|",
            *(_line(kind, [row for row in rows if row.kind == name]) for name, kind in sorted(kinds.items())),
            "",
            *_lost(rows),
            *mended,
            "## Again, and more",
            "",
            "    make faults N=100                       # a hundred more, of all kinds in turn",
            "    make faults N=100 SEED=7 JSON=rows.json # the same hundred each time",
            "    python -m tests.faults --kind kill_rename --seed 123456    # one trial again",
            "",
            "Rows go to `tests/faults/ledger.jsonl` ({kind, seed, survived, detail, commit, seconds}); with a seed,",
            "those that it has of the same commit are not run again, so a long series may be cut short. This page is",
            "made of it by `python -m tests.faults.report`. Most kinds are runs forked from a process that has",
            "imported everything (seconds each); those of processes are jobs of two under torchrun, a fifth of them",
            "started by its command line, the others by its agent forked from that same process.",
            "",
        ]
    )


def _later(mended: Sequence[str]) -> str:
    """How many of them did not at first."""
    later = sum(line.startswith("- ") for line in mended)
    return f", {later} of them once what they had found was mended" if later else ""


def _line(kind: Kind, rows: Sequence[Row]) -> str:
    checked = _NAMED.get(kind.checked, kind.checked)
    for text, letter in _NAMED.items():
        checked = checked.replace(text, letter)
    return f"| `{kind.name}` | {len(rows)} | {sum(row.survived for row in rows)} | {kind.what} | {checked} |"


def _bound(rows: Sequence[Row]) -> str:
    """What so many trials say, in a sentence."""
    if not rows or not all(row.survived for row in rows):
        return "Those that did not are listed below the table."
    return (
        f"With {len(rows)} of {len(rows)}, the share of such faults that would cost a run is below "
        f"{100 * (1 - math.exp(math.log(0.05) / len(rows))):.1f} % (at 95 % confidence)."
    )


def _lost(rows: Sequence[Row]) -> list[str]:
    lost = [row for row in rows if not row.survived]
    if not lost:
        return []
    listed = [f"- `{row.kind}` seed {row.seed}, commit {row.commit[:12]}: {_first(row.detail)}" for row in lost]
    return ["## What did not survive", "", *listed, ""]


def _mended(rows: Sequence[Row]) -> list[str]:
    """Trials that did not survive at one commit and do at a later one."""
    last = {(row.kind, row.seed): row for row in rows}
    lost = {(row.kind, row.seed): row for row in rows if not row.survived and last[row.kind, row.seed].survived}
    listed = [
        f"- `{kind}` seed {seed}, commit {row.commit[:12]}: {_first(row.detail)}. Survives at "
        f"{last[kind, seed].commit[:12]}."
        for (kind, seed), row in lost.items()
    ]
    note = "In the platform, or in what the trial itself looks for: the git log between the two commits says which."
    return ["## Found by a trial, mended, tried again", "", note, "", *listed, ""] if listed else []


def _first(text: str) -> str:
    return text.splitlines()[0][:300] if text else ""


def main() -> None:
    """Write the page."""
    Path(PAGE).write_text(page(read(), load_kinds()))
    print(f"{PAGE}: {len(read())} rows")


if __name__ == "__main__":
    main()
