"""Processes meet, or say in one line why not: with real processes, on hosts that are really apart where it matters."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.hosts import Host
from vlm import meeting, rendezvous
from vlm.errors import HUNG, NoRendezvous, UserError
from vlm.meeting import _choose_interface, _ranges, open_meeting

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import os, sys, time
from vlm.distributed import join, leave, sum_over_ranks
from vlm.errors import HUNG, NoRendezvous
from vlm.run.command import _tell
if "TOGETHER" in os.environ:
    import deepspeed  # what takes long to import is there, so that all come within the same moment
    folder, count = os.environ["TOGETHER"].split()
    open(f"{folder}/came.{os.environ['RANK']}", "x").close()
    while len(os.listdir(folder)) < int(count):
        time.sleep(0.01)
try:
    world = join()
except NoRendezvous as error:
    _tell(f"error: {error}")
    sys.exit(HUNG)
told = [os.environ.get(f"{name}_SOCKET_IFNAME") for name in ("GLOO", "NCCL")]
print("RESULT", world.rank, sum_over_ranks([world.rank + 1.0], world.device), *told, flush=True)
leave()
"""


def place(rank: int, size: int, address: str, port: int, **more: str) -> dict[str, str]:
    """The environment of a process as launchers make it."""
    outer = ("SLURM_", "OMPI_", "PMI", "GLOO_", "NCCL_", "TORCHELASTIC_", "VLM_RENDEZVOUS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    own = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": address}
    own |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return {**environ, **own, **more}


def start(environ: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def outcome(process: subprocess.Popen[str], status: int) -> list[str]:
    """The lines that a process wrote."""
    try:
        printed, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == status, printed
    return printed.splitlines()


def test_ranks_in_short() -> None:
    assert _ranges([0]) == "0"
    assert _ranges([5, 1, 2, 0]) == "0-2, 5"
    assert _ranges([*range(0, 60, 2)]) == "0, 2, 4, 6, 8, 10, 12, 14, 16, 18 and 20 more"


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "one"), ("WORLD_SIZE", "-2"), ("MASTER_PORT", "70000"), ("MASTER_PORT", "http")]
)
def test_numbers_that_are_none(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each, number in place(0, 2, "127.0.0.1", 1234).items():
        monkeypatch.setenv(each, number)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value} is set, but must be a whole number"):
        open_meeting("deepspeed")


def test_what_the_user_says_of_interfaces_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place(1, 2, "127.0.0.1", 1234).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "x")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")  # so that what is set is undone
    found = {"first": "another network", "other": None}
    _choose_interface(open_meeting("slurm"), {"network": "this", "address": "127.0.0.1"}, found)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo", "exactly this one, in NCCL's words"


def test_one_who_does_not_come_is_named(tmp_path: Path) -> None:
    """Two of three come: one line, by rank 0, on time; and none of what torch's sockets say."""
    port = rendezvous.free_port()
    more = {"VLM_RENDEZVOUS_SECONDS": "3", "TOGETHER": f"{tmp_path} 2"}
    both = [start(place(rank, 3, "127.0.0.1", port, **more)) for rank in (0, 2)]
    line, last = (outcome(process, HUNG) for process in both)
    assert len(line) == len(last) == 1
    assert line[0].startswith(f"error: rank 0 on host {socket.gethostname()}, started by deepspeed: of 3 processes, ")
    assert f"rank 1 did not come to MASTER_ADDR=127.0.0.1 MASTER_PORT={port} within 3 s" in line[0]
    assert f"(came: {socket.gethostname()}: 0, 2). Mend:" in line[0]
    assert last[0].startswith("rank 2: error: rank 2 on host")
    assert "rank 1 did not come" in last[0]


@pytest.mark.slow
def test_a_port_that_is_taken_and_one_with_a_stranger() -> None:
    with socket.create_server(("", 0)) as server:  # listens, and says nothing to whoever comes
        port = server.getsockname()[1]
        both = [start(place(rank, 2, "127.0.0.1", port, VLM_RENDEZVOUS_SECONDS="3")) for rank in (0, 1)]
        (line,), (other,) = (outcome(process, HUNG) for process in both)
    assert f"MASTER_PORT={port} is taken on this host by process {os.getpid()} (" in line
    assert "Mend: end what holds it, or choose another port: deepspeed --master_port N" in line
    assert "something answers at MASTER_ADDR=127.0.0.1" in other
    assert "but it is not rank 0" in other


@pytest.mark.slow
def test_a_first_sum_that_fails_is_told_by_who_has_the_fault_and_who_waits() -> None:
    port = rendezvous.free_port()
    limit = {"VLM_RENDEZVOUS_SECONDS": "10"}
    both = [start(place(0, 2, "127.0.0.1", port, **limit))]
    both.append(start(place(1, 2, "127.0.0.1", port, **limit, GLOO_SOCKET_IFNAME="nosuch0")))
    waits, fault = (outcome(process, HUNG)[-1] for process in both)
    assert "first sum over them failed" in fault
    assert "by interface GLOO_SOCKET_IFNAME=nosuch0: " in fault
    assert "Unable to find address for: nosuch0" in fault
    assert "by interface that the library chose: rank 0-1 did not connect with the others" in waits


def test_nodes_of_a_step_that_nobody_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks on each of three nodes; one of b1 and all of b3 stay away."""
    monkeypatch.setenv("SLURM_STEP_NODELIST", "b[1-3]")
    monkeypatch.setenv("SLURMD_NODENAME", "b1")
    store = dist.HashStore()
    for rank, node in ((2, "b1"), (3, "b2"), (4, "b2"), (5, "b2")):
        about = {"host": "x", "network": node, "address": "10.0.0.9", "node": node}
        store.set(f"here/{rank}", json.dumps(about))
    first = meeting.Meeting(0, 9, "127.0.0.1", 1, 0.5, "slurm", False)
    with pytest.raises(NoRendezvous) as told:
        meeting._roll_call(first, store, None)
    assert "of 9 processes, rank 1, 6-8 did not come to" in str(told.value)
    assert "within 0.5 s (came: b1: 0, 2; b2: 3-5); nobody from b3. Mend:" in str(told.value)
    with pytest.raises(NoRendezvous, match="nobody from b3"):  # the others are told the same
        meeting._roll_call(replace(first, rank=2), store, rendezvous.Way("10.0.0.9", "10.0.0.1"))


def test_a_wrong_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network that changes numbers would make it."""
    place_of = meeting.Meeting(0, 2, "127.0.0.1", 1, 5.0, "torchrun", False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # another test may have joined in this process
    monkeypatch.setattr(meeting, "_open_store", lambda *_: (dist.HashStore(), None))
    monkeypatch.setattr(meeting, "_roll_call", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "all_reduce", lambda ones: ones.add_(7))
    with pytest.raises(UserError, match=r"2 ones sum to 8\.0"):
        meeting.join_group(place_of, "gloo", torch.device("cpu"), timedelta(seconds=5))


def on_hosts(both: list[Host], *environs: dict[str, str], status: int = 0) -> list[list[str]]:
    started = [host.start([sys.executable, "-c", SCRIPT], env, ROOT) for host, env in zip(both, environs)]
    return [outcome(process, status) for process in started]


@pytest.mark.slow
def test_hosts_whose_own_name_is_a_loopback_address(two_hosts: list[Host]) -> None:
    """The first host's name is 127.0.1.1 to itself: the interface is the one that leads to the others, on both."""
    name = two_hosts[0].name
    first, second = on_hosts(two_hosts, *(place(rank, 2, name, 23456) for rank in (0, 1)))
    assert first == ["RESULT 0 [3.0] lan0 =lan0"]
    assert second == ["RESULT 1 [3.0] lan0 =lan0"]


@pytest.mark.slow
def test_interfaces_that_lead_nowhere_and_an_address_of_the_wrong_host(two_hosts: list[Host]) -> None:
    more = {"VLM_RENDEZVOUS_SECONDS": "5", "GLOO_SOCKET_IFNAME": "lo"}
    environs = [place(rank, 2, two_hosts[0].name, 23457, **more) for rank in (0, 1)]
    for lines in on_hosts(two_hosts, *environs, status=HUNG):
        assert "first sum over them failed" in lines[-1]
        assert "GLOO_SOCKET_IFNAME=lo" in lines[-1]
    more = {"VLM_RENDEZVOUS_SECONDS": "5"}
    environs = [place(rank, 2, two_hosts[1].address, 23458, **more) for rank in (0, 1)]
    (first,), (second,) = on_hosts(two_hosts, *environs, status=HUNG)
    assert f"MASTER_ADDR is no address of the host of rank 0, which has {two_hosts[0].address}" in first
    assert f"through lan0 ({two_hosts[1].address}): connection refused" in second
