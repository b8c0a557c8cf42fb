"""VideoMAE: masked pretraining of a video ViT by rebuilding hidden cubes (arXiv 2203.12602).

The encoder sees the visible tokens alone; a small decoder sees them and a learned token at each hidden position, and
predicts the hidden cubes' pixels. Differences from the original on purpose: docs/parity.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from vlm.data.clips import MaskedClipConfig
from vlm.models.system import Cost, System, as_clips, check_same
from vlm.nn.vision import PatchEmbed, block_flops, init_xavier, make_blocks, run_blocks, sinusoid_table
from vlm.types import Batch, Losses, LossTerm, UserError


@dataclass(kw_only=True, slots=True)
class VideoMAEConfig:
    """Encoder and decoder of masked pretraining. `video_mae_small()` … `video_mae_huge()` give the sizes."""

    dim: int = 384
    """Width of the encoder."""
    depth: int = 12
    """Blocks of the encoder."""
    heads: int = 6
    """Attention heads of the encoder."""
    decoder_dim: int = 192
    """Width of the decoder."""
    decoder_depth: int = 4
    """Blocks of the decoder."""
    decoder_heads: int = 3
    """Attention heads of the decoder."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of its width."""
    image_size: int = 224
    """Height and width of a clip, in pixels."""
    patch_size: int = 16
    """Height and width of a cube, in pixels."""
    tubelet_size: int = 2
    """Frames of a cube."""
    num_frames: int = 16
    """Frames of a clip."""
    drop_path: float = 0.0
    """Stochastic depth of the last block of encoder and decoder; it grows linearly from 0."""
    qkv_bias: bool = True
    """Biases on q and v (k has none in any case)."""
    init_values: float = 0.0
    """Start of a learned scale of each residual branch; 0: no such scale."""
    norm_eps: float = 1e-6
    """Epsilon of LayerNorm."""
    normalize_target: bool = True
    """Predict each cube's pixels less their mean, over their deviation, per colour; false: pixels from 0 to 1."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean that the clips config subtracted; the target undoes it."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Deviation that the clips config divided by; the target undoes it."""
    activation_checkpointing: bool = False
    """Work out each block again in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        names = ("dim", "depth", "heads", "decoder_dim", "decoder_depth", "decoder_heads")
        for name in (*names, "image_size", "patch_size", "tubelet_size", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        pairs = (("dim", "heads"), ("decoder_dim", "decoder_heads"))
        for whole, part in (*pairs, ("image_size", "patch_size"), ("num_frames", "tubelet_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"model.{whole}={getattr(self, whole)} is not a multiple of model.{part}={getattr(self, part)}"
                )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path is {self.drop_path}; it must be in [0, 1)")

    @property
    def num_tokens(self) -> int:
        """N, tokens (cubes) of a clip."""
        return self.num_frames // self.tubelet_size * (self.image_size // self.patch_size) ** 2

    @property
    def cube_values(self) -> int:
        """Values of a cube: frames * height * width * colours."""
        return self.tubelet_size * self.patch_size**2 * 3

    def check_inputs(self, inputs: MaskedClipConfig) -> None:
        """UserError where a number that model and inputs both state differs."""
        if not isinstance(inputs, MaskedClipConfig):
            raise UserError(f"inputs: VideoMAE trains on masked clips (MaskedClipConfig), not {type(inputs).__name__}")
        check_same(
            self,
            inputs,
            num_frames="num_frames",
            image_size="size",
            patch_size="patch_size",
            tubelet_size="tubelet_size",
            mean="mean",
            std="std",
        )

    def build(self) -> VideoMAE:
        """The model with fresh weights."""
        return VideoMAE(self)


def video_mae_small(**settings: Any) -> VideoMAEConfig:
    """ViT-S encoder; `settings` are fields of `VideoMAEConfig`."""
    sizes = {"dim": 384, "depth": 12, "heads": 6, "decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 3}
    return VideoMAEConfig(**{**sizes, **settings})


def video_mae_base(**settings: Any) -> VideoMAEConfig:
    """ViT-B encoder."""
    sizes = {"dim": 768, "depth": 12, "heads": 12, "decoder_dim": 384, "decoder_depth": 4, "decoder_heads": 6}
    return VideoMAEConfig(**{**sizes, **settings})


def video_mae_large(**settings: Any) -> VideoMAEConfig:
    """ViT-L encoder."""
    sizes = {"dim": 1024, "depth": 24, "heads": 16, "decoder_dim": 512, "decoder_depth": 12, "decoder_heads": 8}
    return VideoMAEConfig(**{**sizes, **settings})


def video_mae_huge(**settings: Any) -> VideoMAEConfig:
    """ViT-H encoder."""
    sizes = {"dim": 1280, "depth": 32, "heads": 16, "decoder_dim": 640, "decoder_depth": 12, "decoder_heads": 8}
    return VideoMAEConfig(**{**sizes, **settings})


class Encoder(nn.Module):
    """Visible tokens of a clip through the ViT."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing
        self.patch_embed = PatchEmbed(
            image_size=config.image_size,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            num_frames=config.num_frames,
            dim=config.dim,
        )
        self.blocks = make_blocks(config.depth, config.dim, config.heads, **_block_settings(config))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, video: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, T, H, W), mask (B, N) True = hidden -> visible tokens in their order, (B, visible, D)."""
        x = self.patch_embed(video)
        x = x + sinusoid_table(x.shape[1], x.shape[2], x.device).to(x.dtype)
        x = x[~mask].view(x.shape[0], -1, x.shape[2])
        return self.norm(run_blocks(self.blocks, x, recompute=self.recompute and self.training))


class Decoder(nn.Module):
    """Visible and mask tokens to the pixels of hidden cubes."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing
        self.blocks = make_blocks(
            config.decoder_depth, config.decoder_dim, config.decoder_heads, **_block_settings(config)
        )
        self.norm = nn.LayerNorm(config.decoder_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.decoder_dim, config.cube_values)

    def forward(self, x: Tensor, num_hidden: int) -> Tensor:
        """(B, N, D), the last `num_hidden` of them hidden -> (B, num_hidden, values of a cube)."""
        x = run_blocks(self.blocks, x, recompute=self.recompute and self.training)
        return self.head(self.norm(x[:, -num_hidden:]))


def _block_settings(config: VideoMAEConfig) -> dict[str, float]:
    return {
        "drop_path": config.drop_path,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "init_values": config.init_values,
        "norm_eps": config.norm_eps,
    }


class VideoMAE(System):
    """Masked pretraining. Its one loss is `pixels`: squared error over the values of hidden cubes."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.input_shape = (3, config.num_frames, config.image_size, config.image_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_dim))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.encoder.apply(init_xavier)
        self.decoder.apply(init_xavier)
        self.encoder_to_decoder = nn.Linear(config.dim, config.decoder_dim, bias=False)  # keeps torch's own start
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.freeze()

    def rebuild(self, video: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, T, H, W), mask (B, N) True = hidden -> predicted hidden cubes in their order, (B, hidden, values)."""
        _check_mask(mask, self.config.num_tokens)
        x = self.encoder_to_decoder(self.encoder(video, mask))
        batch, num_visible, width = x.shape
        table = sinusoid_table(mask.shape[1], width, x.device).to(x.dtype).expand(batch, -1, -1)
        visible = x + table[~mask].view(batch, num_visible, width)
        hidden = self.mask_token.to(x.dtype) + table[mask].view(batch, -1, width)
        return self.decoder(torch.cat([visible, hidden], dim=1), hidden.shape[1])

    def cubes(self, video: Tensor) -> Tensor:
        """The target of every cube: (B, 3, T, H, W) -> (B, N, values of a cube) fp32, colour last in each cube."""
        c = self.config
        video = video.float()
        mean, std = (torch.tensor(x, dtype=video.dtype, device=video.device).view(3, 1, 1, 1) for x in (c.mean, c.std))
        cut = rearrange(
            video * std + mean,
            "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c",
            p0=c.tubelet_size,
            p1=c.patch_size,
            p2=c.patch_size,
        )
        if c.normalize_target:
            deviation = cut.var(dim=2, unbiased=True, keepdim=True).sqrt()
            cut = (cut - cut.mean(dim=2, keepdim=True)) / (deviation + 1e-6)
        return cut.flatten(2)

    @torch.no_grad()
    def target(self, video: Tensor, mask: Tensor) -> Tensor:
        """What `rebuild` should predict: (B, hidden, values) fp32."""
        cubes = self.cubes(video)
        return cubes[mask].view(cubes.shape[0], -1, cubes.shape[2])

    def losses(self, batch: Batch) -> Losses:
        """`pixels`: squared errors over the values of hidden cubes (their mean is the published loss)."""
        video, mask = as_clips(batch), _mask_of(batch)
        predicted = self.rebuild(video, mask).float()
        total = functional.mse_loss(predicted, self.target(video, mask), reduction="sum")
        return {"pixels": LossTerm(total, predicted.numel())}

    def counts(self, batch: Batch) -> dict[str, int]:
        """`pixels`: values of hidden cubes."""
        return {"pixels": int(_mask_of(batch).sum()) * self.config.cube_values}

    def cost(self, batch: Batch) -> Cost:
        """What the forward pass over this batch costs; tokens are the encoder's."""
        c, mask = self.config, _mask_of(batch)
        clips, tokens = mask.shape
        visible = tokens - int(mask[0].sum())
        flops = c.depth * block_flops(visible, c.dim, c.mlp_ratio)
        flops += c.decoder_depth * block_flops(tokens, c.decoder_dim, c.mlp_ratio)
        flops += 2.0 * tokens * c.dim * c.cube_values + 2.0 * visible * c.dim * c.decoder_dim
        flops += 2.0 * (tokens - visible) * c.decoder_dim * c.cube_values
        return Cost(clips * visible, clips * flops, 0.0)

    def no_decay(self, name: str, tensor: Tensor) -> bool:
        """Biases, norms, and the mask token although it has three dimensions."""
        return name == "mask_token" or System.no_decay(self, name, tensor)


def _mask_of(batch: Batch) -> Tensor:
    if batch.mask is None:
        raise UserError("masked pretraining got clips without a mask; set the recipe's clips to a MaskedClipConfig")
    return batch.mask


def _check_mask(mask: Tensor, num_tokens: int) -> None:
    hidden = mask.sum(dim=1)
    if mask.shape[1] != num_tokens or not bool((hidden == hidden[0]).all()) or not 0 < int(hidden[0]) < num_tokens:
        raise ValueError(
            f"a mask over {mask.shape[1]} tokens that hides {hidden.tolist()} of them a clip reached a model of "
            f"{num_tokens} tokens a clip; every clip must hide the same number, at least one and not all. Set clips "
            "and model to the same size, patch_size, tubelet_size and num_frames"
        )
