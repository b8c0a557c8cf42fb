"""The frozen tower of Video-LLaMA (EVA and BLIP-2's Q-Former) as an encoder of frames: tokens computed once.

Trained on these tokens a system has the losses that it has on pixels, as long as they come from its tower; that is what
`hashes` is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.pixels import finished
from vlm.models.eva import Tower, TowerConfig
from vlm.types import Batch, Colours
from vlm.weights import state_hash


class TowerFrames(nn.Module):
    """`forward`: uint8 (n, 3, size, size) -> {name: (n, Q, D)}."""

    def __init__(self, config: TowerConfig, name: str, colours: Colours) -> None:
        """Raises UserError as `TowerConfig.build` does."""
        super().__init__()
        self.config, self.name, self.colours = config, name, colours
        self.tower = config.build()

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        batch = finished(Batch(keys=(), frames=frames, colours=self.colours))
        return {self.name: self.tower(batch.frames)}

    def described(self) -> dict[str, Any]:
        """What decides over the tokens, JSON-able."""
        said = {
            name: getattr(self.config, name) for name in ("dtype", "heads", "query_heads", "patch_size", "image_size")
        }
        return {"kind": "eva-qformer", "sha256": hashes(self.tower), **said, "colours": self.colours._asdict()}


def hashes(tower: Tower) -> dict[str, str]:
    """Name of a precision -> `tower_hash`: of that in which the tower is stored, and of those it can be rounded to."""
    own = tower.query_tokens.dtype
    kinds = (torch.float32, torch.bfloat16) if own == torch.float32 else (own,)
    return {str(kind).removeprefix("torch."): tower_hash(tower, kind) for kind in kinds}


def tower_hash(tower: Tower, dtype: torch.dtype) -> str:
    """Hash of a tower's weights in a precision, under names that begin with `tower.`."""
    return state_hash(_Cast({f"tower.{name}": p for name, p in tower.named_parameters()}, dtype))


def misfit(tower: Tower, made: Mapping[str, Any]) -> str:
    """Why features are not what this tower makes, by the hashes in what `TowerFrames.described` said of them; "": they
    are, or what made them is not known."""
    theirs = made.get("encoder", {}).get("sha256")
    if not isinstance(theirs, dict):
        return "" if theirs is None else f"they were made by {made['encoder'].get('kind')}, not by EVA and a Q-Former"
    own = str(tower.query_tokens.dtype).removeprefix("torch.")
    precision = next((name for name in (own, "bfloat16") if name in theirs), None)
    if precision is None:
        return f"they were made by a tower in {' and '.join(theirs)}, which cannot be compared with one in {own}"
    ours = tower_hash(tower, getattr(torch, precision))
    if ours == theirs[precision]:
        return ""
    return (
        f"they were made by a tower of hash {theirs[precision][:16]}…, but model.tower's is {ours[:16]}… ({precision})"
    )


class _Cast(dict[str, Tensor]):
    """Tensors in another dtype, made one at a time."""

    def __init__(self, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(state)
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(self.dtype)
