"""Stories: moving shapes told in words alone, from which the demo's language model learns to read.

Nothing is drawn. A story is a scene of the grammar in vlm/sources/common_shapes.py, and instead of pictures it has, for
each frame, a few words that tell it: "a red circle left" is a red circle that has gone to the left since the frame
before. Stories come from seeds that no corpus of videos has, so none is about a video that a test asks about.

    for story in stories(10_000, seed=0):
        story.frames[3]  # ("a", "red", "circle", "left")
        story.annotation  # caption and questions, as of a video
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.sources.common_shapes import CLASSES, COLOURS, NUM_CLASSES, NUM_FRAMES, SHAPES, Clip, as_chat, plan
from vlm.types import UserError

NUM_TOLD = 8  # frames that are told, evenly spread over those of a clip
FIRST_SEED = 2**40  # corpora are rendered from seeds below it
WAYS = ("left", "right", "up", "down", "still")  # words for how it went since the frame before
STILL = 1.0  # pixels: less is no movement
ARTICLE = "a"  # stands in every frame

Frame = tuple[str, ...]  # the words that tell a frame: article, colour, shape, way


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One scene in words."""

    frames: tuple[Frame, ...]
    annotation: dict[str, Any]


def stories(number: int, seed: int) -> Iterator[Story]:
    """`number` stories, rounded up to whole groups of one of each class. A pure function of the seed.

    Raises UserError for a negative seed or one so large that a corpus may have it.
    """
    _check(seed)
    rng = np.random.default_rng((FIRST_SEED + seed, len(CLASSES)))
    for clip in plan("train", -(-number // NUM_CLASSES) * NUM_CLASSES, FIRST_SEED + seed):
        yield Story(frames=_tell(clip, int(rng.integers(NUM_FRAMES // NUM_TOLD))), annotation=clip.annotation)


def sequences(number: int, seed: int) -> Iterator[Clip]:
    """`number` scenes of several actions one after another, each with its chat. A pure function of the seed.

    What is told of their frames depends on how many of them are looked at: `ways`.
    """
    _check(seed)
    for clip in plan("sequences_train", number, FIRST_SEED + seed):
        clip.annotation = as_chat(clip.key, clip.annotation)
        yield clip


def ways(centres: np.ndarray) -> list[str]:
    """Of each place (x, y) in pixels the word for how it went since the one before."""
    return [_way(*move) for move in np.diff(centres, axis=0, prepend=centres[:1])]


def _check(seed: int) -> None:
    if not 0 <= seed < FIRST_SEED:
        raise UserError(f"seed {seed} of stories: choose one from 0 to {FIRST_SEED - 1}")


def _tell(clip: Clip, first: int) -> tuple[Frame, ...]:
    """Every third frame from the `first` on, each with the way the shape has gone since the one before."""
    centres = clip.centres[first :: NUM_FRAMES // NUM_TOLD]
    return tuple((ARTICLE, clip.scene.colour, clip.scene.shape, way) for way in ways(centres))


def _way(right: float, down: float) -> str:
    """The word for a displacement in pixels."""
    if max(abs(right), abs(down)) < STILL:
        return "still"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def phrases() -> tuple[str, ...]:
    """Every expression that scenes, captions, questions and options are made of, for a tokenizer to know as one."""
    questions = ("Which way does the", "move?", "What colour is the shape that moves?", "What shape is it that moves?")
    motions = tuple(motion.words for motion in CLASSES)
    return (ARTICLE, "moves", *questions, *COLOURS, *SHAPES, "star", *motions, *WAYS)
