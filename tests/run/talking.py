"""A tiny model that talks in small letters, for tests of the chat: what it says depends on the video and on all words.

The weights are random, but those of the output layer let nothing but letters and blanks be written, and those that
train are large enough for two videos to be told apart.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from string import ascii_lowercase

import av
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.config import to_dict
from vlm.data.tokenizers import ByteTokenizer
from vlm.recipe import Recipe, load
from vlm.run import checkpoint

RECIPE = "video_llama.debug"


def overrides(folder: Path, *more: str) -> list[str]:
    """Settings of `RECIPE` with which it reads the language model in `folder`; no shards are looked for."""
    nowhere = folder / "nowhere"
    return [
        f"model.llama.path={folder / 'llama'}",
        "inputs.max_length=400",
        f"eval.shards={nowhere}",
        f"data.shards={nowhere}",
        *more,
    ]


def write_talker(folder: Path, ends: float = 0.0, layers: int = 2) -> Path:
    """Write a language model to `folder`/llama, and a checkpoint of `RECIPE` on it, whose folder is returned.

    Args:
        ends: size of the end token's row of the output layer, where letters have 1: with 0 no answer ends by itself.
        layers: of the language model, whose time for a token they are.
    """
    torch.manual_seed(7)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=320,
            rms_norm_eps=load(RECIPE).model.llama.norm_eps,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for parameter in llama.model.layers.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        llama.model.embed_tokens.weight.normal_(0, 1)
        head = torch.zeros_like(llama.lm_head.weight)
        for letter in f"{ascii_lowercase} ":
            head[ByteTokenizer().encode(letter)[0]] = torch.randn(32)
        head[ByteTokenizer.eos] = ends * torch.randn(32)
        llama.lm_head.weight.copy_(head)
    llama.save_pretrained(folder / "llama")
    recipe = load(RECIPE, overrides(folder, f"model.llama.layers={layers}"))
    system = quiet(recipe)
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    weights = {name: p.detach().clone() for name, p in system.named_parameters() if p.requires_grad}
    root = folder / "run" / "checkpoints"
    state = {"step": 3, "recipe": to_dict(recipe)}
    written = checkpoint.write(root, state, weights, {}, system.frozen_hash())
    assert checkpoint.resolve(folder / "run") == written == root / "step-00000003"
    return folder / "run"


def quiet(recipe: Recipe) -> torch.nn.Module:
    """The model of a recipe, as it is built."""
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        return recipe.model.build()


def write_clip(path: Path, colour: tuple[int, int, int], frames: int = 12, fps: int = 6) -> Path:
    """A bright bar of this colour that wanders."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.full((48, 64, 3), 20, np.uint8)
            picture[:, 4 * number : 4 * number + 12] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
