"""The moving-shapes corpus: real H.264 clips of one shape that moves, rendered here, and their reader.

What is shown, and why it can only be told from motion: `vlm/sources/common_shapes.py`.

    render(Path("data/demo/corpus"), num_train=1600, num_test=192)
    for sample in read(Path("data/demo/corpus"), "train", ()):
        ...

`render` writes `videos/<split>/<key>.mp4` and `annotations/<split>.json`; the latter is written last, holds the
arguments, and so says that the split is whole: a second call returns at once, one after a kill keeps finished files.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vlm.sources.common_features import take_features
from vlm.sources.common_shapes import CLASSES, COLOURS, HEIGHT, SPLITS, WIDTH, Clip, as_chat, plan
from vlm.types import Rejected, Sample, UserError

FORMAT = "moving-shapes/2"  # raise the number when the same arguments would render something else
FPS = 12
FEATURE_FPS = 4.0  # features a second: 8 of a clip with one action


def _background(seed: int) -> np.ndarray:
    """(H, W, 3) float32: soft dark patches and grain, the same in all frames of a clip."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(30, 70) + rng.normal(0, 12, (5, 6, 1)) + rng.normal(0, 6, (5, 6, 3))
    y, x = np.linspace(0, 3.999, HEIGHT), np.linspace(0, 4.999, WIDTH)
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    grain = rng.normal(0, 5, (HEIGHT, WIDTH, 1))
    return (upper * (1 - down) + lower * down + grain).astype(np.float32)


def _coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Part of each pixel that the shape covers, from its distance to the edge. x, y: offsets from the centre."""
    if shape == "circle":
        edge = np.hypot(x, y) - radius
    elif shape == "square":
        edge = np.maximum(np.abs(x), np.abs(y)) - radius * np.sqrt(np.pi) / 2
    else:  # an equilateral triangle that points up, centroid at the centre
        inradius = radius * np.sqrt(np.pi / (3 * np.sqrt(3)))
        edge = np.maximum(y, np.abs(x) * np.sqrt(3) / 2 - y / 2) - inradius
    return np.clip(0.5 - edge, 0.0, 1.0)


def draw(clip: Clip) -> np.ndarray:
    """uint8 (T, H, W, 3) frames of a clip."""
    frames = np.repeat(_background(clip.scene.background)[None], len(clip.centres), axis=0)
    colour = np.array(COLOURS[clip.scene.colour], np.float32)
    reach = int(1.5 * clip.scene.radius) + 2  # no shape goes further from its centre
    for frame, (centre_x, centre_y) in zip(frames, clip.centres):
        left, top = max(0, int(centre_x) - reach), max(0, int(centre_y) - reach)
        window = frame[top : int(centre_y) + reach, left : int(centre_x) + reach]
        y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]]
        part = _coverage(clip.scene.shape, clip.scene.radius, x - centre_x, y - centre_y)[..., None]
        window += part.astype(np.float32) * (colour - window)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def encode(frames: np.ndarray, path: Path) -> None:
    """Writes uint8 (T, H, W, 3) as H.264 mp4 (yuv420p, a key frame each second, B-frames, one thread), atomically."""
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    # Without cpu-independent, 1 file in 20 differs from run to run: x264's macroblock tree depends on memory alignment.
    once = {"threads": "1", "x264-params": "cpu-independent=1"}
    options = {"preset": "veryfast", "crf": "20", "g": str(FPS), "bf": "2", **once}
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    unfinished.replace(path)


# Files.


def _paths(out: Path, split: str) -> tuple[Path, Path]:
    return out / "videos" / split, out / "annotations" / f"{split}.json"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)


def _arguments_in(path: Path) -> dict[str, Any] | None:
    """The arguments a split's file was written with; None where there is no such file, or not one that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content.get("arguments") if isinstance(content, dict) else None


def _render_one(job: tuple[Clip, Path]) -> None:
    clip, path = job
    if not path.exists():
        encode(draw(clip), path)


def _render_split(out: Path, split: str, number: int, seed: int, workers: int, done: Callable[[int], None]) -> None:
    folder, annotations = _paths(out, split)
    arguments = {"format": FORMAT, "split": split, "number": number, "seed": seed}
    if _arguments_in(annotations) == arguments and len(list(folder.glob("*.mp4"))) == number:
        done(number)
        return
    clips = plan(split, number, seed)
    begun = annotations.with_name(f".{split}.begun.json")  # the arguments of the files that are there already
    if _arguments_in(begun) != arguments:
        for path in folder.glob("*.mp4"):
            path.unlink()
        _write_json(begun, {"arguments": arguments})
    annotations.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.partial"):
        path.unlink()
    jobs = [(clip, folder / f"{clip.key}.mp4") for clip in clips]
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(_render_one, jobs, chunksize=16):
                done(1)
    else:
        for job in jobs:
            _render_one(job)
            done(1)
    items = [{"key": clip.key, "video": f"videos/{split}/{clip.key}.mp4", **clip.annotation} for clip in clips]
    classes = [motion.name for motion in CLASSES]
    _write_json(annotations, {"arguments": arguments, "classes": classes, "items": items})


def render(
    out: Path,
    *,
    num_train: int,
    num_test: int,
    num_sequences_train: int = 0,
    num_sequences_test: int = 0,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Renders the splits whose number is not 0; a split that is there already with the same arguments is kept.

    `progress(done, total)` is called as videos are done. Each split draws from its own seed, so numbers do not
    influence one another. Raises UserError where a number is negative or not a multiple of the number of classes.
    """
    numbers = dict(zip(SPLITS, (num_train, num_test, num_sequences_train, num_sequences_test)))
    for split, number in numbers.items():
        if number < 0:
            raise UserError(f"{number} videos in split {split!r}: a number of videos is 0 (not rendered) or more")
        plan(split, number, seed)  # refuses here, before the first file
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, sum(numbers.values()))

    for split, number in numbers.items():
        if number:
            _render_split(out, split, number, seed, workers, advance)


def read(root: Path, split: str, annotations: Sequence[Path]) -> Iterator[Sample | Rejected]:
    """The samples of a rendered split, in the order of its file; sequences have `chat` in place of questions.

    With features a sample has `features.npy`, and beside what `render` wrote the names that questions about videos
    have: `video`, `captions` and a question's `id`.

    Args:
        root: the folder of the corpus.
        split: train, test, sequences_train or sequences_test.
        annotations: files to read instead of `root/annotations/<split>.json`, and a file of features; all optional.

    Raises UserError where a file is missing or is not one that `render` wrote; a sample whose video is missing is
    Rejected.
    """
    files, features = take_features(annotations)
    for path in files or [_paths(root, split)[1]]:
        if not path.is_file():
            raise UserError(
                f"{path}: no such file, so split {split!r} cannot be read; render it with "
                f"`python tools/render_shapes.py --out {root}` (sequences: --sequences N)"
            )
        if (_arguments_in(path) or {}).get("format") != FORMAT:
            raise UserError(f"{path}: not an annotation file of format {FORMAT!r}; render the corpus again")
        for item in json.loads(path.read_text())["items"]:
            video = root / item.pop("video")
            key = item.pop("key")
            if not video.is_file():
                yield Rejected(key, f"{path}: the video {video} of {key!r} does not exist", str(video))
                continue
            if "segments" in item:
                item = as_chat(key, item)
            sample = Sample(key=key, video=video, annotation=item)
            if features.frames is not None:
                item |= {"video": key, "captions": {"shapes": item["caption"]}}
                asked = [{"id": str(at), **question} for at, question in enumerate(item.get("questions", ()))]
                item |= {"questions": asked} if asked else {}
            features.add_to(sample, FEATURE_FPS)
            yield sample
