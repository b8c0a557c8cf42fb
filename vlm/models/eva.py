"""The frozen part that sees: EVA ViT-g/14 and BLIP-2's Q-Former, 32 tokens a frame (BLIP-2, arXiv 2301.12597).

transformers' Blip2VisionModel and Blip2QFormerModel, as Video-LLaMA (arXiv 2306.02858) uses them: the output of the
39th block of ViT-g, a LayerNorm of epsilon 1e-5, queries that read it. It has no dropout, and a graph only where a
recipe unfreezes some of it.

Letters: F frames, C H W colours, height, width, Q queries (tokens of a frame), D width of the Q-Former.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel

from vlm.models.tower_files import tower_tensors
from vlm.nn.qformer import QFormerConfig, read_memory
from vlm.types import UserError
from vlm.weights import diff_keys

_NORM_EPS = 1e-5  # of the norm behind the ViT; transformers gives it the blocks' 1e-6


@dataclass(kw_only=True, slots=True)
class TowerConfig:
    """The published sizes; smaller ones for tests and demonstrations."""

    path: Path | None = None
    """Its weights: a file of ours or of LAVIS (blip2_pretrained_flant5xxl.pth), or a Hugging Face BLIP-2 folder; none:
    random weights, for debugging only."""
    vision_path: Path | None = None
    """EVA's own file (eva_vit_g.pth) where `path` does not hold it, as LAVIS' Q-Former files do not."""
    image_size: int = 224
    """Height and width of the pictures that its positions are for; frames of another size are interpolated."""
    patch_size: int = 14
    """Height and width of a patch."""
    dim: int = 1408
    """Width of the ViT."""
    layers: int = 39
    """Its blocks: ViT-g's 40 without the last."""
    heads: int = 16
    """Its attention heads."""
    hidden: int = 6144
    """Width of its feed-forward part."""
    queries: int = 32
    """Tokens of a frame (Q)."""
    query_dim: int = 768
    """Width of a token (D)."""
    query_layers: int = 12
    """Layers of the Q-Former, every other with cross attention."""
    query_heads: int = 12
    """Its attention heads."""
    query_hidden: int = 3072
    """Width of its feed-forward part."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How its weights are stored. A bf16 engine stores them so in any case."""
    random_seed: int = 0
    """Decides the random weights where `path` is none."""

    def __post_init__(self) -> None:
        self.path = None if self.path is None else Path(self.path)
        self.vision_path = None if self.vision_path is None else Path(self.vision_path)
        for name in ("image_size", "patch_size", "dim", "layers", "heads", "hidden", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.tower.{name} is {getattr(self, name)}; it must be at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(f"model.tower.image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"model.tower.dim={self.dim} does not divide into {self.heads} heads")
        if self.vision_path is not None and self.path is None:
            raise ValueError("model.tower.vision_path is given, but no model.tower.path for the Q-Former")

    @property
    def qformer(self) -> QFormerConfig:
        """The sizes of BLIP-2's Q-Former; without dropout, since it does not train."""
        return QFormerConfig(
            dim=self.query_dim,
            heads=self.query_heads,
            hidden=self.query_hidden,
            layers=self.query_layers,
            cross_every=2,
            dropout=0.0,
        )

    def build(self) -> Tower:
        """The tower with its weights; on the meta device it stays without.

        Raises:
            UserError: the files are not of the sizes that this config states.
        """
        with torch.device("meta"):
            tower = Tower(self).to(getattr(torch, self.dtype))
        if torch.get_default_device().type != "meta":
            tower.load_state_dict(self._random(tower) if self.path is None else self._read(tower), assign=True)
        return tower.requires_grad_(False)

    def _random(self, tower: Tower) -> dict[str, Tensor]:
        warnings.warn(
            "the frozen EVA and Q-Former have RANDOM weights (model.tower.path is none): good for tests and "
            "demonstrations, not for a result that is compared with published ones",
            stacklevel=3,
        )
        generator = torch.Generator().manual_seed(self.random_seed)
        tensors = {}
        for name, value in tower.state_dict().items():
            norm = "norm" in name.lower() and name.endswith("weight")
            filled = (torch.ones if norm else torch.zeros)(value.shape, device="cpu")
            if value.ndim > 1:
                learnt = name == "query_tokens" or ("embeddings." in name and "patch" not in name)
                filled.normal_(0, 1.0 if learnt else value[0].numel() ** -0.5, generator=generator)
            tensors[name] = filled.to(getattr(torch, self.dtype))
        return tensors

    def _read(self, tower: Tower) -> dict[str, Tensor]:
        assert self.path is not None
        tensors = tower_tensors(self.path, self.vision_path, self.layers)
        named = str(self.path) if self.vision_path is None else f"{self.path} and {self.vision_path}"
        stored = {name: load().to(dtype=getattr(torch, self.dtype), copy=True) for name, load in tensors.items()}
        diff_keys(stored, tower.state_dict()).require(
            f"{named}: not the EVA and Q-Former that this recipe describes (width {self.dim}, {self.layers} blocks, "
            f"{self.queries} queries)"
        )
        return stored

    def flops(self) -> float:
        """Forward FLOPs for one frame of `image_size`."""
        tokens = (self.image_size // self.patch_size) ** 2 + 1
        patch = (tokens - 1) * 3 * self.patch_size**2 * self.dim
        block = tokens * (4 * self.dim**2 + 2 * self.dim * self.hidden) + 2 * tokens**2 * self.dim
        return 2.0 * (patch + self.layers * block) + self.qformer.flops(self.dim, self.queries, tokens)


class Tower(nn.Module):
    """Frames -> tokens. Always in evaluation mode, and without a graph unless some of it is to train."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.vision = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=config.dim,
                intermediate_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )
        self.vision.post_layernorm.eps = _NORM_EPS
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, config.query_dim))
        self.qformer = config.qformer.build(config.dim)
        self.eval()

    def train(self, mode: bool = True) -> Tower:
        """Stays in evaluation mode, whatever becomes of what is around it."""
        return super().train(False)

    def forward(self, frames: Tensor) -> Tensor:
        """(F, C, H, W) normalised frames -> (F, Q, D)."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        other_size = tuple(frames.shape[-2:]) != (self.image_size, self.image_size)
        with torch.set_grad_enabled(learns):
            seen = self.vision(frames, interpolate_pos_encoding=other_size).last_hidden_state
            return read_memory(self.qformer, self.query_tokens.expand(len(frames), -1, -1), seen, None)


def check_frames(frames: Tensor, config: TowerConfig, named: str) -> None:
    """UserError where frames (F, C, H, W) are not what the tower can read."""
    if frames.shape[1] != 3 or any(side % config.patch_size for side in frames.shape[-2:]):
        raise UserError(
            f"{named}: frames are {tuple(frames.shape[1:])}; the tower reads 3 colours and sides that are multiples of "
            f"model.tower.patch_size={config.patch_size}"
        )
