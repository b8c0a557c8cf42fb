"""What the moving-shapes corpus shows: classes, scenes, paths, captions and questions, before anything is drawn.

Eight classes in Something-Something-v2's manner that depend on *motion only*. Clips come in groups of eight, one of
each class, that share everything else: colour, shape, size, background, range of the path, distance, speed. Within a
group a class and its reverse (left to right / right to left, up then down / down then up, ...) are made of **the same
frames in another order**, so whatever looks at frames without their order is right half of the time at most, and what
looks at one frame is right less often still: its axis is hidden too, since the coordinate that does not move is drawn
as the one that does. (The place of the first frame therefore leans to one side by class: it tells the class in 30 % at
most, against 12.5 % by chance.) Sequences are several actions one after another, with frame segments.

    clips = plan("train", 1600, seed=0)  # `vlm/sources/shapes.py` draws them
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlm.sources.common_chat import make_chat
from vlm.types import UserError

SPLITS = ("train", "test", "sequences_train", "sequences_test")  # the place in this tuple is part of the seed
WIDTH, HEIGHT = 80, 64  # pixels
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
ACTIVITY = "moving a {shape}"  # what a sequence is of
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
        annotation: dict[str, Any] = {
            "label": label,
            "name": motion.name,
            "caption": f"a {scene.subject} moves {motion.words}",
            "questions": [
                _motion_question(rng, question, label, turn, "motion"),
                *_appearance_questions(rng, scene, turn),
            ],
            "attributes": _attributes(scene, distance, leg),
        }
        annotation["conversations"] = _conversation(annotation["questions"])
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
    annotation: dict[str, Any] = {
        "caption": f"a {scene.subject} moves " + ", then ".join(CLASSES[label].words for label in labels),
        "segments": segments,
        "questions": [
            _motion_question(rng, first, labels[0], turn, "motion_first"),
            _motion_question(rng, last, labels[-1], turn + 1, "motion_last"),
            *_appearance_questions(rng, scene, turn),
        ],
        "attributes": _attributes(scene, distance, leg),
    }
    annotation["conversations"] = _conversation(annotation["questions"])
    return Clip(key=key, scene=scene, centres=np.concatenate(parts), annotation=annotation)


def as_chat(key: str, annotation: dict[str, Any]) -> dict[str, Any]:
    """A sequence's annotation with `name` (its activity) and `chat`; segments have the words that captions have."""
    activity = ACTIVITY.format(shape=annotation["attributes"]["shape"])
    segments = [part | {"name": CLASSES[part["label"]].words} for part in annotation["segments"]]
    others = {name: value for name, value in annotation.items() if name not in ("questions", "conversations")}
    return others | {"name": activity, "segments": segments, "chat": make_chat(key, segments, activity)}


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


def _conversation(questions: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The questions, asked one after the other about the same video, with their answers in words."""
    turns: list[dict[str, str]] = []
    for question in questions:
        place = "" if turns else "<video>\n"
        turns.append({"from": "human", "value": place + question["question"].capitalize()})
        turns.append({"from": "gpt", "value": question["options"][question["answer"]]})
    return turns


def _question(
    rng: np.random.Generator, question: str, answer: str, wrong: list[str], turn: int, kind: str
) -> dict[str, Any]:
    """The right option's place goes round with `turn`, each being right equally often; the others lie at random."""
    place = turn % 4
    options = [wrong[i] for i in rng.permutation(3)]
    options.insert(place, answer)
    return {"question": question, "options": options, "answer": place, "kind": kind}
