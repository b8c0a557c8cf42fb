"""The steps by which a checkpoint comes to the disk, a function each; vlm.run.checkpoint_job puts them in order.

Up to `_rename` all happens in a folder whose name begins with a dot: whatever ends a run, what has the name of a
checkpoint is whole and has been read back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm.checkpoint_folders import MANIFEST, named
from vlm.files import replace_file, sync
from vlm.run.checkpoint_plan import Plan, Region, Source
from vlm.tensor_files import CHUNK, hash_of, seal

Moved = Callable[[int], None]
"""Told how many bytes have been written, read or hashed."""


def _copy(plan: Plan, held: Sequence[Source]) -> None:
    """This rank's elements to host memory: all that training waits for."""
    plan.copy(held)


def _write_fragments(folder: Path, file: str, regions: Sequence[Region], plan: Plan, moved: Moved) -> None:
    """This rank's bytes of one file to their places in it."""
    descriptor = os.open(folder / file, os.O_WRONLY)
    try:
        for region in regions:
            left, offset = plan.bytes[region.begin : region.end], region.offset
            while left:
                written = os.pwrite(descriptor, left[:CHUNK], offset)
                left, offset = left[written:], offset + written
                moved(written)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    """What was written to a file to the disk, and out of memory: what is read next is what the disk has."""
    sync(path)
    _forget(path)


def _forget(path: Path) -> None:
    """Out of memory with what was read or written of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that keeps nothing in memory
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _verify_fragments(folder: Path, file: str, regions: Sequence[Region], plan: Plan, moved: Moved) -> None:
    """Read this rank's bytes of one file back.

    Raises:
        OSError: they are not those that were written.
    """
    for region in regions:
        begin = region.begin
        for chunk in _read(folder / file, region.offset, region.offset + region.end - region.begin):
            same = torch.equal(torch.frombuffer(chunk, dtype=torch.uint8), plan.memory[begin : begin + len(chunk)])
            if not same:
                break
            begin += len(chunk)
            moved(len(chunk))
        if begin != region.end:
            raise OSError(f"{file} gives back other bytes than were written ({region.name}): the disk is not sound")


def hash_tensors(folder: Path, plan: Plan, moved: Moved) -> dict[tuple[str, str], str]:
    """(file, name) -> sha256 of the tensors that are this rank's to hash, of bytes that have been compared."""
    found = {}
    for file, name in plan.hashes:
        whole = plan.whole(file, name)
        found[file, name] = hash_of([whole] if whole is not None else _read(folder / file, *plan.place(file, name)))
        begin, end = plan.place(file, name)
        moved(end - begin)
    return found


def _read(path: Path, begin: int, end: int) -> Iterator[memoryview]:
    """Bytes [begin, end) of a file, as far as there are any; each piece is gone when the next one comes."""
    if begin == end:
        return
    memory = memoryview(bytearray(min(CHUNK, end - begin)))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while begin < end:
            count = os.preadv(descriptor, [memory[: min(len(memory), end - begin)]], begin)
            if not count:
                return
            yield memory[:count]
            begin += count
    finally:
        os.close(descriptor)


def prepare(folder: Path, plan: Plan) -> None:
    """Make the folder and, of their full length and with their headers, the files that ranks then fill."""
    folder.mkdir(parents=True)
    for file, layout in plan.layouts.items():
        with (folder / file).open("wb") as stream:
            os.fchmod(stream.fileno(), 0o644)
            stream.write(layout.header)
            stream.truncate(layout.size)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The manifest, which makes it a checkpoint, with its own hash."""
    _write_small(folder / MANIFEST, json.dumps(seal(manifest), indent=1).encode())


def _write_small(path: Path, content: bytes) -> None:
    """A small file, read back from the disk.

    Raises:
        OSError: it could not be written, or gives back other bytes.
    """
    replace_file(path, content)
    _forget(path)
    if path.read_bytes() != content:
        raise OSError(f"{path.name} gives back other bytes than were written: the disk is not sound")


def _rename(temporary: Path, final: Path) -> None:
    """Give a whole and verified checkpoint its name."""
    if final.exists():  # a damaged one: the run went on from an older one and has come to this step again
        final.rename(final.parent / f".{final.name}.replaced")
    temporary.rename(final)
    sync(final.parent)


def _point_latest(root: Path, name: str) -> None:
    """Let `latest` name it."""
    replace_file(root / "latest", f"{name}\n".encode())


def _point_best(root: Path, name: str) -> None:
    """Let `best` name it."""
    replace_file(root / "best", f"{name}\n".encode())


def _prune(root: Path, keep: int, written: str) -> None:
    """Remove all but the one just `written`, the `keep` - 1 before it and the best.

    Those of later steps go too: the run could not go on from them (they are damaged) and makes these steps again.
    """
    kept = {written, *[name for name in steps(root) if name <= written][-keep:]}
    with contextlib.suppress(OSError):
        kept.add((root / "best").read_text(errors="replace").strip())
    for folder in (root / name for name in named(root)):
        if folder.name not in kept:
            try:
                gone = root / f".{folder.name}.gone"
                folder.rename(gone)  # at once no checkpoint any more: half of one would be found damaged
                shutil.rmtree(gone)
            except OSError as error:
                print(f"{folder}: could not be removed ({error}); it is not needed any more", flush=True)


def remove_unfinished(root: Path) -> None:
    """Remove what failed and killed saves left behind: it takes the room that the next one needs."""
    for path in (*root.glob(".step-*"), *root.glob(".latest.tmp-*"), *root.glob(".best.tmp-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def steps(root: Path) -> list[str]:
    """Names of the complete checkpoints under `root`, oldest first."""
    return [name for name in named(root) if (root / name / MANIFEST).is_file()]
