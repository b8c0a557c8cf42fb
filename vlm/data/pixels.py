"""What is left to do to the pixels of a batch where the model is.

Loaders hand over whole numbers, a quarter of the bytes. In the order of the published training code: normalise, lay
random erasing's noise upon clips, mix clips.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlm.data.mixup import apply_mixing
from vlm.data.transforms import apply_patch, normalize
from vlm.types import Batch, Colours


def finished(batch: Batch) -> Batch:
    """The batch as models read it, on its device: `video` and `frames` normalised float32, clips patched and mixed.

    The batch itself where it is so already (`colours` is None).
    """
    if batch.colours is None:
        assert not any(batch.patches), "a patch belongs on normalised pixels, of which nobody knows the colours"
        assert batch.mixing is None, "what is normalised already cannot say that it is still to be mixed"
        return batch
    video, frames = batch.video, batch.frames
    if video is not None:
        video = _normalized(video, batch.colours)
        for clip, patch in zip(video, batch.patches):
            if patch is not None:
                apply_patch(clip, patch)
        if batch.mixing is not None:
            apply_mixing(video, batch.mixing)
    if frames is not None:
        frames = _normalized(frames.unsqueeze(2), batch.colours).squeeze(2)
    return replace(batch, video=video, frames=frames, colours=None, patches=(), mixing=None)


def _normalized(pixels: Tensor, colours: Colours) -> Tensor:
    """(B, 3, T, H, W) 0 … 255 in any order of memory -> float32, contiguous."""
    floats = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device).copy_(pixels)
    return normalize(floats, *colours)
