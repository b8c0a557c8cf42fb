"""How a mix of shard sets is written on a command line: "A:100,B:24", "A,B" or "A"."""

from __future__ import annotations

import re

from vlm.errors import UserError

_WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_PIPED = re.compile(r"(?:^|,)\s*(pipe:.*)", re.DOTALL)
_ADDRESS = re.compile(r"pipe:|[a-z][a-z0-9+.-]*(://|::)", re.IGNORECASE)


def parse_mix(text: str) -> list[tuple[str, float | None]]:
    """(folder or address, weight) of each set. What follows the last colon is a weight if it is a number; where only
    some have one, the others have the weight 1. A `pipe:` command may hold commas, so it is the last set.

    Raises UserError where nothing is named.
    """
    found: list[tuple[str, float | None]] = []
    piped = _PIPED.search(text)
    parts = [*text[: piped.start()].split(","), piped[1]] if piped else text.split(",")
    for part in filter(None, (one.strip() for one in parts)):
        weighted = _WEIGHTED.fullmatch(part)
        found.append((weighted[1], float(weighted[2])) if weighted else (part, None))
    if not found:
        raise UserError(f"{text!r} names no shards: give the folder that tools/make_shards.py wrote")
    if any(weight is not None for _, weight in found):
        return [(path, 1.0 if weight is None else weight) for path, weight in found]
    return found


def is_elsewhere(path: str) -> bool:
    """Whether a set lies at an address (https://…, s3://…, hf://…, pipe:…), not in a folder."""
    return _ADDRESS.match(path) is not None and not path.startswith("file://")
