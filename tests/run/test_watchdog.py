"""A run that hangs says so within seconds of the limit, names the rank and what it is at, and ends with 86; a run that
is only slow goes on."""

import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from launching import ROOT, environment, run, start, train_arguments
from safetensors.torch import load_file
from torch import nn

from vlm.data.workers import Loaded
from vlm.distributed import alone
from vlm.errors import HUNG
from vlm.recipe import load
from vlm.run import watchdog, watchdog_timer
from vlm.run.watchdog import Watchdog, _differ
from vlm.run.watchdog_report import Beat, Sight, Told, compose, from_plain, hangs, to_blame, to_plain, waits_for_ranks

SOON = 30.0  # seconds from the limit to the report


def sight(rank: int, age: float, waits: bool = False, quiet: float = 0.0, step: int = 3, signs: int = 5) -> Sight:
    return Sight(Beat(rank, 1, age - quiet, waits, "load", "", step, signs), quiet)


@pytest.mark.parametrize(
    ("sights", "hung", "blamed"),
    [
        ([sight(0, 1), sight(1, 9)], False, None),
        ([sight(0, 10), sight(1, 1)], True, [0]),
        ([sight(0, 99, waits=True), sight(1, 1)], False, None),  # rank 1 goes on, however slowly
        ([sight(0, 11, waits=True), sight(1, 10)], True, [1]),
        ([sight(0, 11, waits=True), sight(1, 10, waits=True, quiet=10)], True, [1]),  # stopped within a collective
        ([sight(0, 11, waits=True, signs=7), sight(1, 11, waits=True, signs=6)], True, [1]),
        ([sight(0, 11, waits=True, step=4, signs=1), sight(1, 11, waits=True, step=3)], True, [1]),
        ([sight(0, 11, waits=True), sight(1, 11, waits=True)], True, []),  # nothing tells them apart
        ([sight(0, 11), sight(1, 11, signs=4), sight(2, 11, waits=True)], True, [1, 0]),
        ([sight(0, 11)], True, [0]),
    ],
)
def test_who_hangs_and_who_is_to_blame(sights, hung, blamed):
    assert hangs(sights, 10.0) is hung
    if hung:
        assert to_blame(sights, 10.0, 5.0) == blamed


def test_a_report_names_ranks_samples_and_stacks_and_those_alike_once():
    told = {
        rank: Told(Beat(rank, 7, 12.0, rank != 2, "load" if rank == 2 else "collective", "", 4, 5), f"process {rank}")
        for rank in range(3)
    }
    told[2].loading.append("'clip-7' in shards/shard-000000.tar (11.0 s)")
    told = {
        rank: from_plain({**to_plain(one), "stacks": "waits" if rank < 2 else "reads"}) for rank, one in told.items()
    }
    sights = {rank: Sight(one.beat, 0.0) for rank, one in told.items()}
    sights[3] = sight(3, 20, quiet=20)
    text = compose(told, sights, {3: "process 8 of host b, stopped by a signal"}, 10.0, 5.0, "rank 3 is late")
    assert text.startswith("the run hangs: rank 3 is late (hang_seconds=10)\nto blame: rank 3")
    assert "rank 2 loads: 'clip-7' in shards/shard-000000.tar (11.0 s)" in text
    assert "rank 3 was silent: process 8 of host b" in text
    assert "stacks of rank 0, 1:\nwaits" in text
    assert "stacks of rank 2 (process 2):\nreads" in text


def test_a_locked_process_shows_its_stacks_to_others_and_ends():
    code = """
import ctypes
from vlm.run.watchdog_timer import LastResort
last = LastResort(86, 0.5)
last.put_off(60)
last.put_off(5)
print(last.descriptor, flush=True)
def locks():
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
locks()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    descriptor = int(process.stdout.readline())
    while " in locks" not in (told := watchdog_timer.ask(process.pid, descriptor)):
        assert told, "it ended before it was locked"
    assert "sleeping" in watchdog_timer.state_of(process.pid)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == HUNG
    assert " in locks" in printed
    assert watchdog_timer.ask(process.pid, descriptor) == ""
    assert "no such process" in watchdog_timer.state_of(process.pid)


def test_a_stopped_process_is_seen_and_goes_on():
    process = subprocess.Popen(["sleep", "100"])
    process.send_signal(signal.SIGSTOP)
    while "stopped" not in watchdog_timer.state_of(process.pid):
        time.sleep(0.01)
    assert watchdog_timer.go_on(process.pid)
    assert not watchdog_timer.go_on(process.pid)
    process.kill()
    process.wait()


def test_blocks_are_signs_of_life_forward_and_backward_and_change_no_gradient():
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def gradient() -> torch.Tensor:
        x = torch.ones(2, 3)
        for layer in model.layers:
            x = layer(x)
        model.zero_grad()
        x.sum().backward()
        return model.layers[0].weight.grad.clone()

    before = gradient()
    dog = Watchdog(Path("nowhere"), 5.0, alone())
    dog.watch(model)
    assert gradient().equal(before)
    assert dog._beat().signs == 8
    assert dog._beat().module == "layers.0"
    with torch.no_grad():
        model.layers[2](torch.ones(1, 3))
    assert dog._beat().module == "layers.2"


def test_zero_watches_nothing(tmp_path):
    threads = threading.active_count()
    with Watchdog(tmp_path, 0.0, alone()) as dog:
        model = nn.ModuleList([nn.Linear(1, 1)])
        dog.watch(model)
        dog.phase("load", step=1)
        assert threading.active_count() == threads
        assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match=r"hang_seconds is -1\.0; it must be a finite number from 0"):
        load("vit_llama.debug", ["hang_seconds=-1"])


def test_a_watchdog_that_fails_ends_no_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(watchdog, "_LAST_RESORT", (0.5, 0.5))
    with Watchdog(tmp_path, 0.5, alone()) as dog:
        dog.loading(lambda: 1 / 0)
        dog.phase("load")
        dog._thread.join(timeout=20)
        assert not dog._thread.is_alive()
        time.sleep(2.0)  # this process would have ended by now
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_busy_process_that_says_nothing_has_not_stalled_in_some_phases():
    assert _differ(("build", (1.0, 5)), ("build", (1.5, 5)), 1.0)
    assert _differ(("build", (1.0, 5)), ("build", (1.0, 6)), 1.0)  # a page came from the disk
    assert not _differ(("build", (1.0, 5)), ("build", (1.001, 5)), 1.0)
    assert _differ(("load", ["a"]), ("load", ["b"]), 1.0)
    assert not _differ(("load", ["a"]), ("load", ["a"]), 1.0)


def test_what_is_loaded_without_workers_can_be_seen():
    seen = []

    class Dataset:
        def load(self, item, watch):
            watch.begin(str(item), f"item {item}")
            seen.append(loader.at_work())
            watch.end()
            return item

    loader = Loaded(Dataset(), range(2), 0, "data.workers")
    assert list(loader) == [0, 1]
    assert [(label, about) for ((label, about, _),) in seen] == [("0", "item 0"), ("1", "item 1")]
    assert loader.at_work() == []
    assert not waits_for_ranks()


# Runs ----------------------------------------------------------------------------------------------------------------


def run_toy(kind: str, rank: int, folder: Path, seconds: float) -> tuple[list[int], list[str], float]:
    """Exit statuses, what was printed, and wall time of both ranks of hang_worker.py."""
    script = [str(ROOT / "tests" / "run" / "hang_worker.py"), str(folder), str(seconds), kind, str(rank)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, *script],
            env=environment() | place | {"RANK": str(one), "LOCAL_RANK": str(one)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for one in range(2)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], printed, time.monotonic() - began


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_report(kind: str, rank: int, folder: Path, seconds: float) -> str:
    """The one report of a toy run in which `rank` does `kind`."""
    statuses, printed, _ = run_toy(kind, rank, folder, seconds)
    assert statuses == [HUNG, HUNG], printed
    (file,) = (folder / "hang").iterdir()
    report = file.read_text()
    assert sum(report in text for text in printed) == 1  # told once
    assert re.search(rf"^to blame: rank {rank}\b", report, re.M), report
    late = float(re.search(r"has given no sign of life for ([0-9.]+) s", report).group(1))
    assert seconds <= late < seconds + SOON
    assert "hang_worker.py:" in report
    return report


def test_a_rank_that_sleeps_while_loading_is_named_with_its_sample(tmp_path):
    report = check_report("sleep", 1, tmp_path, 2.0)
    assert "phase load" in report
    assert "rank 1 loads: 'clip-7' in shards/shard-000000.tar" in report
    assert "rank 0 has in hand: clip-3" in report
    assert "in all_reduce" in report  # of rank 0
    assert " in fault" in report  # of rank 1


def test_a_slow_step_is_no_hang(tmp_path):
    statuses, printed, wall = run_toy("slow", -1, tmp_path, 1.0)  # 6 parts of 0.5 s a step
    assert statuses == [0, 0], printed
    assert wall > 6
    assert not (tmp_path / "hang").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "says"),
    [
        ("lock", 0, " in fault"),
        ("lock", 1, " in fault"),
        ("stop", 0, "stopped by a signal"),
        ("stop", 1, "stopped by a signal"),
        ("save", 1, "thread saver:"),
        ("mismatch", 0, " in recv"),
    ],
)
def test_other_ways_to_hang(tmp_path, kind, rank, says):
    assert says in check_report(kind, rank, tmp_path, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("read", r"rank 1 loads: 'train-000\d\d' in .*/train/shard-000000.tar"),
        ("forward", r"to blame: rank 1, .*module blocks\.0"),
        ("fsync", r"phase save for .*<- to blame"),
        ("evaluate", r"to blame: rank 1, .*phase evaluate"),
    ],
)
def test_the_trainer_hangs_and_where_is_told(shape_shards, tmp_path, kind, says):
    settings = ["steps=4", "checkpoint_every=2", "eval.probes=[]", "hang_seconds=5"]
    arguments = train_arguments(shape_shards, tmp_path / "run", *settings)
    process = start([str(ROOT / "tests" / "run" / "hang_train.py"), kind, *arguments[1:]], 2)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert f"exitcode: {HUNG}" in re.sub(r"exitcode *: *", "exitcode: ", printed), printed[-6000:]
    (report,) = (tmp_path / "run" / "hang").iterdir()
    assert re.search(says, report.read_text()), report.read_text()
    assert "stacks of rank 0" in report.read_text()
    if kind == "fsync":  # half of a checkpoint is in the way
        run(arguments, 2)


@pytest.mark.slow
def test_no_loader_process_outlives_a_run_that_hung(shape_shards, tmp_path):
    settings = ["steps=8", "data.workers=1", "eval.at_end=false", "hang_seconds=5"]
    arguments = train_arguments(shape_shards, tmp_path / "run", *settings)
    process = start([str(ROOT / "tests" / "run" / "hang_train.py"), "forward", *arguments[1:]], 2)
    seen: set[psutil.Process] = set()
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            seen |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.2)
    printed, _ = process.communicate()
    assert len(seen) > 4, printed
    assert not psutil.wait_procs(seen, timeout=60)[1]
    assert list((tmp_path / "run" / "hang").glob("*")), printed


@pytest.mark.slow
def test_training_gives_the_same_bits_watched_or_not(shape_shards, tmp_path):
    ends = []
    for seconds in (600, 0):
        folder = tmp_path / str(seconds)
        settings = ["steps=3", "model.drop_path=0.2", "eval.at_end=false", f"hang_seconds={seconds}"]
        run(train_arguments(shape_shards, folder, *settings))
        files = sorted((folder / "checkpoints" / "step-00000003").glob("*.safetensors"))
        ends.append([load_file(file) for file in files])
    for one, other in zip(*ends, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
