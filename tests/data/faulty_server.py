"""An HTTP server for tests that serves byte ranges, keeps connections, and goes wrong exactly when it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder, as URL/set and as train/ of the dataset team/clips of a hub.

    Each request for a file takes the next fault from `faults[name]`, if there is one:

    "drop" (close without an answer), "cut" (half of the body), "stall" (half of it, then silence), "other" (other bytes
    than asked for), or a status as "500".
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []  # (name, Range)
        self.connections = 0
        self.ranges = True
        self.etags = True
        self.released = threading.Event()  # lets what stalls go

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error of the server."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"

    def asked(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits for the acknowledgement of the headers
    server: FaultyServer

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = (
            self.path.partition("?")[0].removeprefix("/set/").removeprefix("/datasets/team/clips/resolve/main/train/")
        )
        if name.startswith("/api/"):
            self.answer(200, self.hub(), {"Content-Type": "application/json"})
            return
        span = self.headers.get("Range", "")
        self.server.requests.append((name, span))
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else ""
        path = self.server.folder / name
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault.isdigit() or not path.is_file():
            self.answer(int(fault) if fault.isdigit() else 404, b"", {})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}-{path.stat().st_mtime_ns}"'} if self.server.etags else {}
        status = 200
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
        if found and self.server.ranges:
            start, stop, total = int(found[1]), min(int(found[2]) + 1, len(data)), len(data)
            if start >= total:
                self.answer(416, b"", headers | {"Content-Range": f"bytes */{total}"})
                return
            start, stop = (start + 1, stop) if fault == "other" else (start, stop)
            status, data = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        self.answer(status, data, headers, fault)

    def hub(self) -> bytes:
        """What the hub of Hugging Face says of a repository, or of a folder in it: as much as its client asks for."""
        files = [{"type": "file", "path": f"train/{path.name}", "size": path.stat().st_size, "oid": "0" * 40}
                 for path in self.server.folder.iterdir()]  # fmt: skip
        return json.dumps(files if "/tree/" in self.path else {"id": "team/clips", "sha": "0" * 40}).encode()

    def answer(self, status: int, data: bytes, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault in ("cut", "stall") else data)
        if fault == "stall":
            self.wfile.flush()
            self.server.released.wait(20)
        if fault in ("cut", "stall"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """A server of `folder` as URL/set."""
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
