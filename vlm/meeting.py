"""Processes meet before any weight is loaded: rank 0 is reached, all have come, and one number is summed over them.

What goes wrong with that is told in one line that names rank, host, address, port and interface, what was tried, and
the mend, within a limit of `rendezvous.limit` seconds; a collective that hangs would tell after half an hour, and not
which host it is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
import torch.distributed as dist

from vlm import rendezvous
from vlm.errors import HUNG, NoRendezvous, UserError

GRACE_SECONDS = 5.0
"""How much longer others than rank 0 wait with what they have to say: its line is enough."""
_INTERFACES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}  # what stands before the name: NCCL's for "exactly"


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and for how long processes meet, as the environment of this one says."""

    rank: int
    size: int
    address: str
    port: int
    seconds: float
    starter: str
    is_served: bool  # torchrun's agent keeps the store; else rank 0 does

    @property
    def who(self) -> str:
        return f"rank {self.rank} on host {socket.gethostname()}, started by {self.starter}"

    def client(self) -> dist.TCPStore:
        """A connection of its own to the store."""
        return dist.TCPStore(
            "127.0.0.1" if self.rank == 0 and not self.is_served else self.address,
            self.port,
            self.size,
            False,
            timedelta(seconds=self.seconds),
            wait_for_workers=False,
        )


def open_meeting(starter: str) -> Meeting:
    """The meeting that `vlm.starters.find_starter` found the place of.

    Raises:
        UserError: a variable is no number.
    """
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ[name]
        if not text.isdecimal() or (name == "MASTER_PORT" and int(text) > 65535):
            raise UserError(f"{name}={text} is set, but must be a whole number{' up to 65535' * (name[0] == 'M')}")
        numbers[name] = int(text)
    return Meeting(
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        address=os.environ["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
        seconds=rendezvous.limit(numbers["WORLD_SIZE"]),
        starter=starter,
        is_served=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def join_group(meeting: Meeting, backend: str, device: torch.device, timeout: timedelta) -> None:
    """Make this process one of the group, when rank 0 is reached, all ranks have come and a first sum is right.

    Args:
        timeout: of the group's collectives from then on.
    Raises:
        NoRendezvous: one line with the reason. Where a library hangs, the line is written and the process ends with
            status 86 (vlm.errors.HUNG).
    """
    if dist.is_initialized():  # it is one already
        return
    if meeting.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    with _quiet() as stderr:
        store, way = _open_store(meeting, stderr)
        _roll_call(meeting, store, way)
    with _limited(meeting, lambda: _failed_sum(meeting, _laggards(meeting)), sys.stderr):
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=meeting.rank,
                world_size=meeting.size,
                timeout=timeout,
            )
            store.set(f"joined/{meeting.rank}", "")
            ones = torch.ones(1, device=device)
            dist.all_reduce(ones)
            total = ones.item()
        except RuntimeError as error:  # dist.DistError and what gloo raises are both
            raise NoRendezvous(_failed_sum(meeting, " ".join(str(error).split())[:300])) from error
    if total != meeting.size:
        raise NoRendezvous(_failed_sum(meeting, f"{meeting.size} ones sum to {total}"))
    store.set_timeout(timeout)


def _open_store(meeting: Meeting, stderr: TextIO) -> tuple[dist.Store, rendezvous.Way | None]:
    """The store that all ranks share, and the connection by which this one reached it (None: it keeps the store).

    Raises:
        NoRendezvous: nothing answers, or another program does, or the port of rank 0 is taken.
    """
    if meeting.rank == 0 and not meeting.is_served:
        return _serve(meeting), None
    way = rendezvous.reach(meeting.address, meeting.port, meeting.seconds, meeting.who)
    try:
        with _limited(meeting, lambda: _stranger(meeting, "no answer that a store gives"), stderr):
            return meeting.client(), way
    except RuntimeError as error:
        raise NoRendezvous(_stranger(meeting, _first_line(error))) from error


def _stranger(meeting: Meeting, reason: str) -> str:
    return (
        f"{meeting.who}: something answers at MASTER_ADDR={meeting.address} MASTER_PORT={meeting.port}, but it is not "
        f"rank 0 ({reason}). Mend: export MASTER_PORT=N of a port that is free on the host of rank 0, or "
        "MASTER_ADDR=ADDRESS of that host"
    )


def _serve(meeting: Meeting) -> dist.Store:
    """Rank 0 keeps the store. It listens at all addresses of this host, and is itself a client by 127.0.0.1: what
    MASTER_ADDR says to other hosts need not mean anything here."""
    limit = timedelta(seconds=meeting.seconds)
    try:
        return dist.TCPStore(
            "127.0.0.1", meeting.port, meeting.size, True, limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        taken = "EADDRINUSE" in str(error)
        state = f"is taken on this host{_holder(meeting.port)}" if taken else f"cannot be used ({_first_line(error)})"
        raise NoRendezvous(
            f"{meeting.who}: MASTER_PORT={meeting.port} {state}. Mend: end what holds it, or choose another port: "
            f"{_other_port(meeting.starter)}"
        ) from error


def _other_port(starter: str) -> str:
    return {
        "deepspeed": "deepspeed --master_port N",
        "torchrun": "torchrun --master_port N",
        "slurm": "submit again (it follows from the number of the job and its restarts), or export MASTER_PORT=N",
    }.get(starter, "export MASTER_PORT=N")


def _holder(port: int) -> str:
    """ " by process N (name)", where the system tells."""
    with contextlib.suppress(psutil.Error, OSError):
        for item in psutil.net_connections("tcp"):
            if item.status == psutil.CONN_LISTEN and item.laddr.port == port and item.pid:
                return f" by process {item.pid} ({psutil.Process(item.pid).name()})"
    return ""


def _roll_call(meeting: Meeting, store: dist.Store, way: rendezvous.Way | None) -> None:
    """Wait until all have come; then, on several hosts, fix the interface of this one that leads to the others.

    Raises:
        NoRendezvous: on every rank that came; which did not.
    """
    outward = way if way and not rendezvous.is_loopback(way.own) else None
    about = {
        "host": socket.gethostname(),
        "network": rendezvous.network(),
        "address": outward and outward.own,
        "node": os.environ.get("SLURMD_NODENAME"),
    }
    store.set(f"here/{meeting.rank}", json.dumps(about))
    if meeting.rank == 0:
        found = _call(meeting, store)
        store.set("called", json.dumps(found))
    else:
        try:
            store.wait(["called"], timedelta(seconds=meeting.seconds + GRACE_SECONDS))
            found = json.loads(store.get("called"))
        except RuntimeError as error:
            raise NoRendezvous(
                f"{meeting.who}: reached MASTER_ADDR={meeting.address} MASTER_PORT={meeting.port}, but rank 0 did not "
                f"come there within {meeting.seconds:g} s. Mend: look for the message of rank 0 or of its host; "
                f"{rendezvous.LIMIT}=N waits longer"
            ) from error
    if found["missing"]:
        _hear(meeting, store, found)
        raise NoRendezvous(_absent(meeting, found))
    if found["networks"] > 1:
        _choose_interface(meeting, about, found)


def _call(meeting: Meeting, store: dist.Store) -> dict[str, Any]:
    """Rank 0: who came within the limit, and what others need to know of them."""
    names = [f"here/{rank}" for rank in range(meeting.size)]
    missing: list[int] = []
    try:
        store.wait(names, timedelta(seconds=meeting.seconds))
    except RuntimeError:
        missing = [rank for rank, name in enumerate(names) if not store.check([name])]
    came = [rank for rank in range(meeting.size) if rank not in set(missing)]
    told = {rank: json.loads(text) for rank, text in zip(came, store.multi_get([names[rank] for rank in came]))}
    hosts = defaultdict(list)
    for rank, about in told.items():
        hosts[about["node"] or about["host"]].append(rank)
    first = told[0]["network"] if 0 in told else None
    others = [about["address"] for about in told.values() if about["network"] != first and about["address"]]
    return {
        "missing": missing,
        "hosts": hosts,
        "networks": len({about["network"] for about in told.values()}),
        "first": first,
        "silent": _silent_nodes(hosts) if missing else [],
        "doubt": _doubt(meeting) if missing and not meeting.is_served else "",
        "other": others[0] if others else None,
    }


def _hear(meeting: Meeting, store: dist.Store, found: dict[str, Any]) -> None:
    """Rank 0, whose end is the store's, waits until all who came know who did not; else some would not be told."""
    with contextlib.suppress(RuntimeError):
        if meeting.rank:
            store.set(f"heard/{meeting.rank}", "")
        elif not meeting.is_served:
            others = [f"heard/{rank}" for ranks in found["hosts"].values() for rank in ranks if rank]
            store.wait(others or ["called"], timedelta(seconds=min(meeting.seconds, GRACE_SECONDS)))


def _absent(meeting: Meeting, found: dict[str, Any]) -> str:
    came = "; ".join(f"{host}: {_ranges(ranks)}" for host, ranks in found["hosts"].items())
    silent = f"; nobody from {', '.join(found['silent'])}" if found["silent"] else ""
    return (
        f"{meeting.who}: of {meeting.size} processes, rank {_ranges(found['missing'])} did not come to "
        f"MASTER_ADDR={meeting.address} MASTER_PORT={meeting.port} within {meeting.seconds:g} s (came: {came})"
        f"{silent}{found['doubt']}. Mend: look for their own messages, and at hosts that are not named; all must be "
        f"started with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT; {rendezvous.LIMIT}=N waits longer"
    )


def _silent_nodes(came: Container[str]) -> list[str]:
    """Nodes of this Slurm step that no process came from; the first ten."""
    nodelist = os.environ.get("SLURM_STEP_NODELIST")
    silent = (node for node in rendezvous.hostnames(nodelist) if node not in came) if nodelist else ()
    return list(itertools.islice(silent, 10))


def _doubt(meeting: Meeting) -> str:
    """Rank 0: what is odd about its address, if anything."""
    own = rendezvous.own_addresses()
    if rendezvous.way_to(meeting.address) in rendezvous.addresses_of(meeting.address):
        return ""
    told = ", ".join(address for address in own if not rendezvous.is_loopback(address)) or "127.0.0.1 alone"
    return f"; MASTER_ADDR is no address of the host of rank 0, which has {told}"


def _ranges(ranks: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5; what is more than ten of these is cut short."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    told = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    return ", ".join(told[:10]) + (f" and {len(told) - 10} more" if len(told) > 10 else "")


def _choose_interface(meeting: Meeting, about: dict[str, Any], found: dict[str, Any]) -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, unless the user did, to the interface of this host that leads to
    the others. Without it, gloo takes what the host's own name resolves to, which may be 127.0.1.1."""
    if about["network"] == found["first"]:
        own = rendezvous.way_to(meeting.address)
        if own is None or rendezvous.is_loopback(own):
            own = found["other"] and rendezvous.way_to(found["other"])
    else:
        own = about["address"]
    interface = rendezvous.own_addresses().get(own or "")
    if interface is not None:
        for name, mark in _INTERFACES.items():
            os.environ.setdefault(name, mark + interface)


@contextlib.contextmanager
def _quiet() -> Iterator[TextIO]:
    """Drop what torch's sockets write to stderr: dozens of lines a failure, in which the one that tells would drown.
    Gives the real stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with os.fdopen(kept, "w", closefd=False) as stderr, Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield stderr
        finally:
            os.dup2(kept, 2)
    os.close(kept)


@contextlib.contextmanager
def _limited(meeting: Meeting, line: Callable[[], str], stderr: TextIO) -> Iterator[None]:
    """End this process, with a line that says why, where what is inside does not end within the limit: neither torch's
    store, nor gloo, nor NCCL can be called back from connecting."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(meeting.seconds + (GRACE_SECONDS if meeting.rank else 0.0)):
            stderr.write(f"error: {line()}\n")
            stderr.flush()
            os._exit(HUNG)

    guard = threading.Thread(target=watch, daemon=True)
    guard.start()
    try:
        yield
    finally:
        done.set()
        guard.join()


def _laggards(meeting: Meeting) -> str:
    """Which ranks hang in connecting with one another, as the store tells."""
    with contextlib.suppress(RuntimeError):
        store = meeting.client()  # the other is in use by what hangs
        if absent := [rank for rank in range(meeting.size) if not store.check([f"joined/{rank}"])]:
            return f"rank {_ranges(absent)} did not connect with the others"
    return "no answer"


def _failed_sum(meeting: Meeting, reason: str) -> str:
    used = {name: os.environ[name] for name in _INTERFACES if name in os.environ}
    return (
        f"{meeting.who}: reached MASTER_ADDR={meeting.address} MASTER_PORT={meeting.port}, and all {meeting.size} "
        f"processes came, but a first sum over them failed after at most {meeting.seconds:g} s, by interface "
        f"{' '.join(f'{name}={value}' for name, value in used.items()) or 'that the library chose'}: {reason}. "
        f"Mend: open the ports between the hosts, or export {' and '.join(_INTERFACES)}=NAME of an interface that "
        f"leads from each to all others (ip addr); {rendezvous.LIMIT}=N waits longer"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
