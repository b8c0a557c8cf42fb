"""The moving-shapes corpus: real H.264 clips of one shape that moves, rendered here, and their reader.

Eight classes in Something-Something-v2's manner that depend on *motion only*. Clips come in groups of eight, one of
each class, that share everything else: colour, shape, size, background, range of the path, distance, speed. Within a
group a class and its reverse (left to right / right to left, up then down / down then up, ...) are made of **the same
frames in another order**, so whatever looks at frames without their order is right half of the time at most, and what
looks at one frame is right less often still: its axis is hidden too, since the coordinate that does not move is drawn
as the one that does. Sequences (several actions one after another, with frame segments), captions and questions with
four options serve the systems that speak.

    for sample in read(Path("data/demo/corpus"), "train", ()):
        ...

`render` writes `videos/<split>/<key>.mp4` and `annotations/<split>.json`; the latter is written last, holds the
arguments, and so says that the split is whole: a second call returns at once, one after a kill keeps finished files.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from vlm.types import Rejected, Sample, UserError

FORMAT = "moving-shapes/1"  # raise the number when the same arguments would render something else
SPLITS = ("train", "test", "sequences_train", "sequences_test")  # the place in this tuple is part of the seed
WIDTH, HEIGHT, FPS = 80, 64, 12
NUM_FRAMES = 24  # of a clip with one action
DISTANCE = (20.0, 26.0)  # pixels that a leg of a motion covers
LEG_FRAMES = (7, 11)  # frames that a leg takes: the speed, pixels per frame, is DISTANCE / LEG_FRAMES
MARGIN = 2  # pixels kept free between shape and border
ACTIONS = (3, 6)  # actions in a sequence

COLOURS = {
    "red": (255, 70, 60),
    "green": (70, 225, 90),
    "blue": (70, 130, 255),
    "yellow": (250, 225, 50),
    "purple": (205, 90, 245),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
RADII = (7.0, 8.0, 9.0)  # of the circle, pixels; the other shapes have the same area


class Motion(NamedTuple):
    """A class: its Something-Something-style name, the words of captions and answers, and what moves."""

    name: str
    words: str
    axis: int  # 0: x, 1: y (downwards)
    ascending: bool  # whether the coordinate grows in the first (or only) leg
    returns: bool


CLASSES = (
    Motion("Moving something from left to right", "from left to right", 0, True, False),
    Motion("Moving something from right to left", "from right to left", 0, False, False),
    Motion("Moving something up", "up", 1, False, False),
    Motion("Moving something down", "down", 1, True, False),
    Motion("Moving something to the right then back to the left", "right then back left", 0, True, True),
    Motion("Moving something to the left then back to the right", "left then back right", 0, False, True),
    Motion("Moving something up then down", "up then down", 1, False, True),
    Motion("Moving something down then up", "down then up", 1, True, True),
)
NUM_CLASSES = len(CLASSES)


def reverse_of(label: int) -> int:
    """The class made of the same frames in another order: 0 <-> 1, 2 <-> 3, 4 <-> 5, 6 <-> 7."""
    return label ^ 1


@dataclass(slots=True, kw_only=True)
class Scene:
    """What a group of clips shares."""

    colour: str
    shape: str
    radius: float
    background: int  # seed

    @property
    def subject(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(slots=True, kw_only=True)
class Clip:
    """One video to be: where the centre of the shape is in each frame, and what the annotation says."""

    key: str
    scene: Scene
    centres: np.ndarray  # (T, 2) float64: x, y in pixels
    annotation: dict[str, Any]


# Paths. A progress is a (T,) array of fractions: 0 = the lower end of the range (left, top), 1 = the upper end.


def _one_way(num_frames: int, leg: int, wait: int) -> np.ndarray:
    return np.clip((np.arange(num_frames) - wait) / leg, 0.0, 1.0)


def _and_back(num_frames: int, leg: int, wait: int, pause: int) -> np.ndarray:
    time = np.arange(num_frames) - wait
    return np.clip(np.minimum(time / leg, (2 * leg + pause - time) / leg), 0.0, 1.0)


def _pair_of_progress(rng: np.random.Generator, returns: bool, leg: int, num_frames: int) -> dict[bool, np.ndarray]:
    """Progress of the ascending and of the descending class: each fraction is met equally often in both.

    One way: the descending one is the other played backwards. There and back: as many frames as one spends at its home
    end the other spends at its turn (there is one frame more at home, it being met twice: hence the + 1).
    """
    if not returns:
        ascending = _one_way(num_frames, leg, int(rng.integers(0, num_frames - leg)))
        return {True: ascending, False: ascending[::-1]}
    rest = num_frames - 1 - 2 * leg
    assert rest > 0, (num_frames, leg)
    pause = int(rng.integers(1, rest + 1))
    ascending = _and_back(num_frames, leg, int(rng.integers(0, rest - pause + 1)), pause)
    descending = 1.0 - _and_back(num_frames, leg, int(rng.integers(0, pause)), rest + 1 - pause)
    return {True: ascending, False: descending}


def _range(fraction: float, axis: int, radius: float, distance: float) -> float:
    """Lower end of a range of `distance` pixels: `fraction` of the way along what the frame leaves free."""
    free = (WIDTH, HEIGHT)[axis] - 2 * (radius + MARGIN) - distance
    return radius + MARGIN + fraction * free


def _scenes(rng: np.random.Generator, number: int) -> list[tuple[Scene, int]]:
    """`number` scenes with the frames of a leg: a factorial design.

    Every 18 scenes hold each colour with each shape; every 270 hold each of those with each radius and leg.
    """
    looks = list(itertools.product(COLOURS, SHAPES))
    sizes = list(itertools.product(RADII, range(LEG_FRAMES[0], LEG_FRAMES[1] + 1)))
    sizes = [sizes[i] for i in rng.permutation(len(sizes))]
    chosen: list[tuple[str, str, float, int]] = []
    for block in range(-(-number // len(looks))):
        chosen += [(*looks[i], *sizes[(i + block) % len(sizes)]) for i in rng.permutation(len(looks))]
    backgrounds = rng.integers(0, 2**31, number)
    return [
        (Scene(colour=colour, shape=shape, radius=radius, background=int(seed)), leg)
        for (colour, shape, radius, leg), seed in zip(chosen, backgrounds)
    ]


def plan(split: str, number: int, seed: int) -> list[Clip]:
    """The first `number` videos of a split. A pure function: nothing is drawn, encoded or written."""
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    if split.startswith("sequences"):
        return [_sequence(rng, f"{split}-{i:05d}", *scene) for i, scene in enumerate(_scenes(rng, number))]
    if number % NUM_CLASSES:
        nearest = max(NUM_CLASSES, round(number / NUM_CLASSES) * NUM_CLASSES)
        raise UserError(
            f"{number} clips in split {split!r}: clips come in groups of {NUM_CLASSES}, one of each class, or the "
            f"classes would not be balanced; ask for {nearest}"
        )
    clips: list[Clip] = []
    for scene, leg in _scenes(rng, number // NUM_CLASSES):
        clips += _group(rng, split, len(clips), scene, leg)
    return clips


def _group(rng: np.random.Generator, split: str, first: int, scene: Scene, leg: int) -> list[Clip]:
    """Eight clips, one of each class, that differ in motion only. Their order in the split is random."""
    distance = float(rng.uniform(*DISTANCE))
    moving, resting = rng.uniform(size=2)  # where the two ranges lie, fractions
    progress = {returns: _pair_of_progress(rng, returns, leg, NUM_FRAMES) for returns in (False, True)}
    instant = int(rng.integers(NUM_FRAMES))  # the resting coordinate is one that a moving one takes at some time
    places = rng.permutation(NUM_CLASSES)
    clips = []
    for label, motion in enumerate(CLASSES):
        centres = np.empty((NUM_FRAMES, 2))
        along = progress[motion.returns][motion.ascending]
        rest = progress[motion.returns][True][instant]
        centres[:, motion.axis] = _range(moving, motion.axis, scene.radius, distance) + distance * along
        centres[:, 1 - motion.axis] = _range(resting, 1 - motion.axis, scene.radius, distance) + distance * rest
        question = f"which way does the {scene.subject} move?"
        turn = first // NUM_CLASSES + label
        annotation = {
            "label": label,
            "name": motion.name,
            "caption": f"a {scene.subject} moves {motion.words}",
            "questions": [
                _motion_question(rng, question, label, turn, "motion"),
                *_appearance_questions(rng, scene, turn),
            ],
            "attributes": _attributes(scene, distance, leg),
        }
        key = f"{split}-{first + int(places[label]):05d}"
        clips.append(Clip(key=key, scene=scene, centres=centres, annotation=annotation))
    return sorted(clips, key=lambda clip: clip.key)


def _sequence(rng: np.random.Generator, key: str, scene: Scene, leg: int) -> Clip:
    """Several actions one after another; their axes alternate, so that none can be read as part of its neighbour."""
    distance = float(rng.uniform(*DISTANCE))
    lower = np.array([_range(float(rng.uniform()), axis, scene.radius, distance) for axis in (0, 1)])
    at_upper = [bool(rng.integers(2)), bool(rng.integers(2))]  # on each axis
    axis = int(rng.integers(2))
    parts: list[np.ndarray] = []
    segments: list[dict[str, Any]] = []
    frame = 0
    for _ in range(int(rng.integers(ACTIONS[0], ACTIONS[1] + 1))):
        returns, ascending = bool(rng.integers(2)), not at_upper[axis]
        label = next(i for i, m in enumerate(CLASSES) if (m.axis, m.ascending, m.returns) == (axis, ascending, returns))
        length = int(rng.integers(2 * leg + 2, NUM_FRAMES + 1))
        fractions = np.empty((length, 2))
        fractions[:] = at_upper
        fractions[:, axis] = _pair_of_progress(rng, returns, leg, length)[ascending]
        parts.append(lower + distance * fractions)
        segments.append({"start": frame, "end": frame + length, "label": label, "name": CLASSES[label].name})
        frame += length
        at_upper[axis] = at_upper[axis] ^ (not returns)
        axis = 1 - axis
    labels = [segment["label"] for segment in segments]
    turn = int(rng.integers(4))
    first, last = (f"which way does the {scene.subject} move {when}?" for when in ("first", "last"))
    annotation = {
        "caption": f"a {scene.subject} moves " + ", then ".join(CLASSES[label].words for label in labels),
        "segments": segments,
        "questions": [
            _motion_question(rng, first, labels[0], turn, "motion_first"),
            _motion_question(rng, last, labels[-1], turn + 1, "motion_last"),
            *_appearance_questions(rng, scene, turn),
        ],
        "attributes": _attributes(scene, distance, leg),
    }
    return Clip(key=key, scene=scene, centres=np.concatenate(parts), annotation=annotation)


def _attributes(scene: Scene, distance: float, leg: int) -> dict[str, Any]:
    return {
        "colour": scene.colour,
        "shape": scene.shape,
        "radius": scene.radius,
        "background": scene.background,
        "distance": round(distance, 3),
        "speed": round(distance / leg, 4),
    }


def _motion_question(rng: np.random.Generator, question: str, label: int, turn: int, kind: str) -> dict[str, Any]:
    """Options are two whole pairs (a class and its reverse), so that the set of options does not tell the answer."""
    other = (label // 2 + int(rng.integers(1, NUM_CLASSES // 2))) % (NUM_CLASSES // 2) * 2
    wrong = [CLASSES[i].words for i in (reverse_of(label), other, other + 1)]
    return _question(rng, question, CLASSES[label].words, wrong, turn, kind)


def _appearance_questions(rng: np.random.Generator, scene: Scene, turn: int) -> list[dict[str, Any]]:
    colours = [colour for colour in COLOURS if colour != scene.colour]
    colours = [colours[i] for i in rng.permutation(len(colours))[:3]]
    shapes = [shape for shape in (*SHAPES, "star") if shape != scene.shape]
    return [
        _question(rng, "what colour is the shape that moves?", scene.colour, colours, turn + 1, "colour"),
        _question(rng, "what shape is it that moves?", scene.shape, shapes, turn + 2, "shape"),
    ]


def _question(
    rng: np.random.Generator, question: str, answer: str, wrong: list[str], turn: int, kind: str
) -> dict[str, Any]:
    """The right option's place goes round with `turn`, each being right equally often; the others lie at random."""
    place = turn % 4
    options = [wrong[i] for i in rng.permutation(3)]
    options.insert(place, answer)
    return {"question": question, "options": options, "answer": place, "kind": kind}


# Pixels.


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
    """The samples of a rendered split, in the order of its annotation file.

    `annotations`: annotation files to read instead of `root/annotations/<split>.json`. Raises UserError where a file
    is missing or is not one that `render` wrote; a sample whose video is missing is Rejected.
    """
    for path in annotations or [_paths(root, split)[1]]:
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
            if video.is_file():
                yield Sample(key=key, video=video, annotation=item)
            else:
                yield Rejected(key, f"{path}: the video {video} of {key!r} does not exist", str(video))
