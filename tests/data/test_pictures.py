"""Still pictures as media: a picture is a video of one frame, checked and packed like a clip."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.data.shard_reencode import is_still
from vlm.data.shards import ShardSet, write_shards
from vlm.data.video import DecodeError, container_extension, decode, inspect
from vlm.types import Sample

HEIGHT, WIDTH = 48, 64


def picture(kind: str, **options: Any) -> bytes:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], -1).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    mode = {"palette": "P", "grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}.get(options.pop("mode", ""), "RGB")
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


KINDS = {
    "jpeg": picture("JPEG", quality=95),
    "progressive": picture("JPEG", quality=95, progressive=True),
    "grey": picture("JPEG", quality=95, mode="grey"),
    "cmyk": picture("JPEG", quality=95, mode="cmyk"),
    "png": picture("PNG"),
    "palette": picture("PNG", mode="palette"),
    "alpha": picture("PNG", mode="alpha"),
    "webp": picture("WEBP", quality=95),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_one_frame_without_duration(kind: str) -> None:
    info = inspect(KINDS[kind], picture=True)
    assert (info.num_frames, info.fps, info.duration, info.width, info.height) == (1, 0.0, 0.0, WIDTH, HEIGHT)
    assert info.warnings == ()
    frames = decode(KINDS[kind], [0, 0])
    expected = np.asarray(Image.open(io.BytesIO(KINDS[kind])).convert("RGB"))
    assert np.abs(frames - expected.astype(float)).mean() < 3
    with pytest.raises(DecodeError):
        decode(KINDS[kind], [1])
    assert container_extension(KINDS[kind]) == {"png": "png", "palette": "png", "alpha": "png", "webp": "webp"}.get(
        kind, "jpg"
    )


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_picture_that_was_cut_is_an_error(kind: str, part: float) -> None:
    whole = KINDS[kind]
    with pytest.raises(DecodeError):
        inspect(whole[: int(part * len(whole))], picture=True)


def test_bytes_behind_the_end_and_thumbnails_before_it_are_no_cut() -> None:
    assert inspect(KINDS["jpeg"] + b"\0" * 100, picture=True).num_frames == 1
    thumbnail = b"\xff\xe1" + (len(KINDS["grey"]) + 2).to_bytes(2, "big") + KINDS["grey"]
    whole = KINDS["jpeg"][:2] + thumbnail + KINDS["jpeg"][2:]
    assert inspect(whole, picture=True).num_frames == 1
    with pytest.raises(DecodeError, match=f"cut short: a JPEG of {len(whole) - 20} bytes without its end"):
        inspect(whole[:-20], picture=True)


def test_pictures_are_packed_and_read_back(tmp_path: Path) -> None:
    files = {"a.jpg": KINDS["jpeg"], "b.png": KINDS["png"], "c.webp": KINDS["webp"], "d.mp4": KINDS["jpeg"],
             "e.jpg": KINDS["jpeg"][:-200], "f.jpg": b"<html>gone</html>"}  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    items = [Sample(key=name[0], video=tmp_path / name, annotation={"caption": name}) for name in files]
    written = write_shards(items, tmp_path / "out", arguments={"source": "test", "split": "train"})
    shards = ShardSet(tmp_path / "out")
    assert [shards.key(row) for row in range(len(shards))] == ["a", "b", "c", "d"]
    assert list(shards.num_frames) == [1, 1, 1, 1]
    assert written.manifest["hours"] == 0
    record = shards.read(1)
    assert (record.video, record.annotation["caption"]) == (KINDS["png"], "b.png")
    assert [(row["key"], row["reason"]) for row in written.manifest["rejected"]] == [
        ("e", f"cut short: a JPEG of {len(files['e.jpg'])} bytes without its end"),
        ("f", "not a video: looks like HTML, the page of a failed download"),
    ]
    (warning,) = written.manifest["warnings"]  # of the picture that is called a video
    assert (warning["key"], warning["warning"]) == ("d", "a still picture (mjpeg), not a video")


def test_pictures_are_not_encoded_again() -> None:
    assert all(is_still(data) for data in KINDS.values())
    assert not is_still(b"\0\0\0\x18ftypmp42")
