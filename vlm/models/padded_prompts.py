"""Rows as LLMVA-GEBC's original trains on them: prompts filled up to the longest of a micro-batch, captions after that.

The padding is hidden from attention, but what a shorter prompt's caption begins with is predicted from its last pad,
which sees the prompt and not itself. All pads of a prompt see the same, so one of them stands for all here. This is
what `prompt_pad: right` asks for; it makes a row's loss depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from vlm.types import TextRows


def pad_prompts(rows: TextRows, pad: int, *, counted: bool) -> TextRows:
    """The same rows with a pad between prompt and text, where the prompt is shorter than the longest one.

    Args:
        pad: its id.
        counted: pads count as positions (LLaMA in transformers 4.28); else they have position -1, and what comes after
            them stands where it stood (OPT).
    """
    starts = list(accumulate(rows.lengths, initial=0))
    firsts = list(accumulate(rows.target_counts, initial=0))
    predictors, positions = rows.predictors.tolist(), rows.positions.tolist()
    begins = {
        row: positions[predictors[firsts[row]]] + 1 for row, count in enumerate(rows.target_counts) if count
    }  # row -> tokens of its prompt
    longest = max(begins.values(), default=0)
    short = {row: longest - length for row, length in begins.items() if length < longest}
    if not short:
        return rows
    assert not any(parent in short for parent in rows.parents), "rows go on from a row that is to be padded"

    parts: list[tuple[int, int, int, int]] = []  # of the new rows: first old place, one after the last, parent, targets
    moved: list[int] = []  # old row -> the new one that its children hang on
    shift: list[int] = []  # of each new row's positions
    pads: dict[int, int] = {}  # old row -> new number of its pad's row
    for row, parent in enumerate(rows.parents):
        above = moved[parent] if parent >= 0 else -1
        start, stop, count = starts[row], starts[row + 1], rows.target_counts[row]
        if row in short:
            place = max(predictors[firsts[row]] + 1, start)
            if place > start:
                parts.append((start, place, above, 0))
                shift.append(0)
                above = len(parts) - 1
            pads[row] = len(parts)
            parts.append((place, place, above, 0))
            shift.append(0)
            start = place
        parts.append((start, stop, above, count))
        shift.append(short.get(row, 0) if counted else 0)
        moved.append(len(parts) - 1)
    return _laid_out(rows, parts, shift, pads, (pad, longest - 1 if counted else -1))


def _laid_out(
    rows: TextRows,
    parts: Sequence[tuple[int, int, int, int]],
    shift: Sequence[int],
    pads: dict[int, int],
    pad: tuple[int, int],
) -> TextRows:
    """Rows from parts of the old ones; `pad`: id and position of a pad."""
    lengths = [max(stop - start, 1) for start, stop, _, _ in parts]  # an empty part is a pad
    begins = list(accumulate(lengths, initial=0))
    where = rows.tokens.device
    new = torch.cat([torch.arange(stop - start) + begins[n] for n, (start, stop, _, _) in enumerate(parts)]).to(where)
    size = begins[-1]
    blind = [begins[number] for number in pads.values()]
    firsts = list(accumulate(rows.target_counts, initial=0))
    predictors = new[rows.predictors]
    predictors[[firsts[row] for row in pads]] = torch.tensor(blind, device=where)

    def laid(old: Tensor, at_pads: int) -> Tensor:
        return old.new_full((size,), at_pads).index_copy(0, new, old)

    added = torch.tensor(shift, device=where).repeat_interleave(torch.tensor(lengths, device=where))
    positions = laid(rows.positions, 0) + added
    positions[blind] = pad[1]
    return replace(
        rows,
        tokens=laid(rows.tokens, pad[0]),
        positions=positions,
        after_video=laid(rows.after_video, True),
        slots=new[rows.slots],
        pick_slots=new[rows.pick_slots],
        predictors=predictors,
        lengths=tuple(lengths),
        parents=tuple(parent for _, _, parent, _ in parts),
        target_counts=tuple(count for _, _, _, count in parts),
        blind=tuple(blind),
    )
