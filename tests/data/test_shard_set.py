"""A set in a folder: members read alone, shards replaced while it is open, ten thousand shards."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vlm.data import shard_files
from vlm.data.shard_files import ShardChangedError
from vlm.data.shard_format import INDEX, MANIFEST, ShardError, ShardGoneError, index_dtype, shard_name, to_json
from vlm.data.shards import ShardSet, write_shards
from vlm.types import Sample, UserError

KEYS = ["plain", "with.dots/and more", "x" * 130, "no video", "no features", "last"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six records of two shards: a video of 50,000 bytes, features of 4,000, notes of 10, three questions."""
    folder = tmp_path_factory.mktemp("set")
    random = np.random.default_rng(0)
    items = []
    for number, key in enumerate(KEYS):
        files = {name: folder / f"{number}.{name}" for name in ("mp4", "features.npy", "notes.txt")}
        for file, nbytes in zip(files.values(), (50_000, 4000, 10)):
            file.write_bytes(random.bytes(nbytes + number))
        members: dict[str, Path] = {name: files[name] for name in ("features.npy", "notes.txt") if key != "no features"}
        annotation = {"questions": [{"question": "why", "options": ["a", "b"], "answer": 0}] * 3}
        items.append(Sample(key=key, video=None if key == "no video" else files["mp4"], members=members,  # type: ignore[arg-type]
                            annotation=annotation))  # fmt: skip
    arguments = {"source": "test", "split": "train"}
    write_shards(items, folder / "out", arguments=arguments, check=False, shard_samples=3)
    return folder / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "BACKOFF", 0.001)


# Members -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(KEYS)))
def test_wanted_members_are_those_of_the_whole_record(made: Path, row: int) -> None:
    shards = ShardSet(made)
    whole = shards.read(row)
    for wanted in ([], ["json"], ["features.npy"], ["video"], ["notes.txt", "video"], ["features.npy", "notes.txt"],
                   ["video", "features.npy", "notes.txt", "json"], ["nothing of that name"]):  # fmt: skip
        record = shards.read(row, members=wanted)
        assert record.annotation == whole.annotation
        assert record.video == (whole.video if "video" in wanted else None)
        assert record.members == {name: data for name, data in whole.members.items() if name in wanted}
        assert (record.key, record.row, record.shard) == (KEYS[row], row, shard_name(row // 3))


def test_a_question_set_is_read_without_its_videos_in_one_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(made)
    reads: list[tuple[int, int]] = []
    read = shards._files.read

    def counted(number: int, offset: int, nbytes: int, again: bool) -> bytes:
        reads.append((offset, nbytes))
        return read(number, offset, nbytes, again)

    monkeypatch.setattr(shards._files, "read", counted)
    needed = 0
    for row in range(len(shards)):
        record = shards.read(row, members=("features.npy", "notes.txt"))
        needed += sum(map(len, record.members.values())) + int(shards.index["json_nbytes"][row])
    assert len(reads) == len(shards)
    assert shards.bytes_read == sum(nbytes for _, nbytes in reads)
    assert needed < shards.bytes_read < needed + len(shards) * (3 * 512 + 4 * 1024 + 2 * 512)  # headers, padding
    reads.clear()
    shards.read(0, members=("video", "json"))  # features lie between them
    assert len(reads) == 2
    assert sum(nbytes for _, nbytes in reads) == 50_000 + int(shards.index["json_nbytes"][0]) + 2 * 512


def test_whole_records_cost_their_bytes(made: Path) -> None:
    shards = ShardSet(made)
    for row in range(len(shards)):
        shards.read(row)
    assert shards.bytes_read == int(shards.index["nbytes"].sum())
    assert pickle.loads(pickle.dumps(shards)).bytes_read == 0


def test_headers_are_checked_of_what_is_read(copy: Path) -> None:
    shards = ShardSet(copy)
    tar = copy / shard_name(0)
    features = int(shards.index["features.npy_offset"][1])
    with tar.open("r+b") as file:
        file.seek(features - 512)
        file.write(b"other.features.npy".ljust(100, b"\0"))
    with pytest.raises(ShardError, match=r"shard-000000.tar, bytes \d+ to \d+ .*'other.features.npy' is there.*not of"):
        shards.read(1, members=["features.npy"])
    shutil.copy(copy / shard_name(1), tar)
    with pytest.raises(ShardError, match=r"is there; tar and index are not of one set|no record begins there"):
        ShardSet.read(shards, 0, members=["video"])
    shards.index = shards.index.copy()
    shards.index["notes.txt_nbytes"][5] -= 1
    with pytest.raises(ShardError, match=r"its notes.txt has another length than the index says"):
        shards.read(5, members=["notes.txt"])
    shards.index["json_offset"][5] = shards.index["offset"][5] + 100
    with pytest.raises(ShardError, match=r"its json has .* outside of it"):
        shards.read(5, members=[])


# Shards that are replaced --------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_shard_that_was_copied_again_is_compared_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = pickle.loads(pickle.dumps(ShardSet(copy)))
    expected = shards.read(1)
    tar = copy / shard_name(0)
    shutil.copy(tar, copy / "again")
    (copy / "again").replace(tar)
    hashed: list[Path] = []
    digest = shard_files._sha256
    monkeypatch.setattr(shard_files, "_sha256", lambda path: hashed.append(path) or digest(path))
    assert [shards.read(1), shards.read(0).key, shards.read(1)] == [expected, KEYS[0], expected]
    assert hashed == [tar]
    os.utime(tar, (1, 1))
    assert shards.read(1) == expected
    assert hashed == [tar, tar]


def test_a_shard_of_other_content_is_refused_with_both_hashes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(copy)
    assert shards.read(4).key == KEYS[4]
    tar = copy / shard_name(1)
    before = sha256(tar)
    (copy / "kept").write_bytes(tar.read_bytes())
    data = bytearray(tar.read_bytes())
    data[int(shards.index["video_offset"][4])] ^= 1  # one bit of a video: nothing but the hash can tell
    (copy / "other").write_bytes(data)
    (copy / "other").replace(tar)
    calls = []
    digest = shard_files._sha256
    monkeypatch.setattr(shard_files, "_sha256", lambda path: calls.append(path) or digest(path))
    for row in (4, 4, 3):
        says = f"{tar} changed since it was written: it has sha256 {sha256(tar)}, the manifest says {before}"
        with pytest.raises(ShardChangedError, match=says):
            shards.read(row)
    assert len(calls) == 1
    assert shards.read(0).key == KEYS[0]
    (copy / "kept").replace(tar)  # put back as it was
    assert shards.read(4).key == KEYS[4]
    tar.write_bytes(b"#" * 2000)
    with pytest.raises(ShardError, match=r"only .* bytes are there.*; the file was changed after the set was opened"):
        shards.read(4)


def test_a_shard_that_comes_back_in_time_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(copy, retries=3)
    shards.read(0)
    tar = copy / shard_name(0)
    pauses: list[float] = []
    tar.rename(copy / "away")

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            (copy / "away").rename(tar)

    monkeypatch.setattr(shard_files.time, "sleep", sleep)
    assert shards.read(1).key == KEYS[1]
    assert pauses == [0.001, 0.002]
    tar.unlink()
    with pytest.raises(ShardGoneError, match=f"{tar} is gone"):
        shards.read(1)
    assert len(pauses) == 5


# Size ----------------------------------------------------------------------------------------------------------------


def test_ten_thousand_shards_and_ten_million_rows_open_at_once(made: Path, tmp_path: Path) -> None:
    rows, count = 10_000_000, 10_000
    dtype = index_dtype(32, ("video", "json"))
    np.lib.format.open_memmap(tmp_path / INDEX, mode="w+", dtype=dtype, shape=(rows,)).flush()  # sparse: zeros
    for number in range(count):
        with (tmp_path / shard_name(number)).open("wb") as file:
            file.truncate(2 << 30)
    manifest = json.loads((made / MANIFEST).read_text())
    manifest["counts"] = {"listed": rows, "records": rows, "rejected": 0, "warnings": 0}
    manifest["members"] = ["video", "json"]
    manifest["shards"] = [
        {"name": shard_name(number), "bytes": 2 << 30, "sha256": "0" * 64, "records": 1000} for number in range(count)
    ]
    manifest["index"]["bytes"] = (tmp_path / INDEX).stat().st_size
    (tmp_path / MANIFEST).write_bytes(to_json(manifest))
    start = time.process_time()
    shards = ShardSet(tmp_path)
    assert time.process_time() - start < 2
    assert (len(shards), len(shards.shard_names)) == (rows, count)
    start = time.process_time()
    assert len(pickle.loads(pickle.dumps(shards))) == rows
    assert time.process_time() - start < 0.2
    (tmp_path / shard_name(7777)).unlink()
    with pytest.raises(UserError, match=r"shard-007777.tar has no file"):
        ShardSet(tmp_path)


def test_threads_read_at_once(made: Path) -> None:
    shards = ShardSet(made)
    expected = [shards.read(row) for row in range(6)]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(row for _ in range(20) for row in range(6) if shards.read(row) != expected[row])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_url_is_a_folder(made: Path) -> None:
    assert ShardSet(f"file://{made}").read(0) == ShardSet(str(made)).read(0)
