"""A sample that hangs, crashes or leaks costs itself; items come in order; nothing is left of what is killed."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data import worker_datasets as datasets
from tests.encoded import encode, pictures
from vlm.data import nursery
from vlm.data.messages import Packed, pair, receive, send
from vlm.data.video import decode
from vlm.data.worker_process import own_memory
from vlm.data.workers import Loaded
from vlm.types import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def loaded(dataset, items=range(12), workers=2, **options):
    return Loaded(dataset, items, workers, "data.workers", **options)


def reasons(dataset, workers=2, **options):
    """What was told of each sample, when everything has come in order."""
    loader = loaded(dataset, workers=workers, **options)
    told = {}
    for place, (found, content) in enumerate(loader):
        assert [sample for sample, _ in found] == [2 * place, 2 * place + 1]
        assert torch.equal(content, torch.full((40_000,), place, dtype=torch.int32))
        told |= {sample: reason for sample, reason in found if reason}
    assert place == 11
    return told, loader.counts


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sample_that_hangs_or_crashes_costs_itself_alone(workers):
    deeds = {0: "segfault", 5: "hang", 8: "abort", 9: "exit", 17: "killed", 23: "segfault"}
    told, counts = reasons(datasets.Samples(deeds), workers, sample_seconds=2.0)
    assert told == {
        0: "the process that loaded it died: SIGSEGV",
        5: "took more than 2 s to load",
        8: "the process that loaded it died: SIGABRT",
        9: "the process that loaded it died: exit code 3",
        17: "the process that loaded it died: SIGKILL, twice",
        23: "the process that loaded it died: SIGSEGV",
    }
    assert counts == {"samples": 7}


def test_a_process_that_someone_kills_costs_nothing(tmp_path):
    told, counts = reasons(datasets.Samples({5: "killed"}, str(tmp_path / "once")))
    assert (told, counts) == ({}, {"samples": 1})


def test_all_processes_killed_cost_nothing():
    loader = loaded(datasets.Slow(), range(30), workers=4)
    found = [next(loader) for _ in range(3)]
    for pid in pids_of(loader):  # all have started: 0, which one shows before, would be this process's group
        os.kill(pid, signal.SIGKILL)
    os.kill(nursery.nursery()._process.pid, signal.SIGKILL)
    found += loader
    assert [item for item, _ in found] == list(range(30))


def test_a_process_that_stood_still_with_the_others_is_not_blamed(monkeypatch):
    monkeypatch.setattr("vlm.data.workers._GRACE", 1.0)  # a busy machine may be slow to wake it
    loader = loaded(datasets.Slow(), range(8), workers=1, sample_seconds=1.0)
    first = next(loader)
    os.kill(first[1], signal.SIGSTOP)  # the whole job is suspended …
    time.sleep(1.5)
    os.kill(first[1], signal.SIGCONT)  # … and goes on
    assert [item for item, _ in loader] == list(range(1, 8))
    assert not loader.counts


@pytest.fixture(scope="module")
def birth() -> int:
    """Bytes that a process has when it has loaded next to nothing."""
    loader = loaded(datasets.Slow(), range(10), workers=1)
    return own_memory(next(loader)[1])


def test_a_sample_that_swallows_memory_is_ended(birth):
    told, counts = reasons(datasets.Samples({4: "swell"}), worker_memory=birth + (64 << 20))
    assert told.keys() == {4}
    took = re.fullmatch(r"took more than (\d+) MiB of memory to load", told[4])
    assert took
    assert int(took[1]) > 2 * birth / 2**20
    assert counts == {"samples": 1}


def test_a_process_that_leaks_is_replaced_between_items(birth):
    loader = loaded(datasets.Leaky(), range(40), workers=2, worker_memory=birth + (100 << 20))
    found = list(loader)
    assert [item for item, _ in found] == list(range(40))
    assert len({process for _, process in found}) >= 4
    assert loader.counts["renewed"] >= 4
    assert set(loader.counts) == {"renewed"}


def test_a_limit_below_what_a_process_takes_at_birth_is_refused():
    with pytest.raises(UserError, match=r"MiB of memory before it has loaded anything, more than the 8 MiB"):
        next(loaded(datasets.Samples({}), worker_memory=8 << 20))


@pytest.mark.parametrize("again", [False, True])
def test_a_decoder_that_fails_hands_over_or_costs_one_sample(again):
    """decord that raises hands over to PyAV at once; decord that hangs or crashes does so where PyAV is tried again."""
    clip = encode(pictures(12))
    deeds = {1: "raise", 3: "hang", 4: "segfault"}
    found = list(loaded(datasets.Clips(clip, deeds, again), range(8), sample_seconds=3.0))
    lost = {item: reason for item, (reason, _) in enumerate(found) if reason}
    died = "the process that loaded it died: SIGSEGV"
    assert lost == ({} if again else {3: "took more than 3 s to load", 4: died})
    expected = torch.from_numpy(decode(clip, [0, 7]))
    assert all(torch.equal(frames, expected) for reason, frames in found if not reason)


@pytest.mark.parametrize("workers", [1, 3])
def test_deaths_outside_samples_end_the_run_at_their_place(workers):
    found = []
    with pytest.raises(UserError) as caught:
        for item, _ in loaded(datasets.Outside({6: "killed"}), workers=workers):
            found.append(item)
    assert found == list(range(6))
    assert str(caught.value).startswith(
        "a process that loads data ended by itself (SIGKILL): most likely memory ran out"
    )
    assert f"data.workers={workers}" in str(caught.value)


def test_a_death_outside_samples_is_made_good(tmp_path):
    loader = loaded(datasets.Outside({6: "segfault"}, str(tmp_path / "once")))
    assert [item for item, _ in loader] == list(range(12))
    assert loader.counts == {"others": 1}


def test_deaths_at_birth_end_the_run():
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    loader = loaded(datasets.Unbearable({}), workers=3)
    with pytest.raises(UserError, match=r"ended by itself \(SIGSEGV\): most likely a decoder"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    del loader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "at most what the one clean process takes"  # noqa: PTH208


def test_a_dataset_that_does_not_listen_ends_the_run():
    with pytest.raises(UserError, match=r"ended by itself \(SIGSEGV\)"):
        list(loaded(datasets.Heedless({3: "segfault"})))


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_at_their_place(workers):
    loader = loaded(datasets.Raising({2: UserError("set it otherwise"), 4: KeyError("lost")}), range(6), workers)
    assert [next(loader), next(loader)] == [0, 1]
    with pytest.raises(UserError, match=r"^set it otherwise$"):
        next(loader)
    assert next(loader) == 3
    with pytest.raises(RuntimeError if workers else KeyError, match="lost") as caught:
        next(loader)
    if workers:
        assert "in __getitem__" in str(caught.value)
        assert "data.workers=2" in str(caught.value)
    assert [*loader] == [5]
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("dataset", [datasets.Raising({0: ValueError("x")}), datasets.Picky()])
def test_ending_early_ends_the_processes(dataset):
    loader = loaded(dataset, itertools_forever())
    pids = pids_of(loader)
    with pytest.raises((RuntimeError, UserError)):
        next(loader)
    loader.close()
    assert gone(pids)
    with pytest.raises(StopIteration):
        next(loader)


def itertools_forever():
    item = 0
    while True:
        yield item
        item += 1


def pids_of(loader) -> list[int]:
    """Of its processes, when all have started."""
    while not all(pids := [worker.slot.read().pid for worker in loader._crew.values()]):
        time.sleep(0.01)
    return pids


def gone(pids, seconds=60.0) -> bool:
    """Whether all these processes end soon (what nobody has waited for counts as ended)."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_a_loader_that_nobody_holds_ends_its_processes():
    loader = loaded(datasets.Samples({1: "hang"}), range(100))
    pids = pids_of(loader)
    del loader
    assert gone(pids)


def test_no_more_is_loaded_ahead_than_four_items_a_process():
    taken = []
    loader = loaded(datasets.Cheap(), (taken.append(i) or i for i in range(100)), workers=2)
    assert len(taken) == 8
    for place in range(10):
        assert next(loader)["item"] == place
        assert len(taken) == 8 + place
    assert [item["item"] for item in loader] == list(range(10, 100))


def test_at_work_names_samples():
    loader = loaded(datasets.Samples({1: "hang"}), range(8), workers=1)
    while not (at := loader.at_work()) or at[0][0] != "1.0":
        time.sleep(0.01)
    label, about, seconds = at[0]
    assert (label, about) == ("1.0", "sample 1 of the test")
    assert 0 <= seconds < 10


def test_ten_thousand_items_leave_nothing_behind():
    def state():
        lines = Path("/proc/self/status").read_text()
        maps = Path("/proc/self/maps").read_text()
        resident = int(re.search(r"RssAnon:\s+(\d+)", lines)[1]) / 1024
        return resident, len(os.listdir("/proc/self/fd")), maps.count("memfd:vlm-message")  # noqa: PTH208

    gc.collect()  # what tests before this one left holds no file that is closed meanwhile
    loader = loaded(datasets.Cheap(), range(10_000), workers=2)
    for place, item in enumerate(loader):
        assert item["item"] == place
        assert int(item["x"][0]) == place
        if place == 2000:
            before = state()
        if place == 9900:
            after = state()
    assert after[0] < before[0] + 8, "MiB"
    assert after[1] <= before[1]
    assert after[2] <= 12
    del item
    assert state()[1:] == (before[1] - 2 * 3, 0)


def test_items_are_of_writable_memory_of_their_own():
    items = list(loaded(datasets.Cheap(), range(8)))
    for item in items:
        item["x"][0] = -1
    assert [int(item["x"][1]) for item in items] == list(range(8))


def test_messages_keep_what_tensors_are():
    large = torch.randn(300, 2 * 301)
    value = {
        "large": large,
        "bfloat16": large.to(torch.bfloat16)[:, ::2],
        "bool": large > 0,
        "empty": torch.zeros(0, 4, dtype=torch.int16),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "transposed": large.T,
        "complex": torch.complex(large, large).conj(),
        "parameter": torch.nn.Parameter(large),
        "array": np.arange(90_000).reshape(300, 300)[:, ::3],
        "text": "ä" * 100_000,
    }
    here, there = pair()
    packed = Packed(value)
    for _ in range(2):  # the same to several
        send(here, ("note", 1), packed)
        message = receive(there, shared=False)
        assert message.note == ("note", 1)
        back = message.load()
        for name, was in value.items():
            now = back[name]
            assert type(now) is type(was)
            if isinstance(was, torch.Tensor):
                assert (now.dtype, now.shape, now.requires_grad) == (was.dtype, was.shape, was.requires_grad)
                assert torch.equal(now, was)
                with torch.no_grad():
                    now.reshape(-1)[:1] = 0
            else:
                assert np.array_equal(now, was)


def test_messages_of_any_length():
    here, there = pair()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for length in (0, 10, 16 << 10, 47 << 10, 49 << 10, 1 << 20):
        for size in (1, 20_000, 1 << 20):
            note = ("n" * length, {"reason": length})
            send(here, note, Packed([torch.full((size,), 7), "x" * size]))
            message = receive(there)
            assert message.note == note
            tensor, text = message.load()
            assert torch.equal(tensor, torch.full((size,), 7))
            assert text == "x" * size
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_processes_see_folder_and_variables_of_now(tmp_path, monkeypatch):
    assert next(loaded(datasets.Surroundings()))[1] is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_TEST_OF_WORKERS", "x" * 100_000)
    assert next(loaded(datasets.Surroundings())) == (str(tmp_path), "x" * 100_000)


# Other processes -----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from tests.data import worker_datasets as datasets
from tests.encoded import encode, pictures
from vlm.data.workers import Loaded

class Mine(datasets.{base}):
    pass

if __name__ == "__main__":
    loader = Loaded(Mine({arguments}), range(100_000), 2, "data.workers")
    print(next(loader)[0], flush=True)
    crew = list(loader._crew.values())
    while not all(worker.slot.read().pid for worker in crew):
        time.sleep(0.01)
    print(*[worker.slot.read().pid for worker in crew], crew[0].nursery._process.pid, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def trainer(tmp_path):
    """Starts SCRIPT with a dataset; ended with the test, whatever comes of it."""
    started = []

    def start(base, arguments, process_group=None, **environment):
        script = tmp_path / "trainer.py"
        script.write_text(SCRIPT.format(base=base, arguments=arguments))
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
        started.append(
            subprocess.Popen([sys.executable, "-W", "error::ResourceWarning", script], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=environment, process_group=process_group)
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names_held(pids) -> set[str]:
    """What these processes hold that has a name in memory or a socket's: others could find it, and it could stay."""
    unix = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        columns = line.split()
        unix[columns[6]] = columns[7] if len(columns) > 7 else ""
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except FileNotFoundError:  # closed meanwhile: a message on its way
                continue
            if target.startswith("socket:"):
                found.add(unix.get(target[8:-1], ""))
            elif target.startswith("/dev/shm"):
                found.add(target)
        found |= set(re.findall(r"/dev/shm/.*", Path(f"/proc/{pid}/maps").read_text()))
    return found - {""}


def test_nothing_is_left_of_a_trainer_that_is_killed(trainer, tmp_path):
    (tmp_path / "tmp").mkdir()
    process = trainer("Samples", "{3: 'hang'}", TMPDIR=str(tmp_path / "tmp"))
    assert process.stdout.readline().strip() == "[(0, None), (1, None)]"
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    assert names_held([process.pid, *pids]) == set()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(pids), "the one that hangs, the one that waits, and the one from which they came"
    assert process.stderr.read() == ""
    assert list((tmp_path / "tmp").rglob("*")) == []


def test_ctrl_c_is_told_once(trainer):
    process = trainer("Slow", "", process_group=0)
    process.stdout.readline()
    pids = [int(pid) for pid in process.stdout.readline().split()]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    errors = process.communicate()[1]
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert gone(pids)


def test_a_script_that_is_not_guarded_is_told_so():
    """Its classes are looked up by importing it, which would begin to load again."""
    with pytest.raises(UserError, match='must stand under `if __name__ == "__main__":`'):
        next(loaded(datasets.Nested()))
