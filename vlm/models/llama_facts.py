"""What tells a LLaMA's sizes: params.json (Meta), config.json (Hugging Face); read, compared with tensors, written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm.models.llama_base import LlamaBaseConfig, read_llama
from vlm.types import UserError
from vlm.weights import Loader, open_tensors


def llama_config(folder: Path) -> LlamaBaseConfig:
    """The LLaMA in a Meta or Hugging Face folder: its params.json or config.json, and the shapes of its tensors.

    UserError: neither file, no number of heads, a rotary embedding of LLaMA 3.1, or tensors of other sizes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a LLaMA is a folder of Meta's or Hugging Face's.")
    meta, hf = folder / "params.json", folder / "config.json"
    file = next((f for f in (hf, meta) if f.is_file()), None)
    if file is None:
        raise UserError(
            f"{folder}: has neither params.json (Meta) nor config.json (Hugging Face), which tell the number of heads. "
            "Mend: copy it from where the weights came from."
        )
    stated = read_json(file)
    stated = {**stated, **(stated.get("rope_parameters") or {})}
    if stated.get("use_scaled_rope") or stated.get("rope_scaling") or stated.get("rope_type", "default") != "default":
        raise UserError(f"{file}: scaled rotary embedding (LLaMA 3.1) is not supported; use LLaMA 3.")
    heads, kv_heads, eps = (
        ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
        if file == hf
        else ("n_heads", "n_kv_heads", "norm_eps")
    )
    if not isinstance(stated.get(heads), int):
        raise UserError(f"{file}: {heads} is {stated.get(heads)!r}; it must be a number, and is not in the tensors.")
    tensors = _named(open_tensors(folder), folder)
    embeddings = tensors["model.embed_tokens.weight"]()
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    hidden = next((n for n in tensors if n.endswith("mlp.gate_proj.weight")), None)
    if not numbers or hidden is None:
        raise UserError(f"{folder}: holds no blocks of a LLaMA.")
    config = LlamaBaseConfig(
        path=folder,
        dim=embeddings.shape[1],
        layers=1 + max(numbers),
        heads=stated[heads],
        kv_heads=stated.get(kv_heads) or stated[heads],
        hidden=tensors[hidden]().shape[0],
        vocab_size=embeddings.shape[0],
        norm_eps=stated.get(eps, 1e-5 if file == meta else 1e-6),  # what either library takes where its file is silent
        rope_theta=float(stated.get("rope_theta") or 10000.0),
    )
    ours = {"dim": config.dim, "n_layers": config.layers, "hidden_size": config.dim, "vocab_size": config.vocab_size}
    ours |= {"num_hidden_layers": config.layers, "intermediate_size": config.hidden}
    for name, value in ours.items():
        # Meta's LLaMA 1 says vocab_size -1: the tokenizer decides
        if stated.get(name, value) not in (value, -1):
            raise UserError(f"{file}: {name} is {stated[name]}, but the tensors say {value}.")
    return config


def is_llama_folder(folder: Path) -> bool:
    """Whether a Hugging Face folder says that it holds a LLaMA."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "llama"


def refuse_other_sizes(config: LlamaBaseConfig, wanted: LlamaBaseConfig, subject: str) -> None:
    """UserError, with both values of each, where a LLaMA is not the one that a recipe describes."""
    names = ("dim", "layers", "heads", "num_kv_heads", "hidden", "vocab_size", "norm_eps", "rope_theta")
    wrong = [name for name in names if getattr(config, name) != getattr(wanted, name)]
    if wrong:
        lines = "\n".join(f"  {n}: {getattr(config, n)} there, {getattr(wanted, n)} in the recipe" for n in wrong)
        raise UserError(f"{subject}: another LLaMA than the recipe's.\n{lines}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; download it again.")
    return content


def _named(tensors: Mapping[str, Loader], folder: Path) -> dict[str, Loader]:
    """The tensors by transformers' names, q and k not yet renumbered: for their shapes."""
    named = read_llama(tensors, 1, 1, str(folder))
    if "model.embed_tokens.weight" not in named:
        raise UserError(f"{folder}: has no word embeddings, so it is no whole LLaMA.")
    return named


def expected_shapes(config: LlamaBaseConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a LLaMA, by transformers' names."""
    dim, key_rows = config.dim, config.dim // config.heads * config.num_kv_heads
    layer = {
        "self_attn.q_proj.weight": (dim, dim),
        "self_attn.k_proj.weight": (key_rows, dim),
        "self_attn.v_proj.weight": (key_rows, dim),
        "self_attn.o_proj.weight": (dim, dim),
        "mlp.gate_proj.weight": (config.hidden, dim),
        "mlp.down_proj.weight": (dim, config.hidden),
        "mlp.up_proj.weight": (config.hidden, dim),
        "input_layernorm.weight": (dim,),
        "post_attention_layernorm.weight": (dim,),
    }
    words = (config.vocab_size, dim)
    return {
        "model.embed_tokens.weight": words,
        **{f"model.layers.{n}.{name}": shape for n in range(config.layers) for name, shape in layer.items()},
        "model.norm.weight": (dim,),
        "lm_head.weight": words,
    }


def is_llama3(config: LlamaBaseConfig) -> bool:
    """LLaMA 3 by its vocabulary or, for sizes that were never published, its rotary embedding."""
    return config.vocab_size >= 100_000 or (config.vocab_size != 32000 and config.rope_theta == 500_000)


def hf_config(config: LlamaBaseConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of transformers' LlamaForCausalLM (versions 4 and 5)."""
    generation3 = is_llama3(config)
    context = 8192 if generation3 else 2048 if config.norm_eps == 1e-6 else 4096
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 128000 if config.vocab_size >= 128256 else 1,
        "eos_token_id": 128001 if config.vocab_size >= 128256 else 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def meta_params(config: LlamaBaseConfig) -> dict[str, Any]:
    """params.json. Key heads, multiplier, theta (which Flipped-VQA and ViCo refuse) are there only if they must be."""
    params: dict[str, Any] = {"dim": config.dim, "n_layers": config.layers, "n_heads": config.heads}
    if config.num_kv_heads != config.heads:
        params["n_kv_heads"] = config.num_kv_heads
    params["vocab_size"] = config.vocab_size
    multiple, multiplier = _hidden_rule(config.dim, config.hidden)
    params["multiple_of"] = multiple
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params["norm_eps"] = config.norm_eps
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    return params


def hidden_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward part by Meta's rule."""
    width = int(2 * (4 * dim) / 3)
    width = width if multiplier is None else int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def _hidden_rule(dim: int, hidden: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give a width: published pairs first, else any that do."""
    for multiplier, published in ((None, 256), (1.3, 1024)):
        for multiple in (published, 256, 1024, 4096, 512, 128, 64, 32, 16, 8):
            if hidden_width(dim, multiple, multiplier) == hidden:
                return multiple, multiplier
    if hidden_width(dim, hidden, None) == hidden:
        return hidden, None
    multiplier = (hidden + 0.5) / int(2 * (4 * dim) / 3)
    assert hidden_width(dim, 1, multiplier) == hidden
    return 1, multiplier
