"""The moving-shapes corpus is a task of motion only, and its files are whole or absent."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from tools import render_shapes
from vlm.sources import common_shapes, shapes
from vlm.sources.common_shapes import CLASSES, NUM_CLASSES, SPLITS, Clip, plan, reverse_of
from vlm.sources.shapes import read, render
from vlm.types import Rejected, Sample, UserError


def group_of(clip: Clip) -> tuple:
    return tuple(clip.annotation["attributes"].values())


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    render(out, num_train=8, num_test=8, num_sequences_train=2, num_sequences_test=1, seed=3)
    return out


def test_everything_but_motion_is_balanced_over_classes():
    clips = plan("train", 1600, 0)
    for name in ("colour", "shape", "radius", "background", "distance", "speed"):
        counts = Counter((clip.annotation["attributes"][name], clip.annotation["label"]) for clip in clips)
        for value in {value for value, _ in counts}:
            assert len({counts[value, label] for label in range(NUM_CLASSES)}) == 1, name
    for name, most in ("colour", 8), ("shape", 8), ("radius", 32):
        numbers = Counter(clip.annotation["attributes"][name] for clip in clips).values()
        assert max(numbers) - min(numbers) <= most, name
    attributes = ("colour", "shape", "radius")
    whole = Counter(
        (*(clip.annotation["attributes"][name] for name in attributes), clip.annotation["label"])
        for clip in plan("train", 270 * NUM_CLASSES, 0)
    )
    assert len(whole) == 6 * 3 * 3 * NUM_CLASSES
    assert set(whole.values()) == {5}  # each with each number of frames of a leg
    assert sorted(clip.key for clip in clips) == [clip.key for clip in clips]
    assert len({clip.key for clip in clips}) == 1600


def test_a_class_and_its_reverse_show_the_same_frames_in_another_order():
    clips = {(group_of(clip), clip.annotation["label"]): clip for clip in plan("train", 80, 1)}
    for (group, label), clip in clips.items():
        other = clips[group, reverse_of(label)]
        order, its_order = (np.lexsort(c.centres.round(6).T) for c in (clip, other))
        np.testing.assert_allclose(clip.centres[order], other.centres[its_order], atol=1e-6)
        assert np.abs(clip.centres - other.centres).max() > 5
    some, other = clips[group, 0], clips[group, 1]
    pixels = [sorted(frame.tobytes() for frame in shapes.draw(c)) for c in (some, other)]
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize("instant", [0, 12, 23])
def test_a_position_tells_the_class_in_less_than_35_percent(instant):
    """The best guess from where the shape is in one frame: counted over cells of 4 x 4 pixels."""
    clips = plan("train", 40000, 0)
    labels = np.array([clip.annotation["label"] for clip in clips])
    positions = np.stack([clip.centres[instant] for clip in clips])
    cells = [np.histogram2d(*positions[labels == label].T, [20, 16], [[0, 80], [0, 64]])[0] for label in range(8)]
    assert np.max(cells, axis=0).sum() / len(clips) < 0.35


@pytest.mark.parametrize("label", range(NUM_CLASSES))
def test_motion_is_what_the_name_says(label):
    motion = CLASSES[label]
    for clip in plan("test", 160, 2):
        if clip.annotation["label"] != label:
            continue
        assert np.ptp(clip.centres[:, 1 - motion.axis]) == 0
        along = clip.centres[:, motion.axis] * (1 if motion.ascending else -1)
        steps = np.diff(along)
        turns = np.flatnonzero(np.diff(np.sign(steps[np.abs(steps) > 1e-9])))
        assert np.ptp(along) == pytest.approx(clip.annotation["attributes"]["distance"], abs=1e-3)
        assert len(turns) == int(motion.returns)
        assert steps[np.abs(steps) > 1e-9][0] > 0
        assert (along[-1] - along[0] > 19) != motion.returns
        margin = clip.scene.radius
        assert (clip.centres > margin).all()
        assert (clip.centres < np.array([common_shapes.WIDTH, common_shapes.HEIGHT]) - margin).all()


def test_pixels_show_the_colour_where_the_plan_says():
    for clip in plan("test", 24, 5):
        frame = shapes.draw(clip)[7]
        x, y = clip.centres[7]
        assert frame.dtype == np.uint8
        assert tuple(frame[int(y), int(x)]) == common_shapes.COLOURS[clip.scene.colour]
    areas = {shape: shapes._coverage(shape, 8.0, *np.mgrid[-16:17, -16:17]).sum() for shape in common_shapes.SHAPES}
    assert areas == pytest.approx(dict.fromkeys(areas, np.pi * 64), rel=0.03)


def test_splits_and_seeds_differ_and_a_plan_repeats():
    def summary(split: str, seed: int) -> list:
        return [(clip.key, clip.annotation, clip.centres.tolist()) for clip in plan(split, 16, seed)]

    assert summary("train", 0) == summary("train", 0)
    backgrounds = [
        {clip.scene.background for clip in plan(s, 16, seed)} for s, seed in [*zip(SPLITS, [0] * 4), ("test", 1)]
    ]
    assert sum(map(len, backgrounds)) == len(set.union(*backgrounds))


def test_sequences_are_covered_by_segments_that_match_the_motion():
    for clip in plan("sequences_test", 60, 0):
        segments = clip.annotation["segments"]
        assert 3 <= len(segments) <= 6
        assert [0, *(s["end"] for s in segments)] == [*(s["start"] for s in segments), len(clip.centres)]
        for before, after in itertools.pairwise(segments):
            assert CLASSES[before["label"]].axis != CLASSES[after["label"]].axis
        for segment in segments:
            motion = CLASSES[segment["label"]]
            part = clip.centres[segment["start"] : segment["end"]]
            assert np.ptp(part[:, 1 - motion.axis]) < 1e-9
            travelled = (part[-1] - part[0])[motion.axis] * (1 if motion.ascending else -1)
            assert (travelled > 19) if not motion.returns else (abs(travelled) < 1e-9)
            assert segment["name"] == motion.name
        words = [CLASSES[s["label"]].words for s in segments]
        assert clip.annotation["caption"] == f"a {clip.scene.subject} moves " + ", then ".join(words)
        first, last = clip.annotation["questions"][:2]
        assert (first["options"][first["answer"]], last["options"][last["answer"]]) == (words[0], words[-1])
    labels = Counter(s["label"] for clip in plan("sequences_train", 800, 0) for s in clip.annotation["segments"])
    assert max(labels.values()) < 1.25 * min(labels.values())


def test_options_do_not_tell_the_answer():
    """Every question has its truth among four different options, at each place equally often; the set of options of a
    motion question is closed under reversal, so it leaves one chance in four."""
    clips = plan("train", 8000, 0)
    for kind in range(3):
        questions = [clip.annotation["questions"][kind] for clip in clips]
        assert set(Counter(q["answer"] for q in questions).values()) == {2000}
        assert all(len(set(q["options"])) == 4 for q in questions)
    words = [motion.words for motion in CLASSES]
    answers: dict[tuple, Counter] = {}
    for clip in clips:
        question = clip.annotation["questions"][0]
        labels = [words.index(option) for option in question["options"]]
        assert {reverse_of(label) for label in labels} == set(labels)
        assert labels[question["answer"]] == clip.annotation["label"]
        assert question["question"] == f"which way does the {clip.scene.subject} move?"
        answers.setdefault(tuple(labels), Counter())[question["answer"]] += 1
    right = sum(counter.most_common(1)[0][1] for counter in answers.values())
    assert right / len(clips) < 0.4  # the best guess from the ordered options alone, fitted on these very questions


def test_files_are_h264_and_show_what_was_drawn(corpus):
    for sample, clip in zip(read(corpus, "train", ()), plan("train", 8, 3), strict=True):
        assert isinstance(sample, Sample)
        assert (sample.key, sample.annotation) == (clip.key, json.loads(json.dumps(clip.annotation)))
        with av.open(str(sample.video)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (80, 64, 12)
        frames, drawn = decoded(sample.video), shapes.draw(clip)
        assert frames.shape == drawn.shape
        assert np.abs(frames.astype(int) - drawn).mean() < 6
    assert [s.annotation["segments"][-1]["end"] for s in read(corpus, "sequences_test", ())] == [
        len(decoded(s.video)) for s in read(corpus, "sequences_test", ())
    ]
    assert not list(corpus.rglob("*.partial"))


def test_second_run_renders_nothing_and_a_killed_one_is_finished(corpus, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*.mp4")}
    contents = {path: path.read_bytes() for path in before}
    numbers = {"num_train": 8, "num_test": 8, "num_sequences_train": 2, "num_sequences_test": 1}
    seen = []
    render(corpus, **numbers, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*.mp4")} == before
    assert seen[-1] == (19, 19)

    lost = corpus / "videos/train/train-00002.mp4"
    lost.unlink()
    lost.with_suffix(".123.partial").write_bytes(b"half")
    (corpus / "annotations/train.json").unlink()
    render(corpus, **numbers, seed=3)
    assert {path: path.read_bytes() for path in corpus.rglob("*.mp4")} == contents
    after = {path: path.stat().st_mtime_ns for path in corpus.rglob("*.mp4")}
    assert [path for path in after if after[path] != before[path]] == [lost]
    assert not list(corpus.rglob("*.partial"))


def test_other_arguments_replace_the_split_and_leave_the_others(tmp_path):
    render(tmp_path, num_train=8, num_test=8, seed=0)
    old = (tmp_path / "videos/test/test-00000.mp4").read_bytes()
    train = (tmp_path / "annotations/train.json").read_text()
    render(tmp_path, num_train=0, num_test=16, seed=1)
    assert len(list((tmp_path / "videos/test").glob("*.mp4"))) == 16
    assert (tmp_path / "videos/test/test-00000.mp4").read_bytes() != old
    assert (tmp_path / "annotations/train.json").read_text() == train


def test_two_processes_write_the_same_files_as_one(corpus, tmp_path):
    render(tmp_path, num_train=8, num_test=0, seed=3, workers=2)
    for path in (tmp_path / "videos/train").iterdir():
        assert path.read_bytes() == (corpus / "videos/train" / path.name).read_bytes()


def test_numbers_that_would_break_the_balance_are_refused(tmp_path):
    with pytest.raises(UserError, match="ask for 16"):
        render(tmp_path, num_train=8, num_test=13)
    with pytest.raises(UserError, match="-8 videos"):
        render(tmp_path, num_train=-8, num_test=8)
    assert not list(tmp_path.iterdir())


def test_reader_names_what_is_missing(corpus, tmp_path):
    with pytest.raises(UserError, match="render it with"):
        list(read(tmp_path, "train", ()))
    foreign = tmp_path / "other.json"
    foreign.write_text("[]")
    with pytest.raises(UserError, match="moving-shapes/2"):
        list(read(corpus, "train", [foreign]))
    moved = tmp_path / "annotations/test.json"
    moved.parent.mkdir()
    moved.write_text((corpus / "annotations/test.json").read_text())
    rows = list(read(tmp_path, "test", ()))
    assert len(rows) == 8
    assert all(isinstance(row, Rejected) and "does not exist" in row.reason for row in rows)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "corpus"
    assert (
        render_shapes.main(["--out", str(out), "--train", "8", "--test", "8", "--sequences", "4", "--workers", "1"])
        == 0
    )
    assert "rendered 21/21 videos" in capsys.readouterr().err
    assert sorted(path.stem for path in (out / "annotations").glob("[!.]*.json")) == sorted(SPLITS)
    assert render_shapes.main(["--out", str(out), "--train", "9"]) == 2
    assert "ask for 8" in capsys.readouterr().err
    assert render_shapes.main(["--out", str(out), "--workers", "0"]) == 2


def test_sequences_have_chat_in_place_of_questions(corpus):
    for sample in (*read(corpus, "sequences_train", ()), *read(corpus, "sequences_test", ())):
        assert isinstance(sample, Sample)
        annotation = sample.annotation
        words = [CLASSES[part["label"]].words for part in annotation["segments"]]
        assert [part["name"] for part in annotation["segments"]] == words
        assert annotation["name"] == f"moving a {annotation['attributes']['shape']}"  # tells nothing of the motion
        assert [line.partition(" ")[2] for line in annotation["chat"][0]["answer"].splitlines()] == words
        assert {row["kind"] for row in annotation["chat"]} == {"segments", "at", "order", "counts", "anticipation"}
        assert not annotation.keys() & {"questions", "conversations"}
    assert all("chat" not in sample.annotation for sample in read(corpus, "train", ()))
