"""What bench/data.py reads: clips drawn here or real ones, shard sets of them, a damaged copy, a vast sparse set."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from vlm.data import shard_format as layout
from vlm.data.shards import ShardSet, write_shards
from vlm.data.video import DecodeError, check_decoders, inspect
from vlm.types import Sample

CLASSES = 174


class Drawn(NamedTuple):
    """Size of the clips that are drawn: by default those of Something-Something, short side 256."""

    width: int = 340
    height: int = 256
    frames: int = 48
    fps: int = 12


def draw(seed: int, size: Drawn) -> bytes:
    """A textured patch that moves over a panned background with a little noise, as x264 encodes by default."""
    rng = np.random.default_rng(seed)
    width, height = size.width, size.height
    side = height // 3
    wide = (_texture(rng, height, 2 * width, 6) + _texture(rng, height, 2 * width, 24)) / 2
    patch = _texture(rng, side, side, 3)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(size.fps), options={"x264-params": "cpu-independent=1"})
        stream.codec_context.thread_count = 1  # so the same bytes each time, as told in vlm/data/shard_reencode.py
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for at in range(size.frames):
            left = at * width // size.frames
            picture = wide[:, left : left + width] + rng.normal(0, 3, (height, width, 3)).astype(np.float32)
            top = int((height - side) * (0.5 + 0.4 * np.sin(at / 7 + seed)))
            across = (width - side) * at // size.frames
            picture[top : top + side, across : across + side] = patch
            pixels = picture.clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _texture(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    small = rng.integers(0, 255, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)


def real_clips() -> list[bytes]:
    """H.264 clips of VLM_REALDATA (default ../shared/realdata) that decord reads as PyAV does, of 16 to 400 frames."""
    root = Path(os.environ.get("VLM_REALDATA", Path(__file__).resolve().parents[2] / "shared" / "realdata"))
    found = []
    for path in sorted((root / "videos").glob("*.mp4")):
        data = path.read_bytes()
        try:
            info = inspect(data)
        except DecodeError:
            continue
        if info.codec == "h264" and 16 <= info.num_frames <= 400 and "decord" in check_decoders(data, info):
            found.append(data)
    return found


class Corpus(NamedTuple):
    """The same records as files and as shards."""

    files: list[Path]  # by row of the index
    shards: ShardSet


def make_corpus(folder: Path, clips: Sequence[bytes], records: int, *, shard_samples: int = 25) -> Corpus:
    """`records` files that repeat the clips, and a shard set of them."""
    videos = folder / "videos"
    videos.mkdir(parents=True)
    files = []
    for row in range(records):
        files.append(videos / f"clip{row:05}.mp4")
        files[-1].write_bytes(clips[row % len(clips)])
    samples = [Sample(key=file.stem, video=file, annotation={"label": row % CLASSES}) for row, file in enumerate(files)]
    write_shards(samples, folder / "shards", arguments={"source": "bench"}, shard_samples=shard_samples)
    return Corpus(files, ShardSet(folder / "shards"))


def poison(shards: ShardSet, folder: Path, rows: Sequence[int]) -> ShardSet:
    """A copy of a set in which these records' clips break off half way: the dearest damage, found after decoding."""
    shutil.copytree(shards.path, folder)
    rng = np.random.default_rng(0)
    for row in rows:
        entry = shards.index[row]
        start, nbytes = int(entry["video_offset"]), int(entry["video_nbytes"])
        with (folder / shards.shard_name(row)).open("r+b") as file:
            file.seek(start)
            frames_end = file.read(nbytes).rindex(b"moov") - 4  # the index of the frames, behind them, stays
            file.seek(start + frames_end // 2)
            file.write(rng.bytes(frames_end - frames_end // 2))
    return ShardSet(folder)


def make_vast(folder: Path, clip: Path, shards: int, rows_a_shard: int, shard_bytes: int = 1 << 30) -> Path:
    """A set of `shards` sparse tars, each with one record at its beginning, to which all its rows point.

    It has the size of a large set to whoever opens it: every file has a size, a state, and an entry in the manifest.
    """
    one = folder.with_name(f"{folder.name}-one")
    write_shards(
        [Sample(key="clip", video=clip, annotation={"label": 1})], one, arguments={"source": "bench"}, shard_samples=1
    )
    head = (one / layout.shard_name(0)).read_bytes()
    manifest = json.loads((one / layout.MANIFEST).read_bytes())
    row = np.load(one / layout.INDEX)
    folder.mkdir()
    for number in range(shards):
        with (folder / layout.shard_name(number)).open("wb") as file:
            file.write(head)
            file.truncate(shard_bytes)
    index = np.repeat(row, shards * rows_a_shard)
    index["shard"] = np.repeat(np.arange(shards), rows_a_shard)
    np.save(folder / layout.INDEX, index)
    listed = manifest["shards"][0] | {"bytes": shard_bytes}
    manifest["shards"] = [listed | {"name": layout.shard_name(number)} for number in range(shards)]
    manifest["counts"] |= {"listed": len(index), "records": len(index)}
    manifest["index"] |= _file_entry(folder / layout.INDEX)
    (folder / layout.MANIFEST).write_bytes(layout.to_json(manifest))
    return folder


def _file_entry(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
