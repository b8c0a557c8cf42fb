"""Attention inside a transformers language model: packed rows, zero-gated prompts, a learned bias towards the video.

transformers hands every layer's post-rotary q, k, v and all extra arguments of `model(...)` to the attention function
whose name the model's config carries; importing this file registers "vlm" … `ATTENTION`. What the extra arguments
switch on:

* `spans`: rows laid end to end (vlm.data.packing). Each tree of rows is attended on its own, so nothing leaks.
* `prompts`: LLaMA-Adapter's zero-init attention (arXiv 2303.16199, section 3.2): queries also attend learned prompt
  rows, in a softmax of their own, times tanh of a gate that starts at 0. The rows are neither normed nor rotated.
* the prompts' video bias, as in Flipped-VQA (arXiv 2310.15747; not in the paper): text after the video sees the video
  with a learned number added to the score. The bias is rank one, so it is one more column of q and k.

Under ZeRO-3 a parameter exists only while its own module runs, so gates are modules, called here.

Letters: B batch (1 where rows are packed), H heads, G key heads, S tokens, A prompt rows, E width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from vlm.nn.attention import attention

ATTENTION = "vlm_causal"
"""Name to set as a config's attention implementation."""

_EXTRA = 8  # columns added for the bias: kernels want widths in eighths


_TOGETHER = 256  # a tree of rows of so many tokens, or fewer, is attended in one call


class Span(NamedTuple):
    """Queries that are attended in one call: tokens [start, stop) see the tokens of earlier spans and their own."""

    start: int
    stop: int
    before: tuple[int, ...]  # numbers of the spans whose tokens are seen, in order
    mask: Tensor | None  # (stop - start, tokens before + stop - start) bool; None: causal, with nothing before


def make_spans(
    lengths: Sequence[int], parents: Sequence[int], where: torch.device, blind: Sequence[int] = ()
) -> tuple[Span, ...]:
    """How to attend rows that form trees: a causal call for a row alone, one call for a small tree, else row by row.

    Args:
        lengths: tokens of each row, laid end to end.
        parents: for each row the row that it goes on from, or -1; trees stand depth first.
        where: device of the masks.
        blind: places that do not see themselves, and that none sees; each is a row of its own that goes on from one.
    """
    starts, ends = [0], list(range(1, len(lengths) + 1))
    for length in lengths:
        starts.append(starts[-1] + length)
    for row in reversed(range(len(lengths))):
        if parents[row] >= 0:
            assert parents[row] < row, f"row {row} stands before its parent"
            ends[parents[row]] = max(ends[parents[row]], ends[row])
    spans: list[Span] = []
    seen_by: list[tuple[int, ...]] = []  # of each row attended alone: its span and those of its ancestors
    row = 0
    while row < len(lengths):
        parent, end = parents[row], ends[row]
        assert parent < 0 or end <= ends[parent], f"the tree of row {parent} does not stand depth first"
        before = seen_by[parent] if parent >= 0 else ()
        if starts[end] - starts[row] > _TOGETHER:
            end = row + 1
        start, stop = starts[row], starts[end]
        mask = None
        if before or end > row + 1:
            past = sum(spans[number].stop - spans[number].start for number in before)
            mask = torch.ones(stop - start, past + stop - start, dtype=torch.bool, device=where)
            mask[:, past:] = _tree_mask(row, end, starts, parents, where)
            if inside := [past + place - start for place in blind if start <= place < stop]:
                mask[:, inside] = False
        seen_by += [(*before, len(spans))] * (end - row)
        spans.append(Span(start, stop, before, mask))
        row = end
    return tuple(spans)


def _tree_mask(row: int, end: int, starts: Sequence[int], parents: Sequence[int], where: torch.device) -> Tensor:
    """What the tokens of a tree's rows [row, end) see of one another, (tokens, tokens) bool."""
    size = starts[end] - starts[row]
    mask = torch.ones(size, size, dtype=torch.bool, device=where).tril()
    for later in range(row + 1, end):
        path, at = {later}, later
        while at != row:
            at = parents[at]
            assert at >= row, f"row {later} does not hang on row {row}"
            path.add(at)
        for other in range(row, later):
            if other not in path:
                across = slice(starts[other] - starts[row], starts[other + 1] - starts[row])
                mask[starts[later] - starts[row] : starts[later + 1] - starts[row], across] = False
    return mask


class Wanted(NamedTuple):
    """The places whose outputs a pass is for."""

    places: Tensor  # (Z,) int64
    mask: Tensor  # (Z, S) bool: what each of them sees


def make_wanted(places: Tensor, lengths: Sequence[int], parents: Sequence[int], blind: Sequence[int] = ()) -> Wanted:
    """What places of rows see; rows and `blind` as in `make_spans`.

    Args:
        places: (Z,) int64 among the rows' tokens, on the device that the mask is to be on.
    """
    where = places.device
    related = torch.eye(len(lengths), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            related[row] |= related[parent]
    row_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(where, non_blocking=True)
    mask = related.to(where, non_blocking=True)[row_of[places]][:, row_of]
    if blind:
        mask[:, list(blind)] = False
    return Wanted(places, mask & (torch.arange(len(row_of), device=where) <= places[:, None]))


class Gates(nn.Module):
    """The gates of one block, (1, H, 1, 1) each, under their published names.

    Without a bias the one gate is called `gate` (Vamos); with it, `gate1` and the bias itself `gate2` (Flipped-VQA).
    """

    def __init__(self, heads: int, video_bias: float | None) -> None:
        super().__init__()
        self.has_bias = video_bias is not None
        gate = nn.Parameter(torch.zeros(1, heads, 1, 1))
        if video_bias is None:
            self.gate = gate
        else:
            self.gate1 = gate
            self.gate2 = nn.Parameter(torch.full((1, heads, 1, 1), video_bias))

    def forward(self, scale: float) -> tuple[Tensor, Tensor | None]:
        """(tanh of the gate, bias / scale or None), both (1, H, 1, 1): new tensors, which outlive the parameters."""
        gate = self.gate1 if self.has_bias else self.gate
        return gate.tanh(), self.gate2 / scale if self.has_bias else None


class Prompts(NamedTuple):
    """What the blocks of one forward pass attend besides their tokens."""

    rows: Tensor  # (number of prompted blocks, A, D)
    gates: Mapping[int, Gates]  # number of a block in the model -> its gates, in the order of `rows`
    after_video: Tensor | None  # (S,) bool, or (B, S) of a batch: tokens that the bias acts on; None: no bias
    in_video: Tensor | None  # as `after_video`: tokens that they see with it

    def of(self, module: Any, dtype: torch.dtype) -> tuple[Tensor, Gates] | None:
        """Rows (A, D) and gates of an attention module; None: its block has no prompts."""
        if module.layer_idx not in self.gates:
            return None
        return self.rows[list(self.gates).index(module.layer_idx)].to(dtype), self.gates[module.layer_idx]

    def in_batch(self, lengths: Sequence[int], side: str) -> Prompts:
        """The same for packed rows that become those of a batch, filled up on the `side` "left" or "right"."""
        if self.after_video is None or self.in_video is None:
            return self
        after, inside = (
            pad_sequence(list(x.split(list(lengths))), batch_first=True, padding_side=side)
            for x in (self.after_video, self.in_video)
        )
        return self._replace(after_video=after, in_video=inside)

    def sides(self, query: Tensor, key: Tensor, wanted: Wanted | None) -> tuple[Tensor, Tensor]:
        """`after_video` for the queries and `in_video` for the keys, (1 or B, 1, S, 1) and (…, K, 1) in q's dtype.

        Of a batch, keys beyond the prompts are what was written since, after the video where there is one; beams are
        rows that follow one another.
        """
        assert self.after_video is not None
        assert self.in_video is not None
        after, inside = self.after_video, self.in_video
        if after.ndim == 1:
            after, inside = (after if wanted is None else after[wanted.places])[None], inside[None]
        else:
            written, beams = key.shape[2] - after.shape[1], len(query) // len(after)
            since = inside.any(dim=1, keepdim=True).expand(-1, written)
            after = torch.cat([after, since], dim=1)[:, key.shape[2] - query.shape[2] :]
            inside = functional.pad(inside, (0, written))
            after, inside = (x.repeat_interleave(beams, dim=0) for x in (after, inside))
        return tuple(x[:, None, :, None].to(query.dtype) for x in (after, inside))  # type: ignore[return-value]


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    spans: Sequence[Span] | None = None,
    prompts: Prompts | None = None,
    wanted: Wanted | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers.

    Args:
        module: the attention module of a block (k_proj, v_proj, layer_idx, num_key_value_groups).
        query: (B, H, S, E), rotated. key, value: (B, G, K, E); K is S, or more where a cache holds the past.
        attention_mask: (B, 1, S, K) bool or None; not looked at where `spans` is given.
        spans: how packed rows are attended; None: rows of a batch, by `attention_mask`.
        prompts: None: plain attention.
        wanted: the queries are those of these places alone (S is Z); None: of all places.
    Returns:
        (B, S, H, E), and None for the weights.
    """
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)
    found = None if prompts is None else prompts.of(module, value.dtype)
    gate, bias = (None, None) if found is None else found[1](scale)
    repeats = getattr(module, "num_key_value_groups", 1)  # OPT has no groups
    wide, wide_key, wide_value = query, _repeat(key, repeats), _repeat(value, repeats)
    if bias is not None and prompts is not None and prompts.after_video is not None:
        after, inside = prompts.sides(query, key, wanted)
        wide = _with_column(query, after * bias.to(query.dtype))
        wide_key = _with_column(wide_key, inside)
        wide_value = functional.pad(wide_value, (0, _EXTRA))
    if wanted is not None:
        out = functional.scaled_dot_product_attention(
            wide, wide_key, wide_value, attn_mask=wanted.mask, dropout_p=dropout, scale=scale
        )
    elif spans is None:
        out = _attend_batch(wide, wide_key, wide_value, attention_mask, dropout, scale)
    else:
        out = _attend_spans(wide, wide_key, wide_value, spans, dropout, scale)
    out = out[..., : query.shape[3]]
    if found is not None and gate is not None:
        rows = found[0]
        prompt_key, prompt_value = (
            _repeat(project(rows).view(1, len(rows), -1, query.shape[3]).transpose(1, 2), repeats)
            for project in (module.k_proj, module.v_proj)
        )
        prompt_value = gate.to(prompt_value.dtype) * prompt_value  # the gate of a head is that of all its outputs
        count = len(query)
        out = out + attention(
            query, prompt_key.expand(count, -1, -1, -1), prompt_value.expand(count, -1, -1, -1), scale=scale
        )
    return out.transpose(1, 2), None


def _repeat(x: Tensor, times: int) -> Tensor:
    """(B, G, K, E) -> (B, G * times, K, E): each key head serves `times` query heads in a row."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _with_column(x: Tensor, column: Tensor) -> Tensor:
    """(B, H, S, E) and one more column, (B, H, S, 1) or what broadcasts to it -> (B, H, S, E + 8), zeros at the end."""
    return torch.cat([x, functional.pad(column.expand(*x.shape[:3], 1), (0, _EXTRA - 1))], dim=3)


def _attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], dropout: float, scale: float) -> Tensor:
    assert len(q) == 1, f"packed rows are one sequence, not a batch of {len(q)}"
    lengths = [span.stop - span.start for span in spans]
    parts = [x.split(lengths, dim=2) for x in (q, k, v)]  # one split: its backward is one join
    out = []
    for number, span in enumerate(spans):
        own_q, own_k, own_v = (part[number] for part in parts)
        if span.mask is None:
            out.append(attention(own_q, own_k, own_v, dropout=dropout, causal=True, scale=scale))
            continue
        if span.before:
            own_k, own_v = (torch.cat([part[n] for n in (*span.before, number)], dim=2) for part in parts[1:])
        out.append(
            functional.scaled_dot_product_attention(
                own_q, own_k, own_v, attn_mask=span.mask, dropout_p=dropout, scale=scale
            )
        )
    # kernels return (1, S, H, E) seen from another side, and that is how the output is read
    return torch.cat([part.transpose(1, 2) for part in out], dim=1).transpose(1, 2)


def _attend_batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    causal = mask is None and q.shape[2] > 1
    if mask is None:
        return attention(q, k, v, dropout=dropout, causal=causal, scale=scale)
    mask = mask[..., : k.shape[2]]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


AttentionInterface.register(ATTENTION, causal_attention)
# without this second line transformers passes no mask at all, and padding would be attended in silence
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a LLaMA or an OPT, in order."""
    body: Any = model.base_model
    blocks = getattr(body, "layers", None)
    return body.decoder.layers if blocks is None else blocks


class ExactRotary(nn.Module):
    """A model's rotary tables, worked out in fp32 whatever precision the model is cast to.

    transformers keeps the frequencies in a buffer, which an engine that casts the whole model to bf16 rounds to three
    digits: at position 1000 the fastest angles are then off by radians. Here they are no buffer.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.frequencies = tuple(rotary.inv_freq.tolist())
        self.scaling = float(rotary.attention_scaling)
        self._tables: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B, S, E) in x's dtype, of the positions (B, S) int64."""
        if x.device not in self._tables:
            self._tables[x.device] = torch.tensor(self.frequencies, dtype=torch.float32, device=x.device)
        angles = position_ids[..., None].float() * self._tables[x.device]
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)
