"""From records to clips and batches, on tiny real H.264 clips whose frames can be told apart by their brightness."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np
import pytest
import torch

import vlm.data.clip_frames
from vlm.data.clips import PROBES, ClipConfig, MaskedClipConfig
from vlm.data.pixels import finished
from vlm.data.rng import SampleRng
from vlm.data.video import DecodeError
from vlm.types import Example, Record, UserError

STEP = 5  # levels from one frame to the next; far above what the encoder changes in a flat picture
OFF: dict[str, Any] = {
    "randaugment": None,
    "erase_probability": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
}


def encode(frames: np.ndarray) -> bytes:
    """An mp4 of frames (T, H, W, 3) uint8, as good as H.264 gets."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12, options={"qp": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def flat(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i has level STEP * i everywhere."""
    levels = (STEP * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))


def record(frames: np.ndarray, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "key": "clip",
        "shard": "train-000000.tar",
        "row": 0,
        "video": encode(frames),
        "annotation": {"label": 3},
        "num_frames": len(frames),
        "fps": 12.0,
        "decoders": ("pyav",),
    }
    return Record(**{**values, **changes})


@pytest.fixture(scope="module")
def long_clip() -> Record:
    return record(flat(40))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The indices of each decode that is done."""
    calls: list[list[int]] = []
    decode = vlm.data.clip_frames.decode

    def noted(data: bytes, indices: Sequence[int], **options: Any) -> np.ndarray:
        calls.append(list(indices))
        return decode(data, indices, **options)

    monkeypatch.setattr(vlm.data.clip_frames, "decode", noted)
    return calls


def small(**changes: Any) -> ClipConfig:
    return ClipConfig(**{"num_frames": 8, "size": 16, "short_side": 16, "num_classes": 5, **changes})


def levels(example: Example) -> list[int]:
    """Which frames a flat clip made with OFF shows."""
    assert example.video is not None
    return (example.video.float().mean((0, 2, 3)) / STEP).round().int().tolist()


def finish(clips: ClipConfig | MaskedClipConfig, *examples: Example) -> torch.Tensor:
    """(B, 3, T, H, W) as the model sees them."""
    video = finished(clips.test_batch(examples)).video
    assert video is not None
    return video


def test_training_clips(long_clip: Record, reads: list[list[int]]) -> None:
    examples = small().train(long_clip, SampleRng(0))
    assert [example.key for example in examples] == ["clip", "clip"]
    assert [example.label for example in examples] == [3, 3]
    for example in examples:
        assert example.video is not None
        assert example.video.shape == (3, 8, 16, 16)
        assert example.video.dtype == torch.uint8
        assert example.video.stride(0) == 1, "colours stay innermost"
    assert not torch.equal(examples[0].video, examples[1].video), "augmented independently"  # type: ignore[arg-type]
    assert len(reads) == 1, "decoded once"


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_repeats_share_their_frames(long_clip: Record, reads: list[list[int]], repeats: int) -> None:
    examples = small(**OFF, repeats=repeats).train(long_clip, SampleRng(1))
    assert len(examples) == repeats
    assert [levels(example) for example in examples] == [reads[0]] * repeats
    assert [index // 5 for index in reads[0]] == list(range(8)), "one from each fifth"


def test_training_depends_on_the_rng_alone(long_clip: Record) -> None:
    clips = small()
    first, again, other = (clips.train(long_clip, SampleRng(seed))[0].video for seed in (0, 0, 1))
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


def test_augmentations_can_be_turned_off_one_by_one(long_clip: Record) -> None:
    """A flat clip shows which of them touch it: only crops leave it flat and at its level."""
    untouched = finish(small(**OFF), small(**OFF).train(long_clip, SampleRng(0))[0])
    assert untouched.std((0, 3, 4)).max() < 0.01
    changed = {
        "erase_probability": 1.0,
        "randaugment": "rand-m10-n15-inc1",
    }
    for name, value in changed.items():
        clips = small(**{**OFF, name: value})
        video = finish(clips, clips.train(long_clip, SampleRng(0))[0])
        assert (video - untouched).abs().max() > 0.5, name


def test_flip_mirrors_half_of_the_clips() -> None:
    ramp = np.broadcast_to(np.linspace(0, 250, 32).astype(np.uint8)[None, None, :, None], (8, 32, 32, 3))
    clip = record(ramp)
    settings = {**OFF, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    rising = []
    for seed in range(60):
        for example in small(**settings, flip=True).train(clip, SampleRng(seed)):
            assert example.video is not None
            rising.append(bool(example.video[0, 0, 0, 0] < example.video[0, 0, 0, -1]))
    assert 0.3 < np.mean(rising) < 0.7
    for seed in range(10):
        (example, _) = small(**settings).train(clip, SampleRng(seed))
        assert example.video is not None
        assert example.video[0, 0, 0, 0] < example.video[0, 0, 0, -1]


def test_the_model_is_told_the_colours(long_clip: Record) -> None:
    clips = small(**OFF)
    (example, _) = clips.train(long_clip, SampleRng(0))
    assert example.video is not None
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (clips.mean, clips.std))
    expected = (example.video / 255 - mean) / std
    for batch in (clips.test_batch([example]), clips.collate([example], SampleRng(0))):
        assert batch.video is not None
        assert batch.video.dtype == torch.uint8
        (video,) = finished(batch).video  # type: ignore[misc]
        torch.testing.assert_close(video, expected, rtol=0, atol=1e-6)


def test_rounding_moves_training_clips_by_a_level_at_most() -> None:
    noise = record(np.random.RandomState(0).randint(0, 256, (8, 40, 56, 3)).astype(np.uint8))
    for seed in range(5):
        rounded, exact = (small(round_pixels=kept).train(noise, SampleRng(seed))[0] for kept in (True, False))
        assert rounded.video is not None
        assert exact.video is not None
        assert (rounded.video.dtype, exact.video.dtype) == (torch.uint8, torch.float32)
        assert 0 < (rounded.video - exact.video).abs().max() <= 1.01
        assert (rounded.patch is None) == (exact.patch is None), "the draws are the same"


def test_dense_sampling(long_clip: Record) -> None:
    clips = small(**OFF, sampling="dense", stride=2, test_clips=3, test_crops=1)
    drawn = levels(clips.train(long_clip, SampleRng(0))[0])
    assert drawn[-1] - drawn[0] == 15
    views = clips.views(long_clip, SampleRng(0))
    assert [levels(view) for view in views] == [list(range(start, start + 16, 2)) for start in (0, 12, 24)]


def test_a_short_clip_repeats_its_first_frame() -> None:
    clip = record(flat(5))
    assert levels(small(**OFF).train(clip, SampleRng(0))[0]) == [0] * 8
    views = small(**OFF, test_crops=1).views(clip, SampleRng(0))
    assert [levels(view) for view in views] == [[0, 0, 1, 1, 2, 3, 3, 4], [0, 0, 1, 2, 2, 3, 4, 4]]


def test_views_come_clip_by_clip_and_then_crop_by_crop(reads: list[list[int]]) -> None:
    """Brightness tells the frame in one channel and the column in another."""
    frames = np.zeros((40, 16, 48, 3), dtype=np.uint8)
    frames[..., 0] = STEP * np.arange(40)[:, None, None]
    frames[..., 1] = STEP * np.arange(48)
    views = small(**OFF).views(record(frames), SampleRng(0))
    assert len(reads) == 1
    assert len(views) == 6
    seen = []
    for view in views:
        assert view.video is not None
        assert view.label == 3
        seen.append((view.video[0, :, 8, 8].div(STEP).round().tolist(), round(float(view.video[1, 0, 8, 0]) / STEP)))
    starts = [list(range(0, 40, 5)), list(range(2, 40, 5))]
    assert [left for _, left in seen] == [0, 16, 32, 0, 16, 32]
    assert [frame for frame, _ in seen] == [starts[0]] * 3 + [starts[1]] * 3


def test_views_scale_the_shorter_side() -> None:
    """A bright right half: after scaling 32x96 to 16x48, the crops are dark, half bright, bright."""
    frames = np.zeros((8, 32, 96, 3), dtype=np.uint8)
    frames[:, :, 48:] = 200
    views = small(**OFF, test_clips=1).views(record(frames), SampleRng(0))
    assert [round(float(view.video.float().mean()) / 200, 1) for view in views] == [0.0, 0.5, 1.0]  # type: ignore[union-attr]
    turned = record(frames.transpose(0, 2, 1, 3))
    views = small(**OFF, test_clips=1).views(turned, SampleRng(0))
    assert [round(float(view.video.float().mean()) / 200, 1) for view in views] == [0.0, 0.5, 1.0]  # type: ignore[union-attr]


def test_a_single_test_clip_takes_middle_frames_unless_asked(long_clip: Record) -> None:
    clips = small(**OFF, test_clips=1, test_crops=1)
    (view,) = clips.views(long_clip, SampleRng(0))
    assert levels(view) == list(range(2, 40, 5))
    random = dataclasses.replace(clips, test_offsets="random")
    drawn = [levels(random.views(long_clip, SampleRng(seed))[0]) for seed in range(4)]
    assert len({tuple(indices) for indices in drawn}) == 4
    assert all([index // 5 for index in indices] == list(range(8)) for indices in drawn)


def test_probes(long_clip: Record, reads: list[list[int]]) -> None:
    clips = small(**OFF)
    found = clips.all_views(long_clip, SampleRng(0), PROBES)
    assert len(reads) == 1, "all of them from one decode"
    assert list(found) == ["", *PROBES]
    assert {name: len(views) for name, views in found.items()} == {"": 6, "one_frame": 6, "shuffled_frames": 6}
    for view, still, shuffled in zip(*found.values(), strict=True):
        plain = levels(view)
        assert len(set(levels(still))) == 1
        assert levels(still) == levels(found["one_frame"][0]), "one frame of the whole video"
        assert 15 < levels(still)[0] < 25, "from its middle"
        assert levels(shuffled) != plain
        assert sorted(levels(shuffled)) == plain
    orders = [levels(view) for view in found["shuffled_frames"]]
    assert orders[0] == orders[1] == orders[2], "the crops of a clip share its order"
    assert [index - 2 for index in orders[3]] != orders[0], "each clip has an order of its own"


def test_a_probe_alone_is_the_same_as_among_others(long_clip: Record, reads: list[list[int]]) -> None:
    clips = small(**OFF)
    together = clips.all_views(long_clip, SampleRng(5), ["shuffled_frames", "one_frame"])
    for probe in (None, *PROBES):
        alone = clips.views(long_clip, SampleRng(5), probe)
        for one, other in zip(alone, together[probe or ""], strict=True):
            assert torch.equal(one.video, other.video)  # type: ignore[arg-type]
    assert [len(indices) for indices in reads] == [16, 16, 1, 16]


def test_unknown_probes_are_refused(long_clip: Record) -> None:
    with pytest.raises(UserError, match=r"no probe 'oneframe'.*did you mean 'one_frame'"):
        small().views(long_clip, SampleRng(0), "oneframe")


def test_frames_are_counted_where_the_index_does_not_know(long_clip: Record) -> None:
    unknown = dataclasses.replace(long_clip, num_frames=-1, decoders=())
    clips = small(**OFF)
    known, counted = (clips.train(one, SampleRng(0))[0].video for one in (long_clip, unknown))
    assert torch.equal(known, counted)  # type: ignore[arg-type]


def test_unusable_records(long_clip: Record) -> None:
    clips = small()
    for broken in (
        dataclasses.replace(long_clip, video=None),
        dataclasses.replace(long_clip, video=b"\0" * 100),
        dataclasses.replace(long_clip, num_frames=400),  # the index promises more than there is
        dataclasses.replace(long_clip, video=b"", num_frames=-1),
    ):
        with pytest.raises(DecodeError):
            clips.train(broken, SampleRng(0))
        with pytest.raises(DecodeError):
            clips.views(broken, SampleRng(0))


@pytest.mark.parametrize("annotation", [{}, {"label": 5}, {"label": -1}, {"label": "3"}, {"label": None}])
def test_labels_outside_of_the_classes_are_refused(long_clip: Record, annotation: dict[str, Any]) -> None:
    odd = dataclasses.replace(long_clip, annotation=annotation)
    with pytest.raises(UserError, match=r"train-000000.tar: record 'clip' has label .*num_classes=5"):
        small().train(odd, SampleRng(0))
    if annotation:
        with pytest.raises(UserError, match="'clip' has label"):
            small().views(odd, SampleRng(0))
    else:
        assert small().views(odd, SampleRng(0))[0].label is None


def test_collate_mixes(long_clip: Record) -> None:
    clips = small()
    examples = clips.train(long_clip, SampleRng(0)) + clips.train(
        dataclasses.replace(long_clip, annotation={"label": 1}), SampleRng(1)
    )
    batch, again = (clips.collate(examples, SampleRng(2)) for _ in range(2))
    assert batch.label is not None
    assert batch.target is not None
    assert batch.video is not None
    assert batch.label.tolist() == [3, 3, 1, 1]
    torch.testing.assert_close(batch.target.sum(1), torch.ones(4))
    assert (batch.target > 0.03).sum(1).tolist() == [2] * 4, "a share of both labels"
    assert batch.mixing is not None
    assert batch.mixing == again.mixing
    assert torch.equal(finished(batch).video, finished(again).video)  # type: ignore[arg-type]
    assert not torch.equal(finished(batch).video, finish(clips, *examples))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="3 \\(an odd number\\)"):
        clips.collate(examples[:3], SampleRng(2))


def test_collate_without_mixing(long_clip: Record) -> None:
    examples = small().train(long_clip, SampleRng(0))
    smoothed = small(mixup=0.0, cutmix=0.0).collate(examples * 2 + examples[:1], SampleRng(0))
    assert smoothed.target is not None
    assert smoothed.target[0].tolist() == pytest.approx([0.02, 0.02, 0.02, 0.92, 0.02])
    plain = small(**OFF).collate(examples, SampleRng(0))
    assert plain.target is None
    assert torch.equal(plain.video, torch.stack([example.video for example in examples]))  # type: ignore[arg-type, misc]
    with pytest.raises(ValueError, match="have no label"):
        small(**OFF).collate([dataclasses.replace(examples[0], label=None)], SampleRng(0))


def masked(**changes: Any) -> MaskedClipConfig:
    return MaskedClipConfig(**{"num_frames": 8, "size": 16, "patch_size": 4, "mask_ratio": 0.75, **changes})


def test_masked_training_clips(long_clip: Record, reads: list[list[int]]) -> None:
    clips = masked(repeats=2)
    examples = clips.train(long_clip, SampleRng(3))
    assert len(reads) == 1
    assert [levels(example) for example in examples] == [reads[0]] * 2
    assert np.diff(reads[0]).tolist() == [2] * 7
    batch = clips.collate(examples, SampleRng(0))
    assert batch.label is None
    assert batch.target is None
    assert batch.video is not None
    assert batch.mask is not None
    assert batch.video.shape == (2, 3, 8, 16, 16)
    assert batch.mask.dtype == torch.bool
    assert batch.mask.shape == (2, 4 * 4 * 4)
    assert batch.mask.view(2, 4, 16).sum(2).unique().tolist() == [12]
    assert not torch.equal(batch.mask[0], batch.mask[1]), "each clip has a mask of its own"
    assert torch.equal(batch.mask, clips.collate(examples, SampleRng(0)).mask)  # type: ignore[arg-type]


def test_masked_test_clip_is_the_middle(long_clip: Record) -> None:
    found = masked().all_views(long_clip, SampleRng(0), [])
    ((view,),) = found.values()
    assert levels(view) == list(range(12, 28, 2))
    with pytest.raises(UserError, match="has no probes"):
        masked().all_views(long_clip, SampleRng(0), ["one_frame"])


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (ClipConfig, {"num_frames": 0}, "inputs.num_frames is 0"),
        (ClipConfig, {"size": 256}, "inputs.short_side is 224, less than inputs.size=256"),
        (ClipConfig, {"sampling": "uniform"}, "inputs.sampling is 'uniform'"),
        (ClipConfig, {"stride": 4}, "inputs.stride=4 means nothing with inputs.sampling=segments"),
        (ClipConfig, {"sampling": "dense"}, "inputs.sampling=dense needs inputs.stride"),
        (ClipConfig, {"test_clips": 3}, "inputs.test_clips is 3"),
        (ClipConfig, {"test_crops": 0}, "inputs.test_crops is 0"),
        (ClipConfig, {"test_offsets": "random"}, "inputs.test_offsets=random needs"),
        (ClipConfig, {"test_offsets": "first"}, "inputs.test_offsets is 'first'"),
        (ClipConfig, {"crop_scale": (0.0, 1.0)}, "inputs.crop_scale"),
        (ClipConfig, {"crop_scale": (0.5, 1.5)}, "inputs.crop_scale"),
        (ClipConfig, {"crop_ratio": (2.0, 1.0)}, "inputs.crop_ratio"),
        (ClipConfig, {"erase_probability": 1.5}, "inputs.erase_probability is 1.5"),
        (ClipConfig, {"mixup": -1.0}, "inputs.mixup is -1.0"),
        (
            ClipConfig,
            {"mixup": 0.0, "cutmix": 0.0, "mixup_probability": 0.5},
            "inputs.mixup_probability=0.5 means nothing",
        ),
        (ClipConfig, {"cutmix": 0.0, "switch_probability": 0.3}, "inputs.switch_probability=0.3 means nothing"),
        (ClipConfig, {"num_classes": 1}, "inputs.num_classes is 1"),
        (ClipConfig, {"randaugment": "rand-m7"}, "inputs.randaugment: 'rand-m7'"),
        (ClipConfig, {"std": (0.2, 0.0, 0.2)}, "inputs.std"),
        (MaskedClipConfig, {"size": 100}, "inputs.size=100 is not a multiple of inputs.patch_size=16"),
        (MaskedClipConfig, {"num_frames": 9}, "inputs.num_frames=9 is not a multiple of inputs.tubelet_size=2"),
        (MaskedClipConfig, {"mask_ratio": 1.0}, "hides 196 of the 196"),
        (MaskedClipConfig, {"mask_ratio": 0.001}, "hides 0 of the 196"),
        (MaskedClipConfig, {"crop_scales": ()}, "inputs.crop_scales"),
        (MaskedClipConfig, {"stride": 0}, "inputs.stride is 0"),
    ],
)
def test_contradictions_are_refused(build: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(**settings)
    assert message in str(error.value)


def test_the_defaults_are_the_published_recipe() -> None:
    clips = ClipConfig()
    assert (clips.num_frames, clips.size, clips.sampling, clips.repeats, clips.flip) == (16, 224, "segments", 2, False)
    assert (clips.test_clips, clips.test_crops, clips.num_classes) == (2, 3, 174)
    masked_clips = MaskedClipConfig()
    assert (masked_clips.stride, masked_clips.mask_ratio, masked_clips.crop_scales[-1]) == (2, 0.9, 0.66)
