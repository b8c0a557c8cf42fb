"""The token bottleneck of Vamos (arXiv 2311.13627): hard attention that lets few tokens of a caption through.

No code of it was ever released. From the paper and its project page: the caption is cut into k segments of equal
length; a lightweight selector (a shallow Transformer encoder, then a linear layer; 0.7 million parameters beside
LLaMA-3 8B) reads a segment together with the tokens of the task and chooses one token of it; Gumbel-softmax makes that
trainable; the k tokens are what the language model reads of the caption. Ours, where nothing is said: one block 128
wide, which gives those 0.7 million; sinusoidal places within task and segment; no biases, since one in front of a
softmax could not learn.

**How it learns: straight-through Gumbel-softmax** (Jang et al., arXiv 1611.01144). In training the language model reads
the very embedding of the token drawn (log-odds plus Gumbel noise, the largest), so it never sees a mixture of words, as
tests have none; the gradient flows as if it had read the soft mixture of its segment. That gradient is biased, but of
far lower variance than REINFORCE's and needs no baseline; without the noise a token that is passed over once would
hardly ever be tried. In tests there is no noise: the token with the largest score, the same every time.

Under ZeRO-3 a parameter exists only while its own module runs, so each is used in its module's `forward`.

Letters: T tokens, D width of their embeddings, W width of the selector, G segments, n tokens of the longest segment,
q of the longest task, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm.types import Passages

_KINDS = 2  # of tokens: those of the task, those to choose from


class Selector(nn.Module):
    """Chooses one token of each segment."""

    def __init__(self, dim: int, width: int, layers: int, heads: int, temperature: float) -> None:
        """
        Args:
            dim: D. width: W. layers: blocks of the encoder. heads: of each.
            temperature: of the softmax in training: the lower, the closer the gradient's mixture to the hard choice.
        """
        super().__init__()
        self.temperature = temperature
        self.reduce = nn.Linear(dim, width, bias=False)
        self.norm = nn.LayerNorm(width, bias=False)
        self.kind = nn.Embedding(_KINDS, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, embedded: Tensor, passages: Passages) -> tuple[Tensor, Tensor]:
        """Chosen tokens: their embeddings (G, D), in the dtype of `embedded`, and their places (G,) in `embedded`.

        Args:
            embedded: (T, D) embeddings of `passages.tokens`.
        """
        segments = passages.segments
        logits = self.logits(embedded, passages)
        noise = torch.zeros_like(logits)
        if self.training:
            noise = -torch.empty_like(logits).exponential_().log()  # Gumbel
        noisy = (logits + noise) / self.temperature
        chosen = segments.gather(1, noisy.argmax(1, keepdim=True)).squeeze(1)
        picked = embedded[chosen]
        if torch.is_grad_enabled() and logits.requires_grad:
            soft = noisy.softmax(1)
            # exactly 0, with the gradient of the soft mixture
            through = (soft - soft.detach()).to(embedded.dtype)
            picked = picked + (through[:, None] @ embedded[segments.clamp(min=0)])[:, 0]
        return picked, chosen

    def logits(self, embedded: Tensor, passages: Passages) -> Tensor:
        """(G, n) fp32 scores of each segment's tokens; -inf after its end. Arguments as `forward`."""
        places = torch.cat([passages.tasks, passages.segments], dim=1)
        there = places >= 0
        tasks, own = passages.tasks.shape[1], passages.segments.shape[1]
        kinds = torch.arange(_KINDS, device=places.device).repeat_interleave(
            torch.tensor((tasks, own), device=places.device), output_size=tasks + own
        )
        hidden = self.norm(self.reduce(embedded.to(self.reduce.weight.dtype)))  # each token once, not once a segment
        spots = torch.cat([torch.arange(count, device=places.device) for count in (tasks, own)])
        hidden = hidden[places.clamp(min=0)] + self.kind(kinds) + _waves(spots, hidden)
        for block in self.blocks:
            hidden = block(hidden, there)
        scores = self.score(hidden[:, tasks:]).squeeze(2).float()
        return scores.masked_fill(~there[:, tasks:], float("-inf"))


class _Block(nn.Module):
    """A Transformer encoder's block, normed after each part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.grow = nn.Linear(width, 4 * width, bias=False)
        self.shrink = nn.Linear(4 * width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """(G, tokens, W) -> the same. `there`: (G, tokens) bool, tokens that are seen."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.shrink(functional.gelu(self.grow(x))))


def _waves(spots: Tensor, like: Tensor) -> Tensor:
    """(tokens, W) sines and cosines of places, in the dtype of `like` (…, W)."""
    half = like.shape[-1] // 2
    speeds = 10000.0 ** (-torch.arange(half, device=spots.device).float() / half)
    angles = spots[:, None].float() * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)
