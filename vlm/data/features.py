"""What frozen encoders made of a video before: tensors that are members of its record.

`read_tensor` reads any: the member `NAME.safetensors` (one tensor called NAME, of any dtype) or `NAME.npy`. The rest is
about `features.npy`, one row a frame, as Flipped-VQA, Vamos and ViCo use it: cut to what a question is about, frames
evenly spread, short videos filled up with zeros.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlm.data.video import DecodeError
from vlm.tensor_files import DTYPES
from vlm.types import Record

MEMBER = "features.npy"


def tensor_members(name: str) -> tuple[str, ...]:
    """The members of a record that may hold the tensor `name`: what to ask `ShardSet.read` for."""
    return f"{name}.safetensors", f"{name}.npy"


def tensor_bytes(name: str, tensor: Tensor) -> bytes:
    """The content of a member `NAME.safetensors`. The same tensor, the same bytes; every dtype, bfloat16 too."""
    return save({name: tensor.contiguous()})


def read_tensor(record: Record, name: str) -> Tensor:
    """A tensor of a record, as it was stored: shape, dtype and all. DecodeError: it has none, or it is damaged.

    Of a large member it is a view into the file (`ShardSet.read`): nothing is copied until somebody writes to it.
    """
    where = f"record {record.key!r} of {record.shard}"
    member = next((member for member in tensor_members(name) if member in record.members), None)
    if member is None:
        raise DecodeError(f"{where} has no {' or '.join(tensor_members(name))}")
    data = record.members[member]
    try:
        tensor = _viewed(data, name, member) if isinstance(data, memoryview) else None
        if tensor is None and member.endswith(".safetensors"):
            tensor = load(bytes(data))[name]
        elif tensor is None:
            tensor = torch.from_numpy(_read_array(data))
    except KeyError as error:
        raise DecodeError(f"{where}: {member} holds no tensor called {name!r}") from error
    except (SafetensorError, ValueError, TypeError, EOFError) as error:
        raise DecodeError(f"{where}: {member} is damaged ({error})") from error
    if not _is_finite(tensor):
        raise DecodeError(f"{where}: {member} holds numbers that are not finite")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # NaN where there is one; ten times as quick as asking of each number
    return bool(least.isfinite() and most.isfinite())


def _viewed(data: memoryview, name: str, member: str) -> Tensor | None:
    """The tensor in a buffer, not copied; None where it is not plainly there, which a reader with messages looks at."""
    place = _in_safetensors(data, name) if member.endswith(".safetensors") else _in_npy(data)
    if place is None:
        return None
    dtype, shape, begin, end = place
    count = math.prod(shape)
    if not 0 < count * dtype.itemsize == end - begin <= len(data) - begin:
        return None
    return torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(shape)


_Place = tuple[torch.dtype, tuple[int, ...], int, int]  # dtype, shape, first byte, the one after the last


def _in_safetensors(data: memoryview, name: str) -> _Place | None:
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        said = json.loads(bytes(data[8:begin]))[name]
        first, last = said["data_offsets"]
        return _DTYPES[said["dtype"]], tuple(said["shape"]), begin + first, begin + last
    except (ValueError, KeyError, TypeError):
        return None


def _in_npy(data: memoryview) -> _Place | None:
    head = io.BytesIO(data[:_NPY_HEAD])
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(head)
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
    except (ValueError, TypeError):
        return None
    return None if by_columns else (kind, shape, head.tell(), len(data))


_NPY_HEAD = 4096  # bytes in which the header of an array ends, or it is no plain one
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def _read_array(data: bytes | memoryview) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def read_features(record: Record) -> np.ndarray:
    """(frames, D) float32 of a record's features; DecodeError where it has none, or they are damaged or not finite."""
    data = record.members.get(MEMBER)
    if data is None:
        raise DecodeError(f"record {record.key!r} of {record.shard} has no {MEMBER}")
    try:
        features = _read_array(data)
    except (ValueError, EOFError) as error:
        raise DecodeError(f"record {record.key!r} of {record.shard}: {MEMBER} is damaged ({error})") from error
    if features.ndim != 2:
        raise DecodeError(f"record {record.key!r} of {record.shard}: {MEMBER} has shape {features.shape}, not two axes")
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise DecodeError(f"record {record.key!r} of {record.shard}: {MEMBER} holds numbers that are not finite")
    return features


def cut_span(
    features: np.ndarray, annotation: Mapping[str, Any], span: Sequence[float] | None, *, whole: bool = False
) -> np.ndarray:
    """The frames of a question's span, (frames, D); none may be left. Frame i was seen at second i / fps.

    By the record's `span_rule`. rounded (STAR, TVQA, as published): from the rounded first second to the end of the
    rounded last one. inside (Perception Test): frames seen within the span alone, since the rest gives the answer away.

    Args:
        features: all frames of the video, (frames, D).
        annotation: the record's, with `features.fps` and `span_rule`.
        span: first and last second; None: no cut.
        whole: do not cut "inside" spans, as the published Vamos did (it reads what must not be seen).
    """
    if span is None:
        return features
    fps, rule = annotation["features"]["fps"], annotation["span_rule"]
    start, end = span
    if rule == "rounded":
        return features[int(fps * round(start)) : int(fps * (round(end) + 1))]
    assert rule == "inside", rule
    return features if whole else features[math.ceil(start * fps) : math.floor(end * fps) + 1]


def spread_frames(features: np.ndarray, count: int) -> np.ndarray:
    """`count` frames, (count, D): frame floor(j * n / count) for each j, or all n and zeros behind them."""
    available = len(features)
    if available <= count:
        return np.pad(features, ((0, count - available), (0, 0)))
    return features[np.arange(count) * available // count]
