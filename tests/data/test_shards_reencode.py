"""Clips encoded again keep their pictures and times, in short groups and the same bytes; counted tokens."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from encoded import damaged, encode, jpeg, pictures, truncated
from PIL import Image

from vlm.data import shard_reencode
from vlm.data.shard_reencode import Reencode, reencode
from vlm.data.shards import ShardSet, write_shards
from vlm.data.tokenizers import SentencePieceTokenizer, content_hash
from vlm.data.video import DecodeError, decode, frames_at, inspect
from vlm.types import Sample, UserError

ARGUMENTS = {"source": "test", "split": "train"}
TOKENIZER = Path(__file__).resolve().parent.parent / "goldens" / "tiny_llama_tokenizer" / "tokenizer.model"


def smooth(count: int, width: int, height: int) -> np.ndarray:
    """(count, height, width, 3) uint8: a soft picture that is panned over, as cameras do; no pixel-wide edges."""
    coarse = np.random.default_rng(0).integers(0, 255, (6, 12, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((2 * width, height), Image.Resampling.BICUBIC))
    return np.stack([wide[:, at * width // count :][:, :width] for at in range(count)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def key_frames(data: bytes) -> list[int]:
    with av.open(io.BytesIO(data)) as container:
        return [at for at, frame in enumerate(container.decode(video=0)) if frame.key_frame]


def test_frames_stay_what_they_are_and_any_of_them_is_near_a_key_frame() -> None:
    data = encode(smooth(40, 96, 64), rate=24)
    made, warnings = reencode(data, Reencode(gop=8))
    before, after = inspect(data), inspect(made)
    assert warnings == []
    assert (after.num_frames, after.fps, after.duration) == (before.num_frames, before.fps, before.duration)
    assert (after.width, after.height, after.codec) == (96, 64, "h264")
    assert key_frames(data) == [0]
    assert key_frames(made) == [0, 8, 16, 24, 32]
    originals, found = (decode(one, range(40)) for one in (data, made))
    assert psnr(originals, found) > 36
    assert psnr(originals[1:], found[:-1]) < psnr(originals, found) - 6  # a frame later would be seen


@pytest.mark.parametrize(
    ("how", "size", "expected"),
    [
        (Reencode(short_side=32), (96, 64), (48, 32)),
        (Reencode(short_side=32), (64, 96), (32, 48)),
        (Reencode(short_side=128), (96, 64), (96, 64)),
        (Reencode(short_side=0), (96, 64), (96, 64)),
        (Reencode(short_side=30), (97, 61), (48, 30)),
        (Reencode(), (1, 1), (2, 2)),
        (Reencode(), (1920, 1080), (456, 256)),
        (Reencode(), (427, 240), (428, 240)),
    ],
)
def test_sizes(how: Reencode, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert how.size(*size) == expected
    if max(size) < 100:
        frames = smooth(3, *size)
        made, _ = reencode(encode(frames, pix_fmt="yuv444p"), how)
        info = inspect(made)
        assert (info.width, info.height) == expected


def test_small_pictures_are_the_original_ones_resized() -> None:
    data = encode(smooth(5, 384, 256), options={"crf": "1"})
    made, _ = reencode(data, Reencode(short_side=128, crf=1))
    resized = [
        np.asarray(Image.fromarray(picture).resize((192, 128), Image.Resampling.BICUBIC))
        for picture in decode(data, range(5))
    ]
    assert psnr(np.stack(resized), decode(made, range(5))) > 37


def test_rate_is_thinned_to_what_is_on_show_then() -> None:
    data = encode(smooth(48, 64, 48), rate=24)
    made, _ = reencode(data, Reencode(fps=5))
    info = inspect(made)
    assert (info.num_frames, round(info.fps, 6), round(info.duration, 6)) == (10, 5.0, 2.0)
    shown = np.stack(list(frames_at(data, 5, [])))
    assert psnr(shown, decode(made, range(10))) > 35


def test_a_lower_rate_is_not_raised() -> None:
    data = encode(pictures(8), rate=4)
    made, _ = reencode(data, Reencode(fps=10))
    info = inspect(made)
    assert (info.num_frames, info.fps, info.duration) == (8, 4.0, 2.0)


def test_times_of_a_varying_rate_are_kept() -> None:
    times = [0, 1, 2, 3, 4, 28, 29, 30]
    data = encode(pictures(8), times=times, container="matroska")
    made, _ = reencode(data, Reencode())
    with av.open(io.BytesIO(made)) as container:
        found = [float(frame.time) for frame in container.decode(video=0)]
    assert found == pytest.approx([time / 12 for time in times], abs=1e-3)
    assert inspect(made).num_frames == 8


def test_a_rotated_clip_is_upright_afterwards() -> None:
    data = encode(smooth(4, 96, 64), rotation=90)
    made, _ = reencode(data, Reencode())
    info = inspect(made)
    assert (info.width, info.height, info.rotation) == (64, 96, 0)
    assert psnr(decode(data, range(4)), decode(made, range(4))) > 35


def test_damage_is_warned_of_or_named() -> None:
    _, cut = truncated(pictures(48, 160, 120))
    made, warnings = reencode(cut, Reencode())
    assert any("48 frames" in warning for warning in warnings)
    assert 1 < inspect(made).num_frames < 48
    for data in damaged().values():
        with pytest.raises(DecodeError):
            reencode(data, Reencode())


def test_what_the_encoder_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reencode, "size", lambda self, width, height: (width + 1, height))  # yuv420p has even sides
    with pytest.raises(DecodeError, match="cannot be encoded again"):
        reencode(encode(pictures(3)), Reencode())


def test_frames_that_went_missing_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reencode, "count_frames", lambda data: 2)
    with pytest.raises(DecodeError, match="3 frames were written, 2 decode"):
        reencode(encode(pictures(3)), Reencode())


SCRIPT = """
import hashlib, sys
from pathlib import Path
from vlm.data.shard_reencode import Reencode, reencode
waste = [bytes(n) for n in range(int(sys.argv[2]))]
print(hashlib.sha256(reencode(Path(sys.argv[1]).read_bytes(), Reencode(short_side=48))[0]).hexdigest())
"""


def test_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Whatever lies in memory, and however many processors may be used."""
    (tmp_path / "clip.mp4").write_bytes(encode(smooth(60, 160, 120), rate=30))
    found = set()
    for waste, core in (("0", None), ("999", 0)):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "clip.mp4"), waste]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
        )
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 1}, "short side of 0 or 2"),
        ({"short_side": -2}, "short side of 0 or 2"),
        ({"gop": 0}, "gop of 1"),
        ({"crf": 52}, "crf of 0 to 51"),
        ({"fps": 0.0}, "a rate is above 0"),
        ({"fps": float("nan")}, "a rate is above 0"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Reencode(**options)  # type: ignore[arg-type]


# In shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "clip.mp4").write_bytes(encode(smooth(12, 96, 64)))
    (folder / "other.mp4").write_bytes(encode(smooth(20, 64, 96), container="webm", codec="libvpx"))
    (folder / "page.mp4").write_text("<html>")
    (folder / "still.jpg").write_bytes(jpeg(pictures(1)[0]))
    return folder


def items(folder: Path) -> list[Sample]:
    names = {"clip.mp4": "a man walks", "other.mp4": "two words and more", "page.mp4": "", "still.jpg": "x"}
    return [
        Sample(key=name[:-4], video=folder / name, annotation={"label": 1, "caption": text, "captions": {"a": text}})
        for name, text in names.items()
    ]


def test_a_set_of_clips_encoded_again(folder: Path, tmp_path: Path) -> None:
    how = Reencode(short_side=32, gop=4)
    manifest = write_shards(items(folder), tmp_path / "set", arguments=ARGUMENTS, reencode=how).manifest
    assert manifest["arguments"]["reencode"] == {"short_side": 32, "gop": 4, "fps": None, "crf": how.crf}
    assert [row["key"] for row in manifest["rejected"]] == ["page"]
    assert "HTML" in manifest["rejected"][0]["reason"]
    found = ShardSet(tmp_path / "set")
    records = [found.read(row) for row in range(3)]
    assert [record.num_frames for record in records] == [12, 20, 1]
    assert [(int(row["width"]), int(row["height"])) for row in found.index[:2]] == [(48, 32), (32, 48)]
    assert records[2].video == (folder / "still.jpg").read_bytes()
    for record in records[:2]:
        assert record.video is not None
        assert key_frames(record.video) == list(range(0, record.num_frames, 4))
        assert record.video == reencode((folder / f"{record.key}.mp4").read_bytes(), how)[0]
        assert len(decode(record.video, [0, record.num_frames - 1], decoders=record.decoders)) == 2
    with pytest.raises(UserError, match=r"reencode was .*'gop': 4.*, now None"):
        write_shards(items(folder), tmp_path / "set", arguments=ARGUMENTS)
    with pytest.raises(UserError, match=r"reencode was .*'gop': 4.*, now .*'gop': 8"):
        write_shards(items(folder), tmp_path / "set", arguments=ARGUMENTS, reencode=Reencode(short_side=32))


def test_what_does_not_go_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --no-check or --reencode"):
        write_shards(items(folder), tmp_path / "set", arguments=ARGUMENTS, check=False, reencode=Reencode())
    parted = items(folder)
    parted[1].annotation["segments"] = [{"start": 0, "end": 4, "label": 0}]
    with pytest.raises(UserError, match="'other' has segments that count frames, which --fps 8 would move"):
        write_shards(parted, tmp_path / "set", arguments=ARGUMENTS, reencode=Reencode(fps=8))
    assert not (tmp_path / "set").exists()
    write_shards(parted, tmp_path / "set", arguments=ARGUMENTS, reencode=Reencode())


def test_tokens_are_counted_by_the_tokenizer_that_is_named(folder: Path, tmp_path: Path) -> None:
    options = {"arguments": ARGUMENTS, "shard_samples": 2, "workers": 2}
    manifest = write_shards(items(folder), tmp_path / "set", tokenizer=TOKENIZER, **options).manifest
    encode_text = SentencePieceTokenizer(TOKENIZER).encode
    expected = [2 * len(encode_text(text)) for text in ("a man walks", "two words and more", "x")]
    found = ShardSet(tmp_path / "set")
    assert found.tokens is not None
    assert found.tokens.dtype == np.int32
    assert found.tokens.tolist() == expected
    assert manifest["counts"]["tokens"] == sum(expected)
    assert manifest["arguments"]["tokenizer"] == {"file": str(TOKENIZER), "sha256": content_hash(TOKENIZER)}
    write_shards(items(folder), tmp_path / "plain", **options)
    plain = ShardSet(tmp_path / "plain")
    assert plain.tokens is None
    assert "tokens" not in (plain.index.dtype.names or ())
    assert plain.fingerprint == found.fingerprint  # the tars are the same
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        write_shards(items(folder), tmp_path / "bad", tokenizer=folder / "page.mp4", **options)


def test_hash_of_a_tokenizer_is_of_its_content(tmp_path: Path) -> None:
    shutil.copy(TOKENIZER, tmp_path / "moved.model")
    assert content_hash(tmp_path / "moved.model") == content_hash(TOKENIZER)
    assert content_hash(TOKENIZER.parent) != content_hash(TOKENIZER)
    with (tmp_path / "moved.model").open("ab") as file:
        file.write(b"\0")
    assert content_hash(tmp_path / "moved.model") != content_hash(TOKENIZER)
    with pytest.raises(UserError, match="cannot be read"):
        content_hash(tmp_path / "gone.model")


def test_a_rate_of_thirty_thousand_and_one() -> None:
    """29.97 frames a second stay what they are: 3003 ticks each."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001), options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in pictures(30, 32, 32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    made, _ = reencode(buffer.getvalue(), Reencode())
    assert inspect(made).fps == pytest.approx(30000 / 1001, rel=1e-9)
