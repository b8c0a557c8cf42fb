"""Rows of one evaluation have one set of probes, or averages would be over part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm.types import UserError


def names_of_probes(rows: Sequence[Any], noun: str) -> list[str]:
    """The probes of rows of predictions.jsonl, which all have `key` and `probes`, in the order of the first.

    Args:
        rows: at least one.
        noun: what a row is about, for the message.
    Raises:
        UserError: rows that do not agree on them.
    """
    names = list(rows[0].probes)
    for row in rows:
        if set(row.probes) != set(names):
            raise UserError(
                f"{noun} {row.key!r} has the probes {sorted(row.probes)}, {noun} {rows[0].key!r} {sorted(names)}: an "
                "average over part of them would mislead; evaluate again with one set of probes"
            )
    return names
