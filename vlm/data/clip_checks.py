"""Settings of clips that contradict themselves: ValueError with the field, its value and the mend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlm.data.masks import num_hidden
from vlm.data.randaugment import parse_randaugment


def check_clips(config: Any) -> None:
    """Of labelled clips (vlm.data.clips.ClipConfig)."""
    _at_least(config, 1, ("num_frames", "size", "repeats", "test_clips", "test_crops"))
    _at_least(config, 2, ("num_classes",))
    _at_least(config, 0, ("mixup", "cutmix"))
    _shares(config, ("erase_probability", "mixup_probability", "switch_probability", "label_smoothing"))
    _colours(config)
    _check_sampling(config)
    _check_mixing(config)
    if config.short_side < config.size:
        raise ValueError(
            f"inputs.short_side is {config.short_side}, less than inputs.size={config.size}: "
            "a test crop would not fit into the frame; raise short_side or lower size"
        )
    if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
        raise ValueError(f"inputs.crop_scale is {config.crop_scale}; it must be two shares with 0 < least <= most <= 1")
    if not 0 < config.crop_ratio[0] <= config.crop_ratio[1]:
        raise ValueError(f"inputs.crop_ratio is {config.crop_ratio}; it must be two ratios with 0 < least <= most")
    if config.randaugment is not None:
        try:
            parse_randaugment(config.randaugment)
        except ValueError as error:
            raise ValueError(f"inputs.randaugment: {error}") from error


def check_masked_clips(config: Any) -> None:
    """Of clips for masked pretraining (vlm.data.clips.MaskedClipConfig)."""
    _at_least(config, 1, ("num_frames", "size", "stride", "repeats", "patch_size", "tubelet_size"))
    _shares(config, ("mask_ratio",))
    _colours(config)
    for whole, part in (("size", "patch_size"), ("num_frames", "tubelet_size")):
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(
                f"inputs.{whole}={getattr(config, whole)} is not a multiple of inputs.{part}={getattr(config, part)}"
            )
    positions = (config.size // config.patch_size) ** 2
    if not 0 < num_hidden(positions, config.mask_ratio) < positions:
        raise ValueError(
            f"inputs.mask_ratio={config.mask_ratio} hides {num_hidden(positions, config.mask_ratio)} of the "
            f"{positions} positions of a time slice; at least one must be hidden and one visible"
        )
    if not config.crop_scales or not all(0 < scale <= 1 for scale in config.crop_scales):
        raise ValueError(
            f"inputs.crop_scales is {config.crop_scales}; it must be shares of the shorter side, 0 < … <= 1"
        )


def _check_sampling(config: Any) -> None:
    if config.sampling not in ("segments", "dense"):
        raise ValueError(f"inputs.sampling is {config.sampling!r}; it must be segments or dense")
    if config.test_offsets not in ("middle", "random"):
        raise ValueError(f"inputs.test_offsets is {config.test_offsets!r}; it must be middle or random")
    segments = config.sampling == "segments"
    if segments and config.stride is not None:
        raise ValueError(
            f"inputs.stride={config.stride} means nothing with inputs.sampling=segments, where the frames' distance "
            "follows from the length of the video; set inputs.stride=none or inputs.sampling=dense"
        )
    if not segments and (config.stride is None or config.stride < 1):
        raise ValueError(f"inputs.sampling=dense needs inputs.stride >= 1, but it is {config.stride}")
    if segments and config.test_clips > 2:
        raise ValueError(
            f"inputs.test_clips is {config.test_clips}, but inputs.sampling=segments defines 1 (middle frames) or 2"
        )
    if config.test_offsets == "random" and not (segments and config.test_clips == 1):
        raise ValueError(
            f"inputs.test_offsets=random needs inputs.sampling=segments and inputs.test_clips=1, "
            f"but they are {config.sampling} and {config.test_clips}"
        )


def _check_mixing(config: Any) -> None:
    if config.mixup_probability != 1.0 and not (config.mixup or config.cutmix):
        raise ValueError(
            f"inputs.mixup_probability={config.mixup_probability} means nothing while inputs.mixup and inputs.cutmix "
            "are 0; set one of them, or leave it at 1.0"
        )
    if config.switch_probability != 0.5 and not (config.mixup and config.cutmix):
        raise ValueError(
            f"inputs.switch_probability={config.switch_probability} means nothing unless both inputs.mixup and "
            f"inputs.cutmix are on (they are {config.mixup} and {config.cutmix}); leave it at 0.5"
        )


def _at_least(config: Any, least: int, names: Iterable[str]) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"inputs.{name} is {getattr(config, name)}; it must be at least {least}")


def _shares(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"inputs.{name} is {getattr(config, name)}; it must be between 0 and 1")


def _colours(config: Any) -> None:
    if len(config.mean) != 3 or len(config.std) != 3 or min(config.std) <= 0:
        raise ValueError(
            f"inputs.mean={config.mean} and inputs.std={config.std} must be three numbers each, std above 0"
        )
