"""The finished shards of a plan -> index.npy and, last of all, manifest.json.

Several processes may do this at once: each writes whole files of the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data import shard_format as layout
from vlm.data.shard_build import sidecar, unfinished_name
from vlm.data.shard_plan import Plan
from vlm.files import replace_file, sync
from vlm.types import UserError


def join(out: Path, plan: Plan) -> dict[str, Any]:
    """Join the sidecars into the index, then write the manifest: from here on the set exists.

    Raises UserError when no record is left, and then leaves no shard.
    """
    shards, rejected, warnings = [], list(plan.rejected), []
    key_bytes, records, seconds = 1, 0, 0.0
    sums: Counter[str] = Counter()
    others: set[str] = set()
    counted: dict[str, int] = {}
    real: Counter[str] = Counter()  # parts of each kind of text in all records
    for number in range(len(plan.cuts)):
        side = json.loads(sidecar(out, number).read_bytes())
        rejected += side["rejected"]
        warnings += side["warnings"]
        records += len(side["records"])
        seconds += sum(row.get("duration", 0.0) for row in side["records"])
        key_bytes = max([key_bytes, *(len(row["key"]) for row in side["records"])])
        for row in side["records"]:
            sums.update({name: int(row.get(name, 0)) for name in ("questions", "tokens", "outside")})
            for name, parts in row.get("counted", {}).items():
                counted[name] = max(counted.get(name, 1), len(parts))
                real[name] += len(parts)
        others.update(member for row in side["records"] for member in row["members"])
        shards.append({"name": layout.shard_name(number), "records": len(side["records"]), "bytes": side["bytes"],
                       "sha256": side["sha256"]})  # fmt: skip
    counted = {name: parts for name, parts in counted.items() if layout.worth(parts, records, real[name])}
    if not records:
        for shard in shards:
            (out / shard["name"]).unlink(missing_ok=True)
        (out / layout.UNFINISHED / "plan.json").unlink(missing_ok=True)
        refuse_empty(plan, records, rejected)
    rejected.sort(key=lambda row: row["at"])
    members = ["video", *sorted(others - {"video", "json"}), "json"]
    counts_tokens = "tokenizer" in plan.arguments
    dtype = layout.index_dtype(key_bytes, members, sums["questions"] > 0, counts_tokens, counted)
    counts = {"listed": plan.listed, "records": records, "rejected": len(rejected), "warnings": len(warnings)}
    counts |= {"questions": sums["questions"]} if sums["questions"] else {}
    counts |= {"tokens": sums["tokens"]} if counts_tokens else {}
    counts |= {"outside_root": sums["outside"]} if sums["outside"] else {}
    manifest = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "source": plan.arguments.get("source"),
        "split": plan.arguments.get("split"),
        "counts": counts,
        "hours": round(seconds / 3600, 6) if plan.arguments["check"] else None,
        "bytes": sum(shard["bytes"] for shard in shards),
        "members": members,
        **({"counted": counted} if counted else {}),
        "shards": shards,
        "index": _write_index(out, records, len(plan.cuts), dtype, members, counted),
        "rejected": [{name: row[name] for name in ("key", "file", "reason")} for row in rejected],
        "warnings": [{name: row[name] for name in ("key", "file", "warning")} for row in warnings],
        "arguments": plan.arguments,
        "plan": plan.digest,
        "made_with": {name: _version(name) for name in ("av", "decord", "webdataset")},
    }
    replace_file(out / layout.MANIFEST, layout.to_json(manifest, indent=1) + b"\n")
    return manifest


def refuse_empty(plan: Plan, kept: int, rejected: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError when nothing is left to train on."""
    if not plan.listed:
        raise UserError("the source lists no item: check --root, --split and --annotations")
    if not kept:
        reasons = Counter(row["reason"] for row in rejected).most_common(5)
        listed = "; ".join(f"{reason} ({count}x)" for reason, count in reasons)
        raise UserError(f"all {plan.listed} items are rejected, no shard set is written. Most frequent: {listed}")


def _write_index(
    out: Path, records: int, shards: int, dtype: np.dtype, members: Sequence[str], counted: Mapping[str, int]
) -> dict[str, Any]:
    """Write index.npy shard by shard. Returns its {name, bytes, sha256}."""
    temporary = out / layout.UNFINISHED / unfinished_name(layout.INDEX)
    index = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(records,))
    optional = [name for name in ("questions", "tokens") if name in (dtype.names or ())]
    row = 0
    for number in range(shards):
        for record in json.loads(sidecar(out, number).read_bytes())["records"]:
            places = [place for member in members for place in record["members"].get(member, (-1, 0))]
            parts = [_padded(record.get("counted", {}).get(name, []), counted[name]) for name in sorted(counted)]
            decoders = sum(layout.DECODER_BITS[name] for name in record["decoders"])
            index[row] = (record["key"].encode(), number, record["offset"], record["nbytes"], record["num_frames"],
                          record.get("fps", 0.0), record.get("duration", 0.0), record.get("width", 0),
                          record.get("height", 0), record["text_length"], decoders,
                          *(record.get(name, 0) for name in optional), *parts, *places)  # fmt: skip
            row += 1
    index.flush()
    del index
    with temporary.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, os.SEEK_END)
        os.fsync(file.fileno())
    temporary.replace(out / layout.INDEX)
    sync(out)
    return {"name": layout.INDEX, "bytes": size, "sha256": digest}


def _padded(counts: Sequence[int], parts: int) -> list[int]:
    return [*counts, *[0] * (parts - len(counts))]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
