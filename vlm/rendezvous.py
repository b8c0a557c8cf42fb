"""Where processes meet: the first host of a Slurm step, a port that follows from its number, the network interface that
leads there, and whether anything answers. Plain sockets; no torch.

Slurm's SLURM_LAUNCH_NODE_IPADDR is never read: it is the host where srun was typed, which may be none of the step's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from vlm.errors import NoRendezvous, UserError

LIMIT = "VLM_RENDEZVOUS_SECONDS"
PORTS = range(15000, 30000)
"""Ports that jobs meet at: below those that systems give away to outgoing connections."""
_NAME_SECONDS = 10.0  # a name server may be slow to answer; a name that is unknown stays unknown


def limit(size: int, environ: Mapping[str, str] = os.environ) -> float:
    """Seconds that processes wait for one another before any weight is loaded: VLM_RENDEZVOUS_SECONDS, else 60 and
    one more for every 16 processes (thousands that import from one file system do not start at once)."""
    given = environ.get(LIMIT)
    if given is None:
        return 60.0 + size // 16
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:  # neither is true of nan
        raise UserError(f"{LIMIT}={given}: how many seconds processes wait for one another; a number above 0, like 120")
    return seconds


def hostnames(nodelist: str) -> Iterator[str]:
    """The hosts of a Slurm node list such as `a[01-03,07],b2-[1-2]`, in its order.

    Raises:
        UserError: it is no such list.
    """
    one = r"(?:[^,\[\]\s]|\[[^\[\]]*\])+"
    if not re.fullmatch(f"{one}(?:,{one})*", nodelist):
        raise UserError(f"node list {nodelist!r} is none of Slurm's, which read a[01-03,07],b: where did it come from?")
    for item in re.findall(one, nodelist):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # text, inside, text, inside, text
        choices = [_numbers(part, nodelist) if place % 2 else [part] for place, part in enumerate(parts)]
        for chosen in itertools.product(*choices):
            name = "".join(chosen)
            if not re.fullmatch(r"[\w.:-]+", name):
                raise UserError(f"node list {nodelist!r}: {name!r} is no host; such lists read a[01-03,07],b")
            yield name


def _numbers(inside: str, nodelist: str) -> list[str]:
    """`01-03,07` -> 01 02 03 07."""
    found = []
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not int(first) <= int(last) < int(first) + 10**6:
            raise UserError(f"node list {nodelist!r}: {part!r} is no range of numbers such as 01-03")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def first_address(environ: Mapping[str, str] = os.environ) -> str:
    """Address of the first host of this Slurm step: its name where that resolves, else what Slurm itself calls it by.

    Raises:
        UserError: Slurm gave no list of hosts.
    """
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise UserError(
            "started by srun, but SLURM_STEP_NODELIST is not set, so the first host is unknown: export "
            "MASTER_ADDR=ADDRESS of the host of task 0 before srun"
        )
    name = next(hostnames(nodelist))
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        return _node_address(name) or name


def _node_address(name: str) -> str | None:
    """NodeAddr of a node, as its Slurm tells it; None where it cannot be asked."""
    try:
        asked = subprocess.run(
            ["scontrol", "show", "node", name, "-o"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", asked.stdout)
    return found[1] if found else None


def hashed_port(environ: Mapping[str, str] = os.environ) -> int:
    """A port that all tasks of a Slurm step find alike: from the numbers of job, restart and step, so that two jobs of
    a host do not meet, and a job that is requeued takes another than the one that was left busy."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    text = "/".join(environ.get(name, "0") for name in names)
    return PORTS[zlib.crc32(text.encode()) % len(PORTS)]


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this host that nothing uses."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def own_addresses() -> dict[str, str]:
    """{address: interface} of this host."""
    found: dict[str, str] = {}
    for interface, addresses in psutil.net_if_addrs().items():
        for item in addresses:
            if item.family in (socket.AF_INET, socket.AF_INET6):
                found.setdefault(item.address.partition("%")[0], interface)
    return found


def is_loopback(address: str) -> bool:
    """Whether an address leads to the host itself, whichever that is."""
    return address == "::1" or address.removeprefix("::ffff:").startswith("127.")


def network() -> str:
    """Tells hosts apart by what matters here: two processes with the same answer reach each other by 127.0.0.1."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def addresses_of(name: str) -> list[str]:
    """What a name, or an address, stands for; empty: it does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [str(where[0]).partition("%")[0] for *_, where in found]


def way_to(name: str) -> str | None:
    """The address of this host from which packets to another leave; None: no way leads there. Nothing is sent."""
    for address in addresses_of(name):
        with contextlib.suppress(OSError):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))
                return str(probe.getsockname()[0]).partition("%")[0]
    return None


class Way(NamedTuple):
    """A connection that was made: the addresses of both its ends."""

    own: str
    far: str


def reach(address: str, port: int, seconds: float, who: str) -> Way:
    """Connect to `address`:`port`, again and again until it succeeds or `seconds` are over.

    Args:
        who: whose message it is ("rank 3 on host b, started by srun").
    Raises:
        NoRendezvous: one line with what was tried, what came of it, and the mend.
    """
    begun, tries = time.monotonic(), 0
    while True:
        tries += 1
        left = begun + seconds - time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=max(0.1, min(5.0, left))) as made:
                return Way(*(str(end[0]).partition("%")[0] for end in (made.getsockname(), made.getpeername())))
        except OSError as error:
            unknown = isinstance(error, socket.gaierror)
            passed = time.monotonic() - begun
            if passed >= seconds or (unknown and passed >= min(seconds, _NAME_SECONDS)):
                raise NoRendezvous(_unreached(error, address, port, tries, passed, who)) from error
        time.sleep(min(0.5, 0.02 * 2**tries, max(0.0, seconds - passed)))


def _unreached(error: OSError, address: str, port: int, tries: int, passed: float, who: str) -> str:
    """The one line about a connection that was not made."""
    own = None if isinstance(error, socket.gaierror) else way_to(address)
    by = "" if own is None else f" through {own_addresses().get(own, 'an unknown interface')} ({own})"
    if isinstance(error, socket.gaierror):
        what = "this name does not resolve"
        mend = "export MASTER_ADDR=ADDRESS of the host of rank 0, as a number, before the processes are started"
    elif isinstance(error, ConnectionRefusedError):
        what = "connection refused, nothing listens there"
        mend = (
            "look for the message of rank 0, which did not start or has ended; if it runs on another host than this, "
            "export MASTER_ADDR"
        )
    elif isinstance(error, TimeoutError):
        what = "no answer"
        mend = (
            "a firewall, or an address of another network: export MASTER_ADDR=ADDRESS by which this host reaches rank "
            "0's, or MASTER_PORT=N of a port that is open"
        )
    else:
        what = str(error.strerror or error)
        mend = "export MASTER_ADDR=ADDRESS by which this host reaches that of rank 0"
    return (
        f"{who}: cannot reach rank 0 at MASTER_ADDR={address} MASTER_PORT={port}{by}: {what} "
        f"({tries} tries in {passed:.0f} s). Mend: {mend}. {LIMIT}=N waits longer"
    )
