"""From a shard record to clips, and from clips to a batch: one config dataclass for each kind of training.

`ClipConfig` is action recognition (labels, mixup, multi-view tests), `MaskedClipConfig` masked pretraining (VideoMAE,
arXiv 2203.12602). Both decode a record once, however many clips, views or probes are made of it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlm.data import sampling
from vlm.data import transforms as tf
from vlm.data.collate import stack
from vlm.data.frame_operations import apply_operations
from vlm.data.masks import num_hidden, tube_mask
from vlm.data.mixup import mix_batch, soft_targets
from vlm.data.randaugment import parse_randaugment
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.data.video import DecodeError, count_frames, decode
from vlm.types import Ask, Batch, Example, Record, UserError, Visit

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
        _at_least(self, 1, ("num_frames", "size", "repeats", "test_clips", "test_crops"))
        _at_least(self, 2, ("num_classes",))
        _at_least(self, 0, ("mixup", "cutmix"))
        _shares(self, ("erase_probability", "mixup_probability", "switch_probability", "label_smoothing"))
        _colours(self)
        self._check_sampling()
        self._check_mixing()
        if self.short_side < self.size:
            raise ValueError(
                f"inputs.short_side is {self.short_side}, less than inputs.size={self.size}: "
                "a test crop would not fit into the frame; raise short_side or lower size"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"inputs.crop_scale is {self.crop_scale}; it must be two shares with 0 < least <= most <= 1"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"inputs.crop_ratio is {self.crop_ratio}; it must be two ratios with 0 < least <= most")
        if self.randaugment is not None:
            try:
                parse_randaugment(self.randaugment)
            except ValueError as error:
                raise ValueError(f"inputs.randaugment: {error}") from error

    def _check_sampling(self) -> None:
        if self.sampling not in ("segments", "dense"):
            raise ValueError(f"inputs.sampling is {self.sampling!r}; it must be segments or dense")
        if self.test_offsets not in ("middle", "random"):
            raise ValueError(f"inputs.test_offsets is {self.test_offsets!r}; it must be middle or random")
        segments = self.sampling == "segments"
        if segments and self.stride is not None:
            raise ValueError(
                f"inputs.stride={self.stride} means nothing with inputs.sampling=segments, where the frames' distance "
                "follows from the length of the video; set inputs.stride=none or inputs.sampling=dense"
            )
        if not segments and (self.stride is None or self.stride < 1):
            raise ValueError(f"inputs.sampling=dense needs inputs.stride >= 1, but it is {self.stride}")
        if segments and self.test_clips > 2:
            raise ValueError(
                f"inputs.test_clips is {self.test_clips}, but inputs.sampling=segments defines 1 (middle frames) or 2"
            )
        if self.test_offsets == "random" and not (segments and self.test_clips == 1):
            raise ValueError(
                f"inputs.test_offsets=random needs inputs.sampling=segments and inputs.test_clips=1, "
                f"but they are {self.sampling} and {self.test_clips}"
            )

    def _check_mixing(self) -> None:
        if self.mixup_probability != 1.0 and not (self.mixup or self.cutmix):
            raise ValueError(
                f"inputs.mixup_probability={self.mixup_probability} means nothing while inputs.mixup and inputs.cutmix "
                "are 0; set one of them, or leave it at 1.0"
            )
        if self.switch_probability != 0.5 and not (self.mixup and self.cutmix):
            raise ValueError(
                f"inputs.switch_probability={self.switch_probability} means nothing unless both inputs.mixup and "
                f"inputs.cutmix are on (they are {self.mixup} and {self.cutmix}); leave it at 0.5"
            )

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
        num_frames = _frame_count(record)
        if self.stride is None:
            indices = sampling.segment_frames(num_frames, self.num_frames, rng.numpy)
        else:
            indices = sampling.dense_frames(num_frames, self.num_frames, self.stride, rng.numpy)
        frames = _read(record, indices)
        return [Example(key=record.key, video=self.augment(frames, rng), label=label) for _ in range(self.repeats)]

    def augment(self, frames: np.ndarray, rng: SampleRng) -> Tensor:
        """Frames (T, H, W, 3) uint8 -> one random training clip (3, T, size, size), normalised."""
        steps = parse_randaugment(self.randaugment).draw(rng) if self.randaugment else []
        box = tf.draw_resized_crop(*tf.frame_size(frames), self.crop_scale, self.crop_ratio, rng.python)
        video = tf.resize_video(tf.to_video(apply_operations(frames, steps, box)), self.size)
        video = tf.normalize(video, self.mean, self.std)
        if self.flip and rng.numpy.uniform() < 0.5:
            video = video.flip(-1)
        if self.erase_probability > 0:
            erased = tf.draw_erase_box(self.size, self.size, self.erase_probability, rng.python)
            if erased is not None:
                video = tf.erase(video, erased, rng.torch)
        return video

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
        return stack(examples)

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to score."""
        return Example(key="", video=torch.zeros(3, self.num_frames, self.size, self.size))

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """The plain views under "" and those of each probe under its name, all from one decode (see `views`)."""
        return self._views(record, rng, ["", *probes])

    def _views(self, record: Record, rng: SampleRng, names: Sequence[str]) -> dict[str, list[Example]]:
        for name in names:
            _check_probe(name)
        label = self._label(record) if "label" in record.annotation else None
        plain = self._test_indices(_frame_count(record), rng)
        clips = {name: _probed(plain, name, rng) for name in names}
        distinct = np.unique(np.concatenate([clip for several in clips.values() for clip in several]))
        frames = _read(record, distinct)
        frames = tf.resize_bilinear(frames, *tf.short_side_size(*tf.frame_size(frames), self.short_side))
        boxes = tf.spatial_boxes(*tf.frame_size(frames), self.size, self.test_crops)
        examples: dict[str, list[Example]] = {}
        for name, several in clips.items():
            places = [np.searchsorted(distinct, clip) for clip in several]
            examples[name] = [
                Example(key=record.key, video=self._view(tf.crop(frames, box)[place]), label=label)
                for place in places
                for box in boxes
            ]
        return examples

    def _view(self, frames: np.ndarray) -> Tensor:
        """Frames (T, size, size, 3) uint8 -> a test view (3, T, size, size), normalised."""
        return tf.normalize(tf.to_video(frames), self.mean, self.std)

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
        batch = stack(examples)
        if batch.label is None:
            raise ValueError(f"the examples {batch.keys[:3]} … have no label: a training batch needs them")
        if self.mixup or self.cutmix:
            assert batch.video is not None
            video, target = mix_batch(
                batch.video,
                batch.label,
                num_classes=self.num_classes,
                smoothing=self.label_smoothing,
                mixup=self.mixup,
                cutmix=self.cutmix,
                probability=self.mixup_probability,
                switch_probability=self.switch_probability,
                generator=rng.numpy,
            )
            return dataclasses.replace(batch, video=video, target=target)
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
        _at_least(self, 1, ("num_frames", "size", "stride", "repeats", "patch_size", "tubelet_size"))
        _shares(self, ("mask_ratio",))
        _colours(self)
        for whole, part in (("size", "patch_size"), ("num_frames", "tubelet_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"inputs.{whole}={getattr(self, whole)} is not a multiple of inputs.{part}={getattr(self, part)}"
                )
        positions = (self.size // self.patch_size) ** 2
        if not 0 < num_hidden(positions, self.mask_ratio) < positions:
            raise ValueError(
                f"inputs.mask_ratio={self.mask_ratio} hides {num_hidden(positions, self.mask_ratio)} of the "
                f"{positions} positions of a time slice; at least one must be hidden and one visible"
            )
        if not self.crop_scales or not all(0 < scale <= 1 for scale in self.crop_scales):
            raise ValueError(
                f"inputs.crop_scales is {self.crop_scales}; it must be shares of the shorter side, 0 < … <= 1"
            )

    task = "classes"
    probes: ClassVar[tuple[str, ...]] = ()

    members: ClassVar[tuple[str, ...]] = ("video",)

    def parts(self, shards: ShardSet) -> None:
        """A record is one sample."""

    def lengths(self, shards: ShardSet) -> None:
        """Clips have no length in tokens."""

    def train(self, record: Record, rng: SampleRng, visit: Visit = WHOLE) -> list[Example]:
        """`repeats` randomly cropped clips of one decode, (3, T, size, size); raises DecodeError."""
        indices = sampling.strided_frames(_frame_count(record), self.num_frames, self.stride, rng.numpy)
        frames = _read(record, indices)
        return [Example(key=record.key, video=self.augment(frames, rng)) for _ in range(self.repeats)]

    def augment(self, frames: np.ndarray, rng: SampleRng) -> Tensor:
        """Frames (T, H, W, 3) uint8 -> one random training clip (3, T, size, size), normalised."""
        box = tf.draw_multi_scale_crop(*tf.frame_size(frames), self.size, self.crop_scales, rng.python)
        return tf.normalize(tf.to_video(tf.resize_antialiased(tf.crop(frames, box), self.size)), self.mean, self.std)

    def views(self, record: Record, rng: SampleRng, probe: str | None = None) -> list[Example]:
        """One clip: the middle of the video, shorter side scaled to `size`, central crop; raises DecodeError.

        Masked pretraining has no probes, so `probe` must be None (UserError); nothing is drawn from `rng`.
        """
        if probe:
            raise UserError(
                f"probe {probe!r}: masked pretraining scores no classes, so it has no probes; set eval.probes=()"
            )
        indices = sampling.strided_frames(_frame_count(record), self.num_frames, self.stride, None)
        frames = _read(record, indices)
        frames = tf.resize_bilinear(frames, *tf.short_side_size(*tf.frame_size(frames), self.size))
        box = tf.center_box(*tf.frame_size(frames), self.size)
        return [Example(key=record.key, video=tf.normalize(tf.to_video(tf.crop(frames, box)), self.mean, self.std))]

    def asks(self, record: Record) -> tuple[Ask, ...]:
        """Nothing: masked pretraining scores no classes."""
        return ()

    def test_batch(self, examples: Sequence[Example]) -> Batch:
        """Clips stacked, without masks."""
        return stack(examples)

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to score."""
        return Example(key="", video=torch.zeros(3, self.num_frames, self.size, self.size))

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """The single view under ""; there are no probes (UserError where one is asked for)."""
        return {"": self.views(record, rng, probes[0] if probes else None)}

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        """A batch with a tube mask (N,) of its own for each clip, N = tokens of a clip."""
        side = self.size // self.patch_size
        slices = self.num_frames // self.tubelet_size
        masks = [tube_mask(slices, side, side, self.mask_ratio, rng.numpy) for _ in examples]
        return dataclasses.replace(stack(examples), mask=torch.from_numpy(np.stack(masks)))


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


def _frame_count(record: Record) -> int:
    """From the index, or, where the shard was made without looking, by decoding the whole video."""
    if record.num_frames == -1:
        return count_frames(_bytes(record))
    return record.num_frames


def _read(record: Record, indices: np.ndarray) -> np.ndarray:
    """Frames (len(indices), H, W, 3) uint8."""
    return decode(_bytes(record), indices.tolist(), decoders=record.decoders or ("pyav",))


def _bytes(record: Record) -> bytes:
    if record.video is None:
        raise DecodeError(f"record {record.key!r} of {record.shard} has no video member")
    return record.video


def _at_least(config: object, least: int, names: Iterable[str]) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"inputs.{name} is {getattr(config, name)}; it must be at least {least}")


def _shares(config: object, names: Iterable[str]) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"inputs.{name} is {getattr(config, name)}; it must be between 0 and 1")


def _colours(config: ClipConfig | MaskedClipConfig) -> None:
    if len(config.mean) != 3 or len(config.std) != 3 or min(config.std) <= 0:
        raise ValueError(
            f"inputs.mean={config.mean} and inputs.std={config.std} must be three numbers each, std above 0"
        )
