"""Video-LLaMA's vision branch (arXiv 2306.02858): a frozen LLaMA reads 32 tokens of a video or an image.

Both stages are this model: captions without a prompt, then dialogues; which, the rows say (vlm.data.dialogues). The
second begins with the first (`init_from`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.trained import start_from
from vlm.models.video_base import VideoConfig, VideoSystem
from vlm.types import UserError
from vlm.weights import diff_keys, open_tensors


@dataclass(kw_only=True, slots=True)
class VideoLlamaConfig(VideoConfig):
    """Video-LLaMA; every default is the published one."""

    llama: LlamaBaseConfig = field(default_factory=LlamaBaseConfig)
    """The frozen LLaMA: `llama("vicuna_7b_v0", path=...)`, LLaMA-2-chat, Ziya, BiLLa …"""
    projection_from: Path | None = None
    """A file whose `llama_proj` the projection begins with: MiniGPT-4's pretrained_minigpt4.pth, as in stage 1."""

    def __post_init__(self) -> None:
        VideoConfig.__post_init__(self)
        self.projection_from = None if self.projection_from is None else Path(self.projection_from)
        if self.projection_from is not None and self.init_from is not None:
            raise ValueError("model.projection_from and model.init_from are given: the latter has a projection too")

    def check_inputs(self, inputs: Any) -> None:
        """UserError where rows of these inputs are not this model's: sizes, or a tokenizer of another LLaMA."""
        self.check_frames_and_words(inputs, self.llama.vocab_size, self.llama.path, "model.llama")

    def build(self) -> VideoLlama:
        """The model with what is frozen loaded, its trainable parameters fresh or those of `init_from`."""
        model = VideoLlama(self)
        if self.init_from is not None:
            start_from(model, self.init_from)
        if self.projection_from is not None:
            model.take_projection(self.projection_from)
        return model


class VideoLlama(VideoSystem):
    """See the file's beginning."""

    projection = "llama_proj"

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__(config, config.llama.build())
        self.freeze()

    def take_projection(self, file: Path) -> None:
        """Set the projection from a file that holds `llama_proj.weight` and `.bias`.

        Raises:
            UserError: it holds none, or one for a LLaMA of another width.
        """
        found = {name: load for name, load in open_tensors(file).items() if name.startswith("llama_proj.")}
        own = {f"llama_proj.{name}": p for name, p in self.get_submodule("llama_proj").named_parameters()}
        if not found:
            raise UserError(f"model.projection_from={file}: holds no llama_proj.weight")
        tensors = {name: load() for name, load in found.items()}
        diff_keys(tensors, own).require(f"model.projection_from={file} and a LLaMA of width {self.config.llama.dim}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See VideoSystem; and what the LLaMA's shapes do not say."""
        llama = settings["llama"]
        return super().decisive(settings) | {
            "llama.norm_eps": llama["norm_eps"],
            "llama.rope_theta": llama["rope_theta"],
            "llama.kv_heads": llama["kv_heads"] or llama["heads"],
            "llama.vocab_size": llama["vocab_size"],
        }
