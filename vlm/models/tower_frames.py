"""The frozen tower of Video-LLaMA (EVA and BLIP-2's Q-Former) as an encoder of frames: tokens computed once.

Trained on these tokens a system has the losses that it has on pixels, as long as they come from its tower; that is what
`hashes` is for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm.models.eva import Tower, TowerConfig
from vlm.types import Colours
from vlm.weights import state_hash


class TowerFrames(nn.Module):
    """`forward`: uint8 (n, 3, size, size) -> {name: (n, Q, D)}."""

    def __init__(self, config: TowerConfig, name: str, colours: Colours) -> None:
        """Raises UserError as `TowerConfig.build` does."""
        super().__init__()
        self.config, self.name, self.colours = config, name, colours
        self.tower = config.build()

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        mean, std = (torch.tensor(values, device=frames.device)[:, None, None] for values in self.colours)
        pixels = (frames.float() / 255 - mean) / std
        return {self.name: self.tower(pixels.to(self.tower.query_tokens.dtype))}

    def described(self) -> dict[str, Any]:
        """What decides over the tokens, JSON-able."""
        said = {
            name: getattr(self.config, name) for name in ("dtype", "heads", "query_heads", "patch_size", "image_size")
        }
        return {"kind": "eva-qformer", "sha256": hashes(self.tower), **said, "colours": self.colours._asdict()}


def hashes(tower: Tower) -> dict[str, str]:
    """Name of a precision -> hash of the tower's weights in it, under names that begin with `tower.`: the one in which
    the tower is stored, and those to which it can be rounded."""
    state: dict[str, Tensor] = {f"tower.{name}": p for name, p in tower.named_parameters()}
    own = next(iter(state.values())).dtype
    kinds = (torch.float32, torch.bfloat16) if own == torch.float32 else (own,)
    return {str(kind).removeprefix("torch."): state_hash(_Cast(state, kind)) for kind in kinds}


class _Cast(dict[str, Tensor]):
    """Tensors in another dtype, made one at a time."""

    def __init__(self, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(state)
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(self.dtype)
