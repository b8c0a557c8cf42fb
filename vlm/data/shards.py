"""Shard sets: the door to writing one from what a source lists, and to reading records back.

    write_shards(ssv2.read(root, "train", files), Path("data/train"), arguments={"source": "ssv2", "split": "train"})
    shards = ShardSet(Path("data/train"))
    record = shards.read(7)

The layout on disk is described in `shard_format`. Writing goes: plan (`shard_plan`), build shards in processes
(`shard_pool`, `shard_build`), of other ranks too (`shard_ranks`), or in several jobs (`shard_tasks`), then the index
and, last of all, the manifest (`shard_join`).
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.data import shard_format as layout
from vlm.data.shard_build import Settings, is_finished, unfinished_name
from vlm.data.shard_format import ShardError
from vlm.data.shard_join import join, refuse_empty
from vlm.data.shard_plan import Plan, make_plan, read_head, refuse_other_arguments, refuse_other_plan
from vlm.data.shard_pool import Work, build_shards
from vlm.data.shard_ranks import build_on_ranks
from vlm.data.shard_reencode import Reencode
from vlm.data.shard_set import ShardSet
from vlm.data.shard_tasks import HEAD, Task, remove_left, unfinished, wait_or_plan
from vlm.data.tokenizers import content_hash, load_tokenizer
from vlm.files import replace_file, sync
from vlm.types import Rejected, Sample, UserError

__all__ = ["DEFAULT_SHARD_SIZE", "Progress", "Reencode", "ShardError", "ShardSet", "Task", "Written", "write_shards"]

DEFAULT_SHARD_SIZE = 1 << 30
Progress = Callable[[str, int, int | None], None]  # "list" or "write", items done, items in all (None: not known yet)


@dataclass(frozen=True, slots=True)
class Written:
    """What write_shards did."""

    manifest: dict[str, Any]  # empty while `missing`
    path: Path  # of manifest.json
    already_complete: bool  # nothing had to be done
    missing: int = 0  # shards that other tasks have yet to build; the last task to finish writes index and manifest


def write_shards(
    items: Iterable[Sample | Rejected],
    out: Path,
    *,
    arguments: Mapping[str, Any],
    check: bool = True,
    shard_size: int = DEFAULT_SHARD_SIZE,
    shard_samples: int | None = None,
    root: Path | None = None,
    reencode: Reencode | None = None,
    tokenizer: Path | None = None,
    workers: int = 1,
    ranks: Executor | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write what a source lists as a shard set into `out`.

    The same items and arguments give the same bytes for any number of workers, ranks and tasks. Killed at any moment,
    the same call again keeps the finished shards and builds the rest; a finished folder is left as it is.

    Args:
        items: in the order in which they are to lie in the shards. Not listed by a task that finds a plan, but for
            task 0, which compares.
        arguments: JSON-able, recorded in the manifest; `source` and `split` are expected names.
        check: decode every clip (frames, fps, which decoders agree); else only missing files are rejected, and of
            those outside `root` what does not begin like a video.
        shard_size: bytes of media, as they are before `reencode`, after which a new shard begins.
        shard_samples: items after which a new shard begins.
        root: where videos are expected; the manifest counts those that lie elsewhere (by `..`, an absolute path or a
            link). None: anywhere.
        reencode: encode clips again for quick access to any frame; pictures stay as they are.
        tokenizer: counts the tokens of annotation text (`ShardSet.tokens`).
        workers: processes on this machine.
        ranks: other processes to build shards, in place of `workers`.
        task: build this share of the shards alone, beside other calls with other shares.
        progress: told of items listed and written.

    Raises UserError when the folder holds something else or another plan, when another process writes there, when
    nothing can be kept, or when the disk refuses.
    """
    if shard_size < 1 or (shard_samples is not None and shard_samples < 1) or workers < 1:
        raise UserError(f"shard size {shard_size}, samples {shard_samples} and workers {workers} must be at least 1")
    if task is not None and not 0 <= task.index < task.count:
        raise UserError(f"task {task.index} of {task.count}: tasks are counted from 0")
    full = {**arguments, "check": check, "shard_size": shard_size, "shard_samples": shard_samples}
    if reencode is not None:
        if not check:
            raise UserError("clips cannot be encoded again without decoding them: leave out --no-check or --reencode")
        full["reencode"] = asdict(reencode)
        items = _with_times_in_seconds(items, reencode)
    if tokenizer is not None:
        load_tokenizer(tokenizer)
        full["tokenizer"] = {"file": str(tokenizer), "sha256": content_hash(tokenizer)}
    full = json.loads(layout.to_json(full))  # as they will be read back from the manifest
    listing = _Listing(items, out, full, shard_size, shard_samples, root, progress)
    settings = Settings(check=check, reencode=reencode, tokenizer=tokenizer)
    if (out / layout.MANIFEST).exists():
        return _complete(listing, task)
    with locked(out, alone=task is None) as work:
        if (out / layout.MANIFEST).exists():  # by now
            return _complete(listing, task)
        try:
            plan = _plan(work, listing, task)
            job = Work(out=out, lines=work / plan.lines, plan=plan.digest, settings=settings)
            _build_missing(job, plan, task, workers, ranks, progress)
            missing = unfinished(out, range(len(plan.cuts)))
            if missing:
                return Written({}, out / layout.MANIFEST, already_complete=False, missing=len(missing))
            manifest = join(out, plan)
        except (UserError, OSError):
            if task is None or not (out / layout.MANIFEST).exists():
                raise
            return _complete(listing, task)  # another task had built all of this one's share, and finished
    remove_work(out)
    return Written(manifest, out / layout.MANIFEST, already_complete=False)


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a plan is made of."""

    items: Iterable[Sample | Rejected]
    out: Path
    arguments: dict[str, Any]
    shard_size: int
    shard_samples: int | None
    root: Path | None
    progress: Progress | None

    def tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress("list", done, None)

    def plan(self, file: Any = None, tell: Callable[[int], None] | None = None) -> Plan:
        return make_plan(self.items, self.arguments, shard_size=self.shard_size, shard_samples=self.shard_samples,
                         root=self.root, file=file, progress=tell or self.tell)  # fmt: skip

    def publish(self, work: Path, tell: Callable[[int], None]) -> Plan:
        """Make the plan and leave it in the folder: its lines, then its head."""
        temporary = work / unfinished_name("plan.jsonl")
        with temporary.open("wb") as file:
            plan = self.plan(file, tell)
        refuse_empty(plan, plan.planned, plan.rejected)
        sync(temporary)
        temporary.replace(work / plan.lines)
        replace_file(work / HEAD, layout.to_json(plan.head()))
        return plan


def _complete(listing: _Listing, task: Task | None) -> Written:
    """Of a finished folder, unless it was made of something else."""
    manifest = ShardSet(listing.out).manifest
    begun = manifest | {"listed": manifest["counts"]["listed"]}
    _refuse_other(begun, listing, task)
    remove_work(listing.out)
    return Written(manifest, listing.out / layout.MANIFEST, already_complete=True)


def _refuse_other(begun: Mapping[str, Any], listing: _Listing, task: Task | None) -> None:
    """Raise UserError where the folder was begun for something else. One task lists the source for all of them."""
    if task is None or task.index == 0:
        refuse_other_plan(listing.out, begun, listing.plan())
    else:
        refuse_other_arguments(listing.out, begun, listing.arguments)


def _plan(work: Path, listing: _Listing, task: Task | None) -> Plan:
    """The plan that the folder was begun with, or a new one."""
    head = read_head(work / HEAD)
    if head is None and task is None:
        return listing.publish(work, listing.tell)
    made = False
    if head is None:
        head, made = wait_or_plan(work, lambda tell: listing.publish(work, tell), listing.tell)
    if not made:
        _refuse_other(head, listing, task)
    return Plan.from_head(head)


def _with_times_in_seconds(items: Iterable[Sample | Rejected], how: Reencode) -> Iterator[Sample | Rejected]:
    """The items; UserError where thinning the frames would move what an annotation says of them."""
    for item in items:
        if how.fps is not None and isinstance(item, Sample) and item.annotation.get("segments"):
            raise UserError(
                f"{item.key!r} has segments that count frames, which --fps {how.fps:g} would move: leave out --fps"
            )
        yield item


@contextmanager
def locked(out: Path, alone: bool) -> Iterator[Path]:
    """The folder for unfinished work, held by this process alone or beside other tasks.

    The lock goes with the process, however it ends. It keeps a call for the whole set from tasks and other such calls;
    tasks need none among themselves.
    """
    work = out / layout.UNFINISHED
    strangers = sorted(path.name for path in out.iterdir() if path != work) if out.is_dir() else []
    if strangers and not work.exists() and not (out / layout.MANIFEST).exists():
        raise UserError(f"{out} is not empty ({', '.join(strangers[:3])}) and holds no shard set: choose another --out")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing shards into {out}: wait for it, or end it") from error
        except OSError as error:  # a file system without locks
            print(f"{out}: not locked ({error.strerror}): see to it that one call for the whole set writes there")
        if alone:
            _remove_left(work)
        try:
            yield work
        except BaseException:
            if alone:
                _remove_left(work)
                if not (work / HEAD).exists():  # nothing was begun: leave nothing behind
                    remove_work(out)
            raise


def _remove_left(work: Path) -> None:
    """Remove what a killed process was writing."""
    for left in work.glob("*.tmp-*"):
        left.unlink(missing_ok=True)


def remove_work(out: Path) -> None:
    """Remove what only an unfinished set needs, and an empty `out`."""
    work = out / layout.UNFINISHED
    with suppress(FileNotFoundError):  # another task removes it too
        for left in reversed(range(10)):
            for path in work.iterdir():
                path.unlink(missing_ok=True)
            try:
                work.rmdir()
                break
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or not left:  # a task that was thought dead writes there still
                    raise
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _build_missing(
    job: Work, plan: Plan, task: Task | None, workers: int, ranks: Executor | None, progress: Progress | None
) -> None:
    share = range(len(plan.cuts)) if task is None else task.share(len(plan.cuts))
    if task is not None:
        remove_left(job.out, share)
    missing = {number: plan.cuts[number] for number in share if not is_finished(job.out, number, plan.digest)}
    planned = sum(plan.cuts[number].items for number in share)
    before = planned - sum(cut.items for cut in missing.values())

    def tell(done: int) -> None:
        if progress is not None:
            progress("write", before + done, planned)

    tell(0)
    if ranks is not None:
        build_on_ranks(ranks, job, missing, progress=tell)
    else:
        build_shards(job, missing, workers=workers, progress=tell)
