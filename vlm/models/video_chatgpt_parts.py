"""What Video-ChatGPT and its variant add to a frozen LLaMA: rows for new words, encodings of places, fusion.

Letters: V videos, N places of a video, Q states of a place, D their width, S tokens, R rows, H width of the LLaMA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.types import TextRows, UserError


def add_words(llm: PreTrainedModel, count: int) -> Tensor:
    """Append `count` rows to the embedding and to the output layer, each the mean of the rows before it.

    The published code leaves the first of them (<vid_patch>, which is never read and hardly ever written) random and
    makes the others the mean of all before, it included; here none is random, so they follow from the model.

    Returns:
        (1, H) the mean of the embedding's rows, which its new rows are.
    """
    means = []
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        assert isinstance(layer, (nn.Embedding, nn.Linear))
        rows = layer.weight.detach()
        mean = rows.mean(0, keepdim=True, dtype=torch.float32)
        means.append(mean)
        new = torch.cat([rows, mean.to(rows.dtype).expand(count, -1)])
        layer.weight = nn.Parameter(new, requires_grad=False)
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings = len(new)
        else:
            layer.out_features = len(new)
            layer.register_forward_pre_hook(_in_own_precision)
    words = int(llm.config.vocab_size) + count
    llm.config.vocab_size = words
    llm.vocab_size = words  # type: ignore[assignment]
    return means[0]


def _in_own_precision(layer: nn.Linear, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs of the blocks for an output layer that trains in fp32 above bf16 blocks, or the other way round."""
    return (given[0].to(layer.weight.dtype),)


def with_marks(ids: Tensor, text: Tensor, marks: Tensor, first: int) -> Tensor:
    """Embedded words (..., H) of ids (...), in which words `first` and `first` + 1 are rows of `marks` (2, H)."""
    which = torch.stack([ids == first, ids == first + 1], dim=-1)
    # a product, since its backward pass sums in one order on every device, unlike that of picking rows
    rows = which.to(text.dtype) @ marks.to(text.dtype)
    return torch.where(which.any(-1, keepdim=True), rows, text)


class PositionalEncoding(nn.Module):
    """Learned encodings of places, under their published name."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.positional_encodings = nn.Parameter(torch.randn(places, width))

    def forward(self, states: Tensor) -> Tensor:
        """(V, N, D) -> (V, N, D), a new tensor: the published code adds in place, so a second pass adds again."""
        return states + self.positional_encodings


def encodings(states: int, places: int, width: int) -> nn.ModuleList:
    """One for each state."""
    return nn.ModuleList(PositionalEncoding(places, width) for _ in range(states))


def owners(rows: TextRows, videos: int, places: int) -> Tensor:
    """(S, V) fp32: 1 where a token's row has this video, else 0; a row without video has none.

    Raises:
        UserError: rows of different videos share a beginning, to which both videos would have to be added.
    """
    where = rows.tokens.device
    numbers = torch.arange(len(rows.lengths)).repeat_interleave(torch.tensor(rows.lengths))
    row_of = numbers.to(where, non_blocking=True)
    has = torch.zeros(len(rows.lengths), videos, device=where)
    has[row_of[rows.slots], rows.sources // places] = 1.0
    if max(rows.parents) >= 0:
        has = _through_trees(has, rows)
    return has[row_of]


def _through_trees(has: Tensor, rows: TextRows) -> Tensor:
    """`has` (R, V) for rows that go on from others: what one row of a tree has, all have."""
    has = has.clone()
    roots = list(range(len(rows.parents)))
    for row, parent in enumerate(rows.parents):
        if parent >= 0:
            roots[row] = roots[parent]
            has[roots[row]] = has[roots[row]].maximum(has[row])
    shared = has[roots]
    if bool((shared.sum(1) > 1).any()):
        raise UserError("model.fusion: rows of different videos share their beginning, to which neither can be added")
    return shared
