"""Features of a video the way of the published scripts of Video-ChatGPT and its Breakfast variant.

All frames are decoded at once by decord, made floats, resized by torch, made pictures of Pillow, and handed to CLIP's
own preparation one by one; all of them wait in memory while CLIP reads 32 at a time, with a graph for a backward pass
that never comes, and gives all states of all layers. Written from a description, none of it is copied.
"""

from __future__ import annotations

from pathlib import Path

import decord
import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

BATCH = 32


class Rival:
    """One way for both layouts.

    Args:
        folder: of CLIP.
    """

    def __init__(self, folder: Path) -> None:
        self.model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
        self.processor = CLIPImageProcessorPil()

    def pooled(self, file: Path) -> np.ndarray:
        """(100 + patches, D) float16."""
        pixels = self._pixels(file, 100, fill=False)
        rows = []
        for batch in pixels.split(BATCH):
            held = self.model.vision_model(pixel_values=batch, output_hidden_states=True).hidden_states
            rows.append(held[-2][:, 1:].detach().numpy())
        features = np.concatenate(rows).astype(np.float16)
        temporal = features.mean(1)
        temporal = np.pad(temporal, ((0, 100 - len(temporal)), (0, 0)))
        return np.concatenate([temporal, features.mean(0)])

    def states(self, file: Path, count: int = 1000) -> np.ndarray:
        """(count, layers + 1, D) float16."""
        rows = []
        for batch in self._pixels(file, count, fill=True).split(BATCH):
            held = self.model.vision_model(pixel_values=batch, output_hidden_states=True).hidden_states
            normed = [self.model.vision_model.post_layernorm(layer[:, 0]) for layer in held]
            rows.append(torch.stack(normed, 1).detach().numpy())
        return np.concatenate(rows).astype(np.float16)

    def _pixels(self, file: Path, count: int, *, fill: bool) -> torch.Tensor:
        reader = decord.VideoReader(str(file))
        count = count if fill else min(len(reader), count)
        part = float(len(reader) - 1) / count
        indices = [(int(np.round(part * i)) + int(np.round(part * (i + 1)))) // 2 for i in range(count)]
        frames = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2).float()
        frames = functional.interpolate(frames, size=(224, 224)).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        pictures = [Image.fromarray(frame) for frame in frames]
        return self.processor(pictures, return_tensors="pt")["pixel_values"]
