"""Records with more than a video: features from a published file, whole files, counted questions, warnings."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from encoded import encode, pictures

from vlm.data.shards import ShardSet, write_shards
from vlm.types import Rejected, Sample, StoredArray
from vlm.weights import write_safetensors

ARGUMENTS = {"source": "test", "split": "train"}


@pytest.fixture
def features(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = {str(n): torch.randn(n + 1, 8, generator=torch.Generator().manual_seed(n)).half() for n in range(4)}
    torch.save(tensors, tmp_path / "clip.pth")
    write_safetensors(tmp_path / "clip.safetensors", tensors)
    return tensors


def samples(folder: Path, file: str = "clip.pth") -> list[Sample]:
    (folder / "2.mp4").write_bytes(encode(pictures(4)))
    (folder / "notes.txt").write_text("by hand")
    found = []
    for number in range(4):
        questions = [{"question": "why", "options": ["a", "b"], "answer": 0}] * number
        members: dict[str, Path | StoredArray] = {
            "features.npy": StoredArray(folder / file, str(number), (number + 1) * 16)
        }
        if number == 1:
            members["notes.txt"] = folder / "notes.txt"
        video = folder / "2.mp4" if number == 2 else None
        found.append(Sample(key=f"v{number}", video=video, annotation={"questions": questions}, members=members))
    found[3].members.clear()
    found[3].warnings = ("no features",)
    return found


def test_members_come_back(tmp_path: Path, features: dict[str, torch.Tensor]) -> None:
    written = write_shards(samples(tmp_path), tmp_path / "out", arguments=ARGUMENTS, shard_samples=2, workers=2)
    assert written.manifest["members"] == ["video", "features.npy", "notes.txt", "json"]
    assert written.manifest["counts"] == {"listed": 4, "records": 4, "rejected": 0, "warnings": 1, "questions": 6}
    assert written.manifest["warnings"] == [{"key": "v3", "file": "", "warning": "no features"}]
    shards = pickle.loads(pickle.dumps(ShardSet(tmp_path / "out")))
    assert shards.num_questions.tolist() == [0, 1, 2, 3]
    records = [shards.read(row) for row in range(4)]
    for record, (name, tensor) in zip(records[:3], features.items()):
        array = np.load(io.BytesIO(record.members["features.npy"]), allow_pickle=False)
        assert array.dtype == np.float16
        assert torch.equal(torch.from_numpy(array), tensor), name
    assert records[1].members["notes.txt"] == b"by hand"
    assert [sorted(record.members) for record in records] == [
        ["features.npy"], ["features.npy", "notes.txt"], ["features.npy"], []
    ]  # fmt: skip
    assert [record.video is not None for record in records] == [False, False, True, False]
    assert len(records[2].annotation["questions"]) == 2


def test_plain_webdataset_reads_the_members(tmp_path: Path, features: dict[str, torch.Tensor]) -> None:
    write_shards(samples(tmp_path), tmp_path / "out", arguments=ARGUMENTS)
    rows = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in rows] == ["v0", "v1", "v2", "v3"]
    assert set(rows[1]) >= {"features.npy", "notes.txt", "json"}
    assert np.load(io.BytesIO(rows[2]["features.npy"])).shape == (3, 8)


def test_features_may_come_from_safetensors(tmp_path: Path, features: dict[str, torch.Tensor]) -> None:
    write_shards(samples(tmp_path, "clip.safetensors"), tmp_path / "out", arguments=ARGUMENTS)
    array = np.load(io.BytesIO(ShardSet(tmp_path / "out").read(2).members["features.npy"]))
    assert torch.equal(torch.from_numpy(array), features["2"])


def test_the_same_command_finds_a_finished_set(tmp_path: Path, features: dict[str, torch.Tensor]) -> None:
    write_shards(samples(tmp_path), tmp_path / "out", arguments=ARGUMENTS)
    assert write_shards(samples(tmp_path), tmp_path / "out", arguments=ARGUMENTS).already_complete


def test_members_count_for_the_size_of_a_shard(tmp_path: Path, features: dict[str, torch.Tensor]) -> None:
    items = samples(tmp_path)[:2]
    written = write_shards(items, tmp_path / "out", arguments=ARGUMENTS, shard_size=40)
    assert [shard["records"] for shard in written.manifest["shards"]] == [1, 1]


def test_what_cannot_be_read_is_rejected(tmp_path: Path, features: dict[str, torch.Tensor]) -> None:
    items: list[Sample | Rejected] = [
        Sample(key="good", members={"features.npy": StoredArray(tmp_path / "clip.pth", "0", 16)}),
        Sample(key="gone", members={"notes.txt": tmp_path / "gone.txt"}),
        Sample(key="unknown", members={"features.npy": StoredArray(tmp_path / "clip.pth", "7", 16)}),
    ]
    rejected = write_shards(items, tmp_path / "out", arguments=ARGUMENTS).manifest["rejected"]
    assert [row["key"] for row in rejected] == ["gone", "unknown"]
    assert rejected[0]["reason"] == f"{tmp_path / 'gone.txt'}: No such file or directory"
    assert rejected[1]["reason"] == f"{tmp_path / 'clip.pth'} changed while shards were written from it: '7'"


def test_sets_without_questions_are_written_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encode(pictures(4)))
    written = write_shards(
        [Sample(key="a", video=tmp_path / "a.mp4", annotation={"label": 1})], tmp_path / "out", arguments=ARGUMENTS
    )
    assert written.manifest["members"] == ["video", "json"]
    assert "questions" not in written.manifest["counts"]
    shards = ShardSet(tmp_path / "out")
    assert "questions" not in (shards.index.dtype.names or ())
    assert shards.num_questions.tolist() == [0]
    assert shards.read(0).members == {}
