"""Faults of processes, in real jobs of two under torchrun: killed, stopped, preempted, wrong, locked, slow, stuck."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from tests.faults import points, torchrun
from tests.faults.harness import SAME, Setting, Trial, describe, kind
from tests.faults.jobs import Job

ENDED = "the job ends by itself with a status other than 0; " + SAME
PREEMPTED = (
    "all ranks end with status 85 and have saved at the next step's end: no step is made twice; weights and moments "
    "equal to the uninterrupted run to the bit; samples of every step equal, none lost or twice"
)
TOLD = "within 30 s of hang_seconds a report in RUN/hang names that rank, and the job ends with status 86; " + SAME
STUCK = (
    "within 30 s of checkpoint_seconds the run ends with status 86 and a report that says which rank is at what, with "
    "the stacks of all; what was saved before is intact; " + SAME
)
PHASES = ("load", "collective", "forward", "backward", "optimizer", "log", "check", "save")
HANG_SECONDS = 6.0


def _setting(trial: Trial, *overrides: str) -> Setting:
    return trial.draw(worlds=(2,), overrides=(*Setting().overrides, *overrides))


def _plain(setting: Setting) -> Setting:
    """The setting that has the same course and no overrides that do not change it, so that one reference serves all."""
    return replace(setting, overrides=Setting().overrides)


def _draw_point(
    trial: Trial, setting: Setting, phases: tuple[str, ...] = PHASES, thread: bool = True
) -> dict[str, Any]:
    """A random phase of a random step, and for half of the trials some milliseconds later."""
    phase = trial.rng.choice(phases)
    times = {"save": setting.steps // setting.every, "collective": 2 * setting.steps, "build": 1, "report": 1}
    after = trial.rng.uniform(0.001, 0.05) if thread and trial.rng.random() < 0.5 else 0.0
    last = times.get(phase, setting.steps)
    call = trial.rng.randrange(1, (max(1, last // 2) if after else last) + 1)  # not when it has come to its end
    return {"phase": [phase], "call": call, "after": after}


def _draw_rank(trial: Trial, setting: Setting) -> list[int]:
    return [trial.rng.randrange(setting.world)]


def _is_real(trial: Trial) -> bool:
    return trial.rng.random() < torchrun.SHARE


def _said(what: str, fault: dict[str, Any], real: bool) -> str:
    ranks = "all ranks" if len(fault["ranks"]) > 1 else f"rank {fault['ranks'][0]}"
    later = f" and {fault['after'] * 1000:.0f} ms" if fault["after"] else ""
    by = "torchrun" if real else "torchrun's agent"
    return f"{ranks} {what} at {'/'.join(fault['phase'])} {fault['call']}{later}, under {by}"


def _strike(trial: Trial, setting: Setting, what: str, **fault: Any) -> tuple[Job, bool]:
    """Run a job with a fault to its end. Also: whether by the command line."""
    real = _is_real(trial)
    job = torchrun.start(trial, setting, real, said=_said(what, fault, real), **fault)
    job.wait()
    return job, real


def _goes_on(trial: Trial, setting: Setting) -> str:
    """Started again, as it was or with another kind of start, it ends as the uninterrupted run does."""
    real, reference = _is_real(trial), trial.workshop.reference(_plain(setting))
    text = trial.survives(setting, reference=reference, again=lambda: torchrun.again(trial, setting, real))
    return f"{trial.struck()[0]}; {text}"


def _ends(trial: Trial, what: str, phases: tuple[str, ...] = PHASES, thread: bool = True, **fault: Any) -> str:
    """A fault that ends the job."""
    setting = _setting(trial)
    point = _draw_point(trial, setting, phases, thread)
    rank = _draw_rank(trial, setting)
    job, _ = _strike(trial, setting, what, ranks=rank, **point, **fault)
    if trial.struck() and job.statuses == [0]:  # some milliseconds after the last save, the run is over
        assert point["after"], "a rank went wrong, and the job ended with 0"
        trial.compare(trial.workshop.reference(_plain(setting)))
        return f"{trial.struck()[0]}: it had come to its end"
    # Whichever rank the launcher sees first, the one that went wrong did not end as if all were well.
    own = torchrun.own_statuses(trial)
    assert own.get(rank[0]) != 0, f"{own}: {job.printed()[-1500:]}"
    return _goes_on(trial, setting)


# A rank ends ---------------------------------------------------------------------------------------------------------


@kind("sigkill", what="a rank is killed (SIGKILL) at a random moment, also while it builds the model",
      checked=ENDED, process=True)  # fmt: skip
def sigkill(trial: Trial) -> str:
    return _ends(trial, "killed", ("build", *PHASES, "report"), act="signal", signal="SIGKILL")


@kind("segfault", what="a rank reads memory that is not its own", checked=ENDED, process=True)
def segfault(trial: Trial) -> str:
    setting = _setting(trial)
    job, _ = _strike(
        trial, setting, "segfaults", ranks=_draw_rank(trial, setting), act="segfault",
        **_draw_point(trial, setting, thread=False),
    )  # fmt: skip
    assert job.statuses != [0], job.printed()[-1500:]
    assert 0 not in torchrun.own_statuses(trial).values(), job.printed()[-1500:]
    return _goes_on(trial, setting)


@kind("exception", what="an exception that nobody expects is raised on one rank", checked=ENDED, process=True)
def exception(trial: Trial) -> str:
    text = _ends(trial, "raises", act="raise", thread=False)
    assert "RuntimeError: a fault on purpose" in (trial.folder / "out-1").read_text(errors="replace")
    return text


@kind("exit_in_collective", what="a rank ends (status 1) while the others wait for it in a collective",
      checked=ENDED, process=True)  # fmt: skip
def exit_in_collective(trial: Trial) -> str:
    return _ends(trial, "ends", ("collective", "optimizer"), act="exit", status=1)


# Told to stop --------------------------------------------------------------------------------------------------------


def _preempted(trial: Trial, name: str, launcher: bool) -> str:
    setting = _setting(trial)
    point = _draw_point(trial, setting)
    ranks = _draw_rank(trial, setting) if launcher or trial.rng.random() < 0.5 else list(range(setting.world))
    what = f"has torchrun told to stop ({name})" if launcher else f"told to stop ({name})"
    job, _ = _strike(trial, setting, what, ranks=ranks, act="signal", signal=name, launcher=launcher, **point)
    assert trial.struck()
    statuses, done = torchrun.own_statuses(trial), trial.steps_done()
    if done < setting.steps:
        # A rank that ends somewhat later than the first is told so (SIGTERM) by what launched them both.
        seen = {*statuses.values(), *torchrun.seen_statuses(job)}
        assert 85 in statuses.values(), f"{statuses}: {job.printed()[-1500:]}"
        assert seen <= {85, -15}, f"{statuses}, {seen}: {job.printed()[-1500:]}"
    elif set(statuses.values()) == {0}:  # nobody asks any more after the last step
        trial.compare(trial.workshop.reference(_plain(setting)))
        return f"{trial.struck()[0]}: it came to its end"
    text = _goes_on(trial, setting)
    assert trial.resumed_at() == done, f"{done} steps were made, and {trial.resumed_at()} of them saved"
    return text


@kind("sigterm", what="a rank, all ranks or torchrun itself are told to stop (SIGTERM) at a random moment",
      checked=PREEMPTED, process=True)  # fmt: skip
def sigterm(trial: Trial) -> str:
    return _preempted(trial, "SIGTERM", launcher=trial.rng.random() < 0.5)


@kind("sigusr1", what="a rank, or all, get SIGUSR1 (as from Slurm ahead of the time limit) at a random moment",
      checked=PREEMPTED, process=True)  # fmt: skip
def sigusr1(trial: Trial) -> str:
    return _preempted(trial, "SIGUSR1", launcher=False)


# A rank hangs --------------------------------------------------------------------------------------------------------


def _hangs(trial: Trial, what: str, thread: bool = True, **fault: Any) -> str:
    """A fault after which a rank never goes on: it is told which, in time."""
    setting = _setting(trial, f"hang_seconds={HANG_SECONDS}")
    rank = _draw_rank(trial, setting)
    phases = tuple(name for name in PHASES if name != "save")
    point = _draw_point(trial, setting, phases, thread)
    job, _ = _strike(trial, setting, what, ranks=rank, **point, **fault)
    ended, struck_at = time.time(), (trial.folder / "struck").stat().st_mtime
    reports = sorted((trial.run_dir / "hang").glob("*.txt"))
    assert reports, f"no report: {job.printed()[-1500:]}"
    took = reports[0].stat().st_mtime - struck_at
    assert took < HANG_SECONDS + 30, f"told after {took:.0f} s"
    assert ended - struck_at < HANG_SECONDS + 75, f"ended after {ended - struck_at:.0f} s"
    said = reports[0].read_text()
    assert f"to blame: rank {rank[0]}," in said, said[:1500]
    assert "stacks of rank" in said, said[:1500]
    assert 86 in torchrun.seen_statuses(job), job.printed()[-1500:]
    return f"{_goes_on(trial, setting)}; told after {took:.0f} s"


@kind("sigstop", what="a rank is stopped (SIGSTOP) at a random moment and never goes on", checked=TOLD, process=True)
def sigstop(trial: Trial) -> str:
    return _hangs(trial, "is stopped", act="signal", signal="SIGSTOP")


@kind("stall", what="a rank sleeps for ever at a random place of a step", checked=TOLD, process=True)
def stall(trial: Trial) -> str:
    return _hangs(trial, "sleeps for ever", thread=False, act="sleep", seconds=1000)


@kind("gil_lock", what="native code on a rank keeps the interpreter's lock for ever", checked=TOLD, process=True)
def gil_lock(trial: Trial) -> str:
    return _hangs(trial, "locks the interpreter", act="lock")


@kind("stuck_save", what="the file system never answers one rank's fsync of a checkpoint", checked=STUCK)
def stuck_save(trial: Trial) -> str:
    limit, setting = 10.0, trial.draw(worlds=(1, 2, 2))
    setting = replace(setting, overrides=(*setting.overrides, f"checkpoint_seconds={limit}"))
    rank, save = trial.rng.randrange(setting.world), trial.rng.randrange(1, setting.steps // setting.every + 1)

    def inject(own: int) -> None:
        if own == rank:
            due = points.Countdown(0, 2 * save - trial.rng.randrange(2)).due  # two files a save

            def act() -> None:
                trial.strike(f"fsync of save {save} on rank {rank}")
                time.sleep(1000)

            points.strike_at("vlm.run.checkpoint", "_sync_file", "before", 1, due, act)

    printed = trial.run(setting, inject, expect=86)
    took = time.time() - (trial.folder / "struck").stat().st_mtime
    assert took < limit + 30, f"told after {took:.0f} s"
    said = f"rank {rank} is still at this: flushing"
    assert said in printed, printed[-1500:]
    (report,) = (trial.run_dir / "hang").glob("*.txt")
    assert f"to blame: rank {rank}\n" in report.read_text(), report.read_text()[:1500]
    assert "thread save step-" in report.read_text(), "the stacks tell where it is"
    text = trial.survives(setting, reference=trial.workshop.reference(_plain(setting)))
    return f"{trial.struck()[0]}, told after {took:.0f} s; {text}"


@kind("slow_rank", what="one rank is slow: a step of it takes longer than hang_seconds, but goes on",
      checked="no alarm and no restart; weights, moments and samples equal to those of a run that is not slow, to the "
      "bit", process=True)  # fmt: skip
def slow_rank(trial: Trial) -> str:
    limit = 4.0
    setting = _setting(trial, f"hang_seconds={limit}")
    phases = ["load", "forward", "backward", "collective", "optimizer", "log", "check"]
    seconds = trial.rng.uniform(0.8, 1.2)
    fault = {"phase": phases, "call": trial.rng.randrange(1, 8 * (setting.steps - 1)), "after": 0.0}
    job, _ = _strike(
        trial, setting, f"slow ({seconds:.1f} s a phase)", ranks=_draw_rank(trial, setting), act="sleep",
        seconds=seconds, times=8, **fault,
    )  # fmt: skip
    assert len(trial.struck()) == 8, trial.struck()
    assert job.statuses == [0], job.printed()[-1500:]
    assert not (trial.run_dir / "hang").exists(), "an alarm without need"
    trial.compare(trial.workshop.reference(_plain(setting)))
    return f"{trial.struck()[0]}; {describe(setting)}: {8 * seconds:.0f} s with hang_seconds={limit:g}"
