"""Clips that cannot be decoded at run time: named in a ledger, replaced, counted, and too many stop the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from encoded import encode, pictures
from launching import run, train_arguments

from vlm.config import override
from vlm.data.loader import MicroBatch
from vlm.data.shards import write_shards
from vlm.data.video import DecodeError, inspect
from vlm.distributed import alone
from vlm.recipe import load
from vlm.run.quarantine import Quarantine
from vlm.run.streams import open_stream
from vlm.sources import kinetics
from vlm.types import Batch, Incident, UserError


def listed(folder: Path, videos: list[Path]) -> Path:
    """A `path label` list of videos, sharded without looking into them."""
    rows = [f"{video.name} {number % 8}" for number, video in enumerate(videos)]
    root = folder / "videos"
    root.mkdir()
    for video in videos:
        (root / video.name).write_bytes(video.read_bytes())
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    items = kinetics.read(root, "train", [folder / "train.csv"])
    write_shards(items, folder / "shards" / "train", arguments={"source": "kinetics", "split": "train"}, check=False)
    return folder / "shards"


def undecodable(videos: list[Path]) -> set[str]:
    names = set()
    for video in videos:
        try:
            inspect(video)
        except DecodeError:
            names.add(video.stem)
    return names


def epoch(shards: Path, run_dir: Path, *settings: str, expect: int = 0) -> str:
    one_epoch = ["epochs=1", "steps=none", "global_batch_size=6", "eval.at_end=false"]
    return run(train_arguments(shards, run_dir, *one_epoch, *settings), expect=expect)


def ledger(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture
def clips(tmp_path) -> list[Path]:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(17):
        (folder / f"good{number:02d}.mp4").write_bytes(encode(pictures(12, seed=number)))
    whole = encode(pictures(12, seed=99))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.mp4").write_bytes(b"<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    (folder / "head.mp4").write_bytes(whole[: len(whole) // 2])
    return sorted(folder.iterdir())


def test_an_epoch_has_exactly_the_undecodable_clips_in_its_ledger(clips, tmp_path):
    bad = undecodable(clips)
    assert bad == {"empty", "page", "head"}
    shards = listed(tmp_path, clips)
    printed = epoch(shards, tmp_path / "run", "data.quarantine_share=0.2")
    rows = ledger(tmp_path / "run")
    assert {row["key"] for row in rows} == bad
    assert len(rows) == len(bad), "one line a clip"
    assert all(row["reason"] and row["shard"] and row["replaced_by"] not in bad for row in rows)
    assert all(f"quarantined {key}" in printed for key in bad)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["quarantined"] == len(bad)


def test_shards_may_move_between_two_starts(shape_shards, tmp_path):
    """What was met before is known under its new place, and counts against the ceiling of its shard."""
    world, moved = alone(), tmp_path / "elsewhere" / "train"
    shutil.copytree(shape_shards / "train", moved)
    recipe = override(
        load("vit_llama.debug"), [f"data.shards={moved}", f"run_dir={tmp_path}", "data.quarantine_share=0.04"]
    )
    stream = open_stream(recipe)
    keys, shard = [stream.sets[0].samples.shards.key(row) for row in range(2)], "shard-000000.tar"
    (tmp_path / "quarantine.jsonl").write_text(
        json.dumps({"shards": "old/train", "shard": shard, "key": keys[0]}) + "\n"
    )
    quarantine = Quarantine(recipe, stream, [("old/train", shard, keys[0])], world)
    assert quarantine.known == [(str(moved), shard, keys[0])]
    assert [row["key"] for row in ledger(tmp_path)] == [keys[0]]

    def incident(key: str) -> MicroBatch:
        met = Incident(key, str(moved), shard, 0, 0, "cut", 1, "other", 0)
        batch = Batch(keys=("other",), video=torch.zeros(1), label=torch.zeros(1), incidents=(met,))
        return MicroBatch(batch, 1)

    quarantine.add([incident(keys[0])], 5)
    assert len(quarantine.known) == 1, "it was known"
    with pytest.raises(UserError, match=rf"{moved}/{shard}: 2 of "):
        quarantine.add([incident(keys[1])], 6)


def test_too_many_stop_the_run_and_name_the_list(clips, tmp_path):
    printed = epoch(listed(tmp_path, clips), tmp_path / "run", "data.quarantine_share=0.08", expect=2)
    assert "quarantine_share" in printed
    assert str(tmp_path / "run" / "quarantine.jsonl") in printed
    assert "Traceback" not in printed


def test_two_processes_keep_one_ledger(clips, tmp_path):
    shards = listed(tmp_path, clips)
    settings = ["epochs=1", "steps=none", "global_batch_size=6", "eval.at_end=false", "data.quarantine_share=0.2"]
    run(train_arguments(shards, tmp_path / "run", *settings), processes=2)
    assert sorted(row["key"] for row in ledger(tmp_path / "run")) == sorted(undecodable(clips))


def test_what_stops_one_rank_stops_all_with_its_reason(clips, tmp_path):
    shards = listed(tmp_path, clips)
    settings = ["epochs=1", "steps=none", "global_batch_size=2", "data.quarantine_share=0.5"]
    settings += ["data.substitutes=0", "eval.at_end=false"]
    printed = run(train_arguments(shards, tmp_path / "run", *settings), processes=2, expect=1)
    assert "1 records in a row could not be used" in printed
    assert "Connection closed" not in printed
    assert "distributed_c10d" not in printed


def test_real_clips_and_damaged_ones(realdata, tmp_path):
    videos = sorted((realdata / "videos").iterdir()) + sorted(
        p for p in (realdata / "bad").iterdir() if p.suffix == ".mp4"
    )
    bad = undecodable(videos)
    assert {"02_zero_bytes", "03_html_as", "07_audio_only", "12_lfs_pointer"} <= bad
    epoch(listed(tmp_path, videos), tmp_path / "run", "data.quarantine_share=0.2")
    assert {row["key"] for row in ledger(tmp_path / "run")} == bad
