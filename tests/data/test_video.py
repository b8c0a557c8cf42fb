"""Frames come from the index that was asked for, whatever the container; what is no video is refused by its reason."""

from __future__ import annotations

import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
from encoded import damaged, encode, jpeg, pictures, sound, truncated

from vlm.data.video import DecodeError, check_decoders, container_extension, count_frames, decode, inspect

B_FRAMES = {"bf": "3", "g": "12", "b_strategy": "0"}
CLIPS = {
    "mp4_b_frames": lambda: encode(pictures(40), options=B_FRAMES),
    "mp4_open_gop": lambda: encode(pictures(40), options={**B_FRAMES, "x264-params": "open-gop=1"}),
    "mkv": lambda: encode(pictures(20), container="matroska", options=B_FRAMES),
    "vp8": lambda: encode(pictures(20), container="webm", codec="libvpx"),
    "vp9": lambda: encode(pictures(20), container="webm", codec="libvpx-vp9"),
    "hevc": lambda: encode(pictures(24), codec="libx265", options={"x265-params": "log-level=none:keyint=8"}),
    "ts": lambda: encode(pictures(30), container="mpegts", options=B_FRAMES),
    "avi": lambda: encode(pictures(30), container="avi", codec="mpeg4", options={"bf": "2", "g": "12"}),
    "mpg": lambda: encode(pictures(30), container="mpeg", codec="mpeg2video", rate=25, options={"bf": "2", "g": "12"}),
    "gif": lambda: encode(pictures(12), container="gif", codec="gif", pix_fmt="rgb8"),
    "fragmented": lambda: encode(pictures(40), container_options={"movflags": "frag_keyframe+empty_moov"}),
    "odd_size": lambda: encode(pictures(10, 61, 41), pix_fmt="yuv444p"),
    "ten_bit": lambda: encode(pictures(10), pix_fmt="yuv420p10le"),
    "variable_rate": lambda: encode(pictures(8), times=[0, 1, 2, 8, 9, 20, 21, 22]),
    "starts_late": lambda: encode(pictures(8), times=list(range(30, 38))),
    "one_frame": lambda: encode(pictures(1)),
    "one_pixel": lambda: encode(pictures(5, 1, 1), pix_fmt="yuv444p"),
    "rotated": lambda: encode(pictures(12), rotation=90),
    "jpeg": lambda: jpeg(pictures(1)[0]),
}


def sequential(data: bytes) -> np.ndarray:
    """(frames, H, W, 3) as PyAV yields them, turned by the rotation each of them carries."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return np.stack([np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in frames])


@pytest.mark.parametrize("name", CLIPS)
def test_the_frame_of_index_i_is_frame_i_of_sequential_decoding(name: str) -> None:
    data = CLIPS[name]()
    expected = sequential(data)
    info = inspect(data)
    assert (info.num_frames, info.height, info.width) == expected.shape[:3]
    assert count_frames(data) == info.num_frames
    last = info.num_frames - 1
    for decoders in (("pyav",), check_decoders(data, info)):
        for wanted in ([last // 2], [0, last], [last, 0, last, last // 3], range(0, info.num_frames, 3)):
            np.testing.assert_array_equal(decode(data, wanted, decoders=decoders), expected[list(wanted)])


def test_decord_is_admitted_on_plain_h264_and_then_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CLIPS["mp4_b_frames"]()
    assert check_decoders(data, inspect(data)) == ("decord", "pyav")
    expected = decode(data, [3, 30])
    monkeypatch.setattr("vlm.data.video._decode_pyav", None)  # whoever calls it fails
    np.testing.assert_array_equal(decode(data, [3, 30], decoders=("decord", "pyav")), expected)


@pytest.mark.parametrize("name", ["gif", "one_pixel"])
def test_decord_is_refused_where_it_fails_and_pyav_takes_over_from_it(name: str) -> None:
    data = CLIPS[name]()
    assert check_decoders(data, inspect(data)) == ("pyav",)
    np.testing.assert_array_equal(decode(data, [2, 4], decoders=("decord", "pyav")), sequential(data)[[2, 4]])


@pytest.mark.parametrize("name", ["ts", "avi", "mpg"])
def test_decord_is_refused_where_it_returns_wrong_pictures_in_silence(name: str) -> None:
    """Real behaviour of decord 0.6.0: it opens these, and what it returns is not what was asked for."""
    data = CLIPS[name]()
    assert check_decoders(data, inspect(data)) == ("pyav",)


def test_decord_is_refused_where_one_picture_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CLIPS["mp4_b_frames"]()
    info = inspect(data)
    expected = decode(data, range(info.num_frames))

    class Reader:
        """decord as it behaves on damaged seeks: right when read densely, one frame late after a gap."""

        def __len__(self) -> int:
            return info.num_frames

        def get_batch(self, wanted: list[int]) -> Reader:
            self.wanted = wanted
            return self

        def asnumpy(self) -> np.ndarray:
            gaps = np.diff([-1, *self.wanted])
            return expected[np.minimum(np.array(self.wanted) + (gaps > 12), info.num_frames - 1)]

    monkeypatch.setattr("vlm.data.video._decord_reader", lambda data: Reader())
    assert check_decoders(data, info) == ("pyav",)


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_turns_the_picture_counterclockwise(angle: int) -> None:
    frames = np.zeros((6, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255  # white corner at the upper left
    data = encode(frames, rotation=angle)
    info = inspect(data)
    assert info.rotation == angle
    assert (info.width, info.height) == ((48, 64) if angle % 180 else (64, 48))
    picture = decode(data, [3])[0]
    corners = picture[[4, 4, -4, -4], [4, -4, 4, -4], 0] > 128  # upper left, upper right, lower left, lower right
    assert corners.tolist() == {
        90: [False, False, True, False],
        180: [False, False, False, True],
        270: [False, True, False, False],
    }[angle]  # fmt: skip


def test_info_says_what_the_stream_holds() -> None:
    info = inspect(CLIPS["variable_rate"]())
    assert (info.num_frames, info.codec, info.rotation, info.warnings) == (8, "h264", 0, ())
    assert info.duration == pytest.approx(23 / 12, abs=0.05)
    steady = inspect(CLIPS["mp4_b_frames"]())
    assert (steady.fps, steady.duration) == (pytest.approx(12), pytest.approx(40 / 12))


def test_truncated_file_keeps_its_frames_and_warns() -> None:
    whole, cut = truncated(pictures(48, 160, 120))
    info = inspect(cut)
    assert 0 < info.num_frames < 48
    assert f"header promises 48 frames, {info.num_frames} decode" in info.warnings
    wanted = [0, info.num_frames - 1]
    np.testing.assert_array_equal(decode(cut, wanted), decode(whole, wanted))
    with pytest.raises(DecodeError, match=f"frame 47 was asked for, only {info.num_frames} frames decode"):
        decode(cut, [0, 47], decoders=("decord", "pyav"))


def test_decoding_stops_after_the_last_frame_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = inspect.__globals__["_FrameReader"].__iter__

    def counting(self):  # type: ignore[no-untyped-def]
        for frame in plain(self):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr("vlm.data.video._FrameReader.__iter__", counting)
    decode(CLIPS["mp4_b_frames"](), [5, 2])
    assert len(seen) == 6


REASONS = {
    "zero_bytes": r"empty file \(0 bytes\)",
    "html": "not a video: looks like HTML",
    "lfs_pointer": "not a video: a git-lfs pointer",
    "audio_only": r"no video stream \(audio only\)",
    "no_index": 'cut short: an mp4 without its index \\("moov"\\)',
}


@pytest.mark.parametrize("name", REASONS)
def test_damaged_file_is_refused_by_its_reason(name: str, tmp_path: Path) -> None:
    data = damaged()[name]
    (tmp_path / "clip.mp4").write_bytes(data)
    for source in (data, tmp_path / "clip.mp4"):
        for ask in (inspect, count_frames, lambda source: decode(source, [0], decoders=("decord", "pyav"))):
            with pytest.raises(DecodeError, match=REASONS[name]):
                ask(source)


def test_other_things_that_are_no_video(tmp_path: Path) -> None:
    for data, reason in (
        (b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n", "looks like text"),  # FFmpeg would follow it to another file
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "looks like XML"),
        (bytes(range(256)) * 64, "not a video that FFmpeg knows"),
        (sound(cover=pictures(1)[0]), "no video stream .*with a cover picture"),
    ):
        with pytest.raises(DecodeError, match=reason):
            inspect(data)
    with pytest.raises(DecodeError, match="cannot be read: No such file"):
        inspect(tmp_path / "nothing.mp4")


def test_a_size_that_begins_with_a_line_end_is_no_text() -> None:
    """Bytes 4 to 7 of an .avi are its size: of one in 128 they begin as text does, RIFF and a line end."""
    data = encode(pictures(9), container="avi", codec="mpeg4")
    size = len(data) - 8
    padding = (0x0A - size - 8) % 256  # a chunk of junk behind all
    data += b"JUNK" + padding.to_bytes(4, "little") + bytes(padding)
    data = data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]
    assert data[:5] == b"RIFF\n"
    assert b"\n" not in data[5:4096]
    assert inspect(data).num_frames == 9


def test_a_list_of_other_files_opens_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.mp4").write_bytes(encode(pictures(9)))
    monkeypatch.chdir(tmp_path)
    for data in (b"ffconcat version 1.0\nfile secret.mp4\n", b"ffconcat version 1.0\n#\1\nfile secret.mp4\n#\1\n"):
        with pytest.raises(DecodeError):
            inspect(data)


def test_the_default_stream_is_taken() -> None:
    """Two video streams, the second marked as the default one: the first is not shown by a player."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        streams = [output.add_stream("libx264", rate=12) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        streams[0].disposition = av.stream.Disposition(0)
        streams[1].disposition = av.stream.Disposition.default
        for stream, shade in zip(streams, (30, 220)):
            for index in range(4):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
                frame.pts = index
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    assert decode(file.getvalue(), [1]).mean() == pytest.approx(220, abs=3)


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    data = CLIPS["vp8"]()
    (tmp_path / "clip.mp4").write_bytes(data)
    assert inspect(tmp_path / "clip.mp4") == inspect(data)
    extensions = {"mp4_b_frames": "mp4", "mkv": "mkv", "vp8": "webm", "ts": "ts", "avi": "avi", "mpg": "mpg",
                  "gif": "gif", "jpeg": "jpg"}  # fmt: skip
    assert {name: container_extension(CLIPS[name]()) for name in extensions} == extensions
    assert container_extension(b"") is None


def test_still_picture_is_one_frame_and_warned_of() -> None:
    info = inspect(CLIPS["jpeg"]())
    assert info.num_frames == 1
    assert "a still picture" in info.warnings[0]


def test_change_of_picture_size_is_scaled_to_the_first_and_warned_of() -> None:
    data = encode(pictures(6), container="mpegts") + encode(pictures(6, 96, 64), container="mpegts")
    info = inspect(data)
    assert (info.num_frames, info.width, info.height) == (12, 64, 48)
    assert any("picture size becomes 96x64 at frame 6" in warning for warning in info.warnings)
    assert decode(data, [0, 11]).shape == (2, 48, 64, 3)


# The real clips ------------------------------------------------------------------------------------------------------


def table(realdata: Path) -> dict[str, tuple[str, int, str]]:
    """File -> (size, frames decoded by PyAV, what decord does) from the table beside the clips."""
    rows = {}
    for line in (realdata / "VIDEOS.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 12 and re.fullmatch(r"\d+/\d+", cells[5]):
            rows[cells[0]] = (cells[3], int(cells[5].split("/")[1]), cells[11])
    return rows


def test_real_clips_frame_by_frame(realdata: Path) -> None:
    rows = table(realdata)
    clips = sorted((realdata / "videos").iterdir())
    assert {clip.name for clip in clips} <= rows.keys()
    for clip in clips:
        size, frames, decord = rows[clip.name]
        data = clip.read_bytes()
        info = inspect(data)
        assert info.num_frames == frames, clip.name
        upright = f"{info.height}x{info.width}" if info.rotation % 180 else f"{info.width}x{info.height}"
        assert upright == size, clip.name
        decoders = check_decoders(data, info)
        if decord != "ok" and not decord.startswith("auto-rotated"):
            assert decoders == ("pyav",), clip.name
        wanted = sorted({0, 1, frames // 3, frames // 2, frames - 1})
        expected = _real_frames(clip, wanted)
        np.testing.assert_array_equal(decode(data, wanted), expected, err_msg=clip.name)
        np.testing.assert_array_equal(decode(data, wanted, decoders=decoders), expected, err_msg=clip.name)


def _real_frames(clip: Path, wanted: list[int]) -> list[np.ndarray]:
    with av.open(str(clip)) as container:
        frames = [frame for index, frame in enumerate(container.decode(video=0)) if index in wanted]
        return [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in frames]


def test_real_damaged_files(realdata: Path) -> None:
    kept, refused = {}, {}
    for clip in sorted((realdata / "bad").glob("*.mp4")):
        try:
            kept[clip.name[:2]] = inspect(clip.read_bytes())
        except DecodeError as error:
            refused[clip.name[:2]] = str(error)
    assert {name: info.num_frames for name, info in kept.items()} == {"01": 137, "05": 24, "08": 1, "10": 30, "17": 1}
    assert "header promises 303 frames, 137 decode" in kept["01"].warnings
    assert [refused[name].split(" (")[0] for name in ("02", "07")] == ["empty file", "no video stream"]
    assert "HTML" in refused["03"]
    assert "git-lfs" in refused["12"]
