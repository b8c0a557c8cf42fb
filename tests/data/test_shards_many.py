"""One shard set by several tasks and ranks: the same bytes, whoever is killed, late or alive when thought dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from encoded import encode, pictures

from vlm.data import shard_join, shard_plan, shard_tasks, shards
from vlm.data.shard_format import MANIFEST, UNFINISHED, shard_name
from vlm.data.shard_plan import make_plan
from vlm.data.shard_tasks import CLAIM, HEAD, remove_left, unfinished
from vlm.data.shards import Task, Written, write_shards
from vlm.types import Rejected, Sample, UserError

ARGUMENTS = {"source": "test", "split": "train"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        (folder / f"clip{number}.mp4").write_bytes(encode(pictures(6 + number, seed=number)))
    (folder / "clip7.mp4").write_bytes(b"<html>")
    return folder


def samples(clips: Path) -> list[Sample]:
    return [Sample(key=path.stem, video=path, annotation={"label": 1}) for path in sorted(clips.glob("*.mp4"))]


def write(clips: Path, out: Path, **options: Any) -> Written:
    return write_shards(samples(clips), out, **{"arguments": ARGUMENTS, "shard_samples": 2, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the set, written by one call."""
    out = tmp_path_factory.mktemp("whole") / "set"
    write(clips, out)
    assert len(contents(out)) == 6
    return contents(out)


@pytest.mark.parametrize(("count", "order"), [(3, (2, 0, 1)), (9, range(9)), (2, (0, 1))])
def test_tasks_write_what_one_call_writes(
    count: int, order: range, clips: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """In any order, and with more tasks than shards."""
    out = tmp_path / "set"
    done = [write(clips, out, task=Task(index, count)) for index in order]
    assert [bool(one.missing) for one in done if one.missing] == [True] * sum(one.missing > 0 for one in done)
    assert done[-1].manifest
    assert contents(out) == whole
    again = write(clips, out, task=Task(1, count))
    assert again.already_complete
    assert again.manifest == done[-1].manifest
    assert contents(out) == whole


def test_a_task_says_what_is_missing_and_leaves_an_unfinished_set(clips: Path, tmp_path: Path) -> None:
    done = write(clips, tmp_path / "set", task=Task(1, 2))
    assert (done.missing, done.manifest, done.already_complete) == (2, {}, False)
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == [shard_name(1), shard_name(3)]
    with pytest.raises(UserError, match="is unfinished"):
        shards.ShardSet(tmp_path / "set")


def test_one_call_finishes_what_tasks_began(clips: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    write(clips, tmp_path / "set", task=Task(1, 2))
    kept = (tmp_path / "set" / shard_name(1)).stat().st_ino
    assert not write(clips, tmp_path / "set").missing
    assert (tmp_path / "set" / shard_name(1)).stat().st_ino == kept
    assert contents(tmp_path / "set") == whole


def test_tasks_at_once(clips: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Also two of the same share, as when a task that was thought dead is not: one of them may give up."""
    start = threading.Barrier(3)

    def run(index: int) -> Written:
        start.wait()
        return write(clips, tmp_path / "set", task=Task(index, 2))

    with ThreadPoolExecutor(3) as threads:
        ends = [threads.submit(run, index) for index in (0, 1, 1)]
    errors = [end.exception() for end in ends if end.exception() is not None]
    assert len(errors) <= 1
    assert all(isinstance(error, UserError) for error in errors)
    write(clips, tmp_path / "set", task=Task(1, 2))
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize(
    ("module", "name"),
    [(shards, "join"), (shard_join, "_write_index"), (shard_join, "replace_file"), (shards, "remove_work")],
)
def test_two_that_finish_at_once(
    module: ModuleType, name: str, clips: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one task is about to take a step of finishing, another finishes whole, and removes what the one needs."""
    out = tmp_path / "set"
    write(clips, out, task=Task(0, 2))
    step, others = getattr(module, name), []

    def late(*arguments: Any) -> Any:
        if not others:
            others.append(None)
            others[0] = write(clips, out, task=Task(0, 2))
        return step(*arguments)

    monkeypatch.setattr(module, name, late)
    done = write(clips, out, task=Task(1, 2))
    assert done.manifest == others[0].manifest
    assert done.manifest["counts"]["records"] == 7
    assert contents(out) == whole


KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from test_shards_many import write
from vlm.data.shards import Task
out = Path(sys.argv[2])

def die(stage, done, total):
    if sys.argv[3] == stage and (stage == "list" or list(out.glob("shard-*.tar"))):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    write(Path(sys.argv[1]), out, shard_samples=1, task=Task(0, 2), progress=die)
"""


@pytest.mark.parametrize("stage", ["list", "write"])
def test_a_killed_task_is_begun_again(stage: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the task that lists the source, or when its first shard is there; others go on, then it."""
    monkeypatch.setattr(shard_tasks, "SILENCE", 1.0)
    (tmp_path / "run.py").write_text(KILLED)
    out = tmp_path / "set"
    command = [sys.executable, str(tmp_path / "run.py"), str(clips), str(out), stage]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert (out / UNFINISHED / (CLAIM if stage == "list" else HEAD)).exists()
    assert write(clips, out, shard_samples=1, task=Task(1, 2)).missing
    assert not write(clips, out, shard_samples=1, task=Task(0, 2)).missing
    write(clips, tmp_path / "other", shard_samples=1)
    assert contents(out) == contents(tmp_path / "other")


def test_left_of_a_killed_task_is_removed_and_no_other_tasks_file(tmp_path: Path) -> None:
    work = tmp_path / UNFINISHED
    work.mkdir()
    for number in (1, 2, 3):
        (work / f"{shard_name(number)}.tmp-host-1-abcd").touch()
    (work / "shard-000002.json").touch()
    remove_left(tmp_path, [1, 3])
    assert sorted(path.name for path in work.iterdir()) == ["shard-000002.json", f"{shard_name(2)}.tmp-host-1-abcd"]
    assert unfinished(tmp_path, range(1, 4)) == [1, 3]


def test_tasks_wait_for_the_one_that_lists(clips: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out, listed = tmp_path / "set", []
    begun, go = threading.Event(), threading.Event()

    def slow() -> Iterator[Sample]:
        begun.set()
        assert go.wait(30)
        yield from samples(clips)

    def unused() -> Iterator[Sample]:
        listed.append(True)
        yield from samples(clips)

    with ThreadPoolExecutor(2) as threads:
        options: dict[str, Any] = {"arguments": ARGUMENTS, "shard_samples": 2}
        first = threads.submit(write_shards, slow(), out, task=Task(1, 2), **options)
        assert begun.wait(30)
        second = threads.submit(write_shards, unused(), out, task=Task(3, 4), **options)
        time.sleep(0.5)
        assert not second.done()
        go.set()
        assert first.result().missing
        assert second.result().missing
    assert not listed
    write(clips, out, task=Task(0, 1))
    assert contents(out) == whole


def test_another_plan_is_refused_by_every_task_and_another_list_by_task_0(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    write(clips, out, task=Task(1, 3))
    with pytest.raises(UserError, match="shard_samples was 2, now 3"):
        write(clips, out, task=Task(1, 3), shard_samples=3)
    fewer = samples(clips)[:5]
    with pytest.raises(UserError, match="8 items were listed, now 5"):
        write_shards(fewer, out, arguments=ARGUMENTS, shard_samples=2, task=Task(0, 3))
    write(clips, out)
    with pytest.raises(UserError, match="8 items were listed, now 5"):
        write_shards(fewer, out, arguments=ARGUMENTS, shard_samples=2, task=Task(0, 3))
    with pytest.raises(UserError, match="counted from 0"):
        write(clips, out, task=Task(3, 3))


def test_tasks_and_a_call_for_the_whole_set_keep_apart(clips: Path, tmp_path: Path) -> None:
    def other(stage: str, done: int, total: int | None) -> None:
        with pytest.raises(UserError, match="another process is writing"):
            write(clips, tmp_path / "set")
        with pytest.raises(UserError, match="another process is writing"):
            write(clips, tmp_path / "alone", task=Task(0, 2))

    def outer(stage: str, done: int, total: int | None) -> None:
        if stage == "list" and done == 1:
            write(clips, tmp_path / "set", task=Task(0, 2), progress=other)

    write(clips, tmp_path / "alone", progress=outer)


def test_nothing_left_is_every_tasks_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="lists no item"):
            write_shards([], tmp_path / "set", arguments=ARGUMENTS, task=Task(1, 2))
    assert not (tmp_path / "set" / UNFINISHED / HEAD).exists()


def test_ranks_write_what_one_call_writes(clips: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """An executor of threads stands for the other ranks: each drives a process, as a rank does."""
    told = []
    with ThreadPoolExecutor(2) as ranks:
        done = write(clips, tmp_path / "set", ranks=ranks, progress=lambda *event: told.append(event))
    assert not done.missing
    assert contents(tmp_path / "set") == whole
    counts = [event[1] for event in told if event[0] == "write"]
    assert (counts[0], counts[-1]) == (0, 8)
    assert counts == sorted(counts)


def test_what_goes_wrong_on_a_rank_goes_wrong_here(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"

    def spoil(stage: str, done: int, total: int | None) -> None:
        if stage == "write" and not (out / shard_name(0)).exists():
            (out / shard_name(0)).mkdir()

    with ThreadPoolExecutor(1) as ranks, pytest.raises(UserError, match=r"shard-000000.tar cannot be written"):
        write(clips, out, ranks=ranks, progress=spoil)
    assert not (out / MANIFEST).exists()


def test_keys_that_come_twice_among_many_and_cuts_without_media(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of keys grows several times; items without a file are cut by number."""
    monkeypatch.setattr(shard_plan, "MAX_SHARD_ITEMS", 5000)
    count = 10_010

    def items() -> Iterator[Sample | Rejected]:
        for number in range(count):
            yield Sample(key=f"k{number}", annotation={"caption": "a"})
        for number in (0, 4095, count - 1):
            yield Sample(key=f"k{number}", annotation={"caption": "b"})

    plan = make_plan(items(), {}, shard_size=1 << 30, shard_samples=None, file=None)
    assert [cut.items for cut in plan.cuts] == [5000, 5000, 10]
    reasons = [row["reason"] for row in plan.rejected]
    assert reasons == [
        f"duplicate key: item {count + at} of the list has the key of item {first}"
        for at, first in enumerate((0, 4095, count - 1))
    ]
    assert type(plan).from_head(plan.head()) == plan


def test_process_of_a_lost_task_does_not_spoil_a_finished_set(
    clips: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A task that sleeps while others build its share and finish: it wakes up to a finished set."""
    out, woken = tmp_path / "set", []

    def sleep(stage: str, done: int, total: int | None) -> None:
        if stage == "write" and not woken:
            woken.append(os.getpid())
            write(clips, out, task=Task(1, 2))
            assert not write(clips, out, task=Task(0, 2)).missing

    done = write(clips, out, task=Task(0, 2), progress=sleep)
    assert (done.already_complete, bool(done.manifest)) == (True, True)
    assert contents(out) == whole
