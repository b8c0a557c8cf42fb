"""Pictures at a steady rate, by the clock of the frames."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from encoded import damaged, encode, pictures, truncated

from vlm.data.video import DecodeError, decode, frames_at, inspect


def at_rate(data: bytes | Path, fps: float) -> np.ndarray:
    return np.stack(list(frames_at(data, fps, [])))


@pytest.mark.parametrize(("fps", "indices"), [(4, range(0, 24, 3)), (1, [0, 12]), (12, range(24)), (0.1, [0])])
def test_steady_clip(fps: float, indices: list[int]) -> None:
    """24 frames at 12 a second: ceil(2 * fps) pictures, each the frame that is on show then."""
    data = encode(pictures(24))
    assert np.array_equal(at_rate(data, fps), decode(data, indices))


def test_more_pictures_than_frames_repeat_them() -> None:
    data = encode(pictures(3, 32, 32), rate=2)
    assert np.array_equal(at_rate(data, 4), decode(data, [0, 0, 1, 1, 2, 2]))


def test_rates_that_are_no_whole_number() -> None:
    """29.97 frames a second: frame 30 comes a millisecond after second 1."""
    frames = pictures(60, 32, 32)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001), options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = buffer.getvalue()
    assert np.array_equal(at_rate(data, 1), decode(data, [0, 29, 59]))  # 60 frames last 2.002 s


def test_clock_of_the_frames_decides_where_their_rate_varies() -> None:
    """Times in twelfths of a second: four frames within the first third, one that stands for two seconds, the rest."""
    data = encode(pictures(8), times=[0, 1, 2, 3, 4, 28, 29, 30], container="matroska")
    found = at_rate(data, 1)
    assert np.array_equal(found, decode(data, [0, 4, 4]))
    assert len(at_rate(data, 4)) == 11  # 31 twelfths


def test_turned_and_resized_as_decode_does() -> None:
    data = encode(pictures(8), rotation=90)
    assert np.array_equal(at_rate(data, 6), decode(data, [0, 2, 4, 6]))


def test_damage() -> None:
    for data in damaged().values():
        with pytest.raises(DecodeError):
            list(frames_at(data, 1, []))
    whole, cut = 48, truncated(pictures(48, 160, 120))[1]
    warnings: list[str] = []
    found = list(frames_at(cut, 12, warnings))
    assert len(found) == inspect(cut).num_frames < whole
    assert any(f"header promises {whole} frames" in warning for warning in warnings)


def test_real_clips(realdata: Path) -> None:
    """As many pictures as seconds, whatever the container; a clock that leaps does not make thousands."""
    paths = [path for path in sorted((realdata / "videos").iterdir()) if path.stat().st_size < 300_000]
    assert len(paths) > 20
    for path in paths:
        info = inspect(path)
        count = sum(1 for _ in frames_at(path, 1.0, []))
        assert count <= max(1, np.ceil(info.duration)) + 1, path
        if info.duration < 60 and info.fps:
            assert count >= np.floor(info.num_frames / info.fps) - 1, path
