"""Name tables that are read both ways: pairs (ours, theirs) in which {i} is a number, {p} is weight or bias, {rest} any
names to the end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm.weights import Table

Pairs = Sequence[tuple[str, str]]


def same(*names: str) -> Pairs:
    """Names that are ours and theirs."""
    return tuple((name, name) for name in names)


def under(ours: str, theirs: str, pairs: Pairs) -> Pairs:
    """The same pairs with a beginning before each side."""
    return tuple((ours + a, theirs + b) for a, b in pairs)


def table(pairs: Pairs, *, to_ours: bool) -> Table:
    """The rename table of one direction."""
    return [(_pattern(b), _replacement(a)) if to_ours else (_pattern(a), _replacement(b)) for a, b in pairs]


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{i\}", r"(\d+)").replace(r"\{p\}", "(weight|bias)").replace(r"\{rest\}", "(.+)")


def _replacement(name: str) -> str:
    for number in range(1, name.count("{") + 1):
        name = re.sub(r"\{(?:i|p|rest)\}", rf"\\{number}", name, count=1)
    return name
