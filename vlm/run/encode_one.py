"""Features of one video, by the code that makes those of a dataset: for a chat about a file.

    chosen = encoders.open_for(recipe.model, recipe.inputs, Path("pretrained/clip-vit-large-patch14"))
    record = encode_record(Path("a.mp4"), chosen)    # as one of a shard set: recipe.inputs read it

The file is decoded in a process of its own, which may crash or hang: that is a DecodeError, as a damaged file is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vlm.data.features import MEMBER, tensor_bytes
from vlm.data.frame_pool import Frames, Reader, read_frames
from vlm.data.video import DecodeError, inspect
from vlm.run.encode import FEATURES, Work, encode
from vlm.types import Record


class Chosen(Protocol):
    """What is asked of an encoder (vlm.models.encoders.Chosen)."""

    @property
    def encoder(self) -> nn.Module: ...
    @property
    def reader(self) -> Reader: ...
    @property
    def dtype(self) -> str: ...


class Facts(NamedTuple):
    """What is in a file."""

    num_frames: int
    fps: float
    duration: float  # seconds
    width: int
    height: int


def look_into(file: Path, *, apart: bool = True) -> Facts:
    """Decodes all of a video and counts. DecodeError: it cannot be read.

    Args:
        apart: in a process of its own.
    """
    for event in read_frames([file], _facts, workers=int(apart)):
        if isinstance(event, Frames):
            frames, fps, duration, width, height = event.pixels[0]
            return Facts(int(frames), float(fps), float(duration), int(width), int(height))
        raise DecodeError(event.failure)
    raise AssertionError("unreachable")


def _facts(file: Path, warnings: list[str]) -> Iterator[np.ndarray]:
    info = inspect(file)
    warnings += info.warnings
    yield np.array([info.num_frames, info.fps, info.duration, info.width, info.height], np.float64)


def encode_video_file(
    file: Path,
    chosen: Chosen,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 64,
    apart: bool = True,
) -> dict[str, Tensor]:
    """What tools/extract_features.py would store of a video, by name, on the CPU. DecodeError: it cannot be read.

    Args:
        device: where to compute; None: where the encoder is.
        apart: decode in a process of its own.
    """
    if device is not None:
        chosen.encoder.to(device)
    work = Work(
        encoder=chosen.encoder,
        reader=chosen.reader,
        dtype=getattr(torch, chosen.dtype),
        batch_size=batch_size,
        workers=int(apart),
    )
    (done,) = encode([file], work, lambda at: file.name)
    if done.failure:
        raise DecodeError(done.failure)
    return done.tensors


def encode_record(file: Path, chosen: Chosen | None, annotation: Mapping[str, Any] | None = None, **how: Any) -> Record:
    """The video as a record of a shard set, with its features as members; without an encoder, with its bytes.

    Args:
        how: arguments of `encode_video_file`.

    Raises DecodeError: it cannot be read.
    """
    facts = look_into(file, apart=how.get("apart", True))
    tensors = encode_video_file(file, chosen, **how) if chosen is not None else {}
    said = dict(annotation or {})
    if FEATURES in tensors:  # of frames, at a rate, as questions about videos have them
        said.setdefault("features", {"name": FEATURES, "fps": getattr(getattr(chosen, "reader", None), "fps", 0.0)})
    return Record(
        key=file.stem,
        shard=str(file),
        row=0,
        video=file.read_bytes() if chosen is None else None,
        annotation=said,
        num_frames=facts.num_frames,
        fps=facts.fps,
        decoders=("pyav",),
        members=dict(_member(name, tensor) for name, tensor in tensors.items()),
    )


def _member(name: str, tensor: Tensor) -> tuple[str, bytes]:
    if name != FEATURES:
        return f"{name}.safetensors", tensor_bytes(name, tensor)
    content = io.BytesIO()
    np.save(content, tensor.numpy())
    return MEMBER, content.getvalue()
