"""Video-ChatGPT (arXiv 2306.05424), and the variant of it that was trained on Breakfast and 50Salads.

CLIP's features of a video, pooled before (356 places: 100 of frames, 256 of parts of the picture), are projected to the
width of a frozen LLaMA and stand between two words of their own, <vid_start> and <vid_end>. The projector trains and
the rows of these two words, nothing else of the embedding.

The variant reads 1000 frames and, in its first form, all 25 CLS states of CLIP's ViT: learned encodings of the place
are added to each state, the last state makes the video tokens, and after each block of the LLaMA a vector of its state
of the video is added to every token (vlm.models.video_chatgpt_parts). Parts of the LLaMA train too (`train_also`).

Three words follow those of the language model: <vid_patch>, <vid_start>, <vid_end>. Parameters are named as published,
without "model."; the embedding's rows of the two marks are `video_marks`.

Letters: V videos, N places of a video, Q states of a place, D their width, S tokens, H width of the LLaMA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.models.causal import CausalSystem
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.system import Cost, check_same
from vlm.models.trained import start_from
from vlm.models.video_chatgpt_files import check_sound
from vlm.models.video_chatgpt_parts import add_words, encodings, owners, with_marks
from vlm.models.video_chatgpt_start import put_published
from vlm.nn.llama_layers import Additions
from vlm.types import Batch, TextRows, UserError
from vlm.weights import diff_keys, open_tensors

Part = Literal["embeddings", "first_layer", "last_layer", "layers", "norm", "lm_head"]
_BLOCKS = ("first_layer", "last_layer", "layers")
_WORDS = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")


@dataclass(kw_only=True, slots=True)
class VideoChatGptConfig:
    """Video-ChatGPT; every default is the published one. `breakfast_variant()` fills in those of the variant."""

    llama: LlamaBaseConfig = field(default_factory=LlamaBaseConfig)
    """The language model as training begins: LLaVA-Lightning 7B is `llama("llava_lightning_7b", path=...)`.
    `vocab_size` counts its own words; three are added."""
    frame_tokens: int = 1
    """States of a place (Q): 1, or as many as the fusion reads."""
    frame_dim: int = 1024
    """Width of a state (D): CLIP ViT-L/14's."""
    num_video_tokens: int = 356
    """Places of a video (N): 100 + 256; the variant has 1000."""
    marks: bool = True
    """Whether <vid_start> and <vid_end> stand around the video; their rows train. False: <vid_patch> is the only new
    word."""
    positional_encodings: bool = False
    """The variant's: add a learned encoding of the place to each state (`pes`)."""
    fusion: bool = False
    """The variant's: after block l of the LLaMA add a vector made of state min(l, Q - 1) of the row's video to all
    tokens (`reducers`, `projecters`)."""
    fusion_scale: float = 0.1
    """What that vector is multiplied by."""
    train_also: tuple[Part, ...] = ()
    """Parts of the language model that train: first_layer, last_layer, norm, lm_head (the variant trains these four),
    embeddings, layers (all blocks). They are held in fp32 whatever `llama.dtype` is. The variant's code names the
    embedding too, but detaches it, so that the rows of the two marks alone learn: they train here without it."""
    init_from: Path | None = None
    """A checkpoint folder of ours whose trained tensors training begins with; a released file is converted first
    (tools/convert_ckpt.py)."""
    projection_from: Path | None = None
    """A file whose projector training begins with: a mm_projector.bin, or LLaVA's folder, whose projector is part of
    what the published training begins with. Where it has rows of the two marks (the last ones of its embedding), these
    too. None: random numbers."""
    activation_checkpointing: bool = False
    """Work out each block of the language model again in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        self.init_from = None if self.init_from is None else Path(self.init_from)
        self.projection_from = None if self.projection_from is None else Path(self.projection_from)
        for name in ("frame_tokens", "frame_dim", "num_video_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if not math.isfinite(self.fusion_scale):
            raise ValueError(f"model.fusion_scale is {self.fusion_scale}; it must be a number")
        if self.frame_tokens > 1 and not self.fusion:
            raise ValueError(
                f"model.frame_tokens is {self.frame_tokens}, but model.fusion is false: the last state alone would be "
                "read. Mend: model.frame_tokens=1 and shards that hold it alone, or model.fusion=true"
            )
        if self.fusion and self.frame_tokens > self.llama.layers:
            raise ValueError(
                f"model.frame_tokens is {self.frame_tokens}, but model.llama.layers is {self.llama.layers}: block l "
                "reads state l, so the last states would be fused into none"
            )
        unknown = sorted(set(self.train_also) - set(Part.__args__))  # type: ignore[attr-defined]
        if unknown:
            raise ValueError(f"model.train_also: no part is called {unknown[0]!r}")
        blocks = [part for part in self.train_also if part in _BLOCKS]
        if self.llama.quantise and blocks:
            raise ValueError(
                f"model.llama.quantise is {self.llama.quantise}, but model.train_also has {blocks[0]}: matrices of so "
                "few bits cannot train. Mend: model.llama.quantise=none, or leave the blocks frozen"
            )
        if self.projection_from is not None and self.init_from is not None:
            raise ValueError("model.projection_from and model.init_from are given: the latter has a projector too")

    reads_published: ClassVar[bool] = True

    @property
    def new_words(self) -> int:
        """Words that follow the language model's own: <vid_patch>, and with marks <vid_start> and <vid_end>."""
        return 3 if self.marks else 1

    def check_inputs(self, inputs: Any) -> None:
        """UserError where rows of these inputs are not this model's: sizes, or ids of the new words."""
        same = ("num_video_tokens", "frame_tokens", "frame_dim", "marks")
        check_same(self, inputs, **{name: name for name in same})
        if inputs.tokenizer is not None and not inputs.tokenizer.exists():
            return  # said by vlm.recipe.check_files, or by whoever reads it
        words = inputs.vocab_size - self.new_words
        if words != self.llama.vocab_size:
            raise UserError(
                f"inputs.tokenizer={inputs.tokenizer or 'bytes'} and inputs.words give the language model {words} words"
                f", so that the video's own begin at {words}, but model.llama.vocab_size is {self.llama.vocab_size}: "
                "ids would be read as other words. Mend: the tokenizer that came with this language model, and "
                f"inputs.words={self.llama.vocab_size} where the model has rows that its tokenizer does not know "
                "(LLaVA-Lightning: 32003)"
            )

    def build(self) -> VideoChatGpt:
        """The model with its language model loaded, its trainable parameters fresh or those that it begins with."""
        model = self.make()
        if self.init_from is not None:
            start_from(model, self.init_from)
        if self.projection_from is not None:
            model.take_projection(self.projection_from)
        return model

    def make(self) -> VideoChatGpt:
        """The model before it begins with anything: what a variant with modules of its own overrides."""
        return VideoChatGpt(self)


def breakfast_variant(**settings: Any) -> VideoChatGptConfig:
    """The variant of Breakfast and 50Salads with all 25 states; `settings` are further fields.

    Its later form reads the last state alone: `frame_tokens=1, fusion=False`.
    """
    own = {
        "frame_tokens": 25,
        "num_video_tokens": 1000,
        "positional_encodings": True,
        "fusion": True,
        "train_also": ("first_layer", "last_layer", "norm", "lm_head"),
    }
    return VideoChatGptConfig(**{**own, **settings})


class VideoChatGpt(CausalSystem):
    """See the file's beginning."""

    def __init__(self, config: VideoChatGptConfig) -> None:
        super().__init__(config.llama.build(), config.activation_checkpointing)
        self.config = config
        llm: PreTrainedModel = self.llm
        means = add_words(llm, config.new_words)
        self.mm_projector = nn.Linear(config.frame_dim, config.llama.dim)
        if config.positional_encodings:
            self.pes = encodings(config.frame_tokens, config.num_video_tokens, config.frame_dim)
        if config.fusion:
            states = range(config.frame_tokens)
            self.reducers = nn.ModuleList(nn.Linear(config.num_video_tokens, 1) for _ in states)
            self.projecters = nn.ModuleList(nn.Linear(config.frame_dim, config.llama.dim) for _ in states)
        if config.marks:
            self.video_marks = nn.Parameter(means.float().repeat(2, 1))
            llm.get_input_embeddings().register_forward_hook(self._mark)
        for name, parameter in self.named_parameters():
            if self.trainable(name):
                parameter.data = parameter.data.float()
        self.freeze()

    def _mark(self, embedding: nn.Module, given: tuple[Tensor, ...], text: Tensor) -> Tensor:
        """After the embedding, so that marks are read where text is written too."""
        return with_marks(given[0], text, self.video_marks, self.config.llama.vocab_size + 1)

    def take_projection(self, file: Path) -> None:
        """Set the projector, and the marks where there are rows for them, from a published file or a folder.

        Raises:
            UserError: it holds no projector, or one of other sizes.
        """
        found = _projector_of(file)
        if not found:
            raise UserError(f"model.projection_from={file}: holds no mm_projector.weight")
        own = dict(self.mm_projector.named_parameters(prefix="mm_projector"))
        tensors = {name: load() for name, load in found.items()}
        diff_keys(tensors, own).require(
            f"model.projection_from={file} and a projector from model.frame_dim={self.config.frame_dim} to a LLaMA of "
            f"width {self.config.llama.dim}"
        )
        check_sound(tensors, f"model.projection_from={file}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
            if self.config.marks and (rows := self._marks_of(file)) is not None:
                check_sound({"the rows of the marks": rows}, f"model.projection_from={file}")
                self.video_marks.copy_(rows)

    def take_published(self, file: Path) -> str:
        """Set what trains from a projector file or the variant's model.bin (vlm.models.video_chatgpt_start)."""
        return put_published(self, self.config.llama.vocab_size, file)

    def _marks_of(self, file: Path) -> Tensor | None:
        """(2, H) rows of the marks in a published file: the last ones of its embedding. None: it has none. A whole
        language model has some only where it knows the new words."""
        tensors = open_tensors(file)
        load = next((load for name, load in tensors.items() if name.endswith("embed_tokens.weight")), None)
        if load is None:
            return None
        rows = load()
        whole = any(".layers." in name for name in tensors)
        if whole and len(rows) != self.config.llama.vocab_size + self.config.new_words:
            return None
        if len(rows) < 2 or rows.shape[1] != self.config.llama.dim:
            raise UserError(
                f"model.projection_from={file}: its embedding is {tuple(rows.shape)}, no rows for a LLaMA of width "
                f"{self.config.llama.dim}"
            )
        return rows[-2:]

    # ------------------------------------------------------------------------------------------------------ the video

    def encode_video(self, batch: Batch) -> Tensor | None:
        """(V, N, H): the last state of each place, projected."""
        states = self._states(batch)
        return None if states is None else self.mm_projector(self._encoded(states, states.shape[2] - 1))

    def block_arguments(self, names: Sequence[str], rows: Sequence[TextRows], batch: Batch) -> dict[str, Any]:
        """With fusion: what each block adds."""
        vectors = self.fused(batch)
        if vectors is None:
            return {}
        shares = torch.cat([owners(part, vectors.shape[1], self.config.num_video_tokens) for part in rows])
        return {"additions": Additions(vectors, shares)}

    def fused(self, batch: Batch) -> Tensor | None:
        """(Q, V, H) what the fusion makes of each state of each video; None: there is no fusion, or no video."""
        states = self._states(batch) if self.config.fusion else None
        if states is None:
            return None
        made = []
        for number, (reduce, project) in enumerate(zip(self.reducers, self.projecters)):
            over_time = self._encoded(states, number).transpose(1, 2)
            made.append(project(reduce(over_time)[..., 0]))
        return torch.stack(made) * self.config.fusion_scale

    def _states(self, batch: Batch) -> Tensor | None:
        """(V, N, Q, D) stored states, as stored; None: the batch has no video. UserError: they are of other sizes."""
        c, named = self.config, ", ".join(batch.keys)
        tokens = batch.frame_tokens
        if tokens is None:
            if batch.frames is not None:
                raise UserError(
                    f"{named}: the batch has pixels, but this model reads CLIP's stored features; make them with "
                    "tools/extract_features.py"
                )
            return None
        if tuple(tokens.shape[1:]) != (c.frame_tokens, c.frame_dim):
            raise UserError(
                f"{named}: a place's stored states are {tuple(tokens.shape[1:])}, but model.frame_tokens and "
                f"model.frame_dim are {(c.frame_tokens, c.frame_dim)}: shards and recipe do not fit"
            )
        if set(batch.frame_counts) != {c.num_video_tokens} or sum(batch.frame_counts) != len(tokens):
            raise UserError(
                f"{named}: videos of {', '.join(map(str, batch.frame_counts)) or 'no'} places in {len(tokens)}, but "
                f"model.num_video_tokens is {c.num_video_tokens}: shards and recipe do not fit"
            )
        return tokens.unflatten(0, (len(batch.frame_counts), c.num_video_tokens))

    def _encoded(self, states: Tensor, number: int) -> Tensor:
        """(V, N, D): one state of all places in the projector's precision, with its encodings. `states` stay as they
        are."""
        state = states[:, :, number].to(self.mm_projector.weight.dtype)
        return self.pes[number](state) if self.config.positional_encodings else state

    # ------------------------------------------------------------------------------------------------- for the trainer

    def trainable(self, name: str) -> bool:
        """All but the language model, and of it the parts that `train_also` names."""
        if not name.startswith("llm."):
            return True
        last = self.config.llama.layers - 1
        block = re.match(r"llm\.model\.layers\.(\d+)\.", name)
        if block:
            number = int(block[1])
            of = {"layers", *(["first_layer"] * (number == 0)), *(["last_layer"] * (number == last))}
        else:
            of = {{_WORDS[0]: "embeddings", _WORDS[1]: "lm_head", "llm.model.norm.weight": "norm"}[name]}
        return not of.isdisjoint(self.config.train_also)

    def reached(self, name: str, batch: Batch) -> bool:
        """Text alone reaches what trains of the language model."""
        learnt = [rows for view, rows in batch.views.items() if self.predictions_of(view, rows)]
        return any(name.startswith("llm.") or rows.slots.numel() for rows in learnt)

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What shapes do not say: the language model's constants, the scale, words."""
        llama = settings["llama"]
        return {
            "fusion_scale": settings["fusion_scale"] if settings["fusion"] else None,
            "llama.norm_eps": llama["norm_eps"],
            "llama.rope_theta": llama["rope_theta"],
            "llama.kv_heads": llama["kv_heads"] or llama["heads"],
            "llama.vocab_size": llama["vocab_size"],
        }

    def sourced(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of the words that the language model was read with: those of new words follow from them."""
        return tensor[: self.config.llama.vocab_size] if name in _WORDS else tensor

    def cost(self, batch: Batch) -> Cost:
        """What the forward pass over this batch's views costs; parts of the language model that train count as such."""
        cost = super().cost(batch)
        learnt = sum(rows.targets.numel() for rows in batch.views.values())
        moved = 0.0
        for name, parameter in self.named_parameters():
            if name.startswith("llm.") and parameter.ndim == 2 and self.trainable(name) and name != _WORDS[0]:
                moved += 2.0 * parameter.numel() * (learnt if name == _WORDS[1] else cost.tokens)
        moved = min(moved, cost.frozen_flops)  # a narrowed last block costs less
        return cost._replace(trained_flops=cost.trained_flops + moved, frozen_flops=cost.frozen_flops - moved)

    def trained_flops(self, batch: Batch, tokens: int) -> float:
        """Forward FLOPs of the projector and of the fusion."""
        c, videos = self.config, len(batch.frame_counts)
        fusion = c.frame_tokens * (c.num_video_tokens + c.llama.dim) if c.fusion else 0
        return 2.0 * videos * c.frame_dim * (c.num_video_tokens * c.llama.dim + fusion)


def _projector_of(path: Path) -> dict[str, Any]:
    """Loaders of `mm_projector.weight` and `.bias` in a file or a folder, whatever stands before these names."""
    ends = {name: f"mm_projector.{name}" for name in ("weight", "bias")}
    return {
        end: load
        for name, load in open_tensors(path).items()
        for end in ends.values()
        if name == end or name.endswith(f".{end}")
    }
