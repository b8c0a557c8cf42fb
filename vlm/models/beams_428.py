"""Beam search by the rules of transformers 4.28, which the published GEBC captions were made with.

What differs from later rules (and only for that it is kept; used behind `GenerationConfig.rules`):

* a text's score is its log-probability divided by its length to the power `length_penalty`, where the length counts one
  token before the first (the begin token that 4.28 put before embedded prompts) and never the end;
* a row is done when its worst kept text is at least as good as its best running beam could become if it ended now; the
  length for this is one more for every unfinished row before it in the batch (an oversight of 4.28), so texts can
  depend on their neighbours.

Letters: B rows, K beams, L tokens of a prompt, V words, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from vlm.models.generation_config import GenerationConfig

_NEVER = -1e9  # start of the beams that are copies of the first


def write(
    llm: Any, inputs: Tensor, mask: Tensor, config: GenerationConfig, ends: list[int], pad: int, together: bool
) -> list[list[int]]:
    """The texts after embedded prompts; greedy with one beam.

    Args:
        inputs, mask: (B, L, D), and (B, L) int64, 0 where a prompt is filled up.
        ends: ids that end a text.
        pad: what finished rows go on with.
        together: make as many passes as the other processes do.
    Returns:
        B lists of ids; from greedy search with their ends and pads.
    """
    beams = config.num_beams
    reader = _Reader(llm, inputs.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0))
    search = _Beams(len(inputs), config, ends, pad) if beams > 1 else _Greedy(len(inputs), ends, pad)
    ids = mask.new_zeros(len(inputs) * beams, 0)
    for _ in range(config.max_new_tokens):
        logits = reader.next(ids)
        if not search.done:
            scores = logits if beams == 1 else functional.log_softmax(logits, dim=-1)
            scores = _processed(scores, ids, config, ends, llm.config.bos_token_id)
            chosen, words = search.step(scores, ids)
        else:
            chosen, words = torch.arange(len(ids), device=ids.device), ids.new_full((len(ids),), pad)
        ids = torch.cat([ids[chosen], words[:, None]], dim=1)
        if beams > 1:
            reader.reorder(chosen)
        if not _goes_on(not search.done, together, ids.device):
            break
    return search.texts(ids)


class _Reader:
    """The language model with its cache; rows are (B * K)."""

    def __init__(self, llm: Any, inputs: Tensor, mask: Tensor) -> None:
        self.llm, self.inputs, self.mask = llm, inputs, mask
        self.cache: Any = DynamicCache(config=llm.config)

    def next(self, ids: Tensor) -> Tensor:
        """(rows, tokens so far) -> logits of the next (rows, V) fp32."""
        positions = self.mask.cumsum(1) - 1
        hidden = -1 if self.llm.config.model_type == "opt" else 1  # where 4.28 put tokens that are hidden
        positions = positions.masked_fill(self.mask == 0, hidden)
        if ids.shape[1]:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
            positions = self.mask.sum(1, keepdim=True) - 1
        read = {"input_ids": ids[:, -1:]} if ids.shape[1] else {"inputs_embeds": self.inputs}
        return (
            self.llm(
                **read,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )

    def reorder(self, chosen: Tensor) -> None:
        self.cache.reorder_cache(chosen)


def _processed(scores: Tensor, ids: Tensor, config: GenerationConfig, ends: list[int], begin: int | None) -> Tensor:
    """Repetition penalty, which counts the begin token too, and no end before `min_new_tokens`."""
    if config.repetition_penalty != 1:
        written = ids if begin is None else torch.cat([ids.new_full((len(ids), 1), begin), ids], dim=1)
        found = scores.gather(1, written)
        penalty = config.repetition_penalty
        scores = scores.scatter(1, written, torch.where(found < 0, found * penalty, found / penalty))
    if ids.shape[1] < config.min_new_tokens and ends:
        scores = scores.clone()
        scores[:, ends] = -torch.inf
    return scores


class _Greedy:
    def __init__(self, rows: int, ends: list[int], pad: int) -> None:
        self.ends, self.pad = ends, pad
        self.finished = [False] * rows

    @property
    def done(self) -> bool:
        return all(self.finished)

    def step(self, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        words = scores.argmax(dim=1)
        words = words.masked_fill(torch.tensor(self.finished, device=words.device), self.pad)
        self.finished = [old or word in self.ends for old, word in zip(self.finished, words.tolist())]
        return torch.arange(len(words), device=words.device), words

    def texts(self, ids: Tensor) -> list[list[int]]:
        return ids.tolist()


class _Beams:
    """B rows with K running beams and up to K finished texts each."""

    def __init__(self, rows: int, config: GenerationConfig, ends: list[int], pad: int) -> None:
        self.beams, self.ends, self.pad = config.num_beams, ends, pad
        self.kept = [_Kept(config.num_beams, config.length_penalty) for _ in range(rows)]
        self.finished = [False] * rows
        self.totals = torch.tensor([0.0] + [_NEVER] * (config.num_beams - 1)).repeat(rows, 1)

    @property
    def done(self) -> bool:
        return all(self.finished)

    def step(self, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One token more: log-probabilities (B * K, V), ids so far (B * K, tokens) -> which beam each new one goes on
        from (B * K,), and with which word (B * K,)."""
        words_known = scores.shape[1]
        summed = (scores + self.totals.to(scores.device).flatten()[:, None]).view(len(self.kept), -1)
        # enough for K beams that go on, whatever else ends; with one end these are 4.28's 2 K
        most = min((1 + len(self.ends)) * self.beams, summed.shape[1])
        best, places = (x.tolist() for x in summed.topk(most, dim=1))
        length = ids.shape[1] + 1
        chosen, words, totals = [], [], []
        for row, kept in enumerate(self.kept):
            if self.finished[row]:
                chosen += [0] * self.beams
                words += [self.pad] * self.beams
                totals += [0.0] * self.beams
                continue
            taken = 0
            for rank, (score, place) in enumerate(zip(best[row], places[row])):
                beam, word = row * self.beams + place // words_known, place % words_known
                if word in self.ends:
                    if rank < self.beams:  # else others are better
                        kept.add(ids[beam].tolist(), score)
                    continue
                chosen.append(beam)
                words.append(word)
                totals.append(score)
                taken += 1
                if taken == self.beams:
                    break
            length += 1  # one more for each unfinished row: see above
            self.finished[row] = kept.is_settled(best[row][0], length)
        self.totals = torch.tensor(totals).view(len(self.kept), self.beams)
        return torch.tensor(chosen, device=ids.device), torch.tensor(words, device=ids.device)

    def texts(self, ids: Tensor) -> list[list[int]]:
        """The best text of each row; beams that still run in a row that is not settled count as texts."""
        for row, kept in enumerate(self.kept):
            if not self.finished[row]:
                for beam in range(self.beams):
                    kept.add(ids[row * self.beams + beam].tolist(), float(self.totals[row, beam]))
        return [kept.best() for kept in self.kept]


class _Kept:
    """The best K finished texts of a row."""

    def __init__(self, size: int, length_penalty: float) -> None:
        self.size, self.length_penalty = size, length_penalty
        self.texts: list[tuple[float, list[int]]] = []
        self.worst = 1e9

    def add(self, ids: list[int], total: float) -> None:
        score = total / (len(ids) + 1) ** self.length_penalty
        if len(self.texts) == self.size and score <= self.worst:
            return
        self.texts.append((score, ids))
        if len(self.texts) > self.size:
            ranked = sorted((known, place) for place, (known, _) in enumerate(self.texts))
            del self.texts[ranked[0][1]]
            self.worst = ranked[1][0]
        else:
            self.worst = min(score, self.worst)

    def is_settled(self, best_total: float, length: int) -> bool:
        return len(self.texts) == self.size and self.worst >= best_total / length**self.length_penalty

    def best(self) -> list[int]:
        return sorted(self.texts, key=lambda text: text[0])[-1][1]


def _goes_on(mine: bool, together: bool, where: torch.device) -> bool:
    """Whether this process, or where they go together any process, has a text to go on with."""
    if not together:
        return mine
    flag = torch.tensor(float(mine), device=where)
    torch.distributed.all_reduce(flag)
    return bool(flag > 0)
