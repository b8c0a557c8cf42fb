"""Shard sets: the door to writing one from what a source lists, and to reading records back.

    write_shards(ssv2.read(root, "train", files), Path("data/train"), arguments={"source": "ssv2", "split": "train"})
    shards = ShardSet(Path("data/train"))
    record = shards.read(7)

The layout on disk is described in `shard_format`. Writing goes: plan (`shard_plan`), build shards in processes
(`shard_pool`, `shard_build`), then the index and, last of all, the manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data import shard_format as layout
from vlm.data.shard_build import is_finished, sidecar
from vlm.data.shard_format import ShardError
from vlm.data.shard_plan import Plan, make_plan, refuse_other_plan
from vlm.data.shard_pool import build_shards
from vlm.data.shard_set import ShardSet
from vlm.files import replace_file, sync
from vlm.types import Rejected, Sample, UserError

__all__ = ["DEFAULT_SHARD_SIZE", "Progress", "ShardError", "ShardSet", "Written", "write_shards"]

DEFAULT_SHARD_SIZE = 1 << 30
Progress = Callable[[str, int, int | None], None]  # "list" or "write", items done, items in all (None: not known yet)


@dataclass(frozen=True, slots=True)
class Written:
    """What write_shards did."""

    manifest: dict[str, Any]
    path: Path  # of manifest.json
    already_complete: bool  # nothing had to be done


def write_shards(
    items: Iterable[Sample | Rejected],
    out: Path,
    *,
    arguments: Mapping[str, Any],
    check: bool = True,
    shard_size: int = DEFAULT_SHARD_SIZE,
    shard_samples: int | None = None,
    root: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Written:
    """Write what a source lists as a shard set into `out`.

    The same items and arguments give the same bytes for any number of workers. Killed at any moment, the same call
    again keeps the finished shards and builds the rest; a finished folder is left as it is.

    Args:
        items: in the order in which they are to lie in the shards.
        arguments: JSON-able, recorded in the manifest; `source` and `split` are expected names.
        check: decode every clip (frames, fps, which decoders agree); else only missing files are rejected, and of
            those outside `root` what does not begin like a video.
        shard_size: bytes of media after which a new shard begins.
        shard_samples: items after which a new shard begins.
        root: where videos are expected; the manifest counts those that lie elsewhere (by `..`, an absolute path or a
            link). None: anywhere.
        workers: processes.
        progress: told of items listed and written.

    Raises UserError when the folder holds something else or another plan, when another process writes there, when
    nothing can be kept, or when the disk refuses.
    """
    if shard_size < 1 or (shard_samples is not None and shard_samples < 1) or workers < 1:
        raise UserError(f"shard size {shard_size}, samples {shard_samples} and workers {workers} must be at least 1")
    full = {**arguments, "check": check, "shard_size": shard_size, "shard_samples": shard_samples}
    full = json.loads(layout.to_json(full))  # as they will be read back from the manifest
    listing = (lambda done: progress("list", done, None)) if progress is not None else None
    cutting: dict[str, Any] = {"shard_size": shard_size, "shard_samples": shard_samples, "root": root,
                               "progress": listing}  # fmt: skip
    if (out / layout.MANIFEST).exists():
        done = ShardSet(out)
        begun = done.manifest | {"listed": done.manifest["counts"]["listed"]}
        refuse_other_plan(out, begun, make_plan(items, full, file=None, **cutting))
        _remove_work(out)
        return Written(done.manifest, out / layout.MANIFEST, already_complete=True)
    with _locked(out) as work:
        plan_file = work / "plan.jsonl"
        head_file = work / "plan.json"
        if head_file.exists():
            plan = make_plan(items, full, file=None, **cutting)
            refuse_other_plan(out, json.loads(head_file.read_bytes()), plan)
        else:
            with plan_file.open("wb") as file:
                plan = make_plan(items, full, file=file, **cutting)
            _refuse_empty(plan, plan.planned, plan.rejected)
            head = {"arguments": plan.arguments, "listed": plan.listed, "plan": plan.digest}
            replace_file(head_file, layout.to_json(head))
        _build_missing(out, plan, plan_file, check, workers, progress)
        manifest = _finish(out, plan)
    _remove_work(out)
    return Written(manifest, out / layout.MANIFEST, already_complete=False)


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """The folder for unfinished work, held by this process alone. The lock goes with the process, however it ends."""
    work = out / layout.UNFINISHED
    strangers = sorted(path.name for path in out.iterdir() if path != work) if out.is_dir() else []
    if strangers and not work.exists():
        raise UserError(f"{out} is not empty ({', '.join(strangers[:3])}) and holds no shard set: choose another --out")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing shards into {out}: wait for it, or end it") from error
        for left in work.glob("*.tmp-*"):  # of a process that was killed
            left.unlink(missing_ok=True)
        try:
            yield work
        except BaseException:
            for left in work.glob("*.tmp-*"):
                left.unlink(missing_ok=True)
            if not (work / "plan.json").exists():  # nothing was begun: leave nothing behind
                _remove_work(out)
            raise


def _remove_work(out: Path) -> None:
    """Remove what only an unfinished set needs, and an empty `out`."""
    work = out / layout.UNFINISHED
    if work.exists():
        for path in work.iterdir():
            path.unlink()
        work.rmdir()
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _refuse_empty(plan: Plan, kept: int, rejected: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError when nothing is left to train on."""
    if not plan.listed:
        raise UserError("the source lists no item: check --root, --split and --annotations")
    if not kept:
        reasons = Counter(row["reason"] for row in rejected).most_common(5)
        listed = "; ".join(f"{reason} ({count}x)" for reason, count in reasons)
        raise UserError(f"all {plan.listed} items are rejected, no shard set is written. Most frequent: {listed}")


def _build_missing(
    out: Path, plan: Plan, plan_file: Path, check: bool, workers: int, progress: Progress | None
) -> None:
    missing = {number: cut for number, cut in enumerate(plan.cuts) if not is_finished(out, number)}
    before = plan.planned - sum(cut.items for cut in missing.values())

    def tell(done: int) -> None:
        if progress is not None:
            progress("write", before + done, plan.planned)

    tell(0)
    build_shards(out, plan_file, missing, check=check, workers=workers, progress=tell)


def _finish(out: Path, plan: Plan) -> dict[str, Any]:
    """Join the sidecars into the index, then write the manifest: from here on the set exists."""
    shards, rejected, warnings = [], list(plan.rejected), []
    key_bytes, records, seconds, questions, outside = 1, 0, 0.0, 0, 0
    others: set[str] = set()
    for number in range(len(plan.cuts)):
        side = json.loads(sidecar(out, number).read_bytes())
        rejected += side["rejected"]
        warnings += side["warnings"]
        records += len(side["records"])
        seconds += sum(row.get("duration", 0.0) for row in side["records"])
        key_bytes = max([key_bytes, *(len(row["key"]) for row in side["records"])])
        questions += sum(row.get("questions", 0) for row in side["records"])
        outside += sum(row.get("outside", False) for row in side["records"])
        others.update(member for row in side["records"] for member in row["members"])
        shards.append({"name": layout.shard_name(number), "records": len(side["records"]), "bytes": side["bytes"],
                       "sha256": side["sha256"]})  # fmt: skip
    if not records:
        for shard in shards:
            (out / shard["name"]).unlink()
        (out / layout.UNFINISHED / "plan.json").unlink()
        _refuse_empty(plan, records, rejected)
    rejected.sort(key=lambda row: row["at"])
    members = ["video", *sorted(others - {"video", "json"}), "json"]
    dtype = layout.index_dtype(key_bytes, members, questions > 0)
    counts = {"listed": plan.listed, "records": records, "rejected": len(rejected), "warnings": len(warnings)}
    counts |= {name: count for name, count in (("questions", questions), ("outside_root", outside)) if count}
    manifest = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "source": plan.arguments.get("source"),
        "split": plan.arguments.get("split"),
        "counts": counts,
        "hours": round(seconds / 3600, 6) if plan.arguments["check"] else None,
        "bytes": sum(shard["bytes"] for shard in shards),
        "members": members,
        "shards": shards,
        "index": _write_index(out, records, len(plan.cuts), dtype, members),
        "rejected": [{name: row[name] for name in ("key", "file", "reason")} for row in rejected],
        "warnings": [{name: row[name] for name in ("key", "file", "warning")} for row in warnings],
        "arguments": plan.arguments,
        "plan": plan.digest,
        "made_with": {name: _version(name) for name in ("av", "decord", "webdataset")},
    }
    replace_file(out / layout.MANIFEST, layout.to_json(manifest, indent=1) + b"\n")
    return manifest


def _write_index(out: Path, records: int, shards: int, dtype: np.dtype, members: Sequence[str]) -> dict[str, Any]:
    """Write index.npy shard by shard. Returns its {name, bytes, sha256}."""
    temporary = out / layout.UNFINISHED / f"{layout.INDEX}.tmp-{os.getpid()}"
    index = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(records,))
    row = 0
    for number in range(shards):
        for record in json.loads(sidecar(out, number).read_bytes())["records"]:
            places = [place for member in members for place in record["members"].get(member, (-1, 0))]
            counted = (record.get("questions", 0),) if "questions" in (dtype.names or ()) else ()
            decoders = sum(layout.DECODER_BITS[name] for name in record["decoders"])
            index[row] = (record["key"].encode(), number, record["offset"], record["nbytes"], record["num_frames"],
                          record.get("fps", 0.0), record.get("duration", 0.0), record.get("width", 0),
                          record.get("height", 0), record["text_length"], decoders, *counted,
                          *places)  # fmt: skip
            row += 1
    index.flush()
    del index
    with temporary.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    temporary.replace(out / layout.INDEX)
    sync(out)
    return {"name": layout.INDEX, "bytes": (out / layout.INDEX).stat().st_size, "sha256": digest}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
