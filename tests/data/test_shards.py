"""Shard sets: plain webdataset reads them, bytes do not depend on workers or kills, and damage is met by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import webdataset
from encoded import damaged, encode, jpeg, pictures, truncated

from vlm.data import shard_pool, shard_set
from vlm.data.shard_format import (
    INDEX,
    MANIFEST,
    UNFINISHED,
    ShardGoneError,
    decode_key,
    encode_key,
    index_dtype,
    to_json,
)
from vlm.data.shards import ShardError, ShardSet, write_shards
from vlm.data.video import decode
from vlm.types import Rejected, Sample, UserError

ARGUMENTS = {"source": "test", "split": "train"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        (folder / f"clip{number}.mp4").write_bytes(encode(pictures(6 + number, seed=number)))
    return folder


def samples(clips: Path) -> list[Sample]:
    return [
        Sample(key=path.stem, video=path, annotation={"label": number, "name": f"klasse {number} ä"})
        for number, path in enumerate(sorted(clips.glob("*.mp4")))
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of seven records in three shards."""
    out = tmp_path_factory.mktemp("made") / "set"
    write_shards(samples(clips), out, arguments=ARGUMENTS, shard_samples=3)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


# Reading -------------------------------------------------------------------------------------------------------------


def test_records_come_back_by_byte_range(made: Path, clips: Path) -> None:
    shards = ShardSet(made)
    assert len(shards) == 7
    for row, sample in enumerate(samples(clips)):
        record = shards.read(row)
        assert record.video == sample.video.read_bytes()
        assert (record.key, record.annotation, record.row) == (sample.key, sample.annotation, row)
        assert (record.num_frames, record.fps, record.shard) == (6 + row, 12.0, f"shard-{row // 3:06d}.tar")
        assert record.decoders == ("decord", "pyav")
        assert (shards.key(row), shards.shard_name(row)) == (record.key, record.shard)
        assert len(decode(record.video, range(record.num_frames))) == 6 + row
    assert shards.num_frames.tolist() == list(range(6, 13))
    assert shards.text_length.tolist() == [len("klasse 0 ä")] * 7
    assert (shards.index["width"][0], shards.index["height"][0]) == (64, 48)
    with pytest.raises(IndexError):
        shards.read(7)
    with pytest.raises(IndexError):
        shards.read(-1)


def test_plain_webdataset_reads_the_tars(made: Path, clips: Path) -> None:
    urls = [str(made / name) for name in ShardSet(made).shard_names]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None))
    assert [item["__key__"] for item in read] == [sample.key for sample in samples(clips)]
    for item, sample in zip(read, samples(clips)):
        assert item["mp4"] == sample.video.read_bytes()
        assert json.loads(item["json"]) == sample.annotation


def test_manifest_counts_hours_bytes_and_hashes(made: Path) -> None:
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["counts"] == {"listed": 7, "records": 7, "rejected": 0, "warnings": 0}
    assert manifest["hours"] == pytest.approx(sum(range(6, 13)) / 12 / 3600, abs=1e-6)
    assert manifest["bytes"] == sum(path.stat().st_size for path in made.glob("*.tar"))
    assert [shard["records"] for shard in manifest["shards"]] == [3, 3, 1]
    assert sorted(path.name for path in made.iterdir()) == [
        INDEX, MANIFEST, "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]  # fmt: skip


@pytest.mark.parametrize(
    "key", ["a.b", "class/one", "100%", "ключ", "with blank", "back\\slash", "new\nline", "x" * 130]
)
def test_any_key_comes_back_from_the_set_and_from_webdataset(key: str, clips: Path, tmp_path: Path) -> None:
    items = [Sample(key=key, video=clips / "clip0.mp4", annotation={}), Sample(key="b", video=clips / "clip1.mp4")]
    write_shards(items, tmp_path / "set", arguments=ARGUMENTS, check=False)
    shards = ShardSet(tmp_path / "set")
    assert [shards.key(0), shards.read(0).key, shards.read(1).key] == [key, key, "b"]
    read = list(webdataset.WebDataset(str(tmp_path / "set" / shards.shard_names[0]), shardshuffle=False))
    assert [unquote(item["__key__"]) for item in read] == [key, "b"]
    assert decode_key(encode_key(key)) == key


def test_pickled_and_forked_readers_read_the_same(made: Path) -> None:
    shards = ShardSet(made)
    before = shards.read(4)
    other = pickle.loads(pickle.dumps(shards))
    assert other.read(4) == before
    assert (other.fingerprint, len(other), other.manifest) == (shards.fingerprint, 7, shards.manifest)
    assert len(pickle.dumps(shards)) < 2000
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(shards.read, range(7)) == [shards.read(row) for row in range(7)]


def test_many_shards_do_not_hold_many_files(made: Path) -> None:
    shards = ShardSet(made)
    shards._files._open.most = 2
    for row in (0, 3, 6, 0, 3, 6):
        assert shards.read(row).row == row
    ours = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_link(name)]  # noqa: PTH115, PTH208
    assert sum(str(made) in path and path.endswith(".tar") for path in ours) <= 2


def _is_link(name: str) -> bool:
    return Path(f"/proc/self/fd/{name}").is_symlink()


def test_ten_million_rows_open_at_once(made: Path, tmp_path: Path) -> None:
    rows = 10_000_000
    dtype = index_dtype(12, ("video", "json"))
    np.lib.format.open_memmap(tmp_path / INDEX, mode="w+", dtype=dtype, shape=(rows,)).flush()  # sparse: zeros
    manifest = json.loads((made / MANIFEST).read_text())
    manifest["counts"]["records"] = rows
    manifest["shards"] = []
    manifest["index"]["bytes"] = (tmp_path / INDEX).stat().st_size
    (tmp_path / MANIFEST).write_bytes(to_json(manifest))
    start = time.perf_counter()
    assert len(ShardSet(tmp_path)) == rows
    assert time.perf_counter() - start < 2


def test_fingerprint_follows_the_content(made: Path, clips: Path, tmp_path: Path) -> None:
    write_shards(samples(clips)[:6], tmp_path / "six", arguments=ARGUMENTS, shard_samples=3)
    moved = Path(shutil.copytree(made, tmp_path / "moved"))
    assert ShardSet(moved).fingerprint == ShardSet(made).fingerprint != ShardSet(tmp_path / "six").fingerprint


def test_damage_is_met_at_opening(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        ShardSet(tmp_path / "nothing")
    os.truncate(copy / "shard-000001.tar", 5000)
    with pytest.raises(
        UserError, match=r"shard-000001.tar has 5000 bytes, the manifest says \d+ bytes.*copy the folder"
    ):
        ShardSet(copy)
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar has no file"):
        ShardSet(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is not JSON"):
        ShardSet(copy)
    (copy / MANIFEST).write_text('{"format": "vlm-shards", "version": 99}')
    with pytest.raises(UserError, match="format version 99"):
        ShardSet(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds no shard set"):
        ShardSet(copy)
    (copy / UNFINISHED).mkdir()
    with pytest.raises(UserError, match=r"is unfinished.*run the same command again"):
        ShardSet(copy)


def test_damaged_index_is_met_at_opening(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    index = np.load(copy / INDEX)
    np.save(copy / INDEX, index[:5])
    with pytest.raises(UserError, match=r"index.npy has \d+ bytes"):
        ShardSet(copy)
    manifest["index"]["bytes"] = (copy / INDEX).stat().st_size
    (copy / MANIFEST).write_bytes(to_json(manifest))
    with pytest.raises(UserError, match="5 rows"):
        ShardSet(copy)
    np.save(copy / INDEX, np.zeros(7))
    manifest["index"]["bytes"] = (copy / INDEX).stat().st_size
    (copy / MANIFEST).write_bytes(to_json(manifest))
    with pytest.raises(UserError, match="has columns"):
        ShardSet(copy)


def test_damage_after_opening_is_a_shard_error_that_names_shard_and_bytes(copy: Path) -> None:
    shards = ShardSet(copy)
    end = int(shards.index["offset"][4] + shards.index["nbytes"][4])
    with (copy / "shard-000001.tar").open("r+b") as file:
        file.seek(int(shards.index["json_offset"][3]))
        file.write(b"#")
        file.truncate(end - 600)
    assert shards.read(0).row == 0
    with pytest.raises(
        ShardError, match=r"shard-000001.tar, bytes 0 to \d+ \(record 'clip3'\): its annotation is not JSON"
    ):
        shards.read(3)
    with pytest.raises(ShardError, match=rf"shard-000001.tar, bytes \d+ to {end} \(record 'clip4'\): only \d+ bytes"):
        shards.read(4)
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(ShardGoneError, match=r"copy/shard-000002.tar is gone: it was there when the set was opened"):
        shards.read(6)
    shutil.copy(copy / "shard-000000.tar", copy / "shard-000001.tar")
    with pytest.raises(ShardError, match=r"'clip0.mp4' is there; tar and index are not of one set"):
        pickle.loads(pickle.dumps(shards)).read(3)
    (copy / "shard-000001.tar").write_bytes(b"secret words " * 2000)
    with pytest.raises(ShardError, match="no record begins there") as caught:
        pickle.loads(pickle.dumps(shards)).read(3)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("index",), None, "`index` has no name 'index.npy'"),
        (("index", "name"), "../index.npy", "`index` has no name 'index.npy'"),
        (("index", "bytes"), "many", "`index` has no name"),
        (("index", "sha256"), "0" * 64, r"index.npy has sha256 \w{16}…, the manifest says 0{16}…"),
        (("shards",), {}, "`shards` is not a list"),
        (("shards", 1), "shard-000001.tar", "at place 1"),
        (("shards", 1, "name"), "../../../etc/passwd", "no name 'shard-000001.tar'.*at place 1"),
        (("shards", 1, "name"), "shard-000000.tar", "no name 'shard-000001.tar'"),
        (("shards", 2, "bytes"), -1, "at place 2"),
        (("shards", 2, "sha256"), None, "at place 2"),
        (("counts",), [], "`counts` has no numbers"),
        (("counts", "records"), True, "`counts` has no numbers"),
        (("members",), "json", "`members` is not a list"),
        (("members",), ["video"], "`members` has no 'json'"),
        (("members",), ["video", "json", "json"], "a name twice"),
    ],
)
def test_a_manifest_that_nobody_wrote_is_refused_by_its_flaw(copy: Path, place: Any, value: Any, says: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    inner = manifest
    for step in place[:-1]:
        inner = inner[step]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    (copy / MANIFEST).write_bytes(to_json(manifest))
    with pytest.raises(UserError, match=f"{copy}.*{says}"):
        ShardSet(copy)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("shard", 7, "it lies in shard 7 of 3"),
        ("shard", -1, "it lies in shard -1 of 3"),
        ("nbytes", 2**62, r"it has 4611686018427387904 bytes from \d+ on in a shard of \d+"),
        ("nbytes", 0, "it has 0 bytes"),
        ("offset", -512, "it has .* bytes from -512"),
        ("offset", 2**62, "bytes from 4611686018427387904"),
        ("video_nbytes", 2**40, "its video has 1099511627776 bytes from"),
        ("json_offset", 2**40, "its json has .* outside of it"),
        ("json_offset", 0, "its json has .* outside of it"),
        ("json_nbytes", -1, "its json has -1 bytes"),
        ("num_frames", 0, "0 frames"),
        ("num_frames", 2**31 - 1, "2147483647 frames are in"),
        ("key", b"\xff%FF", "tar and index are not of one set"),
    ],
)
def test_a_row_that_cannot_be_true_is_a_shard_error(made: Path, column: str, value: Any, says: str) -> None:
    shards = ShardSet(made)
    shards.index = shards.index.copy()
    shards.index[column][1] = value
    with pytest.raises(ShardError, match=says):
        shards.read(1)
    assert shards.key(1)
    assert shards.shard_name(1).startswith("shard-")
    assert shards.read(2).row == 2


def test_an_index_of_other_types_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    index = np.load(copy / INDEX)
    types = [(name, "<f4" if name == "shard" else index.dtype[name]) for name in index.dtype.names]
    np.save(copy / INDEX, index.astype(types))
    manifest["index"]["bytes"] = (copy / INDEX).stat().st_size
    (copy / MANIFEST).write_bytes(to_json(manifest))
    with pytest.raises(UserError, match="has columns"):
        ShardSet(copy)


def test_a_large_index_is_not_hashed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = np.load(copy / INDEX)
    index["fps"][0] = 99
    np.save(copy / INDEX, index)
    with pytest.raises(UserError, match=r"index\.npy has sha256"):
        ShardSet(copy)
    monkeypatch.setattr(shard_set, "HASHED_BYTES", 100)
    assert ShardSet(copy).read(0).fps == 99


# Writing -------------------------------------------------------------------------------------------------------------


def test_the_bytes_do_not_depend_on_the_number_of_workers(made: Path, clips: Path, tmp_path: Path) -> None:
    write_shards(samples(clips), tmp_path / "three", arguments=ARGUMENTS, shard_samples=3, workers=3)
    assert contents(tmp_path / "three") == contents(made)


def test_shards_are_cut_by_bytes(clips: Path, tmp_path: Path) -> None:
    sizes = [sample.video.stat().st_size for sample in samples(clips)]
    write_shards(samples(clips), tmp_path / "set", arguments=ARGUMENTS, check=False, shard_size=sizes[0] + sizes[1])
    assert [ShardSet(tmp_path / "set").shard_name(row) for row in (0, 1, 2)] == ["shard-000000.tar"] * 2 + [
        "shard-000001.tar"
    ]


def bad_items(folder: Path) -> list[Sample | Rejected]:
    """Good clips, damaged ones, unusual ones, a missing file, a double key and a bad row."""
    folder.mkdir()
    files = {f"bad_{name}": data for name, data in damaged().items()}
    files |= {
        "good": encode(pictures(9)),
        "truncated": truncated(pictures(48, 160, 120))[1],
        "webm_named_mp4": encode(pictures(8), container="webm", codec="libvpx"),
        "jpeg_named_mp4": jpeg(pictures(1)[0]),
        "one_frame": encode(pictures(1)),
        "one_pixel": encode(pictures(5, 1, 1), pix_fmt="yuv444p"),
    }
    items: list[Sample | Rejected] = []
    for name, data in files.items():
        (folder / f"{name}.mp4").write_bytes(data)
        items.append(Sample(key=name, video=folder / f"{name}.mp4", annotation={"label": 0}))
    items.append(Sample(key="missing", video=folder / "missing.mp4"))
    items.append(Sample(key="good", video=folder / "one_frame.mp4"))
    items.append(Rejected("row 7", "list.csv row 7: no label", "list.csv"))
    items.append(Sample(key="not_json", video=folder / "good.mp4", annotation={"label": float("nan")}))
    return items


def test_what_does_not_decode_is_in_the_manifest_with_its_reason(tmp_path: Path) -> None:
    items = bad_items(tmp_path / "clips")
    manifest = write_shards(items, tmp_path / "set", arguments=ARGUMENTS).manifest
    reasons = {row["key"]: row["reason"] for row in manifest["rejected"]}
    expected = {
        "bad_zero_bytes": "empty file",
        "bad_html": "HTML",
        "bad_lfs_pointer": "git-lfs",
        "bad_audio_only": "no video stream",
        "bad_no_index": "without its index",
        "missing": "No such file",
        "good": "duplicate key",
        "row 7": "no label",
        "not_json": "cannot be written as JSON",
    }
    assert reasons.keys() == expected.keys()
    assert all(expected[key] in reason for key, reason in reasons.items())
    assert manifest["rejected"][0]["file"].endswith("bad_zero_bytes.mp4")
    shards = ShardSet(tmp_path / "set")
    kept = {record.key: record for record in map(shards.read, range(len(shards)))}
    assert kept.keys() == {"good", "truncated", "webm_named_mp4", "jpeg_named_mp4", "one_frame", "one_pixel"}
    assert (kept["good"].num_frames, kept["one_frame"].num_frames, kept["jpeg_named_mp4"].num_frames) == (9, 1, 1)
    assert kept["one_pixel"].decoders == ("pyav",)
    assert 0 < kept["truncated"].num_frames < 48
    warnings = {row["key"]: row["warning"] for row in manifest["warnings"]}
    assert warnings.keys() == {"truncated", "jpeg_named_mp4"}
    read = webdataset.WebDataset(str(tmp_path / "set" / "shard-000000.tar"), shardshuffle=False)
    extensions = {item["__key__"]: next(name for name in item if name[0] != "_" and name != "json") for item in read}
    assert (extensions["webm_named_mp4"], extensions["jpeg_named_mp4"], extensions["good"]) == ("webm", "jpg", "mp4")


def test_without_the_check_only_missing_files_are_rejected(tmp_path: Path) -> None:
    items = bad_items(tmp_path / "clips")
    manifest = write_shards(items, tmp_path / "set", arguments=ARGUMENTS, check=False).manifest
    assert [row["key"] for row in manifest["rejected"]] == ["missing", "good", "row 7", "not_json"]
    shards = ShardSet(tmp_path / "set")
    assert (len(shards), set(shards.num_frames.tolist()), manifest["hours"]) == (11, {-1}, None)
    assert (shards.read(0).key, shards.read(0).video, shards.read(0).decoders) == ("bad_zero_bytes", b"", ("pyav",))
    assert "outside_root" not in manifest["counts"]


@pytest.mark.parametrize("check", [True, False])
def test_what_lies_outside_the_root_is_looked_at_and_counted(clips: Path, tmp_path: Path, check: bool) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "passwd").write_text("root:x:0:0:secret words\n")
    (elsewhere / "keys").write_bytes(bytes(range(256)) * 8)
    (root / "link.mp4").symlink_to(elsewhere / "passwd")
    (root / "moved.mp4").symlink_to(clips / "clip0.mp4")
    (root / "inside.mp4").write_bytes((clips / "clip1.mp4").read_bytes())
    (root / "alias.mp4").symlink_to("inside.mp4")
    (root / "bad.mp4").write_text("not a video, but the user's own\n")
    paths = {"up": root / "../elsewhere/passwd", "binary": elsewhere / "keys"}
    paths |= {name: root / f"{name}.mp4" for name in ("link", "moved", "inside", "alias", "bad")}
    items = [Sample(key=key, video=path, annotation={"label": 0}) for key, path in paths.items()]
    (tmp_path / "door").symlink_to(root)  # a root that is itself a link
    manifest = write_shards(items, tmp_path / "set", arguments=ARGUMENTS, check=check, root=tmp_path / "door").manifest
    shards = ShardSet(tmp_path / "set")
    kept = {shards.key(row) for row in range(len(shards))}
    assert kept == {"moved", "inside", "alias"} | (set() if check else {"bad"})
    assert manifest["counts"]["outside_root"] == 1
    reasons = {row["key"]: row["reason"] for row in manifest["rejected"]}
    assert reasons.keys() == {"up", "link", "binary"} | ({"bad"} if check else set())
    assert check or all("outside --root" in reason for reason in reasons.values())
    assert "secret" not in json.dumps(manifest)
    assert not any(b"secret" in content for content in contents(tmp_path / "set").values())


def test_nothing_left_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    for items, reason in (
        ([], "lists no item"),
        ([Sample(key="a", video=tmp_path / "b.mp4")], "all 1 items are rejected.*No such file"),
        ([Sample(key="a", video=tmp_path / "a.mp4")], "all 1 items are rejected.*empty file"),
    ):
        with pytest.raises(UserError, match=reason):
            write_shards(items, tmp_path / "set", arguments=ARGUMENTS)
        assert not (tmp_path / "set").exists()


def test_finished_folder_is_left_as_it_is(copy: Path, clips: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copy.iterdir()}
    written = write_shards(samples(clips), copy, arguments=ARGUMENTS, shard_samples=3)
    assert written.already_complete
    assert before == {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copy.iterdir()}


def test_another_plan_is_refused_with_what_differs(copy: Path, clips: Path, tmp_path: Path) -> None:
    def again(items: list[Sample], **options: Any) -> None:
        write_shards(items, copy, **{"arguments": ARGUMENTS, "shard_samples": 3, **options})

    before = contents(copy)
    with pytest.raises(UserError, match="shard_samples was 3, now 4"):
        again(samples(clips), shard_samples=4)
    with pytest.raises(UserError, match="split was 'train', now 'val'"):
        again(samples(clips), arguments={**ARGUMENTS, "split": "val"})
    with pytest.raises(UserError, match="7 items were listed, now 6"):
        again(samples(clips)[:6])
    changed = samples(clips)
    changed[2].annotation["label"] = 0
    with pytest.raises(UserError, match="annotations, file sizes or missing files have changed"):
        again(changed)
    assert contents(copy) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(thesis.txt\)"):
        write_shards(samples(clips), tmp_path / "full", arguments=ARGUMENTS)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_stopped_run_continues_with_what_is_missing(made: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"

    def stop(stage: str, done: int, total: int | None) -> None:
        if (out / UNFINISHED / "shard-000001.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(samples(clips), out, arguments=ARGUMENTS, shard_samples=3, progress=stop)
    with pytest.raises(UserError, match="is unfinished"):
        ShardSet(out)
    assert not list((out / UNFINISHED).glob("*.tmp-*"))
    with pytest.raises(UserError, match="shard_samples was 3, now 2"):
        write_shards(samples(clips), out, arguments=ARGUMENTS, shard_samples=2)
    first = (out / "shard-000000.tar").stat().st_ino
    told = []
    write_shards(samples(clips), out, arguments=ARGUMENTS, shard_samples=3, progress=lambda *event: told.append(event))
    assert (out / "shard-000000.tar").stat().st_ino == first
    assert ("write", 6, 7) in told
    assert ("write", 0, 7) not in told
    assert contents(out) == contents(made)


KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from test_shards import ARGUMENTS, samples
from vlm.data.shards import write_shards
out = Path(sys.argv[2])

def die(stage, done, total):
    if list(out.glob("shard-*.tar")):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    write_shards(samples(Path(sys.argv[1])), out, arguments=ARGUMENTS, shard_samples=1, workers=2, progress=die)
"""


def test_killed_run_continues_to_the_same_bytes(clips: Path, tmp_path: Path) -> None:
    """kill -9 when the first shard is there; also the lock and the workers must not be in the way afterwards, nor is
    anything left among temporary files."""
    script, scratch = tmp_path / "run.py", tmp_path / "scratch"
    scratch.mkdir()
    script.write_text(KILLED)
    options: dict[str, Any] = {"arguments": ARGUMENTS, "shard_samples": 1, "workers": 2}
    write_shards(samples(clips), tmp_path / "whole", **options)
    command = [sys.executable, str(script), str(clips), str(tmp_path / "killed")]
    assert subprocess.run(command, env={**os.environ, "TMPDIR": str(scratch)}).returncode == -signal.SIGKILL
    assert not list(scratch.iterdir())
    assert list((tmp_path / "killed").glob("shard-*.tar"))
    assert not (tmp_path / "killed" / MANIFEST).exists()
    write_shards(samples(clips), tmp_path / "killed", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_two_writers_at_once_are_refused(clips: Path, tmp_path: Path) -> None:
    def second() -> Iterator[Sample]:
        yield samples(clips)[0]
        with pytest.raises(UserError, match="another process is writing"):
            write_shards(samples(clips), tmp_path / "set", arguments=ARGUMENTS)

    assert len(write_shards(second(), tmp_path / "set", arguments=ARGUMENTS).manifest["shards"]) == 1


def hanging(clips: Path, folder: Path) -> Iterator[Sample]:
    """Three clips; after they are planned, reading the second waits for ever, as on a dead network mount."""
    folder.mkdir()
    for number in range(3):
        shutil.copy(clips / f"clip{number}.mp4", folder)
        yield Sample(key=f"clip{number}", video=folder / f"clip{number}.mp4", annotation={})
    (folder / "clip1.mp4").unlink()
    os.mkfifo(folder / "clip1.mp4")


def test_clip_that_hangs_is_rejected_and_the_run_goes_on(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pool, "SECONDS_PER_ITEM", 2.0)
    manifest = write_shards(hanging(clips, tmp_path / "clips"), tmp_path / "set", arguments=ARGUMENTS).manifest
    assert manifest["counts"] == {"listed": 3, "records": 2, "rejected": 1, "warnings": 0}
    assert manifest["rejected"][0]["key"] == "clip1"
    assert "took more than" in manifest["rejected"][0]["reason"]


def test_clip_that_kills_its_process_is_rejected_at_the_second_time(clips: Path, tmp_path: Path) -> None:
    killed = []

    def kill(stage: str, done: int, total: int | None) -> None:
        worker = next(iter(multiprocessing.active_children()), None)
        if stage == "write" and done == 1 and worker is not None and len(killed) < 2 and worker.pid not in killed:
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    items = hanging(clips, tmp_path / "clips")
    manifest = write_shards(items, tmp_path / "set", arguments=ARGUMENTS, progress=kill).manifest
    assert len(killed) == 2
    assert "ended its process (SIGKILL), 2 times" in manifest["rejected"][0]["reason"]
    assert [ShardSet(tmp_path / "set").key(row) for row in range(2)] == ["clip0", "clip2"]


def test_full_disk_is_one_readable_error(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"

    def spoil(stage: str, done: int, total: int | None) -> None:
        if stage == "write" and not (out / "shard-000000.tar").exists():
            (out / "shard-000000.tar").mkdir()  # renaming a file onto a folder is refused by the system

    with pytest.raises(UserError, match=r"shard-000000.tar cannot be written: .*directory"):
        write_shards(samples(clips), out, arguments=ARGUMENTS, progress=spoil)
