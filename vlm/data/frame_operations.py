"""RandAugment's operations on all frames of a clip, of which a box is wanted: to the bit as Pillow's on whole frames.

Of each operation only the part is made that the box, and what comes between, needs. Operations that change each level
of a colour by itself become one table a frame, those that follow one another together; warps are worked out once for
all frames (warps.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageStat

from vlm.data.box import Box
from vlm.data.randaugment import WARPS, Step, apply_operation, matrix
from vlm.data.warps import Affine, source_box, warp

FIXED_TABLES = frozenset({"Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness"})
"""Those that give each level of each colour another, always the same."""

FRAME_TABLES = frozenset({"AutoContrast", "Equalize", "Contrast"})
"""Those that do so by what the whole frame shows."""

_TABLES = FIXED_TABLES | FRAME_TABLES
_LEVELS = np.arange(256, dtype=np.uint8)


def apply_operations(frames: np.ndarray, steps: Sequence[Step], box: Box) -> np.ndarray:
    """The box of frames (T, H, W, 3) uint8 after all steps. Without steps it is a view of the frames."""
    whole = Box(0, 0, *frames.shape[1:3])
    runs = _runs(steps)
    boxes = [box]
    for run in reversed(runs):
        boxes.insert(0, _needed(run, boxes[0], whole))
    frames = frames[:, boxes[0].rows, boxes[0].columns]
    for run, given, wanted in zip(runs, boxes[:-1], boxes[1:], strict=True):
        if run[0].operation in _TABLES:
            frames = _tabled(frames, run, wanted.within(given))
        elif run[0].operation in WARPS:
            frames = warp(frames, Affine(*matrix((whole.width, whole.height), run[0])), whole, given, wanted)
        elif run[0].operation == "Sharpness":
            frames = _sharpened(frames, run[0], whole, given, wanted)
        else:
            frames = _by_frame(frames, run[0])
    return frames


def _runs(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that follow one another and are tables together, the others alone."""
    runs: list[list[Step]] = []
    for step in steps:
        if runs and step.operation in _TABLES and runs[-1][0].operation in _TABLES:
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def _needed(run: Sequence[Step], box: Box, whole: Box) -> Box:
    """What must be there before a run for the box to be made by it."""
    if any(step.operation in FRAME_TABLES for step in run):
        return whole
    if run[0].operation in WARPS:
        return source_box(Affine(*matrix((whole.width, whole.height), run[0])), box, whole)
    if run[0].operation == "Sharpness":
        top, left = max(0, box.top - 1), max(0, box.left - 1)
        bottom, right = min(whole.height, box.rows.stop + 1), min(whole.width, box.columns.stop + 1)
        return Box(top, left, bottom - top, right - left)
    return box


def _by_frame(frames: np.ndarray, step: Step) -> np.ndarray:
    """Frames after a step that works on each pixel by itself, as Pillow does it."""
    made = np.empty(frames.shape, np.uint8)
    for frame, to in zip(frames, made, strict=True):
        to[:] = np.asarray(apply_operation(Image.fromarray(np.ascontiguousarray(frame)), step))
    return made


def _sharpened(frames: np.ndarray, step: Step, whole: Box, given: Box, box: Box) -> np.ndarray:
    """The box of frames drawn away from a smoothed copy, or towards it. Pixels at the edge of the frame stay."""
    factor = np.float32(step.argument)
    top, left = max(1, box.top), max(1, box.left)
    inner = Box(top, left, min(whole.height - 1, box.rows.stop) - top, min(whole.width - 1, box.columns.stop) - left)
    at = box.within(given)
    made = frames[:, at.rows, at.columns].copy()
    if inner.height < 1 or inner.width < 1:
        return made
    source, target = inner.within(given), inner.within(box)
    for frame, to in zip(frames, made, strict=True):
        around = frame[source.top - 1 : source.rows.stop + 1, source.left - 1 : source.columns.stop + 1]
        around = around.astype(np.uint16)
        sums = around[:-2] + around[1:-1] + around[2:]
        sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:]
        centre = around[1:-1, 1:-1]
        sums += 4 * centre
        smooth = ((2 * sums + 13) // 26).astype(np.float32)  # the mean of 13, rounded: no half can occur
        difference = centre.astype(np.float32)
        difference -= smooth
        difference *= factor
        smooth += difference
        to[target.rows, target.columns] = np.clip(smooth, 0, 255, out=smooth)
    return made


# Tables --------------------------------------------------------------------------------------------------------------


def _tabled(frames: np.ndarray, steps: Sequence[Step], box: Box) -> np.ndarray:
    """The box of frames after steps that each are a table; frames are whole where one of them needs that."""
    part = frames[:, box.rows, box.columns]
    if not any(step.operation in FRAME_TABLES for step in steps):
        table = _LEVELS
        for step in steps:
            table = _fixed_table(step)[table]
        levels = bytearray(np.ascontiguousarray(part).data).translate(table.tobytes())
        return np.frombuffer(levels, np.uint8).reshape(part.shape)
    made = np.empty(part.shape, np.uint8)
    for frame, piece, to in zip(frames, part, made, strict=True):
        tables = _frame_tables(Image.fromarray(np.ascontiguousarray(frame)), steps)
        to[:] = np.asarray(Image.fromarray(np.ascontiguousarray(piece)).point(tables.ravel().tolist()))
    return made


def _frame_tables(image: Image.Image, steps: Sequence[Step]) -> np.ndarray:
    """(3, 256) uint8: what the steps make of each level of red, green and blue in this frame."""
    tables = np.stack([_LEVELS] * 3)
    counted: np.ndarray | None = None
    for step in steps:
        if step.operation in FIXED_TABLES:
            tables = _fixed_table(step)[tables]
        elif step.operation == "Contrast":
            tables = _contrast_table(image.point(tables.ravel().tolist()), step)[tables]
        else:
            counted = np.array(image.histogram()).reshape(3, 256) if counted is None else counted
            make = _autocontrast_table if step.operation == "AutoContrast" else _equalize_table
            for colour, table in enumerate(tables):
                tables[colour] = make(np.bincount(table, counted[colour], 256).astype(np.int64))[table]
    return tables


def _ramp() -> Image.Image:
    return Image.fromarray(np.repeat(_LEVELS[None, :, None], 3, axis=2))


def _fixed_table(step: Step) -> np.ndarray:
    """(256,) uint8, by Pillow itself."""
    return np.asarray(apply_operation(_ramp(), step))[0, :, 0]


def _contrast_table(image: Image.Image, step: Step) -> np.ndarray:
    """Levels drawn towards the mean grey of the frame, or away from it."""
    assert step.argument is not None
    mean = int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)
    ramp = _ramp()
    return np.asarray(Image.blend(Image.new("RGB", ramp.size, (mean,) * 3), ramp, step.argument))[0, :, 0]


def _autocontrast_table(counts: np.ndarray) -> np.ndarray:
    """The darkest level there is becomes 0, the lightest 255. `counts`: pixels of each level."""
    there = np.flatnonzero(counts)
    low, high = int(there[0]), int(there[-1])
    if high <= low:
        return _LEVELS
    scale = 255.0 / (high - low)
    return np.clip((np.arange(256) * scale + -low * scale).astype(np.int64), 0, 255).astype(np.uint8)


def _equalize_table(counts: np.ndarray) -> np.ndarray:
    """Levels that all occur about equally often."""
    there = counts[counts > 0]
    step = int(there.sum() - there[-1]) // 255 if len(there) > 1 else 0
    if not step:
        return _LEVELS
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.minimum((step // 2 + before) // step, 255).astype(np.uint8)
