"""Vamos (arXiv 2311.13627), LLaMA-VQA / Flipped-VQA (arXiv 2310.15747) and ViCo: one model, three settings.

A frozen LLaMA answers questions on video. What trains: a projector of frame features (768 wide, CLIP's), learned prompt
rows that the upper blocks attend through zero-initialised gates (LLaMA-Adapter, arXiv 2303.16199), and, outside Vamos,
an embedding of the frame's number and a bias of text towards the video.

`selector` puts the token bottleneck of Vamos (its section on hard attention) between caption and LLaMA.

Which system it is follows from the recipe's views as well: Vamos learns `answer`; LLaMA-VQA `answer`, `question` and
`video_order`; ViCo `answer` and `caption`. Captions as input are text of the prompt, no matter of the model.

Parameters are named as in the released checkpoints, apart from the frozen LLaMA, whose names are transformers'.
Letters: B videos, N frames, S tokens, D width of LLaMA.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm.data.questions import QuestionConfig
from vlm.models.causal import CausalSystem
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.trained import MANIFEST, other_rows, start_from
from vlm.nn.language import Gates, Prompts
from vlm.nn.selector import Selector
from vlm.nn.splice import splice
from vlm.types import Batch, LossTerm, Passages, TextRows, UserError

VIDEO_ORDER = "video_order"
"""The one view that is no loss over the vocabulary: which frame comes next (Flipped-VQA, section 3.3)."""


@dataclass(kw_only=True, slots=True)
class SelectorConfig:
    """The token bottleneck: of the caption the LLaMA reads a few chosen tokens (vlm.nn.selector)."""

    keep: int = 40
    """Tokens that stay (k), at most; a shorter caption stays whole. The paper's page shows 40. A checkpoint that was
    trained with one number can be tested with another."""
    width: int = 128
    """Width of the selector (W): 128 and one block have the 0.7 million parameters that the paper's has."""
    layers: int = 1
    """Blocks of its encoder."""
    heads: int = 4
    """Attention heads of a block."""
    temperature: float = 1.0
    """Of the Gumbel-softmax in training; tests choose without noise, so it does nothing there."""

    def __post_init__(self) -> None:
        for name in ("keep", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.selector.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(f"model.selector.width={self.width} does not divide into {self.heads} heads of even width")
        if self.temperature <= 0:
            raise ValueError(f"model.selector.temperature is {self.temperature}; it must be above 0")


@dataclass(kw_only=True, slots=True)
class VamosConfig:
    """Gated prompts in a frozen LLaMA. `vamos()`, `llama_vqa()` and `vico()` give the three systems' settings."""

    llama: LlamaBaseConfig = field(default_factory=LlamaBaseConfig)
    """The frozen LLaMA."""
    use_video: bool = True
    """Whether there are video tokens at all. False (captions alone): no projector is made."""
    feature_dim: int = 768
    """Width of a frame's features (CLIP ViT-L/14: 768)."""
    num_frames: int = 10
    """Frames of a video (N), each one token."""
    projector: Literal["linear", "mlp"] = "linear"
    """From features to tokens: linear, without bias; mlp: linear, GELU, linear, with biases (Vamos' --proj_type)."""
    temporal_embedding: bool = False
    """Add a learned embedding of the frame's number (LLaMA-VQA, ViCo)."""
    video_bias: float | None = None
    """Start of `gate2`, the learned number added to the scores of text after the video on the video, as a positive
    number: gate2 starts at minus it (the originals' --bias). None: no such bias (Vamos)."""
    tau: float = 100.0
    """Divisor of the scores of `video_order`."""
    adapter_len: int = 10
    """Prompt rows of a block."""
    adapter_layer: int | None = None
    """How many blocks, counted from the top, have prompts; none: all."""
    skip_lower_blocks: bool = False
    """Do not run the blocks below the prompted ones. False is LLaMA-Adapter's design; the three originals lost those
    blocks, so a checkpoint released with adapter_layer below the number of blocks needs True."""
    rope_theta: float | None = None
    """Base of the rotary embedding where it is not to be the LLaMA's own. Vamos' released checkpoints on LLaMA 1 and 2
    were trained with 500000 (the original's default where params.json is silent) instead of 10000."""
    selector: SelectorConfig | None = None
    """Lets few tokens of the caption through (with inputs.keep_tokens); none: the LLaMA reads all of it."""
    init_from: Path | None = None
    """A checkpoint folder of ours whose trained tensors training begins with, on the same LLaMA and with the same
    settings; a released file is converted first (tools/convert_ckpt.py)."""
    activation_checkpointing: bool = False
    """Work out each LLaMA block again in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        self.init_from = None if self.init_from is None else Path(self.init_from)
        for name in ("feature_dim", "num_frames", "adapter_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.prompted <= self.llama.layers:
            raise ValueError(
                f"model.adapter_layer is {self.adapter_layer}, but model.llama.layers is {self.llama.layers}; it must "
                "be between 1 and that, or none for all of them"
            )
        if not self.use_video and (self.temporal_embedding or self.video_bias is not None):
            raise ValueError("model.use_video is false, so temporal_embedding and video_bias have no video to act on")
        if self.tau <= 0:
            raise ValueError(f"model.tau is {self.tau}; it must be above 0")

    def check_inputs(self, inputs: QuestionConfig) -> None:
        """UserError where rows of these inputs are not this model's: sizes, or a tokenizer of another LLaMA."""
        if self.use_video != inputs.use_video:
            raise UserError(f"model.use_video is {self.use_video}, but inputs.use_video is {inputs.use_video}")
        for name in ("num_frames", "feature_dim") if self.use_video else ():
            if getattr(self, name) != getattr(inputs, name):
                raise UserError(f"model.{name} is {getattr(self, name)}, but inputs.{name} is {getattr(inputs, name)}")
        keep = None if self.selector is None else self.selector.keep
        if keep != inputs.keep_tokens:
            raise UserError(
                f"model.selector keeps {'all' if keep is None else keep} tokens of a caption, but inputs.keep_tokens "
                f"is {inputs.keep_tokens}: rows leave as many places as the selector fills, so both need one number ("
                "or none: a recipe whose model.selector is none reads captions whole)"
            )
        if self.init_from is not None and (self.init_from / MANIFEST).is_file():
            note = other_rows(self.init_from, inputs)
            if note:
                warnings.warn(note, stacklevel=2)
        if inputs.tokenizer is not None and not inputs.tokenizer.exists():
            return  # said by vlm.recipe.check_files, or by whoever reads it
        debugging = inputs.tokenizer is None and self.llama.path is None and inputs.vocab_size <= self.llama.vocab_size
        if inputs.vocab_size != self.llama.vocab_size and not debugging:
            raise UserError(
                f"inputs.tokenizer={inputs.tokenizer or 'bytes'} has {inputs.vocab_size} words, but the vocabulary of "
                f"model.llama ({self.llama.path}) has {self.llama.vocab_size}: the tokenizer is another LLaMA's, and "
                "its ids would be read as other words. Give the tokenizer.model that came with this LLaMA"
            )

    @property
    def prompted(self) -> int:
        """Blocks with prompts."""
        return self.llama.layers if self.adapter_layer is None else self.adapter_layer

    def build(self) -> Vamos:
        """The model with its LLaMA loaded, its trainable parameters fresh or those of `init_from`."""
        model = Vamos(self)
        if self.init_from is not None:
            start_from(model, self.init_from)
        return model


def decisive_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored `VamosConfig` (`vlm.config.to_dict`) says of the blocks that run and of the rows they read, with
    what it leaves to its LLaMA filled in. Sizes that tensors' shapes tell are not among them."""
    llama = settings["llama"]
    layers = llama["layers"]
    selector = settings.get("selector")  # runs from before there was one do not say
    prompted = settings["adapter_layer"] or layers
    return {
        "num_frames": settings["num_frames"] if settings["use_video"] else None,
        "use_video": settings["use_video"],
        "adapter_len": settings["adapter_len"],
        "adapter_layer": prompted,
        "skip_lower_blocks": settings["skip_lower_blocks"] and prompted < layers,
        "rope_theta": settings["rope_theta"] or llama["rope_theta"],
        "selector.heads": selector and selector["heads"],
        "llama.norm_eps": llama["norm_eps"],
        "llama.kv_heads": llama["kv_heads"] or llama["heads"],
        "llama.vocab_size": llama["vocab_size"],
    }


def vamos(**settings: Any) -> VamosConfig:
    """Vamos: neither temporal embedding nor bias. `settings` are fields of `VamosConfig`."""
    return VamosConfig(**{"num_frames": 6, **settings})


def llama_vqa(**settings: Any) -> VamosConfig:
    """LLaMA-VQA (Flipped-VQA)."""
    return VamosConfig(**{"temporal_embedding": True, "video_bias": 3.5, **settings})


def vico(**settings: Any) -> VamosConfig:
    """ViCo: LLaMA-VQA's model; its recipe trains `answer` and `caption`."""
    return llama_vqa(**settings)


class _Block(nn.Module):
    """Holds a block's gates under the name that published checkpoints have."""

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self.attention = gates


class Vamos(CausalSystem):
    """Frame features -> projector -> slots of a prompt -> frozen LLaMA with gated prompts."""

    def __init__(self, config: VamosConfig) -> None:
        unprompted = config.llama.layers - config.prompted
        skipped = unprompted if config.skip_lower_blocks else 0
        super().__init__(config.llama.build(skipped, config.rope_theta), config.activation_checkpointing)
        self.config = config
        dim = config.llama.dim
        self.adapter_query = nn.Embedding(config.adapter_len * config.prompted, dim)
        if config.use_video:
            self.visual_proj = _projector(config.projector, config.feature_dim, dim)
        if config.temporal_embedding:
            self.temporal_emb = nn.Embedding(config.num_frames, dim)
        if config.selector is not None:
            c = config.selector
            self.selector = Selector(dim, c.width, c.layers, c.heads, c.temperature)
        bias = None if config.video_bias is None else -config.video_bias
        gates = [Gates(config.llama.heads, bias) for _ in range(config.llama.layers)]
        for unused in gates[:unprompted]:
            _unlearn(unused)
        self.layers = nn.ModuleList(_Block(block) for block in gates)
        # number of a block in `llm` -> its gates
        self._gates = {i - skipped: gates[i] for i in range(unprompted, config.llama.layers)}
        self.freeze()

    def encode_video(self, batch: Batch) -> Tensor | None:
        """(B, N, D): projected features of frames, with the embedding of their number."""
        if batch.features is None or not self.config.use_video:
            return None
        video = self.project(batch.features)
        if self.config.temporal_embedding:
            video = video + self.temporal_emb(torch.arange(video.shape[1], device=video.device))
        return video

    def project(self, features: Tensor) -> Tensor:
        """(B, N, feature_dim) -> (B, N, D), in the projector's precision."""
        want = (self.config.num_frames, self.config.feature_dim)
        if tuple(features.shape[1:]) != want:
            raise UserError(
                f"features are {features.shape[1]} frames x {features.shape[2]}, but model.num_frames = {want[0]} and "
                f"model.feature_dim = {want[1]}: shards and recipe do not fit"
            )
        return self.visual_proj(features.to(self.adapter_query.weight.dtype))

    def fill(self, text: Tensor, rows: TextRows, batch: Batch) -> Tensor:
        """Put the caption tokens that the selector chooses into their places."""
        if self.config.selector is None or batch.passages is None:
            return super().fill(text, rows, batch)
        picked, _ = self.choose(batch.passages)
        return splice(text, picked[None], rows.pick_slots, rows.pick_sources)

    def choose(self, passages: Passages) -> tuple[Tensor, Tensor]:
        """The caption tokens that the LLaMA will read: embeddings (G, D), and places (G,) in `passages.tokens`."""
        return self.selector(self.llm.get_input_embeddings()(passages.tokens), passages)

    def block_arguments(self, names: Sequence[str], rows: Sequence[TextRows], batch: Batch) -> dict[str, Any]:
        """The prompts of all blocks; the bias acts in every view but `video_order`, as in the original."""
        number = torch.arange(self.adapter_query.num_embeddings, device=rows[0].tokens.device)
        prompts = self.adapter_query(number).view(self.config.prompted, self.config.adapter_len, -1)
        after = inside = None
        if self.config.video_bias is not None:
            after = torch.cat([p.after_video & (name != VIDEO_ORDER) for name, p in zip(names, rows)])
            inside = torch.cat([torch.zeros_like(p.after_video).index_fill(0, p.slots, True) for p in rows])
        return {"prompts": Prompts(prompts, self._gates, after, inside)}

    def places(self, name: str, rows: TextRows) -> Tensor:
        """`video_order`: before each slot; else before each token to be predicted."""
        return rows.slots - 1 if name == VIDEO_ORDER else rows.predictors

    def view_loss(self, name: str, rows: TextRows, hidden: Tensor, batch: Batch) -> LossTerm | None:
        """`video_order`: the output before each slot must be nearest to the features that come there."""
        if name != VIDEO_ORDER:
            return None
        if batch.features is None:
            raise UserError(f"{', '.join(batch.keys)}: {VIDEO_ORDER} needs frame features, but the batch has none")
        frames = self.project(batch.features)
        count = frames.shape[1]
        outputs = hidden.unflatten(0, (-1, count))
        videos = rows.sources.unflatten(0, (-1, count))[:, 0] // count
        return LossTerm(self._order_loss(outputs, frames[videos], rows.sources % count), rows.slots.numel())

    def _order_loss(self, outputs: Tensor, frames: Tensor, order: Tensor) -> Tensor:
        """Sum over (rows, N, D) outputs of the cross-entropy of the next frame among the row's (rows, N, D) frames."""
        logits = outputs.to(frames.dtype) @ frames.transpose(1, 2) / self.config.tau
        return functional.cross_entropy(logits.flatten(0, 1).float(), order, reduction="sum")

    def reached(self, name: str, batch: Batch) -> bool:
        """Text alone reaches neither projector nor temporal embedding; gate2 acts on what is learnt after a video; a
        selector learns where it has a choice."""
        learnt = {view: rows for view, rows in batch.views.items() if self.predictions_of(view, rows)}
        if name.startswith(("visual_proj.", "temporal_emb.")):
            return any(rows.slots.numel() for rows in learnt.values())
        if name.startswith("selector."):
            read = any(rows.pick_slots.numel() for rows in learnt.values())
            return read and batch.passages is not None and bool((batch.passages.segments[:, 1:] >= 0).any())
        if name.endswith(".gate2"):
            return any(bool(rows.after_video.any()) for view, rows in learnt.items() if view != VIDEO_ORDER)
        return bool(learnt)

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See `decisive_settings`."""
        return decisive_settings(settings)

    def predictions_of(self, name: str, rows: TextRows) -> int:
        """`video_order`: frames; else tokens."""
        return rows.slots.numel() if name == VIDEO_ORDER else rows.targets.numel()

    def trained_flops(self, batch: Batch, tokens: int) -> float:
        """Forward FLOPs of projector, prompt rows (keys and values) and queries on them."""
        c = self.config
        prompts = c.adapter_len * c.prompted
        per_row = 2.0 * c.llama.dim * 2 * c.llama.dim * c.llama.num_kv_heads / c.llama.heads
        projector = c.llama.dim * (c.feature_dim + (c.llama.dim if c.projector == "mlp" else 0))
        frames = 0 if batch.features is None else batch.features.shape[0] * batch.features.shape[1]
        selector = 0.0
        if c.selector is not None and batch.passages is not None:
            passages, width = batch.passages, c.selector.width
            read = passages.segments.shape[0] * (passages.segments.shape[1] + passages.tasks.shape[1])
            selector = 2.0 * len(passages.tokens) * c.llama.dim * width + 24.0 * read * c.selector.layers * width**2
        return prompts * per_row + 4.0 * tokens * prompts * c.llama.dim + 2.0 * frames * projector + selector


def _projector(kind: str, width: int, dim: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, dim, bias=False)
    return nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))


def _unlearn(gates: Gates) -> None:
    """Turn the gates of a block without prompts into buffers: nothing reads them, but published files hold them."""
    for name, parameter in list(gates.named_parameters()):
        delattr(gates, name)
        gates.register_buffer(name, parameter.data)
