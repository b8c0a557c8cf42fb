"""Faults of saving: a run is killed at each point of it, the disk is full or fails, files are damaged or stale."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import points
from tests.faults.harness import SAME, Setting, Trial, at_step, describe, kind

MODULES = "vlm.run.checkpoint"
# Points of saving -> the function of vlm.run.checkpoint* that is it, and whether rank 0 alone comes there.
POINTS = {
    "copy": ("_copy", False, "the state is copied to host memory"),
    "shard_write": ("_write_fragments", False, "a rank writes its parts of the tensors"),
    "fsync": ("_sync_file", False, "files are flushed to the disk"),
    "verify": ("_verify_fragments", False, "what was written is read back and compared"),
    "manifest": ("_write_manifest", True, "the manifest is written"),
    "rename": ("_rename", True, "the folder gets its name"),
    "latest": ("_point_latest", True, "`latest` is moved"),
    "prune": ("_prune", True, "old checkpoints are removed"),
}
REFUSED = (
    "the run ends with status 2 and names the folder; what was saved before is intact; once that is mended, " + SAME
)

TWO = "the second ends with status 2 and names the folder and who has it; the first is as if alone: " + SAME


def _armed(saves: int, call: int = 1) -> points.Countdown:
    """Due at the `call`-th question after the `saves`-th save of this process has begun."""
    countdown = points.Countdown(saves, call)

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*arguments: Any, **named: Any) -> Any:
            countdown.arm()
            return function(*arguments, **named)

        return noted

    points.replace(MODULES, "_copy", make)
    return countdown


def _kill_at(trial: Trial, point: str) -> str:
    function, main_alone, _ = POINTS[point]
    setting = trial.draw()
    save = trial.rng.randrange(1, setting.steps // setting.every + 1)
    when, line = trial.rng.choice(points.WHEN), points.lines_drawn(trial.rng)
    rank = 0 if main_alone else trial.rng.randrange(setting.world)
    place = f"{when} {function} of save {save} on rank {rank}" + (f", line {line}" if when == "during" else "")

    def inject(own: int) -> None:
        if own == rank:
            due = points.Countdown(0, save).due if point == "copy" else _armed(save).due

            def act() -> None:
                trial.strike(place)
                points.kill_self()

            points.strike_at(MODULES, function, when, line, due, act)

    trial.start(setting, inject).wait(grace=trial.rng.choice((0.0, 0.3)))
    return f"{trial.struck()[0]}; {trial.survives(setting)}"


def _make_kill(point: str) -> None:
    kind(f"kill_{point}", what=f"a rank is killed before, while or after {POINTS[point][2]}")(
        lambda trial: _kill_at(trial, point)
    )


for _point in POINTS:
    _make_kill(_point)


@kind("kill_anywhere", what="a rank, or all, is killed (SIGKILL) at a random moment of the run")
def kill_anywhere(trial: Trial) -> str:
    setting = trial.draw()
    step, delay = trial.rng.randrange(-1, setting.steps), trial.rng.uniform(0, 0.2)
    rank = trial.rng.choice((None, *range(setting.world)))

    def inject(own: int) -> None:
        def end() -> None:
            time.sleep(delay)
            trial.strike(f"{delay:.2f} s after step {step + 1} began, {'all' if rank is None else f'rank {rank}'}")
            points.kill_self()

        def act() -> None:
            threading.Thread(target=end, daemon=True).start()

        if rank in (None, own) and step >= 0:
            at_step(step, act)
        elif rank in (None, own):  # as it starts
            act()

    statuses = trial.start(setting, inject).wait(grace=trial.rng.choice((0.0, 0.3)))
    if not any(statuses):
        return f"{describe(setting)}: it had ended before; {_ended(trial, setting)}"
    return f"{trial.struck()[0]}; {trial.survives(setting)}"


def _ended(trial: Trial, setting: Setting) -> str:
    """For a run that came to its end all the same: it is as the uninterrupted one."""
    trial.compare(trial.workshop.reference(setting))
    return "weights, moments and samples are the uninterrupted run's"


# The disk refuses ----------------------------------------------------------------------------------------------------


def _refused(trial: Trial, setting: Setting, inject: Any, *words: str) -> str:
    """A run that cannot save: it ends with status 2 on all ranks, and says what and where."""
    printed = trial.run(setting, inject, expect=2)
    for word in ("error: ", str(trial.checkpoints), *words):
        assert word in printed, f"{word!r} is not in what it said: {printed[-1500:]}"
    assert "Traceback" not in printed, printed[-1500:]
    return next(line for line in printed.splitlines() if line.startswith("error: "))


def _failing_call(trial: Trial, calls: tuple[str, ...], number: int, what: str) -> str:
    """A call to the system on a file of a checkpoint fails, from a random one of a save on."""
    setting = trial.draw()
    rank = trial.rng.randrange(setting.world)
    save, call = trial.rng.randrange(1, setting.steps // setting.every + 1), trial.rng.randrange(1, 3)

    def inject(own: int) -> None:
        if own != rank:
            return
        countdown, failing = _armed(save, call), [False]

        def make(usual: Callable[..., Any]) -> Callable[..., Any]:
            def fails(*arguments: Any, **named: Any) -> Any:
                if failing[0] or countdown.due():
                    failing[0] = True
                    trial.strike(f"{usual.__name__} in save {save} on rank {rank}: {what}")
                    raise OSError(number, os.strerror(number))
                return usual(*arguments, **named)

            return fails

        points.system_calls(calls, str(trial.checkpoints), make)

    said = _refused(trial, setting, inject, os.strerror(number))
    assert said
    return f"{trial.struck()[0]}; {trial.survives(setting)}"


@kind("enospc", what="the disk is full in the middle of a save (a real small file system, or write refuses)",
      checked=REFUSED)  # fmt: skip
def enospc(trial: Trial) -> str:
    if trial.rng.random() < 0.5 or not _may_mount():
        return _failing_call(trial, ("write", "pwrite", "pwritev"), errno.ENOSPC, "ENOSPC")
    setting = trial.draw()
    size = _checkpoint_bytes(trial, setting)
    room = int(size * trial.rng.uniform(0.1, 2.5))
    with _small_disk(trial.checkpoints, room) as disk:
        _refused(trial, setting, None)
        disk.grow(64 * size)
        return f"a disk of {room} bytes, {room / size:.1f} checkpoints; {trial.survives(setting)}"


class _small_disk:
    """A file system of `room` bytes in a folder, made for it."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room

    def __enter__(self) -> _small_disk:
        self.folder.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={max(self.room, 8192)}", "tmpfs", str(self.folder))
        return self

    def grow(self, room: int) -> None:
        _mount("-o", f"remount,size={room}", str(self.folder))

    def __exit__(self, *_: Any) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@functools.cache
def _may_mount() -> bool:
    """Whether this process may mount file systems (root outside most containers)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _small_disk(Path(folder) / "disk", 1 << 20):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def _checkpoint_bytes(trial: Trial, setting: Setting) -> int:
    course = trial.workshop.reference(setting)
    tensors = [*course.weights.values(), *course.moments.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@kind("eio_write", what="the disk fails (EIO) as a rank writes its part of a checkpoint", checked=REFUSED)
def eio_write(trial: Trial) -> str:
    return _failing_call(trial, ("write", "pwrite", "pwritev"), errno.EIO, "EIO")


@kind("eio_fsync", what="the disk fails (EIO) as a checkpoint is flushed", checked=REFUSED)
def eio_fsync(trial: Trial) -> str:
    return _failing_call(trial, ("fsync", "fdatasync"), errno.EIO, "EIO")


@kind("read_only", what="the folder of checkpoints becomes read-only in the middle of a run", checked=REFUSED)
def read_only(trial: Trial) -> str:
    setting = trial.draw()
    save = trial.rng.randrange(1, setting.steps // setting.every + 1)

    def inject(rank: int) -> None:
        points.obey_permissions()
        countdown = _armed(save) if rank == 0 else None

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            def locked(*arguments: Any, **named: Any) -> Any:
                result = function(*arguments, **named)
                if countdown and countdown.due():
                    trial.checkpoints.mkdir(exist_ok=True)
                    trial.checkpoints.chmod(0o555)
                    trial.strike(f"read-only from save {save} on")
                return result

            return locked

        points.replace(MODULES, "_copy", make)

    try:
        _refused(trial, setting, inject)
    finally:
        if trial.checkpoints.exists():
            trial.checkpoints.chmod(0o755)
    return f"{trial.struck()[0]}; {trial.survives(setting)}"


@kind("torn_write", what="a write that says it is done leaves half of its bytes undone", checked=REFUSED)
def torn_write(trial: Trial) -> str:
    setting = trial.draw()
    rank, save = trial.rng.randrange(setting.world), trial.rng.randrange(1, setting.steps // setting.every + 1)
    share, call = trial.rng.random(), trial.rng.randrange(1, 9)

    def inject(own: int) -> None:
        if own != rank:
            return
        countdown = _armed(save, call)

        def make(usual: Callable[..., Any]) -> Callable[..., Any]:
            def torn(descriptor: int, data: Any, *rest: Any) -> int:
                view = memoryview(data).cast("B")
                if not bytes(view).strip(b"\0") or not countdown.due():
                    return usual(descriptor, data, *rest)
                done = int(len(view) * share)
                while done and not bytes(view[done:]).strip(b"\0"):
                    done //= 2  # zeros that are not written are zeros all the same
                usual(descriptor, view[:done], *rest)
                trial.strike(f"{done} of {len(view)} bytes in save {save} on rank {rank}")
                return len(view)

            return torn

        points.system_calls(("pwrite",), str(trial.checkpoints), make)

    _refused(trial, setting, inject)
    return f"{trial.struck()[0]}; {trial.survives(setting)}"


# What lies on the disk changes ---------------------------------------------------------------------------------------


def _stopped_with_two(trial: Trial, setting: Setting) -> list[str]:
    """A run that was killed once it had two complete checkpoints or more: their names."""

    saves = trial.rng.randrange(2, setting.steps // setting.every + 1)

    def inject(rank: int) -> None:
        def act() -> None:
            trial.strike(f"killed after {saves} saves")
            points.kill_self()

        if rank == 0:
            points.strike_at(MODULES, "_prune", "after", 1, points.Countdown(0, saves).due, act)

    trial.start(setting, inject).wait(grace=0.0)
    trial.struck()
    names = trial.check_checkpoints()
    assert len(names) >= 2, f"only {names}"
    return names


@kind("flipped_bit", what="one bit of one file of the newest checkpoint changes, anywhere",
      checked="it is found and said; " + SAME)  # fmt: skip
def flipped_bit(trial: Trial) -> str:
    setting = trial.draw()
    newest = _stopped_with_two(trial, setting)[-1]
    files = sorted(path for path in (trial.checkpoints / newest).iterdir())
    path = trial.rng.choices(files, [2 if path.suffix == ".safetensors" else 1 for path in files])[0]
    byte = points.flip(path, trial.rng)
    return f"byte {byte} of {path.name} of {newest}; {trial.survives(setting, damaged=[newest])}"


@kind("missing_shard", what="a file of the newest checkpoint is gone", checked="it is found and said; " + SAME)
def missing_shard(trial: Trial) -> str:
    setting = trial.draw()
    newest = _stopped_with_two(trial, setting)[-1]
    path = trial.rng.choice(sorted((trial.checkpoints / newest).iterdir()))
    path.unlink()
    return f"{path.name} of {newest}; {trial.survives(setting, damaged=[newest])}"


@kind("truncated_checkpoint", what="a file of the newest checkpoint is cut short (a power cut without fsync)",
      checked="it is found and said; " + SAME)  # fmt: skip
def truncated_checkpoint(trial: Trial) -> str:
    setting = trial.draw()
    newest = _stopped_with_two(trial, setting)[-1]
    path = trial.rng.choice(sorted((trial.checkpoints / newest).iterdir()))
    length = trial.rng.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"{path.name} of {newest} to {length} bytes; {trial.survives(setting, damaged=[newest])}"


@kind("stale_latest", what="`latest` names an older checkpoint, none, one that is gone, or holds garbage")
def stale_latest(trial: Trial) -> str:
    setting = trial.draw()
    names = _stopped_with_two(trial, setting)
    latest = trial.checkpoints / "latest"
    stale = trial.rng.choice((f"{names[0]}\n", "", "step-99999999\n", "\0\xff\n", None))
    if stale is None:
        latest.unlink()
    else:
        latest.write_bytes(stale.encode("latin-1"))
    return f"latest held {stale!r}; {trial.survives(setting)}"


@kind("two_writers", what="the same run is started a second time while it runs", checked=TWO)
def two_writers(trial: Trial) -> str:
    setting = trial.draw(worlds=(1, 1, 2))
    moment, over = trial.rng.uniform(0.0, 0.5), trial.folder / "the second is over"

    def slow(rank: int) -> None:  # so that the second comes while the first runs
        from vlm.run.engine import Engine

        step, begun = Engine.step, [0]

        def slowly(*arguments: Any, **named: Any) -> Any:
            time.sleep(0.2)
            begun[0] += 1
            while begun[0] == setting.steps and not over.exists():
                time.sleep(0.01)
            return step(*arguments, **named)

        Engine.step = slowly  # type: ignore[method-assign]

    first = trial.start(setting, slow)
    while not (trial.run_dir / ".lock").is_file() or not (trial.run_dir / ".lock").read_bytes():
        assert not first.poll(), first.printed()[-1500:]
        time.sleep(0.01)
    time.sleep(moment)
    loaded = trial.loaded_file.read_text() if trial.loaded_file.is_file() else ""
    second = trial.start(setting)
    statuses = second.wait()
    over.touch()
    assert statuses[0] == 2, f"the second ended with {statuses}: {second.printed()[-1500:]}"
    assert f"{trial.run_dir}: process {first.pids[0]}" in second.printed(), second.printed()[-1500:]
    assert first.wait() == [0] * setting.world, first.printed()[-1500:]
    assert loaded in trial.loaded_file.read_text()
    trial.compare(trial.workshop.reference(setting))
    return f"the second came {moment:.2f} s after the first had the folder"


@kind("leftovers", what="a killed save left its unfinished folder, full of garbage, and the run starts again")
def leftovers(trial: Trial) -> str:
    setting = trial.draw()
    names = _stopped_with_two(trial, setting)
    source = trial.checkpoints / names[-1]
    step = trial.rng.choice((*(int(name.removeprefix("step-")) for name in names), setting.steps))
    copy = shutil.copytree(source, trial.checkpoints / f".step-{step:08d}.tmp")
    cut = trial.rng.choice(sorted(copy.iterdir()))
    os.truncate(cut, trial.rng.randrange(cut.stat().st_size))
    return f"{copy.name} with half of {cut.name}; {trial.survives(setting)}"
