"""Frame indices: properties that hold for every length (the recorded values are in tests/parity)."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.data import sampling

LENGTHS = range(1, 200)


@pytest.mark.parametrize("num_segments", [2, 8, 16])
def test_segments_take_one_frame_of_each_part(num_segments: int) -> None:
    generator = np.random.RandomState(0)
    for num_frames in LENGTHS:
        part = num_frames // num_segments
        for source in (generator, None):
            indices = sampling.segment_frames(num_frames, num_segments, source)
            assert indices.shape == (num_segments,)
            assert indices.dtype == np.int64
            if part == 0:
                assert not indices.any(), "a video shorter than its segments repeats frame 0"
            else:
                assert (indices // part == np.arange(num_segments)).all()


def test_segment_offsets_come_from_the_generator_alone() -> None:
    first, again = (sampling.segment_frames(160, 16, np.random.RandomState(5)) for _ in range(2))
    other = sampling.segment_frames(160, 16, np.random.RandomState(6))
    assert (first == again).all()
    assert (first != other).any()
    assert len(set((first % 10).tolist())) > 3, "offsets are drawn per segment"
    assert (sampling.segment_frames(160, 16, None) % 10 == 5).all()


def test_a_short_video_draws_nothing() -> None:
    generator = np.random.RandomState(3)
    sampling.segment_frames(15, 16, generator)
    sampling.dense_frames(64, 16, 4, generator)
    sampling.strided_frames(31, 16, 2, generator)
    assert generator.randint(1 << 30) == np.random.RandomState(3).randint(1 << 30)


def test_two_test_clips_share_no_frame_of_a_long_video() -> None:
    for num_frames in LENGTHS:
        early, late = sampling.segment_test_clips(num_frames, 16, 2)
        assert len(early) == len(late) == 16
        assert (early <= late).all()
        assert (np.diff(early) >= 0).all()
        assert late[-1] < num_frames
        if num_frames >= 32:
            assert not set(early.tolist()) & set(late.tolist())


def test_one_test_clip_is_the_middle_of_the_segments() -> None:
    (clip,) = sampling.segment_test_clips(48, 16, 1)
    assert clip.tolist() == [1 + 3 * i for i in range(16)]
    with pytest.raises(ValueError, match="1 or 2 test clips, not 5"):
        sampling.segment_test_clips(48, 16, 5)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_dense_windows_stay_inside(stride: int) -> None:
    generator = np.random.RandomState(0)
    for num_frames in LENGTHS:
        for draw in (sampling.dense_frames, sampling.strided_frames):
            indices = draw(num_frames, 16, stride, generator)
            assert indices.shape == (16,)
            assert indices.dtype == np.int64
            assert (np.diff(indices) >= 0).all()
            assert indices[0] >= 0
            assert indices[-1] < num_frames


def test_dense_windows_reach_both_ends() -> None:
    generator = np.random.RandomState(0)
    clips = [sampling.dense_frames(40, 16, 2, generator) for _ in range(200)]
    assert {int(clip[0]) for clip in clips} == set(range(8)), "ends are drawn from 32 up to 39"
    starts = {int(sampling.strided_frames(40, 16, 2, generator)[0]) for _ in range(300)}
    assert starts == set(range(9))


@pytest.mark.parametrize("num_clips", [1, 2, 5])
def test_dense_test_clips_are_runs_of_the_grid(num_clips: int) -> None:
    for num_frames in LENGTHS:
        grid = sampling.dense_test_grid(num_frames, 16, 4).tolist()
        clips = sampling.dense_test_clips(num_frames, 16, 4, num_clips)
        assert len(clips) == num_clips
        for clip in clips:
            assert clip.tolist() in [grid[i : i + 16] for i in range(len(grid) - 15)]
        if num_clips > 1:
            assert clips[0][0] == 0
            assert clips[-1][-1] == grid[-1]


def test_one_dense_test_clip_is_the_centre() -> None:
    (clip,) = sampling.dense_test_clips(100, 16, 4, 1)
    assert clip.tolist() == list(range(16, 80, 4))


def test_strided_without_a_generator_starts_in_the_middle() -> None:
    assert sampling.strided_frames(42, 16, 2, None).tolist() == list(range(5, 37, 2))
    assert sampling.strided_frames(1, 4, 2, None).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("num_frames", [0, -1])
def test_no_frames_is_an_error(num_frames: int) -> None:
    for draw in (sampling.segment_frames, sampling.segment_test_grid):
        arguments = (num_frames, 16, None) if draw is sampling.segment_frames else (num_frames, 16)
        with pytest.raises(ValueError, match=f"a video of {num_frames} frames"):
            draw(*arguments)
    with pytest.raises(ValueError, match=f"a video of {num_frames} frames"):
        sampling.dense_test_grid(num_frames, 16, 4)
