"""Captioned images: filter_cap.json of three data sets, LLaVA's metadata, the official TSV; packed as one frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.data.shards import ShardSet, write_shards
from vlm.data.video import decode
from vlm.sources.cc3m import read
from vlm.types import Rejected, Sample, UserError

URL = "https://example.org/a.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cc3m" / "image").mkdir(parents=True)
    return tmp_path / "cc3m"


def filter_cap(root: Path, rows: Any) -> Path:
    (root / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    return root / "filter_cap.json"


def test_filter_cap_of_cc3m_and_of_minigpt4(root: Path) -> None:
    (root / "image" / "3.png").write_bytes(b"picture")
    filter_cap(root, [
        {"image_id": "GCC_train_000000000", "caption": "a man in a suit"},
        {"image_id": 2, "caption": "The image shows\na cat."},
        {"image_id": "3", "caption": "a dog"},
        {"image_id": "GCC_train_000000004.jpg", "caption": "a house"},
    ])  # fmt: skip
    images = root / "image"
    assert list(read(root, "train")) == [
        Sample(key="GCC_train_000000000", video=images / "GCC_train_000000000.jpg",
               annotation={"caption": "a man in a suit"}),
        Sample(key="2", video=images / "2.jpg", annotation={"caption": "The image shows\na cat."}),
        Sample(key="3", video=images / "3.png", annotation={"caption": "a dog"}),
        Sample(key="GCC_train_000000004", video=images / "GCC_train_000000004.jpg", annotation={"caption": "a house"}),
    ]  # fmt: skip


def test_metadata_of_llava(root: Path) -> None:
    row = {"id": "GCC_train_002582585", "image": "GCC_train_002582585.jpg", "caption": "olive oil", "blip_caption": "b"}
    (root / "metadata.json").write_text(json.dumps([row]))
    (sample,) = read(root, "train")
    assert isinstance(sample, Sample)
    assert (sample.key, sample.annotation) == ("GCC_train_002582585", {"caption": "olive oil"})
    assert sample.video == root / "image" / "GCC_train_002582585.jpg"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image_id": "1"}, "item 2, column 'caption': is missing"),
        ({"image_id": "1", "caption": ""}, "item 2, column 'caption': is empty"),
        ({"image_id": "1", "caption": ["a"]}, "item 2, column 'caption': ['a'] is not a text"),
        ({"caption": "a"}, "item 2, column 'image_id': is missing"),
        ({"image_id": None, "caption": "a"}, "item 2, column 'image_id': is missing"),
        ({"image_id": 1.5, "caption": "a"}, "item 2, column 'image_id': 1.5 is not a text"),
        ({"image_id": "../secret", "caption": "a"}, "item 2, column 'image_id': '../secret' is not an id"),
        ("text", "item 2: 'text' is not an object"),
    ],
)
def test_a_damaged_item_is_named(row: Any, reason: str, root: Path) -> None:
    good = {"image_id": "0", "caption": "a"}
    file = filter_cap(root, [good, row, {**good, "image_id": "9"}])
    first, rejected, last = read(root, "train")
    assert isinstance(rejected, Rejected)
    assert f"{file} {reason}" in rejected.reason
    assert [item.key for item in (first, last) if isinstance(item, Sample)] == ["0", "9"]


@pytest.mark.parametrize("name", ["image/GCC_train_{0:09d}.jpg", "{1:05d}/{0:09d}.jpg", "{0:09d}.png"])
def test_images_of_a_tsv_are_found_by_the_number_of_their_row(name: str, root: Path) -> None:
    if not name.startswith("image"):
        (root / "image").rmdir()
    lines = [f"caption {n}\t{URL}" for n in range(10_003)]
    lines[3] = f'"quoted" caption\t{URL}'
    (root / "Train_GCC-training.tsv").write_text("\n".join(lines) + "\n\n")
    for number in (0, 3, 10_002):
        path = root / name.format(number, number // 10000)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"picture")
    items = list(read(root, "train"))
    assert len(items) == 10_003
    found = {item.key: (item.video, item.annotation["caption"]) for item in items if isinstance(item, Sample)}
    assert found == {
        "GCC_train_000000000": (root / name.format(0, 0), "caption 0"),
        "GCC_train_000000003": (root / name.format(3, 0), '"quoted" caption'),
        "GCC_train_000010002": (root / name.format(10_002, 1), "caption 10002"),
    }
    missing = items[1]
    assert isinstance(missing, Rejected)
    assert missing.key == "GCC_train_000000001"
    assert f"{root / 'Train_GCC-training.tsv'} row 2: no image of it in " in missing.reason
    assert f"({name.format(1, 0).removeprefix('image/')}): it was not downloaded" in missing.reason


def test_a_tsv_with_a_header(root: Path) -> None:
    (root / "image" / "000000001.jpg").write_bytes(b"picture")
    (root / "a.tsv").write_text(f'url\tcaption\n{URL}\tfirst\n{URL}\t"the ""second"""\n')
    first, second = read(root, "train", [root / "a.tsv"])
    assert isinstance(first, Rejected)
    tried = "GCC_train_000000000.jpg, 00000/000000000.jpg, 000000000.jpg"
    assert f"a.tsv row 2: no image of it in {root / 'image'} ({tried}): it was not downloaded" in first.reason
    assert isinstance(second, Sample)
    assert second.annotation == {"caption": 'the "second"'}


def test_damaged_rows_of_a_tsv(root: Path) -> None:
    for number in range(4):
        (root / "image" / f"{number:09d}.jpg").write_bytes(b"picture")
    (root / "a.tsv").write_bytes(
        b"\xef\xbb\xbfa\t" + URL.encode() + b"\r\nno tab here\r\ncaf\xe9\t" + URL.encode() + b"\n \t" + URL.encode()
    )
    first, *rejected = read(root, "val", [root / "a.tsv"])
    assert isinstance(first, Sample)
    assert (first.key, first.annotation["caption"]) == ("GCC_val_000000000", "a")
    reasons = [row.reason for row in rejected if isinstance(row, Rejected)]
    assert f"{root / 'a.tsv'} row 2: 'no tab here' is not of the form `caption<TAB>url`" in reasons[0]
    assert f"{root / 'a.tsv'} row 3, column 'caption': 'caf\\xe9' is not UTF-8" in reasons[1]
    assert f"{root / 'a.tsv'} row 4, column 'caption': is empty" in reasons[2]


def test_files_are_found_or_asked_for(root: Path) -> None:
    with pytest.raises(UserError, match="no annotation files"):
        list(read(root, "train"))
    filter_cap(root, [])
    with pytest.raises(UserError, match=r"filter_cap.json is a list without items"):
        list(read(root, "train"))
    (root / "Train_GCC-training.tsv").write_text(f"a\t{URL}\n")
    with pytest.raises(UserError, match="2 annotation files"):
        list(read(root, "train"))
    (root / "filter_cap.json").write_text('{"annotations": [{"image_id": "1", "cap')
    with pytest.raises(UserError, match=r"filter_cap.json is not JSON \(line 1, column \d+"):
        list(read(root, "train", [root / "filter_cap.json"]))


def test_images_become_records_of_one_frame(root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        pixels = np.full((40, 60, 3), rng.integers(0, 255, 3), np.uint8)
        Image.fromarray(pixels).save(root / "image" / f"{number}.jpg", quality=95)
    whole = (root / "image" / "1.jpg").read_bytes()
    (root / "image" / "2.jpg").write_bytes(whole[: len(whole) - 10])
    filter_cap(root, [{"image_id": n, "caption": f"image {n}"} for n in range(4)])
    written = write_shards(read(root, "train"), tmp_path / "out", arguments={"source": "cc3m", "split": "train"})
    shards = ShardSet(tmp_path / "out")
    records = [shards.read(row) for row in range(len(shards))]
    assert [(record.key, record.num_frames, record.annotation) for record in records] == [
        ("0", 1, {"caption": "image 0"}),
        ("1", 1, {"caption": "image 1"}),
    ]
    assert records[0].video is not None
    frames = decode(records[0].video, [0] * 8)  # a model that wants 8 frames gets this one 8 times
    assert frames.shape == (8, 40, 60, 3)
    assert np.abs(frames - np.asarray(Image.open(root / "image" / "0.jpg")).astype(float)).max() < 4
    assert written.manifest["warnings"] == []
    assert [(row["key"], row["reason"].split(":")[0]) for row in written.manifest["rejected"]] == [
        ("2", "cut short"),
        ("3", str(root / "image" / "3.jpg")),
    ]


def test_real_rows(realdata: Path, root: Path) -> None:
    file = realdata / "annotations" / "cc3m" / "Validation_GCC-1.1.0-Validation_sample_dev.tsv"
    count = file.read_text().count("\n")
    for number in range(0, count, 100):
        (root / "image" / f"GCC_val_{number:09d}.jpg").write_bytes(b"picture")
    items = list(read(root, "val", [file]))
    assert len(items) == count
    samples = [item for item in items if isinstance(item, Sample)]
    assert len(samples) == len(range(0, count, 100))
    assert samples[0].annotation == {"caption": "father and son putting on ice skates near frozen lake"}
    assert all("it was not downloaded" in item.reason for item in items if isinstance(item, Rejected))
