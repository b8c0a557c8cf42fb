"""ViT-LLaMA: a video ViT with frozen LLaMA layers between its last block and its head (arXiv 2310.12973).

Without the LLaMA part this is the fine-tuning model of VideoMAE (arXiv 2203.12602). The frozen layers stand between two
trained linear maps, without residual, activation or drop path around them.

Which layer? The paper speaks of the *last* block of LLaMA-7B (31, counted from 0), the released code for images uses
31, the released code for video uses **15**. Which one gave the published SSv2 figures is not known; the default here is
the released video code's, `model.llama.layer=31` is the paper's. Differences on purpose: docs/parity.md.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm.checkpoint_folders import meant
from vlm.data.clips import ClipConfig
from vlm.models.system import Cost, System, as_clips, check_same
from vlm.models.trained import read_sealed
from vlm.nn.llama_block import FrozenLlama, norm_tensor, select_layers
from vlm.nn.vision import PatchEmbed, block_flops, init_truncated_normal, make_blocks, run_blocks, sinusoid_table
from vlm.types import Batch, Losses, LossTerm, UserError
from vlm.weights import diff_keys, open_tensors, read_state_dict

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class LlamaLayerConfig:
    """The frozen LLaMA layers."""

    path: Path | None = None
    """Meta's folder or consolidated.00.pth, or a Hugging Face folder; none: random weights, for debugging only."""
    layer: int = 15
    """First layer taken, counted from 0. 15: the released video code; 31: the paper's "last block" of LLaMA-7B."""
    num_layers: int = 1
    """How many layers are taken, from `layer` upwards (the paper's table D also tries 2)."""
    dim: int = 4096
    """Width of LLaMA."""
    heads: int = 32
    """Attention heads of LLaMA."""
    multiple_of: int = 256
    """The feed-forward width is int(8 dim / 3) rounded up to a multiple of this."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    final_norm: Literal["ones", "llama"] = "ones"
    """Weight of the RMSNorm after the layers: ones, as in the original, or LLaMA's own norm.weight."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How the frozen weights are stored; bfloat16 halves their memory. A bf16 engine stores them so in any case."""
    random_seed: int = 0
    """Decides the random weights where `path` is none."""

    def __post_init__(self) -> None:
        self.path = None if self.path is None else Path(self.path)
        for name in ("num_layers", "dim", "heads", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.llama.{name} is {getattr(self, name)}; it must be at least 1")
        if self.layer < 0:
            raise ValueError(f"model.llama.layer is {self.layer}; layers are counted from 0")
        if self.dim % (2 * self.heads):
            raise ValueError(f"model.llama.dim={self.dim} does not divide into {self.heads} heads of even width")
        if self.path is None and self.final_norm == "llama":
            raise ValueError("model.llama.final_norm=llama needs model.llama.path: random layers have no norm to load")

    def build(self) -> FrozenLlama:
        """The filled module; on the meta device (torch.device("meta")) it stays without weights."""
        dtype = getattr(torch, self.dtype)
        block = FrozenLlama(
            dim=self.dim,
            heads=self.heads,
            num_layers=self.num_layers,
            multiple_of=self.multiple_of,
            norm_eps=self.norm_eps,
            dtype=dtype,
        )
        if torch.get_default_device().type == "meta":
            return block
        if self.path is None:
            warnings.warn(
                "the frozen LLaMA layer has RANDOM weights (model.llama.path is none): good for tests and "
                "demonstrations, not for a result that is compared with published ones",
                stacklevel=2,
            )
            block.randomize(self.random_seed)
            return block
        tensors, source = open_tensors(self.path), str(self.path)
        norm = norm_tensor(tensors, source) if self.final_norm == "llama" else None
        block.load(select_layers(tensors, self.layer, self.num_layers, source), source, norm)
        return block


@dataclass(kw_only=True, slots=True)
class ViTLlamaConfig:
    """A video ViT classifier, with or without frozen LLaMA layers. `vit_small()` … `vit_huge()` give the sizes."""

    dim: int = 384
    """Width of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 6
    """Attention heads of a block."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of `dim`."""
    image_size: int = 224
    """Height and width of a clip, in pixels."""
    patch_size: int = 16
    """Height and width of a token, in pixels."""
    tubelet_size: int = 2
    """Frames of a token."""
    num_frames: int = 16
    """Frames of a clip."""
    num_classes: int = 174
    """Classes of the data set (SSv2: 174)."""
    pooling: Literal["mean", "cls"] = "mean"
    """What the head sees: mean, the mean token, normalised; cls, the first of the normalised tokens."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows linearly from 0."""
    dropout: float = 0.0
    """Dropout after the position table, the attention's projection and the MLP."""
    attention_dropout: float = 0.0
    """Dropout of attention weights."""
    fc_dropout: float = 0.0
    """Dropout before the head."""
    qkv_bias: bool = True
    """Biases on q and v (k has none in any case)."""
    init_values: float = 0.0
    """Start of a learned scale of each residual branch; 0: no such scale."""
    init_std: float = 0.02
    """Deviation of the linear layers' initial weights; a narrow ViT from scratch wants more (about dim ** -0.5)."""
    init_scale: float = 0.001
    """Factor on the head's initial weight and bias."""
    norm_eps: float = 1e-6
    """Epsilon of LayerNorm."""
    label_smoothing: float = 0.1
    """Smoothing of labels that are not soft already (with mixup or cutmix on, the clips config makes soft ones)."""
    activation_checkpointing: bool = False
    """Work out each ViT block again in the backward pass instead of keeping its activations."""
    llama: LlamaLayerConfig | None = None
    """The frozen LLaMA layers; none: a plain ViT."""
    init_from: Path | None = None
    """A VideoMAE pretraining checkpoint, published or our own (or a run folder: its latest), that blocks start from."""

    def __post_init__(self) -> None:
        self.init_from = None if self.init_from is None else Path(self.init_from)
        for name in ("dim", "depth", "heads", "image_size", "patch_size", "tubelet_size", "num_frames", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for whole, part in (("dim", "heads"), ("image_size", "patch_size"), ("num_frames", "tubelet_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"model.{whole}={getattr(self, whole)} is not a multiple of model.{part}={getattr(self, part)}"
                )
        for name in ("drop_path", "dropout", "attention_dropout", "fc_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")

    @property
    def num_tokens(self) -> int:
        """N, tokens of a clip."""
        return self.num_frames // self.tubelet_size * (self.image_size // self.patch_size) ** 2

    def check_inputs(self, inputs: ClipConfig) -> None:
        """UserError where a number that model and inputs both state differs."""
        if not isinstance(inputs, ClipConfig):
            raise UserError(f"inputs: ViT-LLaMA classifies labelled clips (ClipConfig), not {type(inputs).__name__}")
        check_same(self, inputs, num_frames="num_frames", image_size="size", num_classes="num_classes")
        if not (inputs.mixup or inputs.cutmix or inputs.label_smoothing):  # then no batch has soft labels
            check_same(self, inputs, label_smoothing="label_smoothing")

    def build(self) -> ViTLlama:
        """The model with fresh weights, its frozen layers loaded, `init_from` read where given."""
        model = ViTLlama(self)
        if self.init_from is not None:
            ours = meant(self.init_from)
            source = ours or self.init_from
            report = load_pretrained(model, read_sealed(ours)[0] if ours else read_state_dict(source), str(source))
            log.info("%s: %s", source, report.sentence())
        return model


def vit_small(**settings: Any) -> ViTLlamaConfig:
    """ViT-S: 22 M parameters; `settings` are fields of `ViTLlamaConfig`."""
    return ViTLlamaConfig(**{"dim": 384, "depth": 12, "heads": 6, **settings})


def vit_base(**settings: Any) -> ViTLlamaConfig:
    """ViT-B: 86 M parameters."""
    return ViTLlamaConfig(**{"dim": 768, "depth": 12, "heads": 12, **settings})


def vit_large(**settings: Any) -> ViTLlamaConfig:
    """ViT-L: 304 M parameters."""
    return ViTLlamaConfig(**{"dim": 1024, "depth": 24, "heads": 16, **settings})


def vit_huge(**settings: Any) -> ViTLlamaConfig:
    """ViT-H: 632 M parameters."""
    return ViTLlamaConfig(**{"dim": 1280, "depth": 32, "heads": 16, **settings})


class ViTLlama(System):
    """Clip -> tokens -> ViT blocks -> (linear -> frozen LLaMA layers -> linear) -> pooled -> class scores.

    Its one loss is `label`.
    """

    def __init__(self, config: ViTLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(
            image_size=config.image_size,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            num_frames=config.num_frames,
            dim=config.dim,
        )
        self.input_shape = self.patch_embed.input_shape
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = make_blocks(
            config.depth,
            config.dim,
            config.heads,
            drop_path=config.drop_path,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            init_values=config.init_values,
            norm_eps=config.norm_eps,
        )
        mean = config.pooling == "mean"
        self.norm = nn.Identity() if mean else nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if mean else None
        self.fc_dropout = nn.Dropout(config.fc_dropout)
        self.head = nn.Linear(config.dim, config.num_classes)
        self._initialize()
        self.llama = None
        if config.llama is not None:
            # made after the initialisation above: the original's linear maps keep torch's own
            self.llama = config.llama.build()
            self.llama_dim_mapper1 = nn.Linear(config.dim, config.llama.dim, bias=False)
            self.llama_dim_mapper2 = nn.Linear(config.llama.dim, config.dim, bias=False)
        self.freeze()

    def _initialize(self) -> None:
        self.apply(functools.partial(init_truncated_normal, std=self.config.init_std))
        with torch.no_grad():
            self.head.weight.mul_(self.config.init_scale)
            self.head.bias.mul_(self.config.init_scale)

    def logits(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K) fp32."""
        x = self.patch_embed(video)
        x = self.pos_drop(x + sinusoid_table(x.shape[1], x.shape[2], x.device).to(x.dtype))
        x = run_blocks(self.blocks, x, recompute=self.config.activation_checkpointing and self.training)
        if self.llama is not None:
            x = self.llama(self.llama_dim_mapper1(x))
            x = self.llama_dim_mapper2(x.to(self.llama_dim_mapper2.weight.dtype))
        x = self.norm(x)
        x = x[:, 0] if self.fc_norm is None else self.fc_norm(x.mean(dim=1))
        return self.head(self.fc_dropout(x)).float()

    def losses(self, batch: Batch) -> Losses:
        """`label`: cross-entropy with the batch's soft targets where it has some, else with smoothed labels."""
        logits = self.logits(as_clips(batch))
        if batch.target is not None:
            total = -(batch.target.float() * logits.log_softmax(dim=-1)).sum()
        else:
            if batch.label is None:
                raise UserError(f"{', '.join(batch.keys)}: clips without a label; their shards hold no `label`")
            total = functional.cross_entropy(
                logits, batch.label, reduction="sum", label_smoothing=self.config.label_smoothing
            )
        return {"label": LossTerm(total, logits.shape[0])}

    def counts(self, batch: Batch) -> dict[str, int]:
        """`label`: clips."""
        return {"label": as_clips(batch).shape[0]}

    def scores(self, batch: Batch) -> Tensor:
        """(B, K) fp32 logits."""
        return self.logits(as_clips(batch))

    def cost(self, batch: Batch) -> Cost:
        """What the forward pass over this batch costs."""
        c, clips, tokens = self.config, as_clips(batch).shape[0], self.config.num_tokens
        trained = c.depth * block_flops(tokens, c.dim, c.mlp_ratio) + 2.0 * c.dim * c.num_classes
        trained += 2.0 * tokens * c.dim * 3 * c.tubelet_size * c.patch_size**2
        frozen = 0.0
        if self.llama is not None:
            frozen, scores = self.llama.flops(tokens)
            trained += scores + 4.0 * tokens * c.dim * self.llama.dim
        return Cost(clips * tokens, clips * trained, clips * frozen)

    def trainable(self, name: str) -> bool:
        """All but the LLaMA layers and their norm; the linear maps around them train."""
        return not name.startswith("llama.")

    @property
    def num_layers(self) -> int:
        """Number of ViT blocks."""
        return self.config.depth

    def layer_id(self, name: str) -> int:
        """0 patch embedding, i + 1 block i, depth + 1 all else (norms, head, the maps around LLaMA)."""
        if name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.num_layers + 1


class LoadReport(NamedTuple):
    """What a pretraining checkpoint gave a classifier."""

    loaded: tuple[str, ...]  # our names, in our order
    kept: tuple[str, ...]  # trained tensors of ours that stay as initialised
    dropped: tuple[str, ...]  # the checkpoint's tensors without use here, prefix removed, in its order

    def sentence(self) -> str:
        """One line for the log."""
        kept = ", ".join(self.kept) or "none"
        return f"{len(self.loaded)} tensors loaded; left as initialised: {kept}; {len(self.dropped)} of it not used"


# What a classifier may lack in a checkpoint, and what a checkpoint may hold beside it.
_MAY_KEEP = ("fc_norm.", "head.", "llama_dim_mapper1.", "llama_dim_mapper2.")
_MAY_DROP = ("decoder.", "encoder_to_decoder.", "mask_token", "norm.", "head.", "pos_embed")


def load_pretrained(model: ViTLlama, state: Mapping[str, Tensor], source: str = "checkpoint") -> LoadReport:
    """Start a classifier from VideoMAE pretraining (or from another classifier's blocks).

    The encoder's tensors (prefix `encoder.` or `backbone.` removed) go to the patch embedding and the blocks, all of
    them or none. The classifier's own norm, head and maps keep their initial values unless the checkpoint has them with
    the same shapes. Under mean pooling the encoder's final norm has no place: it is dropped, as in the original.

    Raises:
        UserError: a tensor of the blocks is missing or of another shape, an unknown tensor is there, or the file is a
            fine-tuned ViT-LLaMA, whose frozen layers must come from LLaMA itself.
    """
    given = {name.removeprefix("backbone.").removeprefix("encoder."): tensor for name, tensor in state.items()}
    if len(given) != len(state):
        raise UserError(
            f"{source}: holds one tensor under two names, with and without the prefix encoder. or backbone."
        )
    if any(name.startswith("llama") for name in given):
        raise UserError(
            f"{source}: is a fine-tuned ViT-LLaMA, not a pretraining checkpoint. Mend: convert it with "
            "tools/convert_ckpt.py --from vit_llama --to vlm and pass the result as init_from of the recipe."
        )
    own = {name: p for name, p in model.named_parameters() if model.trainable(name)}
    wrong_head = {n for n in ("head.weight", "head.bias") if n in given and given[n].shape != own[n].shape}
    usable = {name: tensor for name, tensor in given.items() if name not in wrong_head}
    kept = tuple(name for name in own if name not in usable and name.startswith(_MAY_KEEP))
    dropped = tuple(n for n in given if n in wrong_head or (n not in own and n.startswith(_MAY_DROP)))
    wanted = {name: p for name, p in own.items() if name not in kept}
    diff_keys({n: t for n, t in usable.items() if n not in dropped}, wanted).require(f"{source}: as start of this ViT")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(usable[name])
    return LoadReport(tuple(wanted), kept, dropped)
