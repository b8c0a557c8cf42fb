"""Texts that a selector thins out before a language model reads them: cut into segments, of each one token stays.

    kept = Picks(keep=40)                        # one for each example
    first, count = kept.add(Passage(caption_ids, question_ids))
    batch = gather_passages([kept.passages, ...], keep=40)

The rows hold `count` empty places for the chosen tokens (`Row.picks`), as they do for a video; what stands there is
decided in the model (vlm.nn.selector). So rows have their final length before anything is chosen. After Vamos
(arXiv 2311.13627), which cuts the caption into k segments and chooses one token of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm.types import Passage, Passages


def num_picks(length: int, keep: int) -> int:
    """Tokens that stay of `length`: `keep`, or all where there are no more."""
    return min(length, keep)


def segments(length: int, keep: int) -> list[range]:
    """`length` tokens cut into equal segments (to within a token), as many as there are to be chosen."""
    count = num_picks(length, keep)
    return [range(length * part // count, length * (part + 1) // count) for part in range(count)]


class Picks:
    """The passages of one example, each once, and the number of the first token chosen from each."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._first: dict[Passage, int] = {}
        self._total = 0

    def add(self, passage: Passage) -> tuple[int, int]:
        """(number of the first token chosen from it, how many are), counted over all that was added."""
        assert passage.ids, "an empty passage"
        count = num_picks(len(passage.ids), self.keep)
        if passage not in self._first:
            self._first[passage] = self._total
            self._total += count
        return self._first[passage], count

    @property
    def passages(self) -> tuple[Passage, ...]:
        """In the order in which they were first added."""
        return tuple(self._first)


def total_picks(passages: Sequence[Passage], keep: int) -> int:
    """Tokens that are chosen from all of them."""
    return sum(num_picks(len(passage.ids), keep) for passage in passages)


def gather_passages(passages: Sequence[Passage], keep: int) -> Passages:
    """The passages of a batch, in order. Without any there is one token to be chosen, which no row reads: the selector
    must run in every process or in none (ZeRO-3)."""
    tokens: list[int] = []
    chosen: list[list[int]] = []
    chosen_for: list[list[int]] = []
    for passage in passages or [Passage((0,))]:
        start = len(tokens)
        task = list(range(start + len(passage.ids), start + len(passage.ids) + len(passage.task)))
        tokens += [*passage.ids, *passage.task]
        for part in segments(len(passage.ids), keep):
            chosen.append([start + place for place in part])
            chosen_for.append(task)
    return Passages(tokens=torch.tensor(tokens, dtype=torch.int64), segments=_table(chosen), tasks=_table(chosen_for))


def _table(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """(rows, longest) int64, -1 after a row's end."""
    table = torch.full((len(rows), max(map(len, rows))), -1, dtype=torch.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return table
