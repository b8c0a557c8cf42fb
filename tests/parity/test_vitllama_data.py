"""Frame indices, mixing, pixels and view merging against numbers recorded from the original VideoMAE / ViT-LLaMA code.

Measured: indices, boxes, masks, targets, RandAugment, the 8-bit resize and merged probabilities agree exactly; the
whole seeded augmentation within 2.4e-7, mixup within one float32 unit in the last place.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data import mixup, sampling, transforms
from vlm.data.clips import IMAGENET_STD, ClipConfig, MaskedClipConfig
from vlm.data.masks import tube_mask
from vlm.data.pixels import finished
from vlm.data.randaugment import OPERATIONS, Step, apply_operation, operation_argument, parse_randaugment
from vlm.data.rng import SampleRng
from vlm.metrics.classify import View, classification_metrics, merge_views
from vlm.types import Prediction, UserError

Golden = Callable[[str], Path]


class FixedOffsets(np.random.RandomState):
    """A generator whose `randint` follows the recorded policy and notes how it was called."""

    def __init__(self, policy: str) -> None:
        super().__init__(0)
        self.policy = policy
        self.calls: list[list[int]] = []

    def randint(self, low: int, high: int | None = None, size: int | None = None) -> Any:  # type: ignore[override]
        self.calls.append([x for x in (low, high, size) if x is not None])
        least, end = (0, low) if high is None else (low, high)
        value = {"zero": least, "max": end - 1, "mid": (least + end) // 2}[self.policy]
        return value if size is None else np.full(size, value)


@pytest.fixture(scope="module")
def indices(golden: Golden) -> dict[str, Any]:
    return json.loads(golden("vitllama_frame_index.json").read_text())


@pytest.fixture(scope="module")
def mixing(golden: Golden) -> dict[str, Any]:
    return json.loads(golden("vitllama_mixup.json").read_text())


@pytest.fixture(scope="module")
def spatial(golden: Golden) -> dict[str, Any]:
    return json.loads(golden("vitllama_spatial.json").read_text())


@pytest.fixture(scope="module")
def pixels(golden: Golden) -> dict[str, Any]:
    return torch.load(golden("vitllama_spatial.pt"), weights_only=True)


@pytest.fixture(scope="module")
def merging(golden: Golden) -> dict[str, Any]:
    return json.loads(golden("vitllama_merge.json").read_text())


# ---------------------------------------------------------------------------------------------------- frame indices


def test_segment_training_indices(indices: dict[str, Any]) -> None:
    for case in indices["ssv2_train_val"]:
        frames, segments = case["num_frames_in_video"], case["num_segments"]
        if "offset_policy" in case:
            offsets = FixedOffsets(case["offset_policy"])
            assert sampling.segment_frames(frames, segments, offsets).tolist() == case["indices"], case
            assert offsets.calls == case["randint_calls(lo,hi,size)"], case
            if case["offset_policy"] == "mid":
                assert sampling.segment_frames(frames, segments, None).tolist() == case["indices"], case
        else:
            seeded = np.random.RandomState(case["numpy_legacy_seed"])
            assert sampling.segment_frames(frames, segments, seeded).tolist() == case["indices"], case


def test_segment_test_indices(indices: dict[str, Any]) -> None:
    counts = set()
    for case in indices["ssv2_test"]:
        frames, segments, count = case["num_frames_in_video"], case["num_segments"], case["test_num_segment"]
        counts.add(count)
        grid = sampling.segment_test_grid(frames, segments).tolist()
        recorded = [case["clips"][str(clip)] for clip in range(count)]
        if count <= 2:
            assert grid == case["all_index"], case
            assert [grid[clip::2] for clip in range(count)] == recorded, case
        if count == 2:
            assert [clip.tolist() for clip in sampling.segment_test_clips(frames, segments, 2)] == recorded, case
        if count > 2:  # on purpose not reproduced: clips of other lengths than the model's, full of copies of one frame
            assert set(grid) == set(case["all_index"]), case
            assert all(len(clip) != segments for clip in recorded), case
            with pytest.raises(ValueError, match=f"1 or 2 test clips, not {count}"):
                sampling.segment_test_clips(frames, segments, count)
    assert counts == {1, 2, 3}


def test_dense_training_indices(indices: dict[str, Any]) -> None:
    for case in indices["kinetics_train"]:
        offsets = FixedOffsets(case["offset_policy"])
        ours = sampling.dense_frames(case["num_frames_in_video"], case["clip_len"], case["sampling_rate"], offsets)
        assert ours.tolist() == case["indices"], case
        assert offsets.calls == case["randint(lo,hi)"], case


def test_dense_test_indices(indices: dict[str, Any]) -> None:
    for case in indices["kinetics_test"]:
        arguments = case["num_frames_in_video"], case["clip_len"], case["sampling_rate"]
        assert sampling.dense_test_grid(*arguments).tolist() == case["all_index"], case
        ours = sampling.dense_test_clips(*arguments, case["test_num_segment"])
        assert {str(i): clip.tolist() for i, clip in enumerate(ours)} == case["clips"], case


def test_pretraining_indices(indices: dict[str, Any]) -> None:
    for case in indices["pretrain"]:
        offsets = FixedOffsets(case["offset_policy"])
        ours = sampling.strided_frames(case["num_frames_in_video"], case["clip_len"], case["sampling_rate"], offsets)
        assert ours.tolist() == case["indices"], case
        assert offsets.calls == [[high] for high in case["randint_hi"]], case


def test_spatial_crops_of_tests(indices: dict[str, Any]) -> None:
    for case in indices["test_spatial_crops"]:
        height, width = transforms.short_side_size(case["H"], case["W"], case["short_side"])
        assert [height, width] == case["resized_HW"], case
        boxes = transforms.spatial_boxes(height, width, case["short_side"], case["num_crop"])
        assert [box.top if case["axis"] == "H" else box.left for box in boxes] == case["starts"], case
        assert {box.left if case["axis"] == "H" else box.top for box in boxes} == {0}, case
        center = transforms.center_box(height, width, case["short_side"])
        assert [center.top, center.left] == case["val_center_crop_yx"], case


def test_order_of_views(indices: dict[str, Any]) -> None:
    """A video's views come clip by clip, then crop by crop: the recorded order, seen from one video."""
    recorded = indices["test_view_order"]
    mine = recorded["test_seg"][:: recorded["n_videos"]]
    clips, crops = (1 + max(pair[axis] for pair in mine) for axis in (0, 1))
    assert mine == [[clip, crop] for clip in range(clips) for crop in range(crops)]
    assert recorded["labels"][:: recorded["n_videos"]] == [recorded["labels"][0]] * len(mine)


# ----------------------------------------------------------------------------------------------------------- mixing


def test_mixed_targets(mixing: dict[str, Any]) -> None:
    for case in mixing["targets"]:
        ours = mixup.mixed_targets(torch.tensor(case["labels"]), case["num_classes"], case["smoothing"], case["lam"])
        torch.testing.assert_close(ours, torch.tensor(case["target"]), rtol=0, atol=1e-7)


def test_cutmix_boxes(mixing: dict[str, Any]) -> None:
    for case in mixing["rand_bbox"]:
        height, width = case["shape"][-2:]
        cut = mixup.cut_around(height, width, case["lam"], case["cy"], case["cx"])
        assert list(cut) == case["bbox_yl_yh_xl_xh"], case
        assert mixup.kept_share(height, width, cut) == case["corrected_lam"], case


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_whole_batch(mixing: dict[str, Any], kind: str) -> None:
    (case,) = [case for case in mixing["batch_mode"] if case["kind"] == kind]
    shape = (4, 3, 2, 8, 8)
    assert case["input"] == f"arange(4*3*2*8*8)/100 reshape ({','.join(map(str, shape))})"
    video = torch.arange(np.prod(shape), dtype=torch.float32).view(shape) / 100
    if kind == "mixup":
        video, share = mixup.blend(video, case["lam"]), case["lam"]
    else:
        cut = mixup.cut_around(*shape[-2:], case["lam"], case["cy"], case["cx"])
        video, share = mixup.paste(video, cut), mixup.kept_share(*shape[-2:], cut)
    frame = torch.tensor(case["output_sample0_channel0_frame0"])
    torch.testing.assert_close(video[0, 0, 0], frame, rtol=2e-7, atol=0)
    sums = torch.tensor(case["output_sum_per_sample"])
    torch.testing.assert_close(video.sum((1, 2, 3, 4)), sums, rtol=5e-7, atol=0)
    target = mixup.mixed_targets(torch.tensor(case["labels"]), case["num_classes"], case["smoothing"], share)
    torch.testing.assert_close(target, torch.tensor(case["target"]), rtol=0, atol=1e-7)


def test_seeded_draws(mixing: dict[str, Any]) -> None:
    """The recorded name says the seed; the alphas and probabilities are the published ones, our defaults."""
    (name,) = [name for name in mixing if name.startswith("params_per_batch_seed")]
    generator = np.random.RandomState(int(name.removeprefix("params_per_batch_seed")))
    clips = ClipConfig()
    settings = clips.mixup, clips.cutmix, clips.mixup_probability, clips.switch_probability
    ours = [mixup.draw_mix(*settings, generator) for _ in mixing[name]]
    assert [[mix.share, float(mix.cut)] for mix in ours] == mixing[name]


def test_odd_batch_is_refused(mixing: dict[str, Any]) -> None:
    assert "even" in mixing["odd_batch"]
    with pytest.raises(UserError, match="odd number"):
        mixup.mix_batch(
            torch.zeros(3, 3, 2, 4, 4),
            torch.zeros(3, dtype=torch.int64),
            num_classes=2,
            smoothing=0.0,
            mixup=1.0,
            cutmix=0.0,
            probability=1.0,
            switch_probability=0.5,
            generator=np.random.RandomState(0),
        )


# ----------------------------------------------------------------------------------------------------------- pixels


def test_resized_crop_boxes(spatial: dict[str, Any]) -> None:
    for case in spatial["random_resized_crop_box(python random seed)"]:
        generator = random.Random(case["seed"])
        box = transforms.draw_resized_crop(case["H"], case["W"], tuple(case["scale"]), tuple(case["ratio"]), generator)
        assert list(box) == case["i,j,h,w"], case
    ratio = ClipConfig().crop_ratio
    for case in spatial["fallback"]:
        assert list(transforms.fallback_crop(case["H"], case["W"], ratio)) == case["i,j,h,w"], case
        never = (2.0, 2.0)  # twice the frame's area never fits
        assert (
            list(transforms.draw_resized_crop(case["H"], case["W"], never, ratio, random.Random(0))) == case["i,j,h,w"]
        )


def test_randaugment_tables(spatial: dict[str, Any]) -> None:
    recorded = spatial["randaug"]
    assert [name.removesuffix("Increasing") for name in recorded["ops"]] == list(OPERATIONS)
    assert parse_randaugment(recorded["config"]).num_operations == recorded["n"]
    (levels,) = [table for name, table in spatial.items() if name.startswith("randaug_level_to_arg")]
    assert list(levels) == recorded["ops"]
    for name, table in levels.items():
        for magnitude, arguments in table:
            ours = operation_argument(name.removesuffix("Increasing"), magnitude)
            assert ([] if ours is None else [ours]) == pytest.approx(arguments), (name, magnitude)


def test_randaugment_operations(spatial: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Every operation at the recorded policy's magnitude, to the bit (recorded with Pillow 13; see key `pillow`)."""
    magnitude = parse_randaugment(spatial["randaug"]["config"]).magnitude
    image = Image.fromarray(pixels["image"].numpy())
    assert [name.removesuffix("Increasing") for name in pixels["ops"]] == list(OPERATIONS)
    for name, expected in pixels["ops"].items():
        operation = name.removesuffix("Increasing")
        ours = apply_operation(image, Step(operation, operation_argument(operation, magnitude)))
        np.testing.assert_array_equal(np.asarray(ours), expected.numpy(), err_msg=name)


def test_erasing_boxes(spatial: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Recorded on square frames of one size, which the file does not name: some size must give all the boxes."""
    cases = spatial["random_erasing"]
    recorded = [case["box_top_left_bottom_right"] for case in cases]
    least = max(max(box) for box in recorded if box)

    def corners(size: int) -> list[list[int] | None]:
        boxes = [
            transforms.draw_erase_box(size, size, case["prob"], random.Random(case["python_seed"])) for case in cases
        ]
        return [box and [box.top, box.left, box.top + box.height, box.left + box.width] for box in boxes]

    fitting = [size for size in range(least, 4 * least) if corners(size) == recorded]
    assert fitting
    for case, box in zip(cases, recorded, strict=True):
        if box is None:
            continue
        video = torch.zeros(3, 2, fitting[0], fitting[0])
        area = transforms.Box(box[0], box[1], box[2] - box[0], box[3] - box[1])
        noise = transforms.crop_video(transforms.erase(video, area, torch.Generator().manual_seed(0)), area)
        assert torch.equal(noise[:, 0], noise[:, 1]) == case["noise_identical_across_frames"]
        assert torch.equal(noise[0], noise[1]) == case["channels_identical"]


def test_tube_masks(spatial: dict[str, Any]) -> None:
    for case in spatial["tube_mask"]:
        slices, rows, columns = case["window"]
        generator = np.random.RandomState(case["numpy_legacy_seed"])
        mask = tube_mask(slices, rows, columns, case["ratio"], generator)
        assert len(mask) == case["len"]
        assert mask.sum() == case["total"]
        by_slice = mask.reshape(slices, rows * columns)
        assert by_slice[0].astype(int).tolist() == case["first_slice"]
        assert set(by_slice.sum(axis=1)) == {case["masked_per_frame"]}
        assert bool((by_slice == by_slice[0]).all()) == case["identical_every_slice"]


def test_multi_scale_crop_tables(spatial: dict[str, Any]) -> None:
    case = spatial["pretrain_multiscale_crop"]
    width, height = case["image_wh"]
    clips = MaskedClipConfig()
    pairs = transforms.multi_scale_sizes(height, width, clips.size, clips.crop_scales)
    assert [[w, h] for h, w in pairs] == case["pairs_wh"]
    assert sorted({h for h, _ in pairs}, reverse=True) == case["sizes"]
    (name,) = [name for name in case if name.startswith("offsets_for_crop_")]
    crop_width, crop_height = map(int, name.removeprefix("offsets_for_crop_").split("x"))
    boxes = transforms.multi_scale_boxes(height, width, crop_height, crop_width)
    assert [[box.left, box.top] for box in boxes] == case[name]


def test_resized_crop_pixels(spatial: dict[str, Any], pixels: dict[str, Any]) -> None:
    video = pixels["rrc_in"]
    (output,) = [name for name in pixels if name.startswith("rrc_out_seed")]
    (boxed,) = [name for name in spatial if name.startswith("rrc_seed")]
    expected = pixels[output]
    clips = ClipConfig()
    generator = random.Random(int(boxed.removeprefix("rrc_seed").split("_")[0]))
    box = transforms.draw_resized_crop(*video.shape[-2:], clips.crop_scale, clips.crop_ratio, generator)
    assert list(box) == spatial[boxed]
    ours = transforms.resize_video(transforms.crop_video(video, box), expected.shape[-1])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_normalisation(pixels: dict[str, Any]) -> None:
    clips = ClipConfig()
    ours = transforms.normalize(transforms.to_video(pixels["image"][None].numpy()), clips.mean, clips.std)
    torch.testing.assert_close(ours.permute(1, 2, 3, 0), pixels["norm_out"], rtol=0, atol=1e-6)


def test_validation_resize_crop_normalise(pixels: dict[str, Any]) -> None:
    """OpenCV's 8-bit resize to the bit, then the crop and the numbers the model sees."""
    clips = ClipConfig()
    expected = pixels["val_resize16_cv2"].numpy()
    frames = pixels["image"][None].numpy()
    short_side = min(expected.shape[1:3])
    height, width = transforms.short_side_size(*transforms.frame_size(frames), short_side)
    resized = transforms.resize_bilinear(frames, height, width)
    np.testing.assert_array_equal(resized, expected)
    cropped = transforms.crop(resized, transforms.center_box(height, width, short_side))
    np.testing.assert_array_equal(cropped, pixels["val_centercrop16"].numpy())
    ours = transforms.normalize(transforms.to_video(cropped), clips.mean, clips.std)
    torch.testing.assert_close(ours, pixels["val_tensor"], rtol=0, atol=1e-6)


def test_whole_seeded_augmentation(pixels: dict[str, Any]) -> None:
    """Our training augmentation, generators seeded as the original's three were; by default a level is rounded away."""
    (name,) = [name for name in pixels if name.startswith("aug_clip_out_seed")]
    expected = pixels[name]
    for round_pixels, apart in ((False, 1e-6), (True, 1.01 / 255 / min(IMAGENET_STD))):
        clips = ClipConfig(size=expected.shape[-1], short_side=expected.shape[-1], round_pixels=round_pixels)
        ours = clips.augment(pixels["aug_clip_in"].numpy(), SampleRng(pixels["aug_seed"]))
        batch = finished(clips.test_batch([ours]))
        assert batch.video is not None
        torch.testing.assert_close(batch.video[0], expected, rtol=0, atol=apart)


# ---------------------------------------------------------------------------------------------------------- merging


def test_merged_views(merging: dict[str, Any]) -> None:
    """The recorded ranks' files, padding duplicates among them -> probabilities and accuracies."""
    (name,) = [name for name in merging if name.startswith("logits[")]
    logits = np.array(merging[name], dtype=np.float32)
    videos, chunks, splits, classes = logits.shape
    assert videos == merging["num_videos"]
    assert (chunks, splits, classes) == (merging["test_num_segment"], merging["test_num_crop"], merging["num_classes"])
    order = [(v, chunk, split) for chunk in range(chunks) for split in range(splits) for v in range(videos)]
    padded = order + order[: -len(order) % merging["world_size"]]
    assert len(padded) > len(order), "the recording is meant to have duplicates"
    rows = [
        View(f"vid{v}", chunk, split, logits[v, chunk, split])
        for rank in range(merging["world_size"])
        for v, chunk, split in padded[rank :: merging["world_size"]]
    ]
    merged = merge_views(rows)
    expected = np.array(merging["mean_probs"])
    np.testing.assert_allclose(np.stack([merged[f"vid{v}"] for v in range(videos)]), expected, rtol=0, atol=1e-7)
    predictions = [
        Prediction(
            key=f"vid{v}", truth=label, prediction=int(merged[f"vid{v}"].argmax()), scores=merged[f"vid{v}"].tolist()
        )
        for v, label in enumerate(merging["labels"])
    ]
    assert [prediction.prediction for prediction in predictions] == merging["pred"]
    metrics = classification_metrics(predictions)
    assert 100 * metrics["top1"] == pytest.approx(merging["expected_top1"])
    assert 100 * metrics["top5"] == pytest.approx(merging["expected_top5"])
    averaged = (logits.mean(axis=(1, 2)).argmax(axis=1) == np.array(merging["labels"])).mean()
    assert 100 * averaged == pytest.approx(merging["logit_average_top1_for_contrast"])
