"""A run that is killed and goes on with another number of processes sees the same batches, to the key and the order."""

import json
import shutil
from pathlib import Path

import pytest
from launching import run, train_arguments
from test_train import kill_after_step, rows

from vlm.data.shards import ShardSet

SETTINGS = ["steps=36", "checkpoint_every=2", "global_batch_size=7", "inputs.mixup=0", "inputs.cutmix=0"]
SETTINGS += ["eval.at_end=false", "data.quarantine_share=0.2", "seed=11"]


def spoilt(shards: Path, folder: Path) -> Path:
    """The shards with one clip that no decoder can read."""
    copy = shutil.copytree(shards, folder)
    entry = ShardSet(copy).index[3]
    with (copy / f"shard-{entry['shard']:06d}.tar").open("r+b") as file:
        file.seek(int(entry["video_offset"]))
        file.write(bytes(int(entry["video_nbytes"])))
    return copy


@pytest.mark.slow
def test_two_then_three_then_one_process(shape_shards: Path, tmp_path: Path) -> None:
    """With a weighted mix, repeated augmentation, a broken clip, and a batch that no number of processes divides."""
    broken = spoilt(shape_shards / "train", tmp_path / "broken")
    mix = f"data.shards={broken}:2,{shape_shards / 'test'}:1"
    whole = train_arguments(shape_shards, tmp_path / "whole", *SETTINGS, mix)
    run(whole, processes=1)
    pieces = train_arguments(shape_shards, tmp_path / "pieces", *SETTINGS, mix)
    # The first checkpoint, of step 2, is complete when the next one is begun, at step 4.
    kill_after_step([*pieces, "data.workers=1"], tmp_path / "pieces", 6, 2)
    kill_after_step(pieces, tmp_path / "pieces", 22, 3)
    run([*pieces, "data.workers=2"], processes=1)
    first, second = rows(tmp_path / "whole"), rows(tmp_path / "pieces")
    assert [row["step"] for row in second] == list(range(1, 37))
    for name in ("batch_digest", "epoch", "quarantined"):
        assert [row[name] for row in second] == [row[name] for row in first], name
    # dropout-free, so only sums in another order differ
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-4)
    worlds = [row["world_size"] for row in json.loads((tmp_path / "pieces" / "recipe.json").read_text())["resumed"]]
    assert worlds == [3, 1]
    ledgers = [
        [json.loads(line) for line in (tmp_path / name / "quarantine.jsonl").read_text().splitlines()]
        for name in ("whole", "pieces")
    ]
    assert ledgers[0] == ledgers[1] != []
    assert {row["key"] for row in ledgers[0]} == {ShardSet(broken).key(3)}
