"""Stories: the scenes of the corpus in words, from seeds that no corpus has."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vlm.sources.common_shapes import CLASSES, plan
from vlm.sources.common_stories import FIRST_SEED, NUM_TOLD, WAYS, phrases, stories
from vlm.types import UserError


def test_a_story_tells_its_scene_frame_by_frame() -> None:
    told = list(stories(16, seed=3))
    assert len(told) == 16
    for story in told:
        look = story.annotation["attributes"]
        assert len(story.frames) == NUM_TOLD
        assert all(frame[:3] == ("a", look["colour"], look["shape"]) for frame in story.frames)
        assert all(frame[3] in WAYS for frame in story.frames)
        assert story.frames[0][3] == "still", "nothing stands before the first frame"


def test_the_words_move_as_the_class_says() -> None:
    for story in stories(80, seed=0):
        motion = CLASSES[story.annotation["label"]]
        forth = (("left", "right"), ("up", "down"))[motion.axis]
        went = [frame[3] for frame in story.frames if frame[3] != "still"]
        turns = [before for before, after in pairwise([*went, ""]) if after != before]
        first = forth[motion.ascending]
        assert turns == ([first, forth[not motion.ascending]] if motion.returns else [first])


def test_stories_follow_from_the_seed_and_every_phrase_is_known() -> None:
    first, again, other = (list(stories(40, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    known = " ".join(phrases())
    for story in first:
        for question in story.annotation["questions"]:
            assert all(option in known for option in question["options"])
        assert {word for frame in story.frames for word in frame} <= set(phrases())


def test_no_story_is_of_a_corpus() -> None:
    """A corpus' seed and a story's cannot be the same, and equal numbers give other scenes."""
    story = next(stories(8, seed=0))
    assert story.annotation["attributes"] != plan("train", 8, seed=0)[0].annotation["attributes"]
    for seed in (-1, FIRST_SEED):
        with pytest.raises(UserError, match="seed"):
            next(stories(8, seed))
