"""Faults of what a cluster gives: more or fewer processes, other workers, ports, names, ranks and clocks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tests.faults import points
from tests.faults.harness import CHANGED, SAME, Setting, Trial, describe, kind
from tests.faults.jobs import Inject

ALIKE = ("model.drop_path=0.0",)  # its numbers are drawn for each process, so that they differ with their number
TOLERANCE = 1e-6
ONE_LINE = "the processes end with status 86 and one line that names what is wrong, without a traceback; then, " + SAME


# Other numbers of processes and workers ------------------------------------------------------------------------------


def _stops_at(trial: Trial, step: int, how: str, rank: int) -> Inject:
    """A run is killed, or told to stop, within step `step` (from 1)."""
    import signal

    def inject(own: int) -> None:
        from vlm.run.watchdog import Watchdog

        telling = Watchdog.phase

        def phase(self: Any, name: str, **named: Any) -> None:
            telling(self, name, **named)
            if name == "forward" and self._step == step and not done:
                done.append(1)
                trial.strike(f"{how} in step {step}")
                os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGTERM)

        done: list[int] = []
        if own == rank:
            Watchdog.phase = phase  # type: ignore[method-assign]

    return inject


def _through(trial: Trial, settings: Sequence[Setting], reference: Setting, tolerance: float | None) -> str:
    """A run that is stopped and goes on with another setting, again and again, is as the reference."""
    steps, want = settings[0].steps, trial.workshop.reference(reference)
    stops = sorted(trial.rng.sample(range(3, steps + 1), len(settings) - 1))
    saved = 0
    for setting, stop in zip(settings[:-1], stops):
        how = trial.rng.choice(("killed", "told to stop"))
        inject = _stops_at(trial, stop, how, trial.rng.randrange(setting.world))
        job = trial.start(setting, inject)
        statuses = job.wait(grace=0.2 if how == "killed" else 60.0)  # each ends by itself, one later than another
        assert any(statuses), f"it was not stopped: {job.printed()[-1500:]}"
        assert trial.resumed_at() <= stop
        if saved:
            assert trial.resumed_at() >= saved, f"went on from {trial.resumed_at()}, though {saved} was saved"
        done = trial.steps_done()
        saved = done if how == "told to stop" else max(0, done - 2 * setting.every + 1)
        if how == "told to stop":
            assert set(statuses) == {85}, f"told to stop, ended with {statuses}: {job.printed()[-1500:]}"
    assert len(trial.struck()) == len(stops), trial.struck()
    text = trial.survives(settings[-1], reference=want, tolerance=tolerance)
    runs = " -> ".join(describe(setting) for setting in settings)
    return f"{runs} ({'; '.join(trial.struck())}); {text}"


@kind("world_3_2_1_4", what="the run is stopped again and again and goes on with 3, 2, 1 and 4 processes",
      checked=CHANGED)  # fmt: skip
def world_3_2_1_4(trial: Trial) -> str:
    stage = trial.rng.randrange(4)
    first = Setting(world=1, stage=stage, steps=10, overrides=ALIKE)
    return _through(trial, [replace(first, world=world) for world in (3, 2, 1, 4)], first, TOLERANCE)


@kind("world_and_stage", what="the run goes on with other numbers of processes and other ZeRO stages, both at random",
      checked=CHANGED)  # fmt: skip
def world_and_stage(trial: Trial) -> str:
    first = Setting(world=1, steps=8, overrides=ALIKE)
    drawn = [replace(first, world=trial.rng.randrange(1, 5), stage=trial.rng.randrange(4)) for _ in range(3)]
    return _through(trial, drawn, first, TOLERANCE)


@kind("worker_count", what="the run goes on with other numbers of loader processes")
def worker_count(trial: Trial) -> str:
    setting = trial.draw()
    counts = [trial.rng.randrange(3) for _ in range(2)]
    counts.append(trial.rng.choice([count for count in range(3) if count != counts[-1]]))
    settings = [replace(setting, workers=count) for count in counts]
    return f"workers {counts}: {_through(trial, settings, setting, None)}"


# Processes that do not find one another ------------------------------------------------------------------------------


def _apart(trial: Trial, what: str, inject: Inject, words: Sequence[str], grace: float) -> str:
    """Processes that are started, or started again, and do not meet; then they do.

    Args:
        words: of the line that one of them says.
        grace: seconds that the others have, once one has ended.
    """
    setting = trial.draw(worlds=(2,))
    if trial.rng.random() < 0.5:
        stops = _stops_at(trial, trial.rng.randrange(3, setting.steps), "killed", trial.rng.randrange(2))
        trial.start(setting, stops).wait()
    before = trial.loaded_file.read_text() if trial.loaded_file.is_file() else ""
    began = time.monotonic()
    job = trial.start(setting, inject)
    statuses = job.wait(grace=grace)
    took = time.monotonic() - began
    own = {status for place, status in enumerate(statuses) if place not in job.told}
    assert own == {86}, f"ended with {statuses}: {job.printed()[-1500:]}"
    lines = [line for line in job.printed().splitlines() if "error: " in line]
    assert any(all(word in line for word in words) for line in lines), f"{words} in none of {lines}"
    assert "Traceback" not in job.printed(), job.printed()[-1500:]
    assert took < 45, f"told after {took:.0f} s"
    assert before == (trial.loaded_file.read_text() if trial.loaded_file.is_file() else ""), "it trained all the same"
    again = "a restart" if before else "the start"
    return f"{what} at {again}, told after {took:.1f} s; {trial.survives(setting)}"


def _meets_at(seconds: int, **variables: str) -> None:
    os.environ.update({"VLM_RENDEZVOUS_SECONDS": str(seconds), **variables})


@kind("port_taken", what="another program listens at MASTER_PORT, and says nothing or something else",
      checked=ONE_LINE)  # fmt: skip
def port_taken(trial: Trial) -> str:
    everywhere, talks = trial.rng.random() < 0.5, trial.rng.random() < 0.5
    with socket.create_server(("" if everywhere else "127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        def inject(rank: int) -> None:
            _meets_at(4, MASTER_PORT=str(port))

        if talks:  # as a process: the one that forks runs may have no threads
            pid = os.fork()
            if not pid:
                _talk(taken)
        what = f"a port taken {'everywhere' if everywhere else 'at 127.0.0.1'} by one that is {'not ' * talks}silent"
        try:
            return _apart(trial, what, inject, (f"MASTER_PORT={port}", "is taken on this host"), grace=1.0)
        finally:
            if talks:
                os.kill(pid, 9)
                os.waitpid(pid, 0)


def _talk(server: socket.socket) -> None:
    """Answer whoever comes as a web server does, for ever."""
    try:
        while True:
            caller, _ = server.accept()
            with caller:
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    finally:
        os._exit(0)


@kind("host_unresolvable", what="MASTER_ADDR is a name that nothing knows", checked=ONE_LINE)
def host_unresolvable(trial: Trial) -> str:
    name = f"node{trial.rng.randrange(10**6)}.invalid"

    def inject(rank: int) -> None:
        _meets_at(5, MASTER_ADDR=name, RES_OPTIONS="timeout:1 attempts:1")  # where no name server answers

    return _apart(
        trial, f"MASTER_ADDR={name}", inject, ("rank 1 ", f"MASTER_ADDR={name}", "does not resolve"), grace=30.0
    )


@kind("rank_missing", what="a rank never comes to where the others wait for it", checked=ONE_LINE)
def rank_missing(trial: Trial) -> str:
    def inject(rank: int) -> None:
        _meets_at(4)
        if rank == 1:
            time.sleep(60)

    return _apart(trial, "rank 1 does not come", inject, ("rank 1 did not come", "Mend: "), grace=0.0)


# Clocks --------------------------------------------------------------------------------------------------------------


@kind("clock_skew", what="the clock of each rank is wrong by up to ten years and jumps back and forth, and files have "
      "times from then")  # fmt: skip
def clock_skew(trial: Trial) -> str:
    setting = trial.draw(worlds=(1, 2, 2))
    offsets = [trial.rng.uniform(-3e8, 3e8) for _ in range(2 * setting.world)]
    moment, victim = trial.rng.randrange(3, setting.steps + 1), trial.rng.randrange(setting.world)

    def skew(rank: int) -> None:
        usual, usual_ns, calls, pair = time.time, time.time_ns, [0], offsets[2 * rank : 2 * rank + 2]

        def offset() -> float:
            calls[0] += 1
            return pair[calls[0] % 2]

        time.time = lambda: usual() + offset()  # type: ignore[assignment]
        time.time_ns = lambda: usual_ns() + int(offset() * 1e9)  # type: ignore[assignment]
        for name in ("localtime", "gmtime"):
            _shift(name, offset)
        points.replace("vlm.run.checkpoint", "_rename", lambda rename: _dated(rename, usual, offset))

    stops = _stops_at(trial, moment, "killed", victim)
    statuses = trial.start(setting, lambda rank: (skew(rank), stops(rank))[0]).wait()
    assert any(statuses)
    assert trial.struck()
    hours = ", ".join(f"{offset / 3600:.0f}" for offset in offsets)
    return f"clocks wrong by {hours} h, {trial.struck()[0]}; {trial.survives(setting, inject=skew)}"


def _shift(name: str, offset: Callable[[], float]) -> None:
    usual = getattr(time, name)
    setattr(time, name, lambda seconds=None: usual(time.time() if seconds is None else seconds))


def _dated(function: Callable[..., Any], now: Callable[[], float], offset: Callable[[], float]) -> Callable[..., Any]:
    """Give the files of a checkpoint the time of a clock that is wrong."""

    def dated(source: Any, *arguments: Any, **named: Any) -> Any:
        for path in (source, *source.iterdir()):
            moment = max(0.0, now() + offset())
            os.utime(path, (moment, moment))
        return function(source, *arguments, **named)

    return dated
