"""Sets that lie elsewhere: the same records whatever goes wrong on the way, in a cache that keeps its bound."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pytest
from faulty_server import FaultyServer, serving
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations

from vlm.data import remote, remote_sources
from vlm.data.piece_cache import UNIT, PieceCache
from vlm.data.shard_files import ShardChangedError
from vlm.data.shard_format import INDEX, MANIFEST, ShardError, ShardGoneError, shard_name
from vlm.data.shards import ShardSet, write_shards
from vlm.types import Record, Sample, UserError

ROWS = 24
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 records of 4 shards, each with a video of 20 to 21 kB and features of 3 kB."""
    folder = tmp_path_factory.mktemp("made")
    random, items = np.random.default_rng(0), []
    for number in range(ROWS):
        for name, nbytes in (("mp4", 20_000 + 50 * number), ("npy", 3000 + number)):
            (folder / f"{number}.{name}").write_bytes(random.bytes(nbytes))
        items.append(Sample(key=f"clip{number}", video=folder / f"{number}.mp4", annotation={"label": number},
                            members={"features.npy": folder / f"{number}.npy"}))  # fmt: skip
    write_shards(
        items, folder / "set", arguments={"source": "test", "split": "train"}, check=False, shard_samples=ROWS // 4
    )
    return folder / "set"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


@pytest.fixture
def expected(made: Path) -> list[Record]:
    return records(ShardSet(made))


@pytest.fixture
def server(copy: Path) -> Iterator[FaultyServer]:
    with serving(copy) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF", 0.002)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Recorded(MemoryFileSystem):
    """A file system in memory under the names of real services; it notes what is asked of it."""

    protocol = ("s3", "hf", "recorded")
    store: dict[str, Any] = {}  # noqa: RUF012 - as fsspec has it
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012
    pause = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + re.sub(r"^\w+://", "", path).strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.asked.append((path, start or 0, end or -1))
        time.sleep(self.pause)
        return super().cat_file(path, start, end)


@pytest.fixture
def services(copy: Path) -> Iterator[type[Recorded]]:
    """s3:// and hf:// lead to a file system in memory that holds the set as …/team/clips."""
    real = {name: _registry.get(name) for name in Recorded.protocol}
    for name in Recorded.protocol:
        fsspec.register_implementation(name, Recorded, clobber=True)
    for path in copy.iterdir():
        for folder in ("bucket/team/clips", "datasets/team/clips/train"):
            Recorded().pipe_file(f"/{folder}/{path.name}", path.read_bytes())
    Recorded.asked.clear()
    yield Recorded
    Recorded.store.clear()
    Recorded.pause = 0.0
    for name, implementation in real.items():
        _registry.pop(name)
        if implementation is not None:
            fsspec.register_implementation(name, implementation, clobber=True)


def records(shards: ShardSet) -> list[Record]:
    return [shards.read(row) for row in range(len(shards))]


def pieces(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("??/*") if path.is_file())


def taken(cache: Path) -> int:
    return sum(-(-path.stat().st_size // UNIT) * UNIT for path in cache.glob("*/*") if path.is_file())


# The same records from everywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "http without ranges", "pipe", "s3", "hf", "other"])
def test_the_same_records_come_from_everywhere(
    kind: str, copy: Path, server: FaultyServer, services: Any, expected: list[Record], tmp_path: Path
) -> None:
    server.ranges = kind == "http"
    url = {"pipe": f"pipe:cat {copy}/{{}}", "s3": "s3://bucket/team/clips/", "hf": "hf://datasets/team/clips/train",
           "other": "recorded://bucket/team/clips"}.get(kind, server.url)  # fmt: skip
    shards = ShardSet(url, cache=tmp_path / "cache")
    local = ShardSet(copy)
    assert (str(shards.path), shards.fingerprint, shards.shard_names) == (
        url.rstrip("/"), local.fingerprint, local.shard_names)  # fmt: skip
    assert shards.num_frames.tolist() == local.num_frames.tolist()
    assert [shards.key(row) for row in range(ROWS)] == [local.key(row) for row in range(ROWS)]
    order = list(np.random.default_rng(1).permutation(ROWS))
    assert [shards.read(row) for row in order] == [expected[row] for row in order]
    cost = shards.bytes_read
    needed = sum(path.stat().st_size for path in copy.glob("*.tar"))
    assert cost == (needed if kind in ("pipe", "http without ranges") else int(local.index["nbytes"].sum()))
    other = pickle.loads(pickle.dumps(shards))
    assert records(other) == expected  # from the cache
    assert (other.bytes_read, shards.bytes_read, other.manifest) == (0, cost, local.manifest)
    assert [other.read(row, members=["features.npy"]).members for row in range(ROWS)] == [r.members for r in expected]


def test_urls_are_handed_to_their_file_systems_with_ranges(services: Any, copy: Path, tmp_path: Path) -> None:
    shards = ShardSet("hf://datasets/team/clips/train", cache=tmp_path / "cache")
    services.asked.clear()
    shards.read(7)
    entry = shards.index[7]
    name = f"/datasets/team/clips/train/{shard_name(1)}"
    assert services.asked == [(name, int(entry["offset"]), int(entry["offset"] + entry["nbytes"]))]
    services.asked.clear()
    shards.read(8, members=["features.npy"])  # side by side with the annotation: one request
    start, json_end = int(shards.index["features.npy_offset"][8]) - 512, shards.index["json_offset"][8]
    assert services.asked == [(name, start, int(json_end + shards.index["json_nbytes"][8]))]


def test_the_client_of_the_hub_reads_ranges(
    server: FaultyServer, copy: Path, expected: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": False, "skip_instance_cache": True}
    monkeypatch.setitem(fsspec.config.conf, "hf", options)
    shards = ShardSet("hf://datasets/team/clips/train", cache=tmp_path / "cache", retries=2)
    server.requests.clear()
    server.faults = {shard_name(1): ["drop"]}
    assert records(shards) == expected
    starts, stops = shards.index["offset"], shards.index["offset"] + shards.index["nbytes"]
    spans = [(shards.shard_name(row), f"bytes={starts[row]}-{stops[row] - 1}") for row in range(ROWS)]
    assert sorted(set(server.requests)) == sorted(spans)  # no byte more: its files would read 5 MB ahead
    (copy / shard_name(0)).unlink()
    with pytest.raises(ShardGoneError, match=r"hf://datasets/team/clips/train/shard-000000.tar is gone"):
        shards.read(0, members=["features.npy"])


def test_connections_are_used_again(server: FaultyServer, tmp_path: Path) -> None:
    records(ShardSet(server.url, cache=tmp_path / "cache"))
    assert (len(server.requests), server.connections) == (ROWS + 2, 1)


def test_forked_processes_have_connections_of_their_own(
    server: FaultyServer, expected: list[Record], tmp_path: Path
) -> None:
    shards = ShardSet(server.url, cache=tmp_path / "cache")
    shards.read(0)
    child = os.fork()
    if child == 0:
        os._exit(int([shards.read(row) for row in range(12)] != expected[:12]))
    assert [shards.read(row) for row in range(12, ROWS)] == expected[12:]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert server.connections == 2


# What goes wrong on the way ------------------------------------------------------------------------------------------


def test_a_bad_line_costs_time_and_nothing_else(
    server: FaultyServer, expected: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = {
        MANIFEST: ["drop", "500", "cut"],
        INDEX: ["cut", "503", "drop"],
        shard_name(0): ["drop", "cut", "500", "", "other", "429", "drop", ""] * 3,
        shard_name(1): ["cut", "cut", "cut"],
        shard_name(2): ["404", "404", "404"],
    }
    shards = ShardSet(server.url, cache=tmp_path / "cache")
    assert records(shards) == expected
    assert server.faults[MANIFEST] == server.faults[shard_name(1)] == server.faults[shard_name(2)] == []
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"{server.url}/manifest.json: ConnectionError (Remote end closed")
    assert re.search(r"; trying again, 3x at most and for no more than \d+ s", told[0])
    assert shards.bytes_read == int(shards.index["nbytes"].sum())


def test_an_index_that_comes_in_parts_goes_on_where_it_broke(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 700)
    server.faults = {INDEX: ["", "cut", "", "drop", "500"]}
    ShardSet(server.url, cache=tmp_path / "cache")
    spans = [span for name, span in server.requests if name == INDEX]
    assert spans[:6] == ["bytes=0-699", *["bytes=700-1399"] * 2, *["bytes=1400-2099"] * 3]
    assert len(set(spans)) == len(spans) - 3


def test_silence_is_not_waited_for(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(server.url, cache=tmp_path / "cache", retries=1)
    monkeypatch.setattr(remote_sources, "SILENCE", 1.0)  # in which an answer comes also on a busy machine
    server.faults = {shard_name(0): ["stall", "", "stall", "stall"]}
    assert shards.read(0).key == "clip0"
    monkeypatch.setattr(remote_sources, "SILENCE", 0.2)
    start = time.monotonic()
    with pytest.raises(ShardGoneError, match=r"shard-000000.tar cannot be had: no byte came for 0.2 s"):
        shards.read(1)
    assert time.monotonic() - start < 15  # the server would be silent for 20


def test_a_shard_that_vanished_is_named_and_asked_for_no_longer_than_told(
    server: FaultyServer, copy: Path, expected: list[Record], tmp_path: Path
) -> None:
    shards = ShardSet(server.url, cache=tmp_path / "cache", retries=2)
    (copy / shard_name(1)).rename(copy / "away")
    with pytest.raises(ShardGoneError, match=rf"{server.url}/shard-000001.tar is gone: .*404.*given up after \d+ s"):
        shards.read(8)
    assert server.asked(shard_name(1)) == 3
    with pytest.raises(ShardGoneError, match="is gone"):
        shards.read(9)
    assert server.asked(shard_name(1)) == 4  # patience was in vain before
    (copy / "away").rename(copy / shard_name(1))
    assert records(shards) == expected
    server.faults = {shard_name(1): ["500", "500"]}
    assert pickle.loads(pickle.dumps(shards)).read(9, members=[]).key == "clip9"  # and is had again


def test_a_server_that_is_down_is_told_as_such(copy: Path, tmp_path: Path) -> None:
    with serving(copy) as server:
        shards = ShardSet(server.url, cache=tmp_path / "cache", retries=1)
        shards.read(0)
    server.server_close()
    for connection in [shards._files.source._session()]:  # type: ignore[attr-defined]
        connection.close()
    assert shards.read(0).key == "clip0"  # it is in the cache
    with pytest.raises(ShardGoneError, match=r"shard-000003.tar cannot be had: ConnectionError \(.*refused"):
        shards.read(23)
    with pytest.raises(UserError, match=r"manifest.json cannot be read: ConnectionError"):
        ShardSet(server.url, cache=tmp_path / "cache", retries=0)


def test_a_shard_of_another_size_is_refused(server: FaultyServer, copy: Path, services: Any, tmp_path: Path) -> None:
    tar = copy / shard_name(0)
    shards = [ShardSet(url, cache=tmp_path / "cache", retries=1)
              for url in (server.url, "s3://bucket/team/clips", f"pipe:cat {copy}/{{}}")]  # fmt: skip
    size = tar.stat().st_size
    for change in (lambda data: data[:-700], lambda data: data + b"more", lambda data: data[:600]):
        tar.write_bytes(change((copy / shard_name(0)).read_bytes()))
        found = tar.stat().st_size
        Recorded().pipe_file("/bucket/team/clips/" + shard_name(0), tar.read_bytes())
        for one in shards:
            says = rf"shard-000000.tar changed since it was written: it has .*{found} bytes, the manifest says {size}"
            with pytest.raises(ShardChangedError, match=says):
                one.read(3)
        tar.write_bytes((tar.read_bytes() + bytes(size))[:size])


def test_a_shard_of_another_version_is_compared_with_its_hash(
    server: FaultyServer, copy: Path, expected: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ShardSet(server.url, cache=tmp_path / "cache")
    assert shards.read(0) == expected[0]
    tar = copy / shard_name(0)
    good = tar.read_bytes()
    os.utime(tar, (1, 1))  # another ETag, the same bytes
    assert [shards.read(row) for row in (1, 2)] == expected[1:3]
    assert server.asked(shard_name(0)) == 4  # three records, one comparison
    other = bytearray(good)
    other[int(shards.index["video_offset"][3])] ^= 1
    tar.write_bytes(other)
    for _ in range(2):
        with pytest.raises(ShardChangedError, match=rf"{server.url}/shard-000000.tar changed since it was written: it "
                           rf"has sha256 {hashlib.sha256(other).hexdigest()}, the manifest says "
                           rf"{hashlib.sha256(good).hexdigest()}"):  # fmt: skip
            shards.read(3)
    tar.write_bytes(good)
    os.utime(tar, (1, 1))
    assert shards.read(3) == expected[3]  # and what was wrong was not kept
    assert pickle.loads(pickle.dumps(shards)).read(3) == expected[3]
    assert "another version than before" in capsys.readouterr().err


def test_other_bytes_than_were_asked_for_are_fetched_again(
    services: Any, expected: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet("s3://bucket/team/clips", cache=tmp_path / "cache")
    bad = [b"#" * int(shards.index["nbytes"][5])]
    cat = services.cat_file
    monkeypatch.setattr(services, "cat_file", lambda *args, **kwargs: bad.pop() if bad else cat(*args, **kwargs))
    assert shards.read(5) == expected[5]
    assert pickle.loads(pickle.dumps(shards)).read(5) == expected[5]
    bad += [b"#" * int(shards.index["nbytes"][6])] * 2
    with pytest.raises(ShardError, match=r"s3://bucket/team/clips/shard-000001.tar, bytes .*no record begins there"):
        shards.read(6)


def test_a_file_system_that_hangs_is_left_behind(
    services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet("s3://bucket/team/clips", cache=tmp_path / "cache", retries=1)
    monkeypatch.setattr(remote_sources, "SILENCE", 0.1)
    services.pause = 8.0
    start = time.monotonic()
    with pytest.raises(ShardGoneError, match="cannot be had: no answer within"):
        shards.read(0)
    assert time.monotonic() - start < 7


# Opening -------------------------------------------------------------------------------------------------------------


def test_what_is_no_set_is_told_by_name(server: FaultyServer, copy: Path, services: Any, tmp_path: Path) -> None:
    def refused(url: str, says: str, **options: Any) -> None:
        with pytest.raises(UserError, match=says):
            ShardSet(url, cache=tmp_path / "cache", **options)

    asked = len(server.requests)
    refused(f"{server.url}/nothing", r"/set/nothing holds no shard set: .*nothing/manifest.json.*404")
    assert len(server.requests) == asked + 1  # a wrong name is not tried again
    refused("s3://bucket/nothing", "s3://bucket/nothing holds no shard set")
    refused("pipe:false {}", "pipe:false {} holds no shard set.*exit code 1")
    refused("pipe:cat /data", r"pipe:cat /data: `\{\}` must stand where the name of a file goes")
    refused("nothing-knows://a/b", "nothing-knows://a/b: nothing reads nothing-knows://")
    server.faults = {MANIFEST: ["403"] * 4}
    refused(server.url, r"manifest.json cannot be read: the server answers 403")
    index = (copy / INDEX).read_bytes()
    (copy / INDEX).write_bytes(index[:-1])
    refused(server.url, r"index.npy changed since it was written: it has \d+ bytes, the manifest says \d+ bytes")
    (copy / INDEX).write_bytes(index[:-1] + b"#")
    refused(server.url, r"index.npy changed since it was written: it has sha256 \w+, the manifest says \w+")
    (copy / INDEX).unlink()
    refused(server.url, r"index.npy has no file, the manifest says", retries=0)
    (copy / MANIFEST).write_text("{")
    refused(server.url, r"http://127.0.0.1:\d+/set/manifest.json is not JSON")
    refused(f"pipe:cat {copy}/{{}}", r"pipe:cat .*/manifest.json is not JSON")


@pytest.mark.parametrize(
    ("scheme", "says"), [("s3", r"pip install -e '.\[remote\]'"), ("dreamed", "pip install dreamfs")]
)
def test_a_package_that_is_missing_is_named(
    scheme: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_name = {"s3": "s3fs.S3FileSystem", "dreamed": "dreamfs.core.Dreamed"}[scheme]
    monkeypatch.setitem(known_implementations, scheme, {"class": class_name, "err": "Install it"})
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(UserError, match=f"{scheme}://bucket/dir: {scheme}:// needs a package.*{says}"):
        ShardSet(f"{scheme}://bucket/dir", cache=tmp_path / "cache")


def test_secrets_in_urls_are_used_and_not_told(server: FaultyServer, copy: Path, tmp_path: Path) -> None:
    url = server.url.replace("//", "//me:hidden@") + "?token=secret"
    shards = ShardSet(url, cache=tmp_path / "cache", retries=0)
    assert shards.path == server.url
    shards.read(0)
    (copy / shard_name(3)).unlink()
    with pytest.raises(ShardGoneError) as caught:
        shards.read(23)
    assert not re.search("secret|hidden", str(caught.value))
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError) as refused:
        ShardSet(url, cache=tmp_path / "other", retries=0)
    assert not re.search("secret|hidden", str(refused.value))


def test_a_set_that_is_written_anew_is_another_set(server: FaultyServer, copy: Path, tmp_path: Path) -> None:
    shards = ShardSet(server.url, cache=tmp_path / "cache")
    assert shards.read(0).annotation == {"label": 0}
    state = pickle.dumps(shards)
    again = tmp_path / "again"
    items = [Sample(key="clip0", video=copy / shard_name(0), annotation={"label": 5})]
    write_shards(items, again, arguments={"source": "test", "split": "train"}, check=False)
    for path in copy.iterdir():
        path.unlink()
    shutil.copytree(again, copy, dirs_exist_ok=True)
    assert ShardSet(server.url, cache=tmp_path / "cache").read(0).annotation == {"label": 5}
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"index.npy changed|was replaced while the set was in use"):
        pickle.loads(state)


# Commands ------------------------------------------------------------------------------------------------------------


def test_a_command_that_fails_is_named_and_leaves_nothing_running(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "after").write_text("exit 0")
    shards = ShardSet(f"pipe:cat {copy}/{{}}; . {tmp_path}/after", cache=tmp_path / "cache", retries=1)
    assert shards.read(0).key == "clip0"
    monkeypatch.setattr(remote_sources, "SILENCE", 0.2)
    (tmp_path / "after").write_text("sleep 3013")
    with pytest.raises(ShardGoneError, match=r"pipe:cat .*/shard-000001.tar; .* cannot be had: the command gave \d+"):
        shards.read(8)
    until = time.monotonic() + 30
    while ["sleep", "3013"] in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]:
        assert time.monotonic() < until
        time.sleep(0.02)
    monkeypatch.setattr(remote_sources, "SILENCE", 10.0)
    (tmp_path / "after").write_text("exit 3")
    with pytest.raises(ShardGoneError, match=r"exit code 3 after \d+ bytes"):
        shards.read(8)
    (tmp_path / "after").write_text("exit 0")
    assert shards.read(8).key == "clip8"
    (copy / shard_name(3)).unlink()
    gone = ShardSet(f"pipe:cat {copy}/{{}}", cache=tmp_path / "cache", retries=1)
    with pytest.raises(ShardGoneError, match=r"shard-000003.tar is gone: the command ended with exit code 1"):
        gone.read(23)


def test_a_cache_for_whole_shards_must_hold_some(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: list[Record]
) -> None:
    largest = max(path.stat().st_size for path in copy.glob("*.tar"))
    with pytest.raises(UserError, match=rf"whole shards of up to {largest} bytes, and a cache of {largest} bytes"):
        ShardSet(f"pipe:cat {copy}/{{}}", cache=tmp_path / "cache", cache_bytes=largest)
    shards = ShardSet(f"pipe:cat {copy}/{{}}", cache=tmp_path / "cache", cache_bytes=2 * largest)
    assert records(shards) == expected
    assert "so each may be fetched many times: allow more" in capsys.readouterr().err
    assert taken(tmp_path / "cache") <= 2 * largest


# The cache -----------------------------------------------------------------------------------------------------------


def test_damaged_pieces_are_noticed_and_fetched_again(
    server: FaultyServer, copy: Path, expected: list[Record], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    records(ShardSet(server.url, cache=cache))
    random = np.random.default_rng(0)
    for number, path in enumerate(pieces(cache)):
        data = bytearray(path.read_bytes())
        if number % 3:
            data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        else:
            del data[random.integers(len(data)) :]
        path.write_bytes(data)
    server.requests.clear()
    shards = ShardSet(server.url, cache=cache)
    assert records(shards) == expected
    assert (server.asked(INDEX), len(server.requests)) == (1, ROWS + 2)
    whole = ShardSet(f"pipe:cat {copy}/{{}}", cache=tmp_path / "whole")
    assert records(whole) == expected
    for path in pieces(tmp_path / "whole"):
        with path.open("r+b") as file:
            file.seek(1000)
            file.write(b"######")
    again = ShardSet(f"pipe:cat {copy}/{{}}", cache=tmp_path / "whole")
    assert records(again) == expected
    assert again.bytes_read == whole.bytes_read


def test_the_cache_keeps_its_bound_and_what_was_used_last(server: FaultyServer, tmp_path: Path) -> None:
    cache, bound = tmp_path / "cache", 300_000
    shards = ShardSet(server.url, cache=cache, cache_bytes=bound)
    for row in range(ROWS):
        shards.read(row)
        shards.read(0)
        time.sleep(0.002)  # times of files are as coarse as the kernel's ticks, of up to 10 ms
        assert taken(cache) <= bound
    assert server.asked(shard_name(0)) == 6  # record 0 was never fetched again
    server.requests.clear()
    shards.read(ROWS - 1)
    assert server.requests == []
    shards.read(1)
    assert len(server.requests) == 1
    for path in pieces(cache):  # what another run needed and left
        os.utime(path, (0, 0))
    small = ShardSet(server.url, cache=cache, cache_bytes=100_000)
    small.read(2)
    assert taken(cache) <= 100_000
    assert small.read(2).key == "clip2"


def test_a_piece_as_large_as_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path / "cache", 100_000)
    cache.put("large", bytes(90_000))
    assert cache.get("large") is None
    cache.put("small", b"content")
    assert (cache.get("small"), cache.get("small", 3, 4), cache.get("small", 3, 5)) == (b"content", b"tent", None)
    cache.put("empty", b"")
    assert cache.get("empty") == b""


def test_what_killed_processes_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path / "cache", 100_000)
    ready, go = FORK.Queue(), tmp_path / "go"

    def work() -> None:
        with cache.writing("slow", 20_000) as writer:
            writer.add(b"a" * 10_000)
            ready.put(True)
            while not go.exists():
                time.sleep(0.01)
            writer.add(b"b" * 10_000)

    processes = [FORK.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
        assert ready.get(timeout=60)
    processes[0].kill()
    processes[0].join()
    unfinished = tmp_path / "cache" / "unfinished"
    assert len(list(unfinished.iterdir())) == 2
    with cache.writing("own", 20_000) as writer:
        for name in "abcd":
            cache.put(name, bytes(15_000))  # makes room
            assert taken(tmp_path / "cache") <= 100_000
        assert len(list(unfinished.iterdir())) == 2
        writer.add(b"c" * 20_000)
    go.touch()
    processes[1].join(60)
    assert (cache.get("own"), cache.get("slow")) == (b"c" * 20_000, b"a" * 10_000 + b"b" * 10_000)
    assert list(unfinished.iterdir()) == []


def test_an_index_in_use_leaves_last(server: FaultyServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shards = ShardSet(server.url, cache=cache, cache_bytes=100_000)
    time.sleep(0.01)
    for row in range(12):
        shards.read(row)
    assert len(pieces(cache)) < 8
    server.requests.clear()
    assert pickle.loads(pickle.dumps(shards)).manifest == shards.manifest
    assert server.requests == []


def test_without_a_cache_records_still_come(
    server: FaultyServer, expected: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: the cache cannot be written \(.*\), and http"):
        ShardSet(server.url, cache=tmp_path / "file")
    shards = ShardSet(server.url, cache=tmp_path / "cache")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PieceCache, "put", full)
    assert records(shards) == expected
    told = capsys.readouterr().err
    assert told.count("nothing can be kept there (No space left on device)") == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    ShardSet(server.url)
    assert pieces(tmp_path / "xdg" / "vlm")


def reader(url: str, cache: Path, bound: int, rounds: int, start: int) -> tuple[Any, Any]:
    """A process that reads a set in some order, and the queue through which it tells that it opened it and the cost."""
    told = FORK.Queue()

    def work() -> None:
        shards = ShardSet(url, cache=cache, cache_bytes=bound)
        told.put(0)
        for row in (np.arange(rounds * ROWS) * 7 + start) % ROWS:
            assert shards.read(row).annotation == {"label": row}
        told.put(shards.bytes_read)

    process = FORK.Process(target=work)
    process.start()
    return process, told


def test_two_processes_share_a_cache(server: FaultyServer, copy: Path, tmp_path: Path) -> None:
    cache, bound = tmp_path / "cache", 250_000  # a third of the records
    over, most = threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.02):
            if (cache / "use").exists():
                with (cache / "use").open("ab") as counter:
                    fcntl.lockf(counter, fcntl.LOCK_EX)  # nothing comes or goes
                    sizes = {}
                    for path in cache.glob("*/*"):
                        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                            sizes[path.stat().st_ino] = -(-path.stat().st_size // UNIT) * UNIT
                    most[0] = max(most[0], sum(sizes.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    both = [reader(server.url, cache, bound, 8, start) for start in (0, 11)]
    for process, _ in both:
        process.join(60)
    over.set()
    watcher.join()
    assert [process.exitcode for process, _ in both] == [0, 0]
    assert bound / 2 < most[0] <= bound
    assert taken(cache) <= bound
    both = [reader(f"pipe:sleep 0.05; cat {copy}/{{}}", tmp_path / "whole", 20 << 20, 1, 0) for _ in range(2)]
    costs = [told.get(timeout=60) + told.get(timeout=60) for _, told in both]
    assert sum(costs) == sum(path.stat().st_size for path in copy.glob("*.tar"))  # each shard came once


def test_a_kill_in_the_middle_of_fetching_leaves_nothing_that_blocks(
    server: FaultyServer, copy: Path, expected: list[Record], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    slow = f"pipe:head -c 5000 {copy}/{{}}; case {{}} in shard*) cat {fifo};; *) tail -c +5001 {copy}/{{}};; esac"
    process, told = reader(slow, cache, 20 << 20, 1, 0)
    assert told.get(timeout=60) == 0
    until = time.monotonic() + 120
    while not list((cache / "unfinished").iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    assert len(list((cache / "unfinished").iterdir())) == 1
    start = time.monotonic()
    shards = ShardSet(f"pipe:cat {copy}/{{}}", cache=cache)
    assert records(shards) == expected
    assert time.monotonic() - start < 5
    process, told = reader(server.url, tmp_path / "ranges", 20 << 20, 1000, 0)
    assert told.get(timeout=60) == 0
    time.sleep(0.03)
    process.kill()
    process.join()
    assert records(ShardSet(server.url, cache=tmp_path / "ranges")) == expected
