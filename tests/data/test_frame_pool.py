"""Pictures of many videos: the same from processes and without, and a file that takes its process down is given up."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from encoded import damaged, encode, pictures, truncated

from vlm.data import frame_pool
from vlm.data.frame_pixels import Stretch
from vlm.data.frame_pool import End, Frames, read_frames
from vlm.data.frame_readers import Prepare, RateReader
from vlm.data.video import decode

SMALL = Stretch(width=16, height=12)


def at_rate(fps: float, prepare: Prepare = SMALL) -> RateReader:
    return RateReader(fps=fps, prepare=prepare)


def collect(events) -> tuple[dict[int, np.ndarray], dict[int, End]]:
    parts: dict[int, list[np.ndarray]] = {}
    ends: dict[int, End] = {}
    for event in events:
        assert event.at == len(ends)  # one video after the other
        if isinstance(event, End):
            ends[event.at] = event
        elif event.begins:
            parts[event.at] = [event.pixels]
        else:
            parts[event.at].append(event.pixels)
    return {at: np.concatenate(chunks) for at, chunks in parts.items()}, ends


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    files = [encode(pictures(count, 16, 12, seed=count)) for count in (3, 40, 1, 18)]
    files += [damaged()["html"], truncated(pictures(48, 160, 120))[1]]
    for number, data in enumerate(files):
        (tmp_path / f"{number}.mp4").write_bytes(data)
    return [*sorted(tmp_path.iterdir()), tmp_path / "gone.mp4"]


def test_processes_give_what_one_gives(paths: list[Path]) -> None:
    alone, ends = collect(read_frames(paths, at_rate(12), workers=0))
    together, their_ends = collect(read_frames(paths, at_rate(12), workers=3))
    assert ends == their_ends
    assert [len(alone[at]) for at in range(4)] == [3, 40, 1, 18]
    assert alone.keys() == together.keys()
    for at in alone:
        np.testing.assert_array_equal(alone[at], together[at])
    np.testing.assert_array_equal(alone[1], decode(paths[1], range(40)))
    assert {at for at, end in ends.items() if end.failure} == {4, 6}
    assert "web page" in ends[4].failure or "HTML" in ends[4].failure
    assert "No such file" in ends[6].failure
    assert any("header promises 48 frames" in warning for warning in ends[5].warnings)


def test_what_comes_early_waits_in_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first video is slow and long; of the others no more is taken in than there is room for."""
    monkeypatch.setattr(frame_pool, "EARLY", 16 * 12 * 16 * 3)
    for number, count in enumerate((90, 40, 40, 40, 40)):
        (tmp_path / f"{number}.mp4").write_bytes(encode(pictures(count, 16, 12, seed=number)))
    taken: list[int] = []
    take = frame_pool._Turn.take

    def watched(self: frame_pool._Turn, event: Frames | End):
        yield from take(self, event)
        taken.append(self.nbytes)

    monkeypatch.setattr(frame_pool._Turn, "take", watched)
    found, ends = collect(read_frames(sorted(tmp_path.iterdir()), at_rate(12), workers=2))
    assert [len(found[at]) for at in range(5)] == [90, 40, 40, 40, 40]
    assert not any(end.failure for end in ends.values())
    most = frame_pool.EARLY + 16 * 12 * 16 * 3  # one chunk more
    assert max(taken) <= most


def test_half_read_is_no_answer(paths: list[Path]) -> None:
    """Whoever stops early ends the processes too: nothing hangs, nothing is left running."""
    events = read_frames(paths, at_rate(12), workers=2)
    assert isinstance(next(events), Frames | End)
    events.close()


class Deadly:
    """Takes its process down at pictures of one size, after some of them, as a broken decoder would."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        self.seen += picture.shape[0] == 14
        if self.seen > 20:
            os.kill(os.getpid(), 11)
        return SMALL(picture)


def test_video_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    for number in range(4):
        size = (16, 14) if number == 1 else (16, 12)
        (tmp_path / f"{number}.mp4").write_bytes(encode(pictures(24, *size, seed=number)))
    found, ends = collect(read_frames(sorted(tmp_path.iterdir()), at_rate(12, Deadly()), workers=2))
    assert {at: end.failure for at, end in ends.items() if end.failure} == {
        1: "decoding ended its process (SIGSEGV), 2 times"
    }
    assert [len(found[at]) for at in (0, 2, 3)] == [24, 24, 24]


def test_video_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_pool, "SECONDS_OF_SILENCE", 4.0)
    (tmp_path / "0.mp4").write_bytes(encode(pictures(2, 16, 12)))
    os.mkfifo(tmp_path / "1.mp4")
    found, ends = collect(read_frames(sorted(tmp_path.iterdir()), at_rate(12), workers=1))
    assert (len(found[0]), ends[1].failure) == (2, "decoding took more than 4 s, 2 times")
