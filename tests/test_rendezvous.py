"""Where processes meet: lists of hosts, ports, ways, and what is said when nothing answers."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from vlm import rendezvous
from vlm.errors import NoRendezvous, UserError
from vlm.rendezvous import PORTS, first_address, hashed_port, hostnames, limit, reach


@pytest.mark.parametrize(
    ("nodelist", "want"),
    [
        ("a", "a"),
        ("a1,b2", "a1 b2"),
        ("a[1-3]", "a1 a2 a3"),
        ("a[01-03,07],b2-[1-2]", "a01 a02 a03 a07 b2-1 b2-2"),
        ("gpu[008-011]", "gpu008 gpu009 gpu010 gpu011"),
        ("n[9-11]", "n9 n10 n11"),
        ("r[1-2]n[3-4]", "r1n3 r1n4 r2n3 r2n4"),
        ("cn-[2,5]i.site.org,x", "cn-2i.site.org cn-5i.site.org x"),
    ],
)
def test_lists_of_hosts(nodelist: str, want: str) -> None:
    assert list(hostnames(nodelist)) == want.split()


@pytest.mark.parametrize(
    "nodelist", ["", "a[1-3", "a1-3]", "a[3-1]", "a[]", "a[x]", "a[1-]", "a,,b", "a b", "a[1-99999999]", "a/../b", "[1"]
)
def test_what_is_no_list_of_hosts(nodelist: str) -> None:
    with pytest.raises(UserError, match="node list"):
        list(hostnames(nodelist))


def test_the_first_of_very_many_is_found_at_once() -> None:
    started = time.process_time()
    assert next(hostnames("n[000001-900000]")) == "n000001"
    assert time.process_time() - started < 2


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that knows node n7 by another address, and writes down what it was asked."""
    asked = tmp_path / "asked"
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\n[ "$3" = n7.invalid ] || exit 1\n'
        "echo NodeName=n7 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=other State=IDLE\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return asked


def test_the_address_of_a_step(scontrol: Path) -> None:
    step = {"SLURM_JOB_NODELIST": "x[1-9]", "SLURM_LAUNCH_NODE_IPADDR": "203.0.113.9"}
    assert first_address({**step, "SLURM_STEP_NODELIST": "localhost,x2"}) == "localhost", "the step's, not the job's"
    assert not scontrol.exists(), "a name that resolves is asked of nobody"
    assert first_address({**step, "SLURM_STEP_NODELIST": "n[7-8].invalid"}) == "10.1.2.3"
    assert first_address({"SLURM_JOB_NODELIST": "n9.invalid"}) == "n9.invalid", "Slurm does not know it either"
    assert scontrol.read_text().splitlines() == ["show node n7.invalid -o", "show node n9.invalid -o"]
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST is not set"):
        first_address({"SLURM_LAUNCH_NODE_IPADDR": "203.0.113.9"})


def test_ports_follow_from_job_restart_and_step() -> None:
    def port(job: int, restart: int = 0, step: int = 0) -> int:
        return hashed_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart), "SLURM_STEP_ID": str(step)})

    assert port(7) == port(7) == hashed_port({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    assert len({port(7), port(7, restart=1), port(7, step=1), port(8)}) == 4
    ports = [port(job) for job in range(3000)]
    assert all(number in PORTS for number in ports)
    assert len(set(ports)) > 2650, "as many as of 3,000 drawn from 15,000 (2,719), about"
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(PORTS) < max(ephemeral, 32768)


@pytest.mark.parametrize(("given", "size", "want"), [(None, 2, 60), (None, 4096, 316), ("7.5", 4096, 7.5)])
def test_how_long_processes_wait(given: str | None, size: int, want: float) -> None:
    assert limit(size, {} if given is None else {"VLM_RENDEZVOUS_SECONDS": given}) == want


@pytest.mark.parametrize("given", ["", "0", "-1", "nan", "inf", "a minute"])
def test_a_limit_that_is_none(given: str) -> None:
    with pytest.raises(UserError, match=r"VLM_RENDEZVOUS_SECONDS=.*a number above 0"):
        limit(2, {"VLM_RENDEZVOUS_SECONDS": given})


def test_a_connection_tells_its_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        way = reach("127.0.0.1", server.getsockname()[1], 5, "rank 1")
    assert way == ("127.0.0.1", "127.0.0.1")
    assert rendezvous.is_loopback(way.own)
    assert rendezvous.own_addresses()[way.own] == "lo"
    assert rendezvous.way_to("127.0.0.1") == "127.0.0.1"


def test_who_comes_late_is_waited_for() -> None:
    port = rendezvous.free_port()
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        late.bind(("127.0.0.1", port))  # refuses until it listens
        timer = threading.Timer(1.0, late.listen)
        timer.start()
        assert reach("127.0.0.1", port, 20, "rank 1").far == "127.0.0.1"
        timer.join()


def told(address: str, port: int, seconds: float = 1.0) -> str:
    started = time.monotonic()
    with pytest.raises(NoRendezvous) as error:
        reach(address, port, seconds, "rank 3 on host b, started by slurm")
    assert time.monotonic() - started < seconds + 30  # a name server may be slow to say that it knows no such name
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"rank 3 on host b, started by slurm: cannot reach rank 0 at MASTER_ADDR={address} ")
    assert "VLM_RENDEZVOUS_SECONDS" in message
    return message


def test_nothing_listens() -> None:
    port = rendezvous.free_port()
    message = told("127.0.0.1", port)
    assert f"MASTER_PORT={port} through lo (127.0.0.1): connection refused, nothing listens there" in message
    assert "Mend: look for the message of rank 0" in message
    tries = int(message.split("(")[2].split()[0])
    assert 2 <= tries <= 12


def test_nobody_answers() -> None:
    """A server whose queue is full lets packets drop, as a firewall does."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = []
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(server.getsockname())
        message = told("127.0.0.1", server.getsockname()[1])
        for each in waiting:
            each.close()
    assert ": no answer (" in message
    assert "a firewall, or an address of another network" in message


def test_a_name_that_means_nothing() -> None:
    message = told("node7.invalid", 1234)
    assert "MASTER_PORT=1234: this name does not resolve" in message
    assert "export MASTER_ADDR=ADDRESS of the host of rank 0" in message
