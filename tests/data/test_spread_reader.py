"""So many pictures of a video, whatever its length and whatever its container says of it."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoded import damaged, encode, pictures, truncated
from torch.nn import functional

from vlm.data.frame_pixels import Nearest
from vlm.data.frame_pool import End, Frames, read_frames
from vlm.data.frame_readers import Listed
from vlm.data.sampling import middle_frames
from vlm.data.shards import ShardSet, write_shards
from vlm.data.spread_reader import SpreadReader
from vlm.data.video import count_frames, count_packets, decode
from vlm.types import Sample

NEAREST = Nearest(width=20, height=20)


def read(reader: SpreadReader, item: object) -> tuple[np.ndarray, End, list[Frames]]:
    """All pictures as the encoder gets them, those that come again too; the end; the pieces."""
    pieces: list[Frames] = []
    for event in read_frames([item], reader, workers=0):
        if isinstance(event, End):
            whole = [piece.pixels.repeat(piece.times, axis=0) for piece in pieces]
            return np.concatenate(whole) if whole else np.empty(0), event, pieces
        pieces = [event] if event.begins else [*pieces, event]
    raise AssertionError


def without_beginning() -> bytes:
    """A stream that begins in the midst of a group of pictures: its container holds more frames than decode."""
    out = io.BytesIO()
    whole = io.BytesIO(encode(pictures(40), options={"g": "10"}))
    with av.open(whole) as source, av.open(out, "w", format="matroska") as copy:
        stream = source.streams.video[0]
        written = copy.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if number >= 3 and packet.dts is not None:
                packet.stream = written
                copy.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("count", [1, 7, 30, 100])
@pytest.mark.parametrize("fill", [True, False])
def test_the_middle_frames_of_a_file(tmp_path: Path, count: int, fill: bool) -> None:
    file = tmp_path / "a.avi"
    file.write_bytes(encode(pictures(30, 64, 48), container="avi", codec="mpeg4", options={"bf": "2"}))
    found, end, pieces = read(SpreadReader(num_frames=count, fill=fill, prepare=NEAREST), file)
    indices = middle_frames(30, count if fill else min(count, 30)).tolist()
    np.testing.assert_array_equal(found, [NEAREST(frame) for frame in decode(file, indices)])
    assert end == End(0, "", ())
    assert sum(len(piece.pixels) for piece in pieces) == len(set(indices))  # none is sent twice


@pytest.mark.parametrize("make", [lambda: truncated(pictures(48, 160, 120))[1], without_beginning])
def test_containers_that_say_too_much_are_read_again(tmp_path: Path, make: Callable[[], bytes]) -> None:
    """As published loaders do not: they sample from the container's count."""
    file = tmp_path / "a.mkv"
    file.write_bytes(make())
    promised, frames = count_packets(file), count_frames(file)
    assert frames < promised
    found, end, _ = read(SpreadReader(num_frames=10, fill=True, prepare=NEAREST), file)
    expected = [NEAREST(frame) for frame in decode(file, middle_frames(frames, 10).tolist())]
    np.testing.assert_array_equal(found, expected)
    assert not end.failure


def test_records_of_shards_know_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encode(pictures(9)))
    samples = [Sample(key="a", video=tmp_path / "a.mp4", annotation={"caption": "c"}),
               Sample(key="text", annotation={"caption": "c"})]  # fmt: skip
    write_shards(samples, tmp_path / "out", arguments={"source": "test"})
    shards = ShardSet(tmp_path / "out")
    reader = SpreadReader(num_frames=5, fill=False, prepare=NEAREST, shards=shards)
    from_file = read(SpreadReader(num_frames=5, fill=False, prepare=NEAREST), tmp_path / "a.mp4")[0]
    for given in (0, shards.read(0)):
        chosen = reader if given == 0 else SpreadReader(num_frames=5, fill=False, prepare=NEAREST)
        np.testing.assert_array_equal(read(chosen, given)[0], from_file)
    assert "has no video" in read(reader, 1)[1].failure


def test_files_that_are_no_videos_are_told(tmp_path: Path) -> None:
    for name, data in damaged().items():
        (tmp_path / name).write_bytes(data)
        assert read(SpreadReader(num_frames=5, fill=True, prepare=NEAREST), tmp_path / name)[1].failure


def test_copies_beside_each_picture_are_made_before_it_is_resized(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(encode(pictures(6, 64, 48)))
    reader = SpreadReader(num_frames=4, fill=True, prepare=NEAREST, augment=("flip", "sharp"))
    found = read(reader, Listed("key", file))[0]
    assert found.shape == (4, 3, 20, 20, 3)
    frames = decode(file, middle_frames(6, 4).tolist())
    np.testing.assert_array_equal(found[:, 1], [NEAREST(frame[:, ::-1]) for frame in frames])
    assert not np.array_equal(found[:, 1], found[:, 0, :, ::-1])  # the nearest pixel of the mirrored one is another
    np.testing.assert_array_equal(found, read(reader, Listed("key", file))[0])
    assert not np.array_equal(found, read(reader, Listed("other", file))[0])


def test_nearest_pixels_are_those_of_torch() -> None:
    for size in (*range(1, 700), 720, 1080, 1081, 1920, 2160, 3840):
        row = torch.arange(size).float().expand(1, 1, 2, size)
        expected = functional.interpolate(row, (2, 224))[0, 0, 0].numpy()
        picture = np.arange(size)[None, :, None].repeat(2, 0)
        np.testing.assert_array_equal(Nearest(width=224, height=2)(picture)[0, :, 0], expected)


def test_processes_that_decode_do_without_torch() -> None:
    """It would cost each of them half a second and 200 MB."""
    program = "import sys, vlm.data.spread_reader; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
