"""What encoding clips again saves when frames are read, and what it costs in bytes and in pixels.

    python bench/reencode.py [--quick] [--json FILE]       (also in: make bench)

Sixteen evenly spaced frames of each clip are decoded before and after, by turns, by the decoders that the index would
name (`vlm/data/video.py`), in CPU seconds of one process. The clips are those of VLM_REALDATA (default
../shared/realdata) or, where there are none, drawn here. For each setting of `make_shards.py --reencode`:

    gain    CPU seconds of all clips before / after; and the median over clips with its 95 % bootstrap interval
    bytes   after / before
    PSNR    of the decoded RGB frames against the original ones, resized alike: median and worst over clips, dB
    cost    CPU seconds of encoding a second of video
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from figures import add_figures
from PIL import Image

from vlm.data.shard_reencode import Reencode, is_still, reencode
from vlm.data.video import DecodeError, VideoInfo, check_decoders, decode, frames_at, inspect

FRAMES = 16
SETTINGS = {
    "default": Reencode(),
    "gop 4": Reencode(gop=4),
    "gop 16": Reencode(gop=16),
    "size kept": Reencode(short_side=0),
    "fps 8": Reencode(fps=8),
}


class Clip(NamedTuple):
    """A file, what is in it, and what may decode it."""

    name: str
    data: bytes
    info: VideoInfo
    decoders: tuple[str, ...]


class Measured(NamedTuple):
    """One clip under one setting."""

    name: str
    before: float  # CPU seconds of decoding the frames
    after: float
    bytes_before: int
    bytes_after: int
    psnr: float  # dB
    cost: float  # CPU seconds of encoding
    seconds: float  # of video


def find_clips(quick: bool) -> list[Clip]:
    """Real clips of sixteen frames and more, or drawn ones."""
    root = Path(os.environ.get("VLM_REALDATA", Path(__file__).resolve().parents[2] / "shared" / "realdata"))
    files = {path.name: path.read_bytes() for path in sorted((root / "videos").glob("*"))} if root.is_dir() else {}
    if not files:
        files = {f"drawn {width}x{height}": draw(width, height) for width, height in ((854, 480), (320, 240))}
    clips = []
    for name, data in files.items():
        try:
            info = inspect(data)
        except DecodeError:
            continue
        if not is_still(data) and info.num_frames >= FRAMES and (not quick or info.num_frames < 200):
            clips.append(Clip(name, data, info, check_decoders(data, info)))
    return clips[:: max(1, len(clips) // 5)] if quick else clips


def draw(width: int, height: int, frames: int = 150) -> bytes:
    """A smooth picture that is panned over, as x264 encodes by default: a key frame in 250."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (9, 18, 3), dtype=np.uint8))
    wide = np.asarray(small.resize((2 * width, height), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(30), options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for at in range(frames):
            left = at * width // frames
            picture = np.ascontiguousarray(wide[:, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def measure(clip: Clip, how: Reencode, repeats: int) -> Measured:
    start = time.process_time()
    made, _ = reencode(clip.data, how)
    cost = time.process_time() - start
    info = inspect(made)
    decoders = check_decoders(made, info)
    old, new = (_spaced(count) for count in (clip.info.num_frames, info.num_frames))
    before, after = [], []
    for _ in range(repeats):
        before.append(_seconds(clip.data, old, clip.decoders))
        after.append(_seconds(made, new, decoders))
    return Measured(clip.name, min(before), min(after), len(clip.data), len(made),
                    _psnr(clip.data, how, made, new), cost, clip.info.duration)  # fmt: skip


def _spaced(count: int) -> list[int]:
    return [int(index) for index in np.linspace(0, count - 1, FRAMES).round()]


def _seconds(data: bytes, indices: Sequence[int], decoders: tuple[str, ...]) -> float:
    start = time.process_time()
    decode(data, indices, decoders=decoders)
    return time.process_time() - start


def _originals(data: bytes, how: Reencode, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The original pictures that became frames `indices`, in the size that they got."""
    if how.fps is None or inspect(data).fps <= how.fps:
        pictures = iter(decode(data, indices))
    else:
        wanted = set(indices)
        pictures = (picture for at, picture in enumerate(frames_at(data, how.fps, [])) if at in wanted)
    for picture in pictures:
        size = how.size(picture.shape[1], picture.shape[0])
        yield np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _psnr(data: bytes, how: Reencode, made: bytes, indices: Sequence[int]) -> float:
    """Of all the frames together."""
    indices = sorted(set(indices))
    squares, count = 0.0, 0
    for old, new in zip(_originals(data, how, indices), decode(made, indices), strict=True):
        squares += float(((old.astype(np.float32) - new) ** 2).sum())
        count += old.size
    return float(10 * np.log10(255**2 / max(squares / count, 1e-6)))


def summarise(rows: Sequence[Measured]) -> dict[str, Any]:
    ratios = np.array([row.before / row.after for row in rows])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    psnr = [row.psnr for row in rows]
    return {
        "clips": len(rows),
        "gain": round(sum(row.before for row in rows) / sum(row.after for row in rows), 2),
        "gain_median": round(float(np.median(ratios)), 2),
        "gain_interval": [round(float(low), 2), round(float(high), 2)],
        "bytes": round(sum(row.bytes_after for row in rows) / sum(row.bytes_before for row in rows), 3),
        "psnr_median": round(float(np.median(psnr)), 1),
        "psnr_worst": round(min(psnr), 1),
        "cost": round(sum(row.cost for row in rows) / sum(row.seconds for row in rows), 3),
        "cpu_before": round(sum(row.before for row in rows), 3),
        "cpu_after": round(sum(row.after for row in rows), 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="five short clips and two settings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here under the name reencode")
    chosen = parser.parse_args(arguments)
    clips = find_clips(chosen.quick)
    settings = dict(list(SETTINGS.items())[:2]) if chosen.quick else SETTINGS
    figures: dict[str, Any] = {}
    for name, how in settings.items():
        rows = [measure(clip, how, repeats=1 if chosen.quick else 3) for clip in clips]
        figures[name] = summarise(rows)
        print(f"{name:10} {json.dumps(figures[name])}", flush=True)
        if name == "default":
            figures["clips"] = [row._asdict() for row in rows]
            for row, clip in zip(rows, clips):
                about = f"{clip.info.codec} {clip.info.width}x{clip.info.height}, {clip.info.num_frames} frames"
                print(f"    {row.before / row.after:6.2f} x  {row.psnr:5.1f} dB  "
                      f"{row.bytes_after / row.bytes_before:6.2f} bytes  {about}, {clip.decoders[0]}: {row.name}",
                      flush=True)  # fmt: skip
    if chosen.json:
        add_figures(chosen.json, figures, under="reencode")
    print(json.dumps({name: value for name, value in figures.items() if name != "clips"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
