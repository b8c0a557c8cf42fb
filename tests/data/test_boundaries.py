"""Boundaries and their captions: from published files to batches."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_frames import levels
from tests.encoded import encode
from vlm.data.array_files import array_bytes
from vlm.data.boundaries import KINDS, BoundaryConfig, nearest_places
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet, write_shards
from vlm.data.stream import Samples
from vlm.data.tokenizers import ByteTokenizer
from vlm.sources import gebc
from vlm.types import IGNORE, Row, UserError, Visit

WORDS = ByteTokenizer()
VIDEOS = ("6q3q3SoZwSY", "-tZY4HE03yo")
FOLDERS = {
    "eva_vit_g_q_former_tokens_12": (3, 2, 5),
    "intern_video_feat_8": (4, 6),
    "clip_fps_15_stride_1_rename": (7, 3),
}


def boundary(video: str, number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "boundary_id": f"{video}_{number}",
        "timestamp": 1.5 + number,
        "prev_timestamp": 0.5 + number,
        "next_timestamp": 2.5 + number,
        "label": "Change of Action",
        "subject": f"man {number}",
        "status_before": "walking slowly",
        "status_after": "/0",
    }
    return row | changes


def arrays(video: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(video)
    return {folder: draw.normal(size=shape).astype(np.float32) for folder, shape in FOLDERS.items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, annotations and folders of features: tokens as .npy, the others pickled."""
    root = tmp_path_factory.mktemp("gebc")
    (root / "clips").mkdir()
    for number, video in enumerate(VIDEOS):
        (root / "clips" / f"{video}.mp4").write_bytes(encode(levels(20), rate=10))
        for folder, array in arrays(number).items():
            place = root / "features" / folder
            place.mkdir(parents=True, exist_ok=True)
            if "tokens" in folder:
                np.save(place / f"{video}.npy", array)
            else:
                (place / f"{video}.pkl").write_bytes(pickle.dumps(array, protocol=2))
    rows = {VIDEOS[0]: [boundary(VIDEOS[0], 0), boundary(VIDEOS[0], 1)], VIDEOS[1]: [boundary(VIDEOS[1], 0)]}
    (root / "val.json").write_text(json.dumps(rows))
    untold = {video: [{k: v for k, v in row.items() if k not in KINDS} for row in some] for video, some in rows.items()}
    (root / "test.json").write_text(json.dumps(untold))
    (root / "video_info.json").write_text(json.dumps({VIDEOS[0]: 10.0}))
    return root


def make(tree: Path, out: Path, name: str = "val.json") -> ShardSet:
    write_shards(gebc.read(tree, "val", [tree / name, tree / "video_info.json"]), out, arguments={})
    return ShardSet(out)


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make(tree, tmp_path_factory.mktemp("shards") / "val")


def config(**changes: Any) -> BoundaryConfig:
    settings = {
        "frame_tokens": 2,
        "frame_dim": 5,
        "num_video_tokens": 4,
        "other_features": ("intern_video", "clip"),
        "other_dims": (6, 3),
        "other_length": 8,
        "max_caption_length": 20,
    }
    return BoundaryConfig(**{**settings, **changes})


def text(row: Row) -> str:
    first, end = row.video
    return WORDS.decode([*row.ids[:first], *WORDS.encode("*"), *row.ids[end:]])


def learnt(row: Row) -> str:
    return WORDS.decode([label for label in row.labels if label != IGNORE])


def train(shards: ShardSet, inputs: BoundaryConfig, sample: int):
    row, part = Samples(shards, inputs).locate(sample)
    (example,) = inputs.train(shards.read(row, inputs.members), SampleRng(0), Visit(part, 0, ("caption",)))
    return example


# Shards ---------------------------------------------------------------------------------------------------------------


def test_folders_of_features_become_members(shards: ShardSet) -> None:
    record = shards.read(0)
    assert set(record.members) == {"q_former.npy", "intern_video.npy", "clip.npy"}
    assert record.num_frames == 20
    assert shards.num_questions.tolist() == [6, 3]


def test_features_without_clips_are_enough(tree: Path, tmp_path: Path) -> None:
    samples = list(gebc.read(tree / "features", "val", [tree / "val.json", *(tree / "features").iterdir()]))
    assert all(sample.video is None and len(sample.members) == 3 for sample in samples)
    write_shards(iter(samples), tmp_path / "out", arguments={})
    inputs = config()
    with pytest.raises(Exception, match="no duration"):
        train(ShardSet(tmp_path / "out"), inputs, 0)


def test_two_folders_of_one_member(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "clip_other"
    other.mkdir()
    (other / "x.npy").write_bytes(b"")
    with pytest.raises(UserError, match="both hold the features 'clip'"):
        list(gebc.read(tree, "val", [tree / "val.json", other, tree / "features" / "clip_fps_15_stride_1_rename"]))
    empty = tmp_path / "none"
    empty.mkdir()
    with pytest.raises(UserError, match=r"holds no .npy or .pkl"):
        list(gebc.read(tree, "val", [tree / "val.json", empty]))


class _Harmful:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("content", "message"),
    [(_Harmful(), "asks for posix.system"), ({"a": 1}, "no array of numbers but dict"), (b"", "no array of numbers")],
)
def test_pickles_that_are_no_arrays(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        array_bytes(file)
    file.write_bytes(pickle.dumps(np.ones(9))[:-20])
    with pytest.raises(UserError, match="damaged"):
        array_bytes(file)


def test_shards_of_other_things(tmp_path: Path) -> None:
    class Empty:
        path, num_questions = tmp_path, np.zeros(2, np.int32)

    with pytest.raises(UserError, match="counts no boundaries"):
        config().parts(Empty())  # type: ignore[arg-type]


# Training -------------------------------------------------------------------------------------------------------------


def test_each_caption_is_a_sample(shards: ShardSet) -> None:
    inputs = config()
    assert len(Samples(shards, inputs)) == 9
    keys = [Samples(shards, inputs).key(sample) for sample in range(9)]
    examples = [train(shards, inputs, sample) for sample in range(9)]
    assert [example.key for example in examples] == keys
    (row,) = examples[3].rows["caption"]
    assert text(row) == "Video:*This video describes the change of action.The subject isman 1"
    assert learnt(row) == "man 1"
    assert row.labels[-1] == WORDS.eos
    assert examples[3].extra["boundary"].tolist() == [0.25, 0.2]
    assert examples[8].extra["boundary"].tolist() == [0.75, 1.0], "20 frames at 10 a second, where nothing is published"


def test_placeholders(shards: ShardSet) -> None:
    skipped, taught = (train(shards, config(placeholders=how), 2) for how in ("skip", "teach"))
    assert (learnt(skipped.rows["caption"][0]), skipped.counters["rows_untaught"]) == ("", 1)
    assert (learnt(taught.rows["caption"][0]), taught.counters["rows_untaught"]) == ("/0", 0)


def test_features_of_a_video(shards: ShardSet) -> None:
    example = train(shards, config(), 6)
    tokens, intern, clip = arrays(1).values()
    assert np.array_equal(example.frame_tokens, tokens)
    other = example.extra["other"]
    assert (other.dtype, other.shape) == (torch.float32, (8, 9))
    assert np.array_equal(other[:, :6], intern[nearest_places(4, 8)])
    assert np.array_equal(other[:, 6:], clip[nearest_places(7, 8)])
    batch = config().collate([train(shards, config(), sample) for sample in (0, 6)], SampleRng(0))
    assert batch.frame_counts == (3, 3)
    assert batch.extra["other"].shape == (2, 8, 9)
    assert batch.extra["boundary"].dtype == torch.float64
    assert batch.views["caption"].sources.tolist() == list(range(8))
    assert (batch.colours, batch.frames) == (None, None)


def test_pixels_in_the_place_of_features(shards: ShardSet) -> None:
    inputs = config(source="pixels", num_frames=4, size=16)
    example = train(shards, inputs, 0)
    assert (example.frames.dtype, example.frames.shape) == (torch.uint8, (4, 3, 16, 16))
    assert inputs.collate([example], SampleRng(0)).colours is not None


def test_what_does_not_fit(shards: ShardSet, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"intern_video .* is 6 wide, but inputs.other_dims says 7"):
        train(shards, config(other_dims=(7, 3)), 0)
    with pytest.raises(UserError, match="another tower's"):
        train(shards, config(frame_dim=6), 0)
    with pytest.raises(UserError, match="no view 'dialogue'"):
        config().check_views(("dialogue",))
    with pytest.raises(ValueError, match="each needs one"):
        config(other_dims=(6,))
    untold = make(tree, tmp_path / "test", "test.json")
    with pytest.raises(UserError, match="no published captions"):
        train(untold, config(), 0)


def test_lengths_are_never_too_short(shards: ShardSet) -> None:
    inputs = config()
    rows = [train(shards, inputs, sample).rows["caption"][0] for sample in range(9)]
    assert (inputs.lengths(shards) >= [len(row.ids) for row in rows]).all()


# Tests ----------------------------------------------------------------------------------------------------------------


def test_what_a_test_asks(shards: ShardSet, tree: Path, tmp_path: Path) -> None:
    inputs = config()
    record = shards.read(0, inputs.members)
    asks = inputs.asks(record)
    assert [(ask.id, ask.kind) for ask in asks[:4]] == [
        *((f"{VIDEOS[0]}_0", kind) for kind in KINDS),
        (f"{VIDEOS[0]}_1", "subject"),
    ]
    assert asks[2].references == ("/0",)
    assert len({ask.key for ask in asks}) == 6
    views = inputs.all_views(record, SampleRng(0), ("blind",))
    assert [len(example.prompts) for example in views[""]] == [3, 3]
    assert text(views[""][1].prompts[2]) == "Video:*This video describes the change of action.Status after change is"
    blind = views["blind"][1]
    assert not blind.frame_tokens.any()
    assert not blind.extra["other"].any()
    assert torch.equal(blind.extra["boundary"], views[""][1].extra["boundary"])
    batch = inputs.test_batch([*views[""], inputs.blank()])
    assert batch.frame_counts == (3, 3, 1)
    assert len(batch.prompts.lengths) == 7
    assert batch.prompts.sources.tolist()[-8:-4] == [4, 5, 6, 7]
    assert inputs.test_batch([config(source="pixels").blank()]).frames is not None
    untold = make(tree, tmp_path / "test", "test.json").read(0, inputs.members)
    assert all(ask.references == () for ask in inputs.asks(untold))


def test_what_was_written() -> None:
    inputs = config()
    assert inputs.decode([*WORDS.encode(" a man "), WORDS.eos, 40]) == "a man"
    assert inputs.ends == ((WORDS.eos,),)
