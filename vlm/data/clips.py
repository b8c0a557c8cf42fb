"""From a shard record to clips, and from clips to a batch: one config dataclass for each kind of training.

`ClipConfig` is action recognition (labels, mixup, multi-view tests), `MaskedClipConfig` masked pretraining (VideoMAE,
arXiv 2203.12602). Both decode a record once, however many clips, views or probes are made of it. Pixels leave here as
levels, 0 … 255; the model normalises them, erases and mixes (vlm.data.pixels), since whole numbers are a quarter of the
bytes to write, to hand over and to copy to a device.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlm.data import clip_frames, sampling
from vlm.data import transforms as tf
from vlm.data.clip_checks import check_clips, check_masked_clips
from vlm.data.collate import stack
from vlm.data.frame_operations import apply_operations
from vlm.data.masks import tube_mask
from vlm.data.mixup import mix_batch, soft_targets
from vlm.data.randaugment import parse_randaugment
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.types import Ask, Batch, Colours, Example, Record, UserError, Visit

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ONE_FRAME = "one_frame"
SHUFFLED_FRAMES = "shuffled_frames"
WHOLE = Visit()
PROBES = (ONE_FRAME, SHUFFLED_FRAMES)
"""Conditions that should break a model that understands motion: one frame repeated, and frames in random order."""


@dataclass(slots=True, kw_only=True)
class ClipConfig:
    """Labelled clips: training with augmentation and mixing, tests over several views."""

    num_frames: int = 16
    """Frames of a clip (T)."""
    size: int = 224
    """Height and width of a clip, in pixels."""
    short_side: int = 224
    """Test frames are scaled so that their shorter side has this many pixels, then cropped to `size`."""
    sampling: Literal["segments", "dense"] = "segments"
    """segments: one frame from each of `num_frames` equal parts of the video (SSv2); dense: a window of consecutive
    strides (Kinetics)."""
    stride: int | None = None
    """Frames from one sampled frame to the next; dense sampling needs it, segments have none."""
    round_pixels: bool = True
    """Round training clips to whole levels (0 … 255) in each direction of their resize, at most a level in all; test
    clips always are. false: as published, unrounded, in four times the bytes."""
    repeats: int = 2
    """Clips made of each training record: the same frames, augmented independently (repeated augmentation)."""
    randaugment: str | None = "rand-m7-n4-mstd0.5-inc1"
    """RandAugment policy: magnitude m, operations n, spread of the magnitude mstd; none: off."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the frame's area that a training crop takes."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Least and greatest width / height of a training crop before it is resized to a square."""
    flip: bool = False
    """Mirror half of the training clips; must stay off where classes tell left from right (SSv2)."""
    erase_probability: float = 0.25
    """Share of the training clips in which a rectangle is replaced by noise (random erasing); 0: off."""
    mixup: float = 0.8
    """Alpha of mixup's Beta(alpha, alpha); 0: off."""
    cutmix: float = 1.0
    """Alpha of CutMix's Beta(alpha, alpha); 0: off."""
    mixup_probability: float = 1.0
    """Share of the micro-batches that are mixed at all."""
    switch_probability: float = 0.5
    """Share of the mixed micro-batches that get CutMix, where both kinds are on."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""
    num_classes: int = 174
    """Number of classes (K)."""
    test_clips: int = 2
    """Clips along time of a test video."""
    test_crops: int = 3
    """Square crops along the longer side of each test clip."""
    test_offsets: Literal["middle", "random"] = "middle"
    """Which frame of its segment a single test clip takes. random: as the published validation did, so that two
    validations of the same weights differ; needs sampling=segments and test_clips=1."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green, blue (0 … 1) that is subtracted."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Deviation of red, green, blue that the difference is divided by."""

    def __post_init__(self) -> None:
        check_clips(self)

    task = "classes"
    probes: ClassVar[tuple[str, ...]] = PROBES

    members: ClassVar[tuple[str, ...]] = ("video",)

    def parts(self, shards: ShardSet) -> None:
        """A record is one sample."""

    def lengths(self, shards: ShardSet) -> None:
        """Clips have no length in tokens."""

    def train(self, record: Record, rng: SampleRng, visit: Visit = WHOLE) -> list[Example]:
        """`repeats` augmented clips of one decode, (3, T, size, size) each.

        Raises:
            DecodeError: the frames cannot be read.
            UserError: the record's label is missing or outside of 0 … num_classes - 1.
        """
        label = self._label(record)
        num_frames = clip_frames.count(record)
        if self.stride is None:
            indices = sampling.segment_frames(num_frames, self.num_frames, rng.numpy)
        else:
            indices = sampling.dense_frames(num_frames, self.num_frames, self.stride, rng.numpy)
        frames = clip_frames.read(record, indices)
        clips = [self.augment(frames, rng) for _ in range(self.repeats)]
        return [dataclasses.replace(clip, key=record.key, label=label) for clip in clips]

    def augment(self, frames: np.ndarray, rng: SampleRng) -> Example:
        """Frames (T, H, W, 3) uint8 -> one random training clip, with what is to be erased of it."""
        steps = parse_randaugment(self.randaugment).draw(rng) if self.randaugment else []
        box = tf.draw_resized_crop(*tf.frame_size(frames), self.crop_scale, self.crop_ratio, rng.python)
        frames = apply_operations(frames, steps, box)
        if self.round_pixels:
            video = tf.as_video(tf.resize_frames(frames, self.size))
        else:
            video = tf.resize_video(tf.to_video(frames), self.size)
        if self.flip and rng.numpy.uniform() < 0.5:
            video = video.flip(-1)
        erased = None
        if self.erase_probability > 0:
            erased = tf.draw_erase_box(self.size, self.size, self.erase_probability, rng.python)
        patch = None if erased is None else tf.draw_patch(erased, self.num_frames, rng.torch)
        return Example(key="", video=video, patch=patch)

    def views(self, record: Record, rng: SampleRng, probe: str | None = None) -> list[Example]:
        """The `test_clips * test_crops` views of a video, clip by clip and then crop by crop, from one decode.

        Args:
            record: a test record; its label may be missing.
            rng: drawn from by `shuffled_frames` and by `test_offsets="random"` only.
            probe: one of `PROBES`, for views that should break the model. one_frame: the middle one of the sampled
                frames everywhere, so that all clips of one crop are equal; shuffled_frames: each clip's frames in an
                order of its own, the same for its crops.
        Raises:
            DecodeError: the frames cannot be read.
            UserError: there is no such probe.
        """
        name = probe or ""
        return self._views(record, rng, [name])[name]

    def asks(self, record: Record) -> tuple[Ask, ...]:
        """One thing: the class of the clip."""
        return (Ask(record.key, self._label(record) if "label" in record.annotation else None),)

    def test_batch(self, examples: Sequence[Example]) -> Batch:
        """Views stacked, without mixing."""
        return dataclasses.replace(stack(examples), colours=Colours(self.mean, self.std))

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to score."""
        return _blank(self.num_frames, self.size)

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """The plain views under "" and those of each probe under its name, all from one decode (see `views`)."""
        return self._views(record, rng, ["", *probes])

    def _views(self, record: Record, rng: SampleRng, names: Sequence[str]) -> dict[str, list[Example]]:
        for name in names:
            _check_probe(name)
        label = self._label(record) if "label" in record.annotation else None
        plain = self._test_indices(clip_frames.count(record), rng)
        clips = {name: _probed(plain, name, rng) for name in names}
        distinct = np.unique(np.concatenate([clip for several in clips.values() for clip in several]))
        frames = clip_frames.read(record, distinct)
        height, width = tf.short_side_size(*tf.frame_size(frames), self.short_side)
        boxes = tf.spatial_boxes(height, width, self.size, self.test_crops)
        seen = tf.hull(boxes)
        video = tf.as_video(tf.resize_bilinear(frames, height, width, seen))
        views = [tf.crop_video(video, box.within(seen)) for box in boxes]
        return {
            name: [
                Example(key=record.key, video=tf.pick(view, np.searchsorted(distinct, clip)), label=label)
                for clip in several
                for view in views
            ]
            for name, several in clips.items()
        }

    def _test_indices(self, num_frames: int, rng: SampleRng) -> list[np.ndarray]:
        if self.stride is not None:
            return sampling.dense_test_clips(num_frames, self.num_frames, self.stride, self.test_clips)
        if self.test_offsets == "random":
            return [sampling.segment_frames(num_frames, self.num_frames, rng.numpy)]
        return sampling.segment_test_clips(num_frames, self.num_frames, self.test_clips)

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        """A training batch: stacked, mixed, with soft targets where mixing or smoothing is on.

        Raises:
            UserError: mixing is on and the number of examples is odd.
        """
        batch = dataclasses.replace(stack(examples), colours=Colours(self.mean, self.std))
        if batch.label is None:
            raise ValueError(f"the examples {batch.keys[:3]} … have no label: a training batch needs them")
        if self.mixup or self.cutmix:
            assert batch.video is not None
            mixing, target = mix_batch(
                batch.video.shape,
                batch.label,
                num_classes=self.num_classes,
                smoothing=self.label_smoothing,
                mixup=self.mixup,
                cutmix=self.cutmix,
                probability=self.mixup_probability,
                switch_probability=self.switch_probability,
                generator=rng.numpy,
            )
            return dataclasses.replace(batch, mixing=mixing, target=target)
        if self.label_smoothing:
            target = soft_targets(batch.label, self.num_classes, self.label_smoothing)
            return dataclasses.replace(batch, target=target)
        return batch

    def _label(self, record: Record) -> int:
        label = record.annotation.get("label")
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise UserError(
                f"{record.shard}: record {record.key!r} has label {label!r}, but inputs.num_classes={self.num_classes} "
                f"allows 0 … {self.num_classes - 1}: shard it with a label list, or set inputs.num_classes"
            )
        return label


@dataclass(slots=True, kw_only=True)
class MaskedClipConfig:
    """Unlabelled clips with a tube mask, for masked pretraining."""

    num_frames: int = 16
    """Frames of a clip (T)."""
    size: int = 224
    """Height and width of a clip, in pixels."""
    stride: int = 2
    """Frames from one sampled frame to the next (published: 2 for SSv2, 4 for Kinetics)."""
    repeats: int = 1
    """Clips made of each record: the same frames, cropped and masked independently."""
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the training crop, as shares of the frame's shorter side, largest first."""
    mask_ratio: float = 0.9
    """Share of the positions of a time slice that is hidden."""
    patch_size: int = 16
    """Height and width of a token, in pixels."""
    tubelet_size: int = 2
    """Frames of a token."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green, blue (0 … 1) that is subtracted."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Deviation of red, green, blue that the difference is divided by."""

    def __post_init__(self) -> None:
        check_masked_clips(self)

    task = "classes"
    probes: ClassVar[tuple[str, ...]] = ()

    members: ClassVar[tuple[str, ...]] = ("video",)

    def parts(self, shards: ShardSet) -> None:
        """A record is one sample."""

    def lengths(self, shards: ShardSet) -> None:
        """Clips have no length in tokens."""

    def train(self, record: Record, rng: SampleRng, visit: Visit = WHOLE) -> list[Example]:
        """`repeats` randomly cropped clips of one decode, (3, T, size, size); raises DecodeError."""
        indices = sampling.strided_frames(clip_frames.count(record), self.num_frames, self.stride, rng.numpy)
        frames = clip_frames.read(record, indices)
        return [Example(key=record.key, video=self.augment(frames, rng)) for _ in range(self.repeats)]

    def augment(self, frames: np.ndarray, rng: SampleRng) -> Tensor:
        """Frames (T, H, W, 3) uint8 -> one random training clip (3, T, size, size) uint8."""
        box = tf.draw_multi_scale_crop(*tf.frame_size(frames), self.size, self.crop_scales, rng.python)
        return tf.as_video(tf.resize_antialiased(tf.crop(frames, box), self.size))

    def views(self, record: Record, rng: SampleRng, probe: str | None = None) -> list[Example]:
        """One clip: the middle of the video, shorter side scaled to `size`, central crop; raises DecodeError.

        Masked pretraining has no probes, so `probe` must be None (UserError); nothing is drawn from `rng`.
        """
        if probe:
            raise UserError(
                f"probe {probe!r}: masked pretraining scores no classes, so it has no probes; set eval.probes=()"
            )
        indices = sampling.strided_frames(clip_frames.count(record), self.num_frames, self.stride, None)
        frames = clip_frames.read(record, indices)
        height, width = tf.short_side_size(*tf.frame_size(frames), self.size)
        frames = tf.resize_bilinear(frames, height, width, tf.center_box(height, width, self.size))
        return [Example(key=record.key, video=tf.as_video(frames))]

    def asks(self, record: Record) -> tuple[Ask, ...]:
        """Nothing: masked pretraining scores no classes."""
        return ()

    def test_batch(self, examples: Sequence[Example]) -> Batch:
        """Clips stacked, without masks."""
        return dataclasses.replace(stack(examples), colours=Colours(self.mean, self.std))

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to score."""
        return _blank(self.num_frames, self.size)

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """The single view under ""; there are no probes (UserError where one is asked for)."""
        return {"": self.views(record, rng, probes[0] if probes else None)}

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        """A batch with a tube mask (N,) of its own for each clip, N = tokens of a clip."""
        side = self.size // self.patch_size
        slices = self.num_frames // self.tubelet_size
        masks = [tube_mask(slices, side, side, self.mask_ratio, rng.numpy) for _ in examples]
        return dataclasses.replace(self.test_batch(examples), mask=torch.from_numpy(np.stack(masks)))


def _blank(num_frames: int, size: int) -> Example:
    return Example(key="", video=torch.zeros((num_frames, size, size, 3), dtype=torch.uint8).permute(3, 0, 1, 2))


def _probed(clips: list[np.ndarray], probe: str, rng: SampleRng) -> list[np.ndarray]:
    """The frame indices of each clip under a probe; "" leaves them as they are."""
    if probe == ONE_FRAME:
        distinct = np.unique(np.concatenate(clips))
        return [np.full_like(clip, distinct[len(distinct) // 2]) for clip in clips]
    if probe == SHUFFLED_FRAMES:
        return [clip[rng.numpy.permutation(len(clip))] for clip in clips]
    return clips


def _check_probe(name: str) -> None:
    if name and name not in PROBES:
        near = difflib.get_close_matches(name, PROBES, n=1, cutoff=0.0)[0]
        raise UserError(f"eval.probes: there is no probe {name!r}, only {', '.join(PROBES)}; did you mean {near!r}?")
