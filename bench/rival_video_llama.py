"""The rival of bench/video_llama.py: Video-LLaMA stepped the plain way, as its published code does.

The same modules and weights. Frames go through EVA and Q-Former in every step; rows of text are padded to the longest
of the batch; transformers' LlamaForCausalLM attends under a mask and scores the vocabulary at every position. Nothing
is slowed down on purpose: what is frozen runs without a graph, attention is torch's fused one, weights are not copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.models.video_llama import VideoLlama
from vlm.types import IGNORE


class Padded(NamedTuple):
    """Rows of a batch. B rows, L tokens of the longest."""

    ids: Tensor  # (B, L) int64
    labels: Tensor  # (B, L) int64, IGNORE where nothing is learnt
    mask: Tensor  # (B, L) int64, 0 behind a row's end


def pad(rows: Sequence[Sequence[int]], learnt: Sequence[Sequence[bool]]) -> Padded:
    """Rows of ids, and of each token whether it is to be predicted."""
    shape = (len(rows), max(map(len, rows)))
    ids, labels, mask = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE), torch.zeros(shape)
    for at, (row, told) in enumerate(zip(rows, learnt, strict=True)):
        ids[at, : len(row)] = torch.tensor(row)
        labels[at, : len(row)] = torch.tensor([token if wanted else IGNORE for token, wanted in zip(row, told)])
        mask[at, : len(row)] = 1
    return Padded(ids, labels, mask.long())


class Rival(nn.Module):
    """Made from one of our models: what trains is copied, what is frozen is shared."""

    def __init__(self, ours: VideoLlama) -> None:
        super().__init__()
        self.tower = ours.tower
        for name in ("video_query_tokens", "video_frame_position_embedding", "video_Qformer", "llama_proj"):
            setattr(self, name, copy.deepcopy(getattr(ours, name)))
        size = ours.config.llama
        config = LlamaConfig(
            hidden_size=size.dim, intermediate_size=size.hidden, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.num_kv_heads, vocab_size=size.vocab_size,
            rms_norm_eps=size.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
            tie_word_embeddings=False, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            llama = LlamaForCausalLM(config)
        llama.load_state_dict(ours.llm.state_dict(), assign=True)
        llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
        self.llama = llama.requires_grad_(False).eval()

    def video(self, frames: Tensor, num_videos: int) -> Tensor:
        """Frames (V * T, 3, H, W), normalised, of V videos -> (V, N, width of the LLaMA)."""
        with torch.no_grad():
            tokens = self.tower(frames).unflatten(0, (num_videos, -1))  # (V, T, Q, D)
        numbers = torch.arange(tokens.shape[1])
        memory = (tokens + self.video_frame_position_embedding(numbers)[None, :, None]).flatten(1, 2)
        queries = self.video_query_tokens.expand(num_videos, -1, -1)
        read = self.video_Qformer(query_embeds=queries, encoder_hidden_states=memory).last_hidden_state
        return self.llama_proj(read)

    def loss(self, frames: Tensor, rows: Padded, first: int) -> Tensor:
        """Mean over the tokens to be predicted; each row's video stands from its place `first` on."""
        embedded = self.llama.get_input_embeddings()(rows.ids)
        video = self.video(frames, len(rows.ids))
        stop = first + video.shape[1]
        embedded = torch.cat([embedded[:, :first], video, embedded[:, stop:]], dim=1)
        return self.llama(inputs_embeds=embedded, attention_mask=rows.mask, labels=rows.labels, use_cache=False).loss
