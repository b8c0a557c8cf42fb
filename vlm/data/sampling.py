"""Which frames of a clip are read: pure functions from a frame count (and a generator) to frame indices.

Three families of clips of a fixed length, as in VideoMAE (arXiv 2203.12602, §4 and its released recipes):
segments   the clip is cut into S equal segments and one frame is taken from each (TSN, arXiv 1608.00859); SSv2
dense      `clip_length` frames spread over a window of `clip_length * stride` frames; Kinetics
strided    `clip_length` frames exactly `stride` apart from a random start; masked pretraining

two that give fewer frames where the video has fewer (ALPRO, arXiv 2112.09583; Video-LLaMA, arXiv 2306.02858):
headtail   so many frames of the first half, drawn, and so many of the second
uniform    evenly spread

and one that always gives as many as are asked for (Video-ChatGPT, arXiv 2306.05424):
middle     the middle of each of so many equal parts

Every function returns an int64 array; N is the number of frames of the video, S the number of segments. The offsets of
the seeded originals come from numpy's legacy generator, so `generator` is a `numpy.random.RandomState`.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.random import RandomState


def segment_frames(num_frames: int, num_segments: int, generator: RandomState | None) -> np.ndarray:
    """One frame per segment of N // S frames: (S,) indices.

    With a generator the offset inside each segment is drawn uniformly (training); with None it is the middle one. The
    N - S * (N // S) frames after the last segment are never used. A video shorter than S frames gives frame 0 S times:
    the original repeats it too (its branch for short videos cannot be reached).
    """
    _check(num_frames, num_segments)
    length = num_frames // num_segments
    if length == 0:
        return np.zeros(num_segments, dtype=np.int64)
    if generator is None:
        offsets = np.full(num_segments, length // 2, dtype=np.int64)
    else:
        offsets = generator.randint(0, length, size=num_segments).astype(np.int64)
    return np.arange(num_segments, dtype=np.int64) * length + offsets


def segment_test_grid(num_frames: int, num_segments: int) -> np.ndarray:
    """The 2S test frames of a video, sorted: the start and the middle of each segment of N / S (fractional) frames."""
    _check(num_frames, num_segments)
    tick = num_frames / num_segments
    steps = range(num_segments)
    return np.array(sorted([int(tick / 2 + tick * x) for x in steps] + [int(tick * x) for x in steps]), dtype=np.int64)


def segment_test_clips(num_frames: int, num_segments: int, num_clips: int) -> list[np.ndarray]:
    """Test clips of S frames: both strided halves of the grid, or, for one clip, the middle of each segment.

    No other number of clips is defined: the original takes every second frame whatever the number, and for three clips
    fills up with copies of one frame, so that its clips have 24, 24 and 23 frames for S = 16.
    """
    if num_clips == 1:
        return [segment_frames(num_frames, num_segments, None)]
    if num_clips != 2:
        raise ValueError(
            f"segment sampling defines 1 or 2 test clips, not {num_clips}: the test grid has 2 frames per segment"
        )
    grid = segment_test_grid(num_frames, num_segments)
    return [grid[0::2], grid[1::2]]


def dense_frames(num_frames: int, clip_length: int, stride: int, generator: RandomState) -> np.ndarray:
    """Training indices, (clip_length,): evenly over a random window of `clip_length * stride` frames.

    A video no longer than the window is covered from its start by N // stride indices, and the last frame is repeated.
    """
    _check(num_frames, clip_length, stride)
    window = clip_length * stride
    if num_frames <= window:
        covered = np.linspace(0, num_frames, num=num_frames // stride)
        indices = np.concatenate([covered, np.full(clip_length - len(covered), num_frames, dtype=np.float64)])
        return np.clip(indices, 0, num_frames - 1).astype(np.int64)
    end = int(generator.randint(window, num_frames))
    return np.clip(np.linspace(end - window, end, num=clip_length), end - window, end - 1).astype(np.int64)


def dense_test_grid(num_frames: int, clip_length: int, stride: int) -> np.ndarray:
    """Every `stride`-th frame of the video, the last one repeated up to `clip_length`."""
    _check(num_frames, clip_length, stride)
    grid = np.arange(0, num_frames, stride, dtype=np.int64)
    missing = clip_length - len(grid)
    return np.concatenate([grid, np.full(missing, grid[-1])]) if missing > 0 else grid


def dense_test_clips(num_frames: int, clip_length: int, stride: int, num_clips: int) -> list[np.ndarray]:
    """`num_clips` runs of `clip_length` grid frames, evenly spaced from first to last; a single one is centred."""
    grid = dense_test_grid(num_frames, clip_length, stride)
    slack = len(grid) - clip_length
    if num_clips == 1:
        starts = [slack // 2]
    else:
        step = slack / (num_clips - 1)
        starts = [int(clip * step) for clip in range(num_clips)]
    return [grid[start : start + clip_length] for start in starts]


def strided_frames(num_frames: int, clip_length: int, stride: int, generator: RandomState | None) -> np.ndarray:
    """Pretraining indices, (clip_length,): `stride` apart from a random start, or, without a generator, the middle one.

    A video shorter than `clip_length * stride` is read from frame 0 and its last sampled frame is repeated. The very
    last frame of the video is never sampled: the original counts from one there and stops one short.
    """
    _check(num_frames, clip_length, stride)
    num_starts = num_frames - clip_length * stride + 1
    if num_starts <= 0:
        start = 0
    elif generator is None:
        start = num_starts // 2
    else:
        start = int(generator.randint(num_starts))
    steps = np.arange(clip_length, dtype=np.int64)
    return start + stride * np.minimum(steps, max(0, (num_frames - 2 - start) // stride))


def headtail_frames(num_frames: int, count: int, generator: random.Random) -> np.ndarray:
    """min(count, N) frames in order: half of them drawn without replacement from each half of the video, of an odd
    number one more from the second.

    The original draws as many from the second half as from the first, and then refuses the odd clip.
    """
    _check(num_frames, count)
    count = min(count, num_frames)
    middle = num_frames // 2
    head = sorted(generator.sample(range(middle), count // 2))
    tail = sorted(generator.sample(range(middle, num_frames), count - count // 2))
    return np.array(head + tail, dtype=np.int64)


def uniform_frames(num_frames: int, count: int) -> np.ndarray:
    """min(count, N) frames: the first of each of so many equal parts."""
    _check(num_frames, count)
    count = min(count, num_frames)
    return np.arange(0, num_frames, num_frames / count).astype(np.int64)[:count]


def middle_frames(num_frames: int, count: int) -> np.ndarray:
    """`count` frames in order: the middle of each of so many parts of N - 1 frames, borders rounded half to even.

    As published, to the number. Of a video of fewer frames some come several times; the last frame never comes, unless
    it is the only one.
    """
    _check(num_frames, count)
    borders = np.round((num_frames - 1) / count * np.arange(count + 1)).astype(np.int64)
    return (borders[:-1] + borders[1:]) // 2


def _check(num_frames: int, clip_length: int, stride: int = 1) -> None:
    if num_frames < 1:
        raise ValueError(
            f"a video of {num_frames} frames has none to sample: it should have been rejected when sharded"
        )
    assert clip_length >= 1, clip_length
    assert stride >= 1, stride
