"""The rivals of bench/data.py: other loaders of video clips, each built the way its own users build it.

All decode with decord, one thread, and yield what training eats, (B, 3, T, size, size) float32, normalised. Pixels go
through this repository's own functions wherever the method does not say how they are made, so that only the method
differs. Nothing is slowed down on purpose.

`EachViewItsFile` works as the published training code of VideoMAE does, written from its description: clips are files
named by a list; frames go to Pillow for RandAugment, whole frames become floats and are normalised before the crop;
each view of a test opens and decodes the file anew and resizes all the frames of both its clips.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from PIL import Image
from torch import Tensor

from vlm.data import sampling
from vlm.data import transforms as tf
from vlm.data.clips import ClipConfig
from vlm.data.randaugment import apply_operation, parse_randaugment
from vlm.data.rng import SampleRng


def open_video(video: bytes | memoryview | Path) -> Any:
    import decord

    return decord.VideoReader(str(video) if isinstance(video, Path) else io.BytesIO(video), num_threads=1)


class PlainClip:
    """Encoded video -> a clip without augmentation: one frame a segment, wholly resized, as ours, and normalised."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config

    def __call__(self, video: bytes, generator: RandomState) -> Tensor:
        config, reader = self.config, open_video(video)
        frames = reader.get_batch(sampling.segment_frames(len(reader), config.num_frames, generator)).asnumpy()
        box = tf.fallback_crop(*tf.frame_size(frames), config.crop_ratio)
        frames = tf.resize_frames(tf.crop(frames, box), config.size)
        return tf.normalize(tf.to_video(frames), config.mean, config.std)


class _FromSample:
    """A sample of webdataset or energon -> its clip (a class, so that it can be sent to processes)."""

    def __init__(self, config: ClipConfig) -> None:
        self.clip, self.generator = PlainClip(config), RandomState(0)

    def __call__(self, sample: dict[str, Any]) -> Tensor:
        return self.clip(sample["mp4"], self.generator)


def webdataset_batches(tars: Sequence[Path], config: ClipConfig, batch: int, workers: int) -> Iterator[Tensor]:
    """Plain webdataset: tars read through in order, again and again, without a shuffle, which would cost copies."""
    import webdataset as wds

    dataset = wds.WebDataset([str(tar) for tar in tars], shardshuffle=False).repeat()
    batched = dataset.map(_FromSample(config)).batched(batch, collation_fn=torch.stack)
    return iter(wds.WebLoader(batched, batch_size=None, num_workers=workers) if workers else batched)


# Those that have to be installed --------------------------------------------------------------------------------------


def missing(name: str) -> str:
    """Why a package cannot be used here; "": it can."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _video_of(file: str) -> dict[str, Any]:
    return {"mp4": Path(file).read_bytes()}


def litdata_batches(
    files: Sequence[Path], folder: Path, config: ClipConfig, batch: int, workers: int
) -> Iterator[Tensor]:
    """litdata: the clips in its own chunks, its own loader."""
    import litdata

    class Clips(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Tensor:
            return make(super().__getitem__(index))

    make = _FromSample(config)
    if not folder.exists():
        litdata.optimize(_video_of, [str(file) for file in files], str(folder), chunk_bytes="64MB", num_workers=1)
    dataset = Clips(str(folder), shuffle=False)
    while True:
        yield from litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, drop_last=True)


def energon_batches(
    tars: Sequence[Path], folder: Path, config: ClipConfig, batch: int, workers: int
) -> Iterator[Tensor]:
    """megatron-energon over the same tars, with a task encoder that decodes the clip and stacks."""
    import megatron.energon as energon

    if not folder.exists():
        folder.mkdir()
        for tar in tars:
            shutil.copy(tar, folder / tar.name)
        command = ["prepare", str(folder), "--non-interactive", "--split-ratio", "1,0,0",
                   "--sample-type", "CrudeWebdataset"]  # fmt: skip
        code = f"import sys; sys.path[:] = {sys.path!r}; from megatron.energon.cli.main import main; main()"
        subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
    make = _FromSample(config)

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Tensor:
        return make(sample)

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        cookers = (energon.Cooker(cook),)
        decoder = None

        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: list[Any]) -> Tensor:
            return torch.stack(samples)

        def encode_batch(self, batch: Any) -> Any:
            return batch

    dataset = energon.get_train_dataset(
        folder,
        batch_size=batch,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        task_encoder=Encoder(),
    )
    return iter(energon.get_loader(dataset))


# As VideoMAE's -------------------------------------------------------------------------------------------------------


class EachViewItsFile:
    """Files -> training clips and test views. Draws what `ClipConfig.train` draws from the same generator."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self.resize = quick_resize()

    def train(self, file: Path, rng: SampleRng) -> list[Tensor]:
        """`repeats` clips (3, T, size, size): decoded once, augmented apart."""
        config, reader = self.config, open_video(file)
        indices = sampling.segment_frames(len(reader), config.num_frames, rng.numpy)
        frames = reader.get_batch(indices).asnumpy()
        return [self._augment(frames, rng) for _ in range(config.repeats)]

    def _augment(self, frames: np.ndarray, rng: SampleRng) -> Tensor:
        config = self.config
        pictures = [Image.fromarray(frame) for frame in frames]
        for step in parse_randaugment(config.randaugment).draw(rng) if config.randaugment else []:
            pictures = [apply_operation(picture, step) for picture in pictures]
        video = torch.stack([_to_float(np.asarray(picture)) for picture in pictures]).permute(0, 2, 3, 1)
        video = (video - torch.tensor(config.mean)) / torch.tensor(config.std)  # (T, H, W, 3), whole frames
        video = video.permute(3, 0, 1, 2)
        box = tf.draw_resized_crop(video.shape[2], video.shape[3], config.crop_scale, config.crop_ratio, rng.python)
        video = tf.resize_video(tf.crop_video(video, box), config.size)
        erased = tf.draw_erase_box(config.size, config.size, config.erase_probability, rng.python)
        return video if erased is None else tf.erase(video, erased, rng.torch)

    def views(self, file: Path) -> list[Tensor]:
        """All test views (3, T, size, size), clip by clip and then crop by crop, each from a decode of its own."""
        config = self.config
        return [self._view(file, clip, crop) for clip in range(config.test_clips) for crop in range(config.test_crops)]

    def _view(self, file: Path, clip: int, crop: int) -> Tensor:
        config, reader = self.config, open_video(file)
        frames = reader.get_batch(sampling.segment_test_grid(len(reader), config.num_frames)).asnumpy()
        height, width = tf.short_side_size(*tf.frame_size(frames), config.short_side)
        frames = np.stack([self.resize(frame, height, width) for frame in frames])
        box = tf.spatial_boxes(height, width, config.size, config.test_crops)[crop]
        pictures = [_to_float(frame) for frame in tf.crop(frames[clip :: config.test_clips], box)]
        return _normalised(torch.stack(pictures), config).permute(1, 0, 2, 3)


def _to_float(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32, 0 … 1."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float().div(255)


def _normalised(video: Tensor, config: ClipConfig) -> Tensor:
    """(T, 3, H, W) 0 … 1 -> normalised."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return video.sub_(mean).div_(std)


def quick_resize() -> Callable[[np.ndarray, int, int], np.ndarray]:
    """OpenCV's resize, which the original calls; where it is not installed, Pillow's, the next best."""
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        return lambda frame, height, width: cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    return lambda frame, height, width: np.asarray(
        Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
    )
