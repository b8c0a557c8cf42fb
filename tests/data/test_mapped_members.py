"""Large members of shards in a folder: views into the file, so only what is used is fetched, and nothing is copied."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm.data.features import read_tensor, tensor_bytes
from vlm.data.shard_format import ShardError
from vlm.data.shard_set import MAPPED_BYTES, ShardSet
from vlm.data.shards import write_shards
from vlm.data.video import DecodeError
from vlm.types import Sample

STATES = torch.arange(200 * 5 * 1024).view(200, 5, 1024).remainder(1000).half()  # 2 MB
CLS = STATES[:, -1].contiguous()  # 0.4 MB


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def shards(folder: Path, *members: tuple[str, bytes], keys: str = "ab") -> ShardSet:
    """Records that all have these members."""
    files = {}
    for name, content in members:
        (folder / name).write_bytes(content)
        files[name] = folder / name
    samples = [Sample(key=key, annotation={"caption": key}, members=dict(files)) for key in keys]
    write_shards(samples, folder / "out", arguments={"source": "test"}, check=False)
    return ShardSet(folder / "out")


def test_a_recipe_of_one_state_reads_that_alone(tmp_path: Path) -> None:
    opened = shards(
        tmp_path,
        ("clip_states.safetensors", tensor_bytes("clip_states", STATES)),
        ("clip_cls.safetensors", tensor_bytes("clip_cls", CLS)),
    )
    before = opened.bytes_read
    record = opened.read(1, ("clip_cls.safetensors",))
    assert torch.equal(read_tensor(record, "clip_cls"), CLS)
    assert CLS.nbytes <= opened.bytes_read - before <= CLS.nbytes + 4096  # headers and the annotation


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clip_states.safetensors", lambda tensor: tensor_bytes("clip_states", tensor)),
        ("clip_states.npy", lambda tensor: npy(tensor.numpy())),
    ],
)
def test_large_members_are_views_and_the_file_stays_as_it_is(
    tmp_path: Path, name: str, content: Callable[[Tensor], bytes]
) -> None:
    assert STATES.nbytes > MAPPED_BYTES
    opened = shards(tmp_path, (name, content(STATES)))
    before = (tmp_path / "out/shard-000000.tar").read_bytes()
    for members in (None, (name,)):
        record = opened.read(1, members)
        view = record.members[name]
        assert isinstance(view, memoryview)
        found = read_tensor(record, "clip_states")
        assert (found.dtype, found.shape) == (torch.float16, STATES.shape)
        assert torch.equal(found, STATES)
        start = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        assert start < found.data_ptr() < start + len(view)  # no copy
        assert record.annotation == {"caption": "b"}
        found.zero_()  # whoever writes has a page of his own
        assert torch.equal(read_tensor(opened.read(1, members), "clip_states"), STATES)
    assert (tmp_path / "out/shard-000000.tar").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(MAPPED_BYTES).to(dtype)
    opened = shards(tmp_path, ("x.safetensors", tensor_bytes("x", tensor)), keys="a")
    found = read_tensor(opened.read(0), "x")
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.replace(b'"clip_states"', b'"other_state"'), "no tensor called 'clip_states'"),
        (lambda data: data.replace(b"[0,2048000]", b"[0,2047998]"), "is damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "is damaged"),
        (lambda data: data[:-2] + np.float16("nan").tobytes(), "not finite"),
    ],
)
def test_damage_is_told_as_of_small_ones(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    whole = tensor_bytes("clip_states", STATES)
    damaged = damage(whole)
    assert damaged != whole
    opened = shards(tmp_path, ("clip_states.safetensors", damaged), keys="a")
    with pytest.raises(DecodeError, match=message):
        read_tensor(opened.read(0), "clip_states")


@pytest.mark.parametrize("at", [0, 1, 31, 102_399])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found_wherever_it_is(tmp_path: Path, value: float, at: int) -> None:
    tensor = CLS.flatten()[:102_400].clone()
    tensor[at] = value
    opened = shards(tmp_path, ("x.safetensors", tensor_bytes("x", tensor)), keys="a")
    with pytest.raises(DecodeError, match="not finite"):
        read_tensor(opened.read(0), "x")


def test_a_shard_cut_short_after_opening_is_an_error(tmp_path: Path) -> None:
    opened = shards(tmp_path, ("clip_states.safetensors", tensor_bytes("clip_states", STATES)))
    tar = tmp_path / "out/shard-000000.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(ShardError, match="cut short"):
        opened.read(1)
