"""Kinetics-GEB+: boundaries by video, their captions, and every way in which they come damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.sources.gebc import read
from vlm.types import Rejected, Sample, UserError

VIDEO = "6q3q3SoZwSY"
BOUNDARY = {
    "boundary_id": f"{VIDEO}_0A",
    "timestamp": 0.72566,
    "prev_timestamp": 0,
    "next_timestamp": 4.74076,
    "label": "Change of Action",
    "subject": "woman in white t-shirt",
    "status_before": "drinking water",
    "status_after": "/1",
    "action_of_cause": None,
    "caption": "Subject: woman in white t-shirt //Status_Before: drinking water //Status_After: /1",
}
LATER = BOUNDARY | {
    "boundary_id": f"{VIDEO}_1A",
    "timestamp": 4.74076,
    "prev_timestamp": 0.72566,
    "next_timestamp": 10.0,
    "label": "Multiple",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "gebc"
    (root / "clips").mkdir(parents=True)
    (root / "clips" / f"{VIDEO}_000010_000020.mp4").write_bytes(b"clip")
    (root / "clips" / "-tZY4HE03yo.mp4").write_bytes(b"clip")
    return root


def items(root: Path, content: Any, *others: Path) -> list[Sample | Rejected]:
    (root / "val.json").write_text(json.dumps(content))
    return list(read(root, "val", [root / "val.json", *others]))


def test_boundaries_of_a_video_are_one_record(root: Path) -> None:
    (root / "video_info.json").write_text(json.dumps({VIDEO: 10.01}))
    first, second = items(root, {VIDEO: [BOUNDARY, LATER], "-tZY4HE03yo": [BOUNDARY]}, root / "video_info.json")
    assert first == Sample(
        key=VIDEO,
        video=root / "clips" / f"{VIDEO}_000010_000020.mp4",
        annotation={
            "video": VIDEO,
            "duration": 10.01,
            "boundaries": [
                {
                    "id": f"{VIDEO}_0A",
                    "kind": "Change of Action",
                    "prev_timestamp": 0.0,
                    "timestamp": 0.72566,
                    "next_timestamp": 4.74076,
                    "subject": "woman in white t-shirt",
                    "status_before": "drinking water",
                    "status_after": "/1",
                },
                {
                    "id": f"{VIDEO}_1A",
                    "kind": "Multiple",
                    "prev_timestamp": 0.72566,
                    "timestamp": 4.74076,
                    "next_timestamp": 10.0,
                    "subject": "woman in white t-shirt",
                    "status_before": "drinking water",
                    "status_after": "/1",
                },
            ],
        },
    )
    assert isinstance(second, Sample)
    assert (second.video, "duration" in second.annotation) == (root / "clips" / "-tZY4HE03yo.mp4", False)
    assert second.warnings == ("the duration of video '-tZY4HE03yo' is not in video_info.json",)


def test_the_test_file_has_no_captions(root: Path) -> None:
    bare = {name: BOUNDARY[name] for name in list(BOUNDARY)[:5]}
    (sample,) = items(root, {VIDEO: [bare]})
    assert isinstance(sample, Sample)
    (boundary,) = sample.annotation["boundaries"]
    assert sorted(boundary) == ["id", "kind", "next_timestamp", "prev_timestamp", "timestamp"]
    assert sample.warnings == ()


@pytest.mark.parametrize(
    ("boundary", "reason"),
    [
        ("text", "'text' is not an object"),
        (LATER | {"label": "Change"}, "column 'label': 'Change' is none of Change of Action, "),
        (LATER | {"timestamp": None}, "column 'timestamp': None is not a time in seconds"),
        (LATER | {"timestamp": -1}, "column 'timestamp': -1 is not a time in seconds"),
        (LATER | {"timestamp": 10.0}, "0.72566, 10.0, 10.0 do not follow one another"),
        (LATER | {"prev_timestamp": 5}, "5.0, 4.74076, 10.0 do not follow one another"),
        (LATER | {"boundary_id": ""}, "column 'boundary_id': is empty"),
        (LATER | {"boundary_id": f"{VIDEO}_0A"}, f"column 'boundary_id': '{VIDEO}_0A' stands there twice"),
        (LATER | {"subject": ""}, "column 'subject': is empty"),
        ({name: LATER[name] for name in list(LATER)[:5]}, "column 'subject': is missing"),
    ],
)
def test_a_damaged_boundary_is_rejected_and_its_video_kept(boundary: Any, reason: str, root: Path) -> None:
    rejected, sample = items(root, {VIDEO: [BOUNDARY, boundary]})
    assert isinstance(rejected, Rejected)
    assert isinstance(sample, Sample)
    assert f"{root / 'val.json'} video '{VIDEO}' boundary 2, " in rejected.reason
    assert reason in rejected.reason
    assert len(sample.annotation["boundaries"]) == 1


def test_videos_that_cannot_be_used(root: Path) -> None:
    content = {"notthere000": [BOUNDARY], "empty000000": [], "odd00000000": {"a": 1}, VIDEO: [BOUNDARY]}
    *rejected, sample = items(root, content)
    assert isinstance(sample, Sample)
    reasons = [(item.key, item.reason) for item in rejected if isinstance(item, Rejected)]
    assert [key for key, _ in reasons] == ["notthere000", "empty000000", "odd00000000"]
    assert "no video file 'notthere000'" in reasons[0][1]
    assert "has no boundary that can be used" in reasons[1][1]
    assert "video 'odd00000000': {'a': 1} is not a list of boundaries" in reasons[2][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be a JSON object of video: boundaries, not list"),
        ({}, "must be a JSON object"),
        ({VIDEO: "text"}, f"val.json: video '{VIDEO}': 'text' is not a time in seconds, as in video_info.json"),
        ({VIDEO: 10.0}, "none of them hold boundaries"),
    ],
)
def test_a_damaged_file_is_one_error(content: Any, message: str, root: Path) -> None:
    with pytest.raises(UserError) as error:
        items(root, content)
    assert message in str(error.value)
    (root / "a.json").write_text(json.dumps({VIDEO: [BOUNDARY]}))
    with pytest.raises(UserError, match="2 of them hold boundaries"):
        items(root, {VIDEO: [BOUNDARY]}, root / "a.json")


def test_files_are_found_by_their_published_names(root: Path) -> None:
    with pytest.raises(UserError, match=r"no files of boundaries for split 'val' \(looked for valset_highest_f1.json"):
        list(read(root, "val"))
    (root / "data" / "annotations").mkdir(parents=True)
    (root / "data" / "annotations" / "valset_highest_f1.json").write_text(json.dumps({VIDEO: [BOUNDARY]}))
    (root / "data" / "annotations" / "video_info.json").write_text(json.dumps({VIDEO: 9.5}))
    (sample,) = read(root, "val")
    assert isinstance(sample, Sample)
    assert sample.annotation["duration"] == 9.5
    (root / "valset_highest_f1.json").write_text("{}")
    with pytest.raises(UserError, match="2 files of boundaries"):
        list(read(root, "val"))


@pytest.mark.parametrize(
    ("name", "captioned"),
    [
        ("val_sample_dev", True),
        ("test_sample_dev", True),
        ("loveu_valset_highest_f1_sample_dev", True),
        ("loveu_test_timestamp_sample_dev", False),
    ],
)
def test_real_boundaries(name: str, captioned: bool, realdata: Path, tmp_path: Path) -> None:
    file = realdata / "annotations" / "kinetics_gebc" / f"{name}.json"
    content = json.loads(file.read_text())
    for video in content:
        (tmp_path / f"{video}.mp4").write_bytes(b"clip")
    samples = list(read(tmp_path, "val", [file, file.with_name("video_info_subset.json")]))
    assert [sample.key for sample in samples if isinstance(sample, Sample)] == list(content)
    for sample in samples:
        assert isinstance(sample, Sample)
        assert len(sample.annotation["boundaries"]) == len(content[sample.key])
        assert all(("subject" in boundary) == captioned for boundary in sample.annotation["boundaries"])
