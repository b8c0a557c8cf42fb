"""Features of frames: what a question may see of them, and F of them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.data.features import cut_span, read_features, read_tensor, spread_frames, tensor_bytes
from vlm.data.shards import ShardSet, write_shards
from vlm.data.video import DecodeError
from vlm.types import Record, Sample

FRAMES = np.arange(30, dtype=np.float32)[:, None]  # frame i says i


def record(**members: bytes) -> Record:
    found = {name.replace("_", "."): content for name, content in members.items()}
    return Record(
        key="v", shard="s", row=0, video=None, annotation={}, num_frames=-1, fps=0, decoders=(), members=found
    )


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def seen(span: tuple[float, float] | None, rule: str, fps: float = 1.0, **options: bool) -> list[int]:
    annotation = {"features": {"fps": fps}, "span_rule": rule}
    return [int(frame) for frame in cut_span(FRAMES, annotation, span, **options)[:, 0]]


@pytest.mark.parametrize(
    ("span", "fps", "first", "last"),
    [
        ((2.1, 9.6), 1, 2, 10),
        ((2.5, 3.5), 1, 2, 4),  # halves go to the even second
        ((19.18, 19.18), 1, 19, 19),
        ((28.0, 99.0), 1, 28, 29),
        ((1.21, 4.0), 3, 3, 14),
    ],
)
def test_rounded_spans(span: tuple[float, float], fps: float, first: int, last: int) -> None:
    assert seen(span, "rounded", fps) == list(range(first, last + 1))


@pytest.mark.parametrize("fps", [1.0, 2.0, 30.0])
@pytest.mark.parametrize("span", [(0.0, 18.48), (0.2, 0.9), (3.0, 4.0), (0.5, 0.51), (28.5, 40.0)])
def test_nothing_outside_of_the_span_is_seen(span: tuple[float, float], fps: float) -> None:
    inside = [i for i in range(30) if span[0] <= i / fps <= span[1]]
    assert seen(span, "inside", fps) == inside
    assert seen(span, "inside", fps, whole=True) == list(range(30))


def test_no_span_is_all() -> None:
    assert seen(None, "inside") == list(range(30))
    assert cut_span(FRAMES, {}, None) is FRAMES


@pytest.mark.parametrize(("available", "count"), [(13, 6), (7, 6), (6, 6), (30, 10), (1000, 10)])
def test_frames_are_spread_evenly(available: int, count: int) -> None:
    frames = np.arange(available)[:, None]
    assert spread_frames(frames, count)[:, 0].tolist() == [j * available // count for j in range(count)]


def test_short_videos_are_filled_up_with_zeros() -> None:
    assert spread_frames(np.ones((2, 3), np.float32), 4).tolist() == [[1] * 3] * 2 + [[0] * 3] * 2
    assert spread_frames(np.ones((0, 3), np.float32), 2).tolist() == [[0] * 3] * 2


def test_features_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(array(np.full((2, 4), 0.5, np.float16)))
    write_shards(
        [Sample(key="v", members={"features.npy": tmp_path / "v.npy"})], tmp_path / "out", arguments={"source": "t"}
    )
    features = read_features(ShardSet(tmp_path / "out").read(0))
    assert features.dtype == np.float32
    assert features.tolist() == [[0.5] * 4] * 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "record 'v' of s has no features.npy"),
        ({"features_npy": b""}, "features.npy is damaged"),
        ({"features_npy": array(np.ones((2, 4)))[:40]}, "features.npy is damaged"),
        ({"features_npy": array(np.ones(4))}, r"has shape \(4,\), not two axes"),
        ({"features_npy": array(np.array([{}]))}, "features.npy is damaged"),  # a pickle: not opened
    ],
)
def test_features_that_cannot_be_used(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        read_features(record(**members))


# Any tensor ----------------------------------------------------------------------------------------------------------


def holding(**members: bytes) -> Record:
    """A record with members NAME__safetensors or NAME__npy."""
    return record(**{name.replace("__", "."): data for name, data in members.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (0, 4), ()])
def test_tensors_come_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).mul(9).to(dtype)
    data = tensor_bytes("tokens", tensor)
    members = {"tokens.safetensors": data}
    found = read_tensor(dataclasses.replace(record(), members=members), "tokens")
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found, tensor)
    assert tensor_bytes("tokens", tensor.clone()) == data


def test_published_arrays_are_tensors_too() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert torch.equal(read_tensor(holding(tokens__npy=array(values)), "tokens"), torch.from_numpy(values))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"record 'v' of s has no tokens.safetensors or tokens.npy"),
        ({"tokens__safetensors": b""}, "record 'v' of s: tokens.safetensors is damaged"),
        ({"tokens__safetensors": tensor_bytes("tokens", torch.ones(9))[:-1]}, "tokens.safetensors is damaged"),
        ({"tokens__safetensors": b"\xff" * 8 + b"{}"}, "tokens.safetensors is damaged"),
        ({"tokens__safetensors": tensor_bytes("other", torch.ones(9))}, "holds no tensor called 'tokens'"),
        ({"tokens__safetensors": tensor_bytes("tokens", torch.tensor([1.0, torch.nan]))}, "that are not finite"),
        ({"tokens__npy": array(np.ones((2, 4)))[:40]}, "tokens.npy is damaged"),
        ({"tokens__npy": array(np.array([{}]))}, "tokens.npy is damaged"),  # a pickle: not opened
        ({"tokens__npy": array(np.array(["a"]))}, "tokens.npy is damaged"),
    ],
)
def test_tensors_that_cannot_be_used(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        read_tensor(holding(**members), "tokens")
