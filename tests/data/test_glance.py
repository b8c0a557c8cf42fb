"""The first look at a handed-over file: what it shows, what it refuses, and that it cannot take the caller with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vlm.data.containers import DecodeError
from vlm.data.glance import Limits, look, look_apart


def clip(path: Path, frames: int = 40, fps: int = 10, size: tuple[int, int] = (64, 48)) -> Path:
    """A video that grows brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), 40 + 200 * number // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_pictures_from_the_whole_video(tmp_path: Path) -> None:
    glance = look_apart(clip(tmp_path / "a.mp4"), Limits(), count=5, height=24)
    assert glance.pictures.shape == (5, 24, 32, 3)
    assert glance.info.num_frames == 40
    assert not glance.is_image
    assert glance.seconds[0] == 0
    assert 3.4 < glance.seconds[-1] < 4
    assert np.all(np.diff(glance.seconds) > 0.5)
    brightness = glance.pictures.mean((1, 2, 3))
    assert np.allclose(brightness, [40 + 200 * second / 4 for second in glance.seconds], atol=6)
    here = look(tmp_path / "a.mp4", Limits(), count=5, height=24)
    assert np.array_equal(here.pictures, glance.pictures)


def test_an_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    glance = look(tmp_path / "a.png", Limits())
    assert (len(glance.pictures), glance.is_image, glance.info.warnings) == (1, True, ())


def test_a_video_of_two_frames_has_two(tmp_path: Path) -> None:
    assert len(look(clip(tmp_path / "a.mp4", frames=2), Limits()).pictures) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    good = clip(tmp_path / "good.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("What happens in this video?\n" * 20)
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:600])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    for name, said in (
        ("empty.mp4", "empty file"),
        ("text.mp4", "looks like text"),
        ("cut.mp4", "cut short"),
        ("noise.mp4", "not a video that FFmpeg knows"),
        ("absent.mp4", "No such file"),
        (".", "folder"),
    ):
        with pytest.raises(DecodeError, match=said):
            look(tmp_path / name, Limits())
    with pytest.raises(DecodeError, match=r"too large: 0\.0 MB, and at most"):
        look(good, Limits(nbytes=100))
    with pytest.raises(DecodeError, match=r"too long: .* at most 1 seconds"):
        look(good, Limits(seconds=1))
    with pytest.raises(DecodeError, match=r"too long: .* at most 2\.5 seconds"):  # the header alone would let it pass
        look(good, Limits(seconds=2.5))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(DecodeError, match=r"no video stream \(audio only\)"):
        look(tmp_path / "sound.mp4", Limits())


def test_frames_too_large_are_refused_by_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.data.glance.MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(DecodeError, match="64 x 48 pixels, at most 3,071 are taken"):
        look(clip(tmp_path / "a.mp4"), Limits())


def test_the_caller_lives_on(tmp_path: Path) -> None:
    good = clip(tmp_path / "good.mp4")
    with pytest.raises(DecodeError, match="looks like text"):
        (tmp_path / "text.mp4").write_text("word " * 100)
        look_apart(tmp_path / "text.mp4", Limits())
    with pytest.raises(DecodeError, match=r"longer than 0\.01 seconds"):
        look_apart(good, Limits(patience=0.01))
    assert not multiprocessing.active_children()


def test_a_crash_of_the_decoder_is_a_sentence(tmp_path: Path) -> None:
    good = clip(tmp_path / "good.mp4")

    def shoot() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until and not multiprocessing.active_children():
            time.sleep(0.001)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSEGV)

    thread = threading.Thread(target=shoot)
    thread.start()
    with pytest.raises(DecodeError, match=r"the decoder crashed \(SIGSEGV\)"):
        look_apart(good, Limits())
    thread.join()
