"""The one time axis: borders of frames and of places."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.data.time_axis import TimeAxis

SIZES = [(1, 1), (1, 7), (186, 1000), (999, 1000), (1000, 1000), (1001, 1000), (1318, 1000), (9745, 1000), (600, 356)]


@pytest.mark.parametrize(("frames", "places"), SIZES)
def test_ends_order_and_way_back(frames: int, places: int) -> None:
    axis = TimeAxis(frames, places)
    assert (axis.place(0), axis.place(frames)) == (0, places)
    assert (axis.frame(0), axis.frame(places)) == (0, frames)
    there = [axis.place(frame) for frame in range(frames + 1)]
    back = [axis.frame(place) for place in range(places + 1)]
    assert there == sorted(there)
    assert back == sorted(back)
    if frames >= places:
        assert [axis.place(frame) for frame in back] == list(range(places + 1))
    if frames <= places:
        assert [axis.frame(place) for place in there] == list(range(frames + 1))


@pytest.mark.parametrize(("frames", "places"), SIZES)
def test_the_nearest_border_is_taken(frames: int, places: int) -> None:
    axis = TimeAxis(frames, places)
    for place in range(places + 1):
        assert abs(axis.frame(place) - place * frames / places) <= 0.5
    for frame in range(frames + 1):
        assert abs(axis.place(frame) - frame * places / frames) <= 0.5
    assert TimeAxis(3, 2).frame(1) == 2, "1.5: of two as near the later"


@pytest.mark.parametrize("frames", [1000, 1318, 1999, 2000, 9745, 18151])
def test_a_place_looks_at_a_frame_of_its_own(frames: int) -> None:
    """What the published sampling takes for place t lies between the borders t and t + 1, or one frame beside."""
    places = 1000
    axis, step = TimeAxis(frames, places), (frames - 1) / places
    borders = np.round(np.arange(places + 1) * step).astype(int)
    seen = (borders[:-1] + borders[1:]) // 2
    first = np.array([axis.frame(place) for place in range(places + 1)])
    assert (seen >= first[:-1] - 1).all()
    assert (seen <= first[1:]).all()
    if frames >= 2 * places:
        assert (seen >= first[:-1]).all()
        assert (seen < first[1:]).all()


def test_beyond_the_ends_is_the_end() -> None:
    axis = TimeAxis(2000, 1000)
    assert axis.place(2400) == 1000, "labels of Breakfast may go on after the video"
    assert (axis.place(-3), axis.frame(-1), axis.frame(4711)) == (0, 0, 2000)


def test_times_in_texts() -> None:
    axis = TimeAxis(2000, 1000)
    assert axis.render("<t:0>-<t:301> pour milk\n<t:301>-<t:2000> SIL") == "0-151 pour milk\n151-1000 SIL"
    assert axis.render("at <t:x>, 5 or <video>") == "at <t:x>, 5 or <video>", "nothing else is touched"


@pytest.mark.parametrize("sizes", [(0, 10), (-1, 10), (10, 0)])
def test_a_video_without_frames_has_no_axis(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must have frames and places"):
        TimeAxis(*sizes).place(0)
