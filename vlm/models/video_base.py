"""What Video-LLaMA (arXiv 2306.02858) and LLMVA-GEBC (arXiv 2306.10354) share: frames become tokens in a frozen tower,
an embedding of the frame's number is added, a Q-Former of two layers reads those of a whole video into a few tokens,
and these are projected to the width of a frozen language model.

Frames come as pixels, or as what the tower made of them before (`Batch.frame_tokens`): the losses are the same. Videos
of any number of frames share one pass of each module; an image is a video of one frame.

Letters: V videos, F frames of all videos, Q tokens of a frame, N video tokens, D width of the Q-Former.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.config import to_dict
from vlm.models import tower_frames
from vlm.models.causal import CausalSystem
from vlm.models.eva import TowerConfig, check_frames
from vlm.models.system import Cost
from vlm.nn.language import blocks_of
from vlm.nn.qformer import QFormerConfig, by_video, frame_numbers, read_memory
from vlm.types import Batch, UserError
from vlm.weights import hash_of_hashes

FROZEN = ("llm.", "tower.")
"""How the names of what never trains begin."""


@dataclass(kw_only=True, slots=True)
class VideoConfig:
    """From frames to video tokens."""

    tower: TowerConfig | None = field(default_factory=TowerConfig)
    """The frozen EVA and Q-Former; none: frames come as its stored tokens alone (inputs.source=features), and its 2 GB
    are not loaded."""
    frame_tokens: int = 32
    """Tokens of a frame (Q): the tower's queries."""
    frame_dim: int = 768
    """Width of a frame's token: the tower's query_dim."""
    num_video_tokens: int = 32
    """Tokens that the video Q-Former makes of a video."""
    max_frames: int = 32
    """Frames that a video may have: rows of the embedding of their number."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    """The video Q-Former; its width is `frame_dim`."""
    init_from: Path | None = None
    """A checkpoint folder of ours whose trained tensors training begins with (a stage before this one); a released
    file is converted first (tools/convert_ckpt.py)."""
    activation_checkpointing: bool = False
    """Work out each block of the language model again in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        self.init_from = None if self.init_from is None else Path(self.init_from)
        for name in ("frame_tokens", "frame_dim", "num_video_tokens", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.qformer.dim != self.frame_dim:
            raise ValueError(f"model.qformer.dim is {self.qformer.dim}, but model.frame_dim is {self.frame_dim}")
        if self.tower is not None:
            for ours, theirs in (("frame_tokens", "queries"), ("frame_dim", "query_dim")):
                if getattr(self, ours) != getattr(self.tower, theirs):
                    raise ValueError(
                        f"model.{ours} is {getattr(self, ours)}, but model.tower.{theirs} is "
                        f"{getattr(self.tower, theirs)}: both must be the same"
                    )

    @property
    def places(self) -> int:
        """Places that a video takes in a row (N)."""
        return self.num_video_tokens

    def check_frames_and_words(self, inputs: Any, vocab_size: int, path: Path | None, named: str) -> None:
        """UserError where rows of these inputs are not this model's.

        Args:
            vocab_size, path: of the language model that the recipe calls `named`.
        """
        if inputs.num_video_tokens != self.places:
            raise UserError(
                f"inputs.num_video_tokens is {inputs.num_video_tokens}, but this model makes {self.places} of a video"
            )
        if inputs.num_frames > self.max_frames:
            raise UserError(
                f"inputs.num_frames is {inputs.num_frames}, but model.max_frames is {self.max_frames}: the model has "
                "no embedding for frames beyond"
            )
        if inputs.source == "pixels" and self.tower is None:
            raise UserError(
                "inputs.source is pixels, but model.tower is none: nothing reads pixels. Mend: inputs.source=features "
                "with shards that hold them (tools/extract_features.py), or a recipe with a tower"
            )
        if inputs.tokenizer is not None and not inputs.tokenizer.exists():
            return  # said by vlm.recipe.check_files, or by whoever reads it
        debugging = (inputs.tokenizer is None or path is None) and inputs.vocab_size <= vocab_size
        if inputs.vocab_size > vocab_size or (inputs.vocab_size < vocab_size - _UNUSED_WORDS and not debugging):
            raise UserError(
                f"inputs.tokenizer={inputs.tokenizer or 'bytes'} has {inputs.vocab_size} words, but the vocabulary of "
                f"{named} ({path}) has {vocab_size}: the tokenizer is another model's, and its ids would be read as "
                "other words. Give the tokenizer that came with this language model"
            )


# Most rows of an embedding that no word has: padding to a multiple of 64 (Ziya's 14, to 39424; OPT's 7, to 50272).
_UNUSED_WORDS = 63


class VideoSystem(CausalSystem):
    """Frames -> frozen tower -> video Q-Former -> projection -> slots of a prompt -> frozen language model."""

    config: Any  # a VideoConfig with a language model
    projection: str
    """Name of the module that projects to the language model's width, as published."""

    def __init__(self, config: VideoConfig, llm: PreTrainedModel) -> None:
        super().__init__(llm, config.activation_checkpointing)
        self.config = config
        if config.tower is not None:
            self.tower = config.tower.build()
        self.video_query_tokens = nn.Parameter(
            torch.empty(1, config.num_video_tokens, config.frame_dim).normal_(0, 0.02)
        )
        self.video_frame_position_embedding = nn.Embedding(config.max_frames, config.frame_dim)
        self.video_Qformer = config.qformer.build(config.frame_dim)
        self.add_module(self.projection, nn.Linear(config.frame_dim, llm.config.hidden_size))

    def train(self, mode: bool = True) -> VideoSystem:
        """What is frozen stays in evaluation mode, but for the dropout of an OPT that is asked for (model.opt.dropout).

        transformers works out activations again, and drops, only in blocks that are in training mode, so the blocks
        themselves are switched; nothing else in them depends on it.
        """
        super().train(mode)
        self.llm.train(False)
        for block in blocks_of(self.llm):
            block.training = mode
        return self

    # ------------------------------------------------------------------------------------------------------ the video

    def encode_video(self, batch: Batch) -> Tensor | None:
        """(V, N, width of the language model)."""
        tokens = self.see(batch)
        if tokens is None:
            return None
        memory, mask = self.memory(tokens, batch.frame_counts)
        queries = self.video_query_tokens.expand(len(memory), -1, -1)
        return self.project(read_memory(self.video_Qformer, queries, memory, mask))

    def see(self, batch: Batch) -> Tensor | None:
        """(F, Q, D) tokens of all frames: those that the batch brings, or the tower's; None: there is no video.

        Raises:
            UserError: a video of too many frames, or tokens of another tower.
        """
        self._check(batch)
        tokens = batch.frame_tokens
        if tokens is None and batch.frames is not None:
            tokens = self.tower(batch.frames)
        return None if tokens is None else tokens.to(self.video_query_tokens.dtype)

    def memory(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """What the video Q-Former reads: (F, Q, D) with the embedding of each frame's number, by video (`by_video`)."""
        numbers = frame_numbers(counts, tokens.device)
        return by_video(tokens + self.video_frame_position_embedding(numbers)[:, None], counts)

    def project(self, tokens: Tensor) -> Tensor:
        """(V, n, D) -> (V, n, width of the language model)."""
        return self.get_submodule(self.projection)(tokens)

    def _check(self, batch: Batch) -> None:
        config, named = self.config, ", ".join(batch.keys)
        frames = batch.frames if batch.frame_tokens is None else batch.frame_tokens
        if frames is None:
            return
        if max(batch.frame_counts) > config.max_frames:
            raise UserError(
                f"{named}: a video has {max(batch.frame_counts)} frames, but model.max_frames is {config.max_frames}: "
                "the model has no embedding for those beyond. Mend: fewer frames (inputs.num_frames), or train a model "
                "with more"
            )
        if sum(batch.frame_counts) != len(frames):
            raise UserError(f"{named}: {len(frames)} frames, but the videos have {batch.frame_counts}")
        if batch.frame_tokens is not None:
            want = (config.frame_tokens, config.frame_dim)
            if tuple(frames.shape[1:]) != want:
                raise UserError(
                    f"{named}: a frame's stored tokens are {tuple(frames.shape[1:])}, but model.frame_tokens and "
                    f"model.frame_dim are {want}: shards and recipe do not fit"
                )
        elif config.tower is None:
            raise UserError(f"{named}: the batch has pixels, but model.tower is none; set inputs.source=features")
        else:
            check_frames(frames, config.tower, named)

    # ------------------------------------------------------------------------------------------------- for the trainer

    def trainable(self, name: str) -> bool:
        """All but tower and language model."""
        return not name.startswith(FROZEN)

    def reached(self, name: str, batch: Batch) -> bool:
        """Text alone reaches nothing that trains. The bias of a key adds the same to all scores of a query: its
        gradient is 0 but for rounding."""
        return not name.endswith(".key.bias") and any(
            rows.slots.numel() and self.predictions_of(view, rows) for view, rows in batch.views.items()
        )

    def no_decay(self, name: str, tensor: Tensor) -> bool:
        """As published: decay for every matrix, learned queries and positions among them."""
        return tensor.ndim < 2 or any(part in name for part in ("bias", "ln", "bn"))

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a stored config says that shapes of the trained tensors do not. Of a tower where there are two: a run
        on stored tokens says nothing of what made them."""
        own = self.config.tower
        stated = {} if own is None else settings["tower"] or to_dict(own)
        names = [name for name in ("patch_size", "heads", "query_heads") if name in stated]
        return self.shared_settings(settings) | {f"tower.{name}": stated[name] for name in names}

    def shared_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the video Q-Former."""
        return {f"qformer.{name}": settings["qformer"][name] for name in ("heads", "cross_every")}

    def misfit(self, made: Mapping[str, Any]) -> str:
        """By the hash of the tower; without a tower there is nothing to compare."""
        return "" if self.config.tower is None else tower_frames.misfit(self.tower, made)

    def _joined(self, hashes: Mapping[str, str]) -> str:
        """The language model's hash and, with a tower, `+` and the tower's."""
        prefixes = FROZEN if self.config.tower is not None else FROZEN[:1]
        return "+".join(hash_of_hashes({n: h for n, h in hashes.items() if n.startswith(p)}) for p in prefixes)

    def frozen_fits(self, stated: str) -> bool:
        """Where either side has no tower, the language models alone are compared: stored tokens stand for one."""
        return all(theirs == ours for theirs, ours in zip(stated.split("+"), self.frozen_hash().split("+")))

    def frozen_misfits(self, stated: Mapping[str, str], held: Collection[str]) -> list[str]:
        """As `frozen_fits`."""
        differing = super().frozen_misfits(stated, held)
        both = any(name.startswith(FROZEN[1]) for name in stated)
        return [name for name in differing if both or not name.startswith(FROZEN[1])]

    def cost(self, batch: Batch) -> Cost:
        """What the forward pass over this batch's views costs; the tower has no backward pass."""
        cost = super().cost(batch)
        tower = self.config.tower
        if batch.frames is None or batch.frame_tokens is not None or tower is None:
            return cost
        return cost._replace(unlearned_flops=len(batch.frames) * tower.flops())

    def trained_flops(self, batch: Batch, tokens: int) -> float:
        """Forward FLOPs of the video Q-Former and of the projection."""
        videos = len(batch.frame_counts)
        if not videos:
            return 0.0
        c = self.config
        memory = max(batch.frame_counts) * c.frame_tokens
        width = self.llm.config.hidden_size
        projected = 2.0 * c.places * c.frame_dim * width
        return videos * (c.qformer.flops(c.frame_dim, c.num_video_tokens, memory) + projected)
