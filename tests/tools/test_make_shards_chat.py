"""Shards of cut-up videos from the command line: their chat, counted by the index, and what is warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoded import encode, pictures
from safetensors.torch import save_file

from tools import make_shards
from vlm.data.shards import ShardSet

TOKENIZER = Path(__file__).resolve().parents[1] / "goldens" / "tiny_llama_tokenizer" / "tokenizer.model"
LABELS = {"cam01": "1-4 SIL \n4-12 pour_milk \n", "cam02": "1-9 SIL \n9-20 pour_milk \n", "stereo": "1-10 SIL \n"}


def breakfast(root: Path) -> Path:
    """Two activities of one person; each video has 12 frames."""
    for camera, labels in LABELS.items():
        name = "P03_milk_ch1" if camera == "stereo" else "P03_milk"
        folder = root / "P03" / camera
        folder.mkdir(parents=True)
        (folder / f"{name}.avi").write_bytes(encode(pictures(12), container="avi", codec="mpeg4"))
        (folder / f"{name}.avi.labels").write_text(labels)
    (root / "valid.txt").write_text("/P03/cam02/P03_milk.avi\n")
    return root


def test_breakfast(tmp_path: Path) -> None:
    root, out = breakfast(tmp_path / "breakfast"), tmp_path / "out"
    arguments = ["breakfast", "--root", str(root), "--split", "all", "--out", str(out), "--workers", "1"]
    assert make_shards.main([*arguments, "--tokenizer", str(TOKENIZER)]) == 0
    shards = ShardSet(out)
    records = [shards.read(row) for row in range(len(shards))]
    assert [record.key for record in records] == [f"P03_{camera}_P03_milk" for camera in ("cam01", "cam02", "stereo01")]
    assert shards.num_frames.tolist() == [12, 12, 12]
    assert shards.num_questions.tolist() == [len(record.annotation["chat"]) for record in records]
    counted = shards.counted("chat")
    assert counted is not None
    assert (counted > 0).sum(1).tolist() == shards.num_questions.tolist()
    assert records[0].annotation["chat"][0] == {
        "kind": "segments",
        "question": "List down all the segments. action is milk",
        "answer": "<t:0>-<t:4> SIL\n<t:4>-<t:12> pour milk",
    }
    assert [row["warning"] for row in shards.manifest["warnings"]] == [
        "segments end at frame 20, but the video has 12: what is beyond counts as its end; questions about "
        "it that are left out: 1",
        "segments end at frame 10 of 12: the last 2 are in none",
    ]
    assert "notes" not in shards.manifest["arguments"]


def test_the_forks_split_is_made_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = breakfast(tmp_path / "breakfast"), tmp_path / "out"
    arguments = ["breakfast", "--root", str(root), "--split", "train.fork", "--out", str(out), "--workers", "1"]
    for _ in range(2):  # a second call says it again
        assert make_shards.main(arguments) == 0
        assert "make_shards: the published fork's split leaks: 1 of 1 test videos" in capsys.readouterr().err
    assert ShardSet(out).manifest["arguments"]["notes"]["leak"]["same_performance_in_training"] == 1


def test_salads_from_features_alone(tmp_path: Path) -> None:
    """As tools/extract_features.py writes them: several tensors by name, in one file among the annotations."""
    root, out = tmp_path / "salads", tmp_path / "out"
    (root / "groundTruth").mkdir(parents=True)
    (root / "groundTruth" / "rgb-01-1.txt").write_text("action_start\ncut_tomato\ncut_tomato\n")
    tensors = {f"{name}/rgb-01-1": torch.ones(4, 3).half() for name in ("clip_pooled", "clip_cls")}
    settings = {"tensors": {"clip_pooled": {}, "clip_cls": {}}}
    save_file(tensors, tmp_path / "clip.safetensors", metadata={"settings": json.dumps(settings)})
    arguments = ["salads", "--root", str(root), "--split", "all", "--out", str(out), "--workers", "1"]
    assert make_shards.main([*arguments, "--annotations", str(tmp_path / "clip.safetensors")]) == 0
    shards = ShardSet(out)
    record = shards.read(0)
    assert record.video is None
    assert set(record.members) == {"clip_pooled.safetensors", "clip_cls.safetensors"}
    assert record.annotation["num_frames"] == 3
    assert shards.num_questions.tolist() == [len(record.annotation["chat"])]
