"""An encoder of frames on altered copies of them (vlm/data/frame_variants.py): further tensors of the same video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlm.models.frame_encoders import ClipFrames
from vlm.models.frame_pools import Pools, SpatioTemporal


class VariantFrames(nn.Module):
    """`forward`: uint8 (n, 1 + V, side, side, 3), each picture and its V copies -> what CLIP makes of each, by name."""

    def __init__(self, encoder: ClipFrames, variants: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.variants = encoder, ("", *variants)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        made = self.encoder(pictures.flatten(0, 1))
        assert isinstance(made, dict)
        return {
            variant_name(name, variant): rows.unflatten(0, pictures.shape[:2])[:, number]
            for name, rows in made.items()
            for number, variant in enumerate(self.variants)
        }

    def pool(self) -> Pools:
        """What takes in the rows of one video."""
        return Pools(
            {
                variant_name(name, variant): SpatioTemporal(places)
                for name, places in self.encoder.pools.items()
                for variant in self.variants
            }
        )


def variant_name(name: str, variant: str) -> str:
    """What a tensor of the altered copy is called: `clip_states_flip`; "": of the picture as it is."""
    return f"{name}_{variant}" if variant else name
