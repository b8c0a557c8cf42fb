"""Real separate hosts on this machine: network namespaces with an address, a name and an /etc/hosts of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NO_HOSTS = "needs network namespaces"
"""Beginning of the reason for which tests on separate hosts are skipped: no root, or a sandbox that allows none."""
# As Debian and Ubuntu do it: to itself, a host's own name is an address that means something else to all others.
_HOSTS = "127.0.0.1 localhost\n127.0.1.1 {own}\n{others}"
# Shared mounts would show this machine the other /etc/hosts.
_ENTER = 'mount --make-rprivate / && mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


@dataclass(frozen=True, slots=True)
class Host:
    """A host: its name, and its address, by which others know it."""

    name: str
    address: str
    file: Path  # its /etc/hosts

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
        """Start a command there; what it prints, errors too, is read from the process."""
        inside = ["bash", "-c", _ENTER, "enter", str(self.file), self.name, *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", *inside],
            cwd=folder,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def missing() -> str | None:
    """Why there can be no such hosts here; None: there can."""
    if os.geteuid() != 0:
        return "not root"
    if absent := [name for name in ("ip", "unshare", "mount", "hostname") if shutil.which(name) is None]:
        return f"no {', '.join(absent)} (Debian: iproute2)"
    name = f"probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "ip netns add is refused"
    inside = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "true"]
    refused = subprocess.run(inside, capture_output=True).returncode
    _ip("netns", "del", name)
    return "a mount namespace is refused" if refused else None


@contextmanager
def running(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts on a network of their own, for as long as the context lasts.

    Each has two interfaces: `side0`, where nothing else is, and `lan0`, which leads to the others.
    """
    mark = f"{os.getpid() % 10**6}"
    net = f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}"
    hosts = [Host(f"h{mark}{letter}", f"{net}.{i + 1}", folder / f"hosts.{i}") for i, letter in enumerate("abcdefgh")]
    hosts = hosts[:count]
    bridge = f"b{mark}"
    for left in (["link", "del", bridge], *(["netns", "del", host.name] for host in hosts)):  # of a killed process
        subprocess.run(["ip", *left], capture_output=True)
    with ExitStack() as down:
        _ip("link", "add", bridge, "type", "bridge")
        down.callback(_ip, "link", "del", bridge)
        _ip("link", "set", bridge, "up")
        for i, host in enumerate(hosts):
            others = "".join(f"{each.address} {each.name}\n" for each in hosts if each is not host)
            host.file.write_text(_HOSTS.format(own=host.name, others=others))
            _ip("netns", "add", host.name)
            down.callback(_ip, "netns", "del", host.name)
            _ip("link", "add", f"v{mark}{i}", "type", "veth", "peer", "name", "lan0", "netns", host.name)
            _ip("link", "set", f"v{mark}{i}", "master", bridge, "up")
            _ip("-n", host.name, "link", "add", "side0", "type", "bridge")
            _ip("-n", host.name, "addr", "add", f"192.168.77.{i + 1}/30", "dev", "side0")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "lan0")
            for interface in ("lo", "side0", "lan0"):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield hosts


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
