"""The rival of bench/vqa.py: a LLaMA with gated prompts run the way the original code of Vamos runs it.

The same model as vlm.models.vamos, on plain torch: rows are padded to max_seq_len, all attention scores of a block
stand in one (tokens, prompt rows + tokens) matrix per head with a softmax for each of its two parts, the vocabulary is
scored at every position, and to answer a question every option is a row of its own. Nothing is slowed down on purpose:
frozen weights have no gradients, and there are no copies or casts that the method does not need.

Letters: B rows, S tokens of a row (max_seq_len), A prompt rows, H heads, E width of a head, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm.models.vamos import Vamos
from vlm.weights import halves_to_pairs

PADDING = 0
"""Id of padding and of labels that are not learnt, as in the original."""


class Norm(nn.Module):
    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False).requires_grad_(False)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (linear(dim, dim) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(1, heads, 1, 1))

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """x (B, S, D), turns (S, E / 2) complex, mask (S, S) of 0 and -inf, prompt (A, D) -> (B, S, D)."""
        rows, length, dim = x.shape
        q, k, v = (project(x).view(rows, length, self.heads, -1) for project in (self.wq, self.wk, self.wv))
        q, k = rotate(q, turns), rotate(k, turns)
        own_k, own_v = (
            project(prompt).view(1, len(prompt), self.heads, -1).expand(rows, -1, -1, -1)
            for project in (self.wk, self.wv)
        )
        q, k, v = (x.transpose(1, 2) for x in (q, torch.cat([own_k, k], dim=1), torch.cat([own_v, v], dim=1)))
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        prompted, text = scores.split([len(prompt), length], dim=3)
        weights = torch.cat([self.gate.tanh() * prompted.softmax(dim=-1), (text + mask).softmax(dim=-1)], dim=3)
        return self.wo((weights @ v).transpose(1, 2).reshape(rows, length, dim))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring pairs of (B, S, H, E) as complex numbers, turned by position."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(3)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = linear(dim, hidden), linear(dim, hidden), linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm, self.ffn_norm = Norm(dim, epsilon), Norm(dim, epsilon)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns, mask, prompt)
        return x + self.feed_forward(self.ffn_norm(x))


class Rival(nn.Module):
    """Made from one of our models, with its weights under Meta's and Vamos' names."""

    def __init__(self, ours: Vamos, max_seq_len: int) -> None:
        super().__init__()
        size, epsilon = ours.config.llama, ours.config.llama.norm_eps
        assert size.num_kv_heads == size.heads, "the rival is written without grouped heads"
        assert ours.config.prompted == size.layers, "the rival has prompts in every block"
        self.adapter_len, self.num_frames = ours.config.adapter_len, ours.config.num_frames
        self.tok_embeddings = nn.Embedding(size.vocab_size, size.dim).requires_grad_(False)
        self.adapter_query = nn.Embedding(self.adapter_len * size.layers, size.dim)
        self.visual_proj = nn.Linear(ours.config.feature_dim, size.dim, bias=False)
        self.layers = nn.ModuleList(Block(size.dim, size.heads, size.hidden, epsilon) for _ in range(size.layers))
        self.norm, self.output = Norm(size.dim, epsilon), linear(size.dim, size.vocab_size)
        theta = ours.config.rope_theta or size.rope_theta
        width = size.dim // size.heads
        frequencies = theta ** -(torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(max_seq_len).float(), frequencies)
        self.turns = torch.polar(torch.ones_like(angles), angles)
        self.mask = torch.full((max_seq_len, max_seq_len), float("-inf")).triu(1)
        self.load_state_dict(renamed(ours))

    def forward(self, ids: Tensor, labels: Tensor, features: Tensor, video_start: int) -> Tensor:
        """Logits at every position but the last, ((S - 1) * B, words), and their labels in the same order.

        Args:
            ids, labels: (B, S) int64; features: (B, N, feature_dim) of each row's video, which starts at `video_start`.
        """
        x = self.tok_embeddings(ids)
        x[:, video_start : video_start + self.num_frames] = self.visual_proj(features)
        prompts = self.adapter_query.weight.view(len(self.layers), self.adapter_len, -1)
        for layer, prompt in zip(self.layers, prompts):
            x = layer(x, self.turns, self.mask, prompt)
        return self.output(self.norm(x))[:, :-1]

    def loss(self, ids: Tensor, labels: Tensor, features: Tensor, video_start: int) -> Tensor:
        """Mean over the labelled tokens of the rows."""
        logits = self(ids, labels, features, video_start)
        return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=PADDING)

    @torch.no_grad()
    def option_losses(self, ids: Tensor, labels: Tensor, features: Tensor, video_start: int) -> Tensor:
        """(B, K) mean loss of each option of B questions, ids and labels (B, K, S); the least is the answer."""
        questions, options = ids.shape[:2]
        features = features.repeat_interleave(options, dim=0)
        labels = labels.flatten(0, 1)
        logits = self(ids.flatten(0, 1), labels, features, video_start)
        losses = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=PADDING, reduction="none")
        return (losses.sum(1) / (losses != 0).sum(1)).view(questions, options)


_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "llm.model.embed_tokens": "tok_embeddings",
    "llm.model.norm": "norm",
    "llm.lm_head": "output",
    "llm.model.": "",
}


def renamed(ours: Vamos) -> dict[str, Tensor]:
    """Copies of our tensors under the rival's names, q and k in Meta's order."""
    tensors = {}
    for name, tensor in ours.state_dict().items():
        value = tensor.clone()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = halves_to_pairs(value, ours.config.llama.heads)
        for theirs, old in _NAMES.items():
            name = name.replace(theirs, old)
        tensors[name] = value
    return tensors
