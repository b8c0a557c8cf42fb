"""Features of videos for Video-ChatGPT: CPU seconds and peak memory, against the published scripts' way.

    python bench/features.py [--quick] [--json FILE]       (also in: make bench)

Ours is what tools/extract_features.py runs: `SpreadReader`, CLIP's states, running sums (vlm/run/encode.py), in one
process. The rival is rival_features.py. Both read the same drawn videos (240 lines, 15 frames a second, H.264) with the
same tiny CLIP (3 layers, 64 wide, 224 / 14), by turns, on one thread. Pooled features take 100 frames of a video, and
states 1,000: of a shorter one some come again, which ours encodes once. Peak memory is of a process each, beyond what
it has when the encoder is loaded. Exits with 1 where features differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from figures import add_figures
from rival_features import Rival
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vlm.models.encoders import POOLED, STATES, open_layout, pooled_layout, states_layout
from vlm.run.encode_one import encode_video_file

TOLERANCE = 2e-2  # of features: decord and PyAV give the same pictures here, float16 is rounded
VIDEOS = {"600 frames": 600, "1,500 frames": 1500}
ROUNDS = {"pooled": 3, "states": 1}  # layout -> how often each way is measured


def draw(file: Path, count: int) -> None:
    """A picture that wanders over another."""
    generator = np.random.default_rng(0)
    ground = generator.integers(0, 256, (15, 20, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    thing = generator.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    with av.open(str(file), "w") as output:
        stream: Any = output.add_stream("libx264", rate=15, options={"g": "48", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(count):
            picture = ground.copy()
            top, left = index * 3 % 180, index * 2 % 260
            picture[top : top + 60, left : left + 60] = thing
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 15)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def tiny_clip(folder: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                              image_size=224, patch_size=14, projection_dim=64)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def ways(folder: Path) -> dict[tuple[str, str], Callable[[Path], np.ndarray]]:
    """(layout, way) -> file -> features."""
    rival = Rival(folder)
    pooled, states = open_layout(folder, pooled_layout()), open_layout(folder, states_layout({STATES: (0, 1, 2, 3)}))
    return {
        ("pooled", "published"): rival.pooled,
        ("pooled", "ours"): lambda file: encode_video_file(file, pooled, apart=False)[POOLED].numpy(),
        ("states", "published"): rival.states,
        ("states", "ours"): lambda file: encode_video_file(file, states, apart=False)[STATES].numpy(),
    }


def peak_of(folder: Path, layout: str, way: str, file: Path) -> None:
    """Run one in this process and print by how many MB its memory grew at most (Linux)."""
    torch.set_num_threads(1)
    run = ways(folder)[layout, way]
    Path("/proc/self/clear_refs").write_text("5")  # the most so far counts no more
    before = _memory("VmRSS")
    run(file)
    print((_memory("VmHWM") - before) / 1024)


def _memory(name: str) -> int:
    """kB that the system counts of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def _peak(folder: Path, layout: str, way: str, file: Path) -> float:
    command = [sys.executable, __file__, "--peak", str(folder), layout, way, str(file)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(place: Path, videos: dict[str, int], *, quick: bool) -> tuple[dict[str, Any], float]:
    """Figures, and the largest difference between features."""
    folder = place / "clip"
    tiny_clip(folder)
    figures: dict[str, Any] = {}
    worst = 0.0
    runs = ways(folder)
    for name, count in videos.items():
        file = place / f"{count}.mp4"
        draw(file, count)
        for layout, rounds in ROUNDS.items():
            chosen = {way: run for (which, way), run in runs.items() if which == layout}
            seconds: dict[str, list[float]] = {way: [] for way in chosen}
            made: dict[str, np.ndarray] = {}
            for _ in range(1 if quick else rounds):
                for way, run in chosen.items():
                    begun = time.process_time()
                    made[way] = run(file)
                    seconds[way].append(time.process_time() - begun)
            worst = max(worst, float(np.abs(made["published"].astype(np.float32) - made["ours"]).max()))
            figures[f"{layout}, {name}"] = {way: median(times) for way, times in seconds.items()}
    if not quick:
        figures["states, peak MB"] = {way: _peak(folder, "states", way, file) for way in ("published", "ours")}
    return figures, worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short video, once: does it run, do features agree?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        folder, layout, way, file = options.peak
        peak_of(Path(folder), layout, way, Path(file))
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        figures, worst = measure(Path(place), {"60 frames": 60} if options.quick else VIDEOS, quick=options.quick)
    for name, values in figures.items():
        unit = "MB" if name.endswith("MB") else "s"
        said = ", ".join(f"{way} {value:.2f} {unit}" for way, value in values.items())
        print(f"{name}: {said}; published / ours {values['published'] / values['ours']:.2f}")
    print(f"largest difference between features: {worst:.1e}")
    if options.json:
        add_figures(options.json, {**figures, "difference": worst}, "features")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
