"""tools/doctor.py ledger: what still is bad, what can be read again, what its set no longer has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tools import hanging_checks
from tools import doctor
from vlm.data import ledger
from vlm.data.shards import ShardSet, write_shards
from vlm.sources import shapes

WAS = "cut short: an mp4 without its index"


@pytest.fixture
def shards(shape_shards, tmp_path) -> ShardSet:
    return ShardSet(shutil.copytree(shape_shards / "train", tmp_path / "train"))


def row_of(shards: ShardSet, at: int, /, **changes) -> dict:
    entry = shards.index[at]
    row = {"key": shards.key(at), "shards": str(shards.path), "shard": shards.shard_name(at),
           "offset": int(entry["offset"]), "nbytes": int(entry["nbytes"]), "reason": WAS, "attempts": 1,
           "replaced_by": shards.key(0), "position": 7, "step": 2}  # fmt: skip
    return {**row, **changes}


def written(tmp_path: Path, rows: list[dict]) -> str:
    path = tmp_path / "quarantine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def poison(shards: ShardSet, at: int) -> None:
    """Overwrite the video of a record; sizes stay."""
    entry = shards.index[at]
    with (Path(shards.path) / shards.shard_name(at)).open("r+b") as file:
        file.seek(int(entry["video_offset"]))
        file.write(b"\0" * int(entry["video_nbytes"]))


def check(capsys, *arguments: str) -> tuple[int, list[str]]:
    status = doctor.main(["ledger", *arguments])
    return status, capsys.readouterr().out.splitlines()


def test_readable_again(shards, tmp_path, capsys):
    rows = [row_of(shards, 9), row_of(shards, 3), row_of(shards, 9, step=8)]
    status, lines = check(capsys, written(tmp_path, rows))
    assert status == 0
    entry = shards.index[9]
    place = f"{shards.path}/shard-000000.tar, bytes {entry['offset']} to {entry['offset'] + entry['nbytes']}"
    assert lines[0] == f"readable now: {shards.key(9)} ({place}): it can be used (was: {WAS})"
    assert lines[1].startswith(f"readable now: {shards.key(3)} ")
    assert lines[2].endswith("quarantine.jsonl: 2 records: 0 still bad, 2 readable now, 0 changed since")
    assert len(lines) == 3


def test_still_bad_and_gone(shards, tmp_path, capsys):
    poison(shards, 4)
    rows = [row_of(shards, 4), row_of(shards, 5), row_of(shards, 6, key="nobody")]
    status, lines = check(capsys, written(tmp_path, rows))
    assert status == 1
    assert lines[0].startswith(f"still bad: {shards.key(4)} ")
    assert "not a video that FFmpeg knows" in lines[0]
    assert lines[1].startswith("readable now: ")
    assert lines[2].startswith("changed since: nobody ")
    assert lines[2].endswith(f"{shards.path} no longer has a record of this key (was: {WAS})")
    assert lines[3].endswith("3 records: 1 still bad, 1 readable now, 1 changed since")


def test_frames_that_are_lost_are_bad(shards, tmp_path, capsys):
    index = shards.index.copy()
    index["num_frames"][2] += 3
    shards.index = index
    found = ledger._Checks({"": shards}).load((0, ("", 2)), ledger_watch())
    assert found[0] == "24 frames decode, the index says 27"
    assert found[1]["pyav"] == "24 frames"


def ledger_watch():
    from vlm.data.watch import Unwatched

    return Unwatched()


def test_json(shards, tmp_path, capsys):
    poison(shards, 4)
    path = written(tmp_path, [row_of(shards, 4), row_of(shards, 5)])
    status, lines = check(capsys, path, "--json")
    told = json.loads("\n".join(lines))
    assert status == 1
    assert {name: told[name] for name in ("ledger", "bad", "readable", "changed")} == {
        "ledger": path, "bad": 1, "readable": 1, "changed": 0,
    }  # fmt: skip
    bad, good = told["rows"]
    assert (bad["key"], bad["state"], bad["was"]) == (shards.key(4), "bad", WAS)
    assert "not a video that FFmpeg knows" in bad["decoders"]["pyav"]
    assert bad["now"].startswith(bad["decoders"]["pyav"])
    assert "shard-000000.tar is not what was written: it has sha256 " in bad["now"]
    assert good["decoders"]["pyav"] == "24 frames"
    assert set(good["decoders"]) == set(ShardSet(shards.path).read(5).decoders)


def test_a_set_written_anew(shards, tmp_path, capsys):
    """The clips before it are gone, so a record lies elsewhere; some are there no more."""
    again = tmp_path / "again"
    shapes.render(tmp_path / "corpus", num_train=16, num_test=8, seed=0, workers=1)
    items = [item for item in shapes.read(tmp_path / "corpus", "train", ()) if item.key != shards.key(0)]
    kept = {item.key for item in items}
    write_shards(items, again, arguments={"source": "shapes", "split": "train"})
    at = next(at for at in range(1, len(shards)) if shards.key(at) in kept)
    status, lines = check(capsys, written(tmp_path, [row_of(shards, at), row_of(shards, 0)]), "--shards", str(again))
    assert status == 0
    new = ShardSet(again)
    here = next(row for row in range(len(new)) if new.key(row) == shards.key(at))
    assert (
        f"the set was written anew; it can be used, at shard-000000.tar, bytes {new.index['offset'][here]}" in lines[0]
    )
    assert "no longer has a record of this key" in lines[1]
    assert "2 changed since" in lines[2]


def test_a_decoder_that_hangs_or_crashes_is_told(shards, tmp_path, capsys, monkeypatch):
    keys = {"hangs": shards.key(2), "crashes": shards.key(5), "decord": shards.key(7)}
    monkeypatch.setattr(ledger, "_Checks", hanging_checks.with_keys(keys))
    path = written(tmp_path, [row_of(shards, at) for at in (1, 2, 5, 7)])
    status, lines = check(capsys, path, "--json", "--seconds", "1.5", "--workers", "2")
    rows = json.loads("\n".join(lines))["rows"]
    assert status == 1
    assert [row["state"] for row in rows] == ["readable", "bad", "bad", "bad"]
    assert rows[1]["now"] == "took more than 1.5 s to load"
    assert rows[2]["now"] == "the process that loaded it died: SIGSEGV"
    assert rows[3]["now"] == "decord took more than 1.5 s to load"
    assert rows[3]["decoders"]["pyav"] == "24 frames"


def test_a_ledger_without_places(shards, tmp_path, capsys):
    """As it was written before it had them."""
    rows = [{name: row_of(shards, 3)[name] for name in ("key", "shard", "reason", "replaced_by", "position", "step")}]
    path = written(tmp_path, rows)
    assert doctor.main(["ledger", path]) == 2
    assert "--shards DIR" in capsys.readouterr().err
    status, lines = check(capsys, path, "--shards", str(shards.path))
    assert (status, lines[0].split(":")[0]) == (0, "readable now")


def test_a_set_that_cannot_be_opened_is_bad(shards, tmp_path, capsys):
    rows = [row_of(shards, 1, shards=str(tmp_path / "gone")), row_of(shards, 1)]
    status, lines = check(capsys, written(tmp_path, rows))
    assert status == 1
    assert lines[0].startswith("still bad: ")
    assert "no such folder" in lines[0]
    assert lines[1].startswith("readable now: ")


def test_an_empty_ledger(tmp_path, capsys):
    assert check(capsys, written(tmp_path, []))[0] == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "line 1 is not a line of a quarantine ledger"),
        ('{"key": "a"}\n', "line 1 is not a line"),
        ('{"key": 1, "shards": "a", "shard": "b"}\n', "line 1 is not a line"),
        ("[]\n", "line 1 is not a line"),
    ],
)
def test_what_is_no_ledger(tmp_path, capsys, content, says):
    path = tmp_path / "quarantine.jsonl"
    path.write_text(content)
    assert doctor.main(["ledger", str(path)]) == 2
    assert says in capsys.readouterr().err
    assert doctor.main(["ledger", str(tmp_path / "none")]) == 2
    assert "none: cannot be read (No such file or directory)" in capsys.readouterr().err
    assert doctor.main(["ledger", str(path), "--seconds", "0"]) == 2
