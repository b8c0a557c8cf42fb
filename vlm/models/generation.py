"""Writing text: rows of a batch go on token by token, each as if it were alone.

    texts = generate(system, batch, GenerationConfig(num_beams=5), ends=[(tokenizer.eos,)], keys=keys)

The rows of `batch.prompts` are embedded as in training (video in its places) and given to transformers' `generate`,
padded at their beginnings. What a row becomes does not depend on its neighbours: padding is hidden from attention and
from positions, and what is sampled is drawn for each row by its own key.

Letters: B rows, L tokens of the longest row, S tokens of all rows, V words, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig as Settings
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vlm.data.rng import derive_seed
from vlm.models import beams_428
from vlm.models.causal import CausalSystem
from vlm.models.generation_config import GenerationConfig
from vlm.nn.language import Prompts
from vlm.nn.llama_layers import Additions
from vlm.types import Batch, UserError

Ends = Sequence[Sequence[int]]
Watch = Callable[[list[list[int]]], bool]
"""What each row has so far, its end included and filled up behind it -> whether to write no further."""


@torch.no_grad()
def generate(
    system: CausalSystem,
    batch: Batch,
    config: GenerationConfig,
    *,
    ends: Ends,
    pad: int | None = None,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """The texts that follow the rows of `batch.prompts`, without their ends. Call it in evaluation mode.

    Under ZeRO-3 all ranks must call it together, each with at least one row (`inputs.blank()` where one has nothing to
    write): they then make equally many passes, so that each finds the weights gathered.

    Args:
        ends: token sequences that end a text: the end token, and what else the inputs end texts with ("###").
        pad: id that fills up shorter rows; hidden from attention, so it matters with config.prompt_pad=right alone.
            None: OPT's own, or that of LLaMA's unknown word.
        seed: with `keys` decides what is sampled.
        keys: a name for each row; needed where config.sample is set.
        watch: called after each token; where it says so, texts end there. Beams are not watched: they change what was
            written.
    Raises:
        UserError: the batch has no such rows, rows are longer than the language model's positions, or a setting of
            the system has no meaning here.
    """
    rows = batch.prompts
    if rows is None or not rows.lengths:
        raise UserError(f"{', '.join(batch.keys)}: no prompts to go on from; these inputs are not for writing")
    assert max(rows.parents) < 0, "prompts are rows alone, not trees"
    assert not system.training, "generation is for evaluation mode"
    assert ends, "nothing would end a text"
    assert all(ends), "an empty end"
    assert keys is None or len(keys) == len(rows.lengths), f"{len(keys)} keys for {len(rows.lengths)} rows"
    assert keys is not None or not config.sample, "sampling needs a key for each row"
    assert watch is None or (config.num_beams == 1 and config.prompt_pad == "left"), "beams cannot be watched"
    check_positions(system.llm, max(rows.lengths) + config.max_new_tokens)
    pad = int(system.llm.config.model_type == "opt") if pad is None else pad

    def write(batch: Batch) -> list[list[int]]:
        assert batch.prompts is not None
        text = system.embed(batch.prompts, batch).split(batch.prompts.lengths)
        arguments = system.block_arguments(["prompts"], [batch.prompts], batch)
        for name, given in arguments.items():
            if isinstance(given, Prompts):
                arguments[name] = given.in_batch(rows.lengths, config.prompt_pad)
            elif isinstance(given, Additions):
                arguments[name] = given.in_batch(rows.lengths)
        with _given(system.llm.base_model, arguments):
            if config.rules == "4.28" and (config.num_beams > 1 or config.prompt_pad == "right"):
                inputs, mask = padded(
                    text, config.prompt_pad, system.llm.get_input_embeddings()(rows.tokens.new_tensor([pad]))
                )
                return beams_428.write(system.llm, inputs, mask, config, _single(ends), pad, is_sharded(system))
            draws = _draws(config, seed, keys)
            return _write(system.llm, text, config, ends, pad, draws, is_sharded(system), watch)

    return [cut(ids, ends, config.min_new_tokens) for ids in system(batch, instead=write)]


def cut(ids: Sequence[int], ends: Ends, at_least: int = 0) -> list[int]:
    """What stands before the first end that has `at_least` tokens before it."""
    for start in range(at_least, len(ids)):
        if any(tuple(ids[start : start + len(end)]) == tuple(end) for end in ends):
            return list(ids[:start])
    return list(ids)


def padded(rows: Sequence[Tensor], side: str, pad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (tokens, D) of one batch: (B, L, D), filled up with `pad` (1, D), and (B, L) int64, 0 where it was."""
    seen = [torch.ones(len(row), dtype=torch.int64, device=row.device) for row in rows]
    mask = pad_sequence(seen, batch_first=True, padding_side=side)
    inputs = pad_sequence(list(rows), batch_first=True, padding_side=side)
    return torch.where(mask[..., None].bool(), inputs, pad.to(inputs.dtype)), mask


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 has cut the weights among several processes, which then must make their passes together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        together
        and torch.distributed.get_world_size() > 1
        and any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    )


def check_positions(llm: PreTrainedModel, length: int) -> None:
    """UserError where a model with learned positions (OPT) has fewer than a row may become long."""
    known = llm.config.max_position_embeddings if llm.config.model_type == "opt" else length
    if length > known:
        raise UserError(
            f"a prompt and the text after it may have {length} tokens, but the language model knows {known} positions; "
            "lower inputs.max_length or eval.generation.max_new_tokens"
        )


def _write(
    llm: Any,
    text: Sequence[Tensor],
    config: GenerationConfig,
    ends: Ends,
    pad: int,
    draws: Tensor | None,
    together: bool,
    watch: Watch | None,
) -> list[list[int]]:
    """Through transformers."""
    inputs, mask = padded(text, "left", text[0].new_zeros(1, text[0].shape[1]))
    settings = Settings(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        num_beams=config.num_beams,
        do_sample=False,  # what is sampled is drawn by `_Draw`, so that it is the most likely token
        length_penalty=config.length_penalty,
        eos_token_id=_single(ends) or None,
        pad_token_id=pad,
    )
    long = [end for end in ends if len(end) > 1]
    stops: list[StoppingCriteria] = [_EndsWith(long, config.min_new_tokens, mask.device)] if long else []
    if watch is not None:
        stops.append(_Watched(watch))
    steps: list[LogitsProcessor] = []
    if config.repetition_penalty != 1:
        # not by `settings`, for then as many written tokens as the row has padding are passed over
        steps.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if draws is not None:
        steps.append(_Draw(draws.to(mask.device), config))
    ids = llm.generate(
        inputs_embeds=inputs,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList(steps),
        stopping_criteria=StoppingCriteriaList(stops),
        synced_gpus=together,
    )
    return ids.tolist()


def _single(ends: Ends) -> list[int]:
    return [end[0] for end in ends if len(end) == 1]


def _draws(config: GenerationConfig, seed: int, keys: Sequence[str] | None) -> Tensor | None:
    """(B, tokens) numbers from 0 to 1, a generator for each row; None: nothing is sampled."""
    if not config.sample or keys is None:
        return None
    made = []
    for key in keys:
        generator = torch.Generator().manual_seed(derive_seed("generation", seed, key))
        made.append(torch.rand(config.max_new_tokens, generator=generator))
    return torch.stack(made)


class _Draw(LogitsProcessor):
    """Leaves one token of each row: the one at which the row's number for this step falls among the probabilities."""

    def __init__(self, draws: Tensor, config: GenerationConfig) -> None:
        self.draws, self.config = draws, config

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """input_ids (B, tokens so far), scores (B, V) -> (B, V): 0 at the token, else minus infinity."""
        c = self.config
        likely, words = (scores / c.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        if c.top_k is not None:
            likely[:, c.top_k :] = 0
            likely = likely / likely.sum(-1, keepdim=True)
        likely = likely * (likely.cumsum(-1) - likely < c.top_p)
        total = likely.cumsum(-1)
        place = (total <= self.draws[:, input_ids.shape[1], None] * total[:, -1:]).sum(-1, keepdim=True)
        place = place.minimum((likely > 0).sum(-1, keepdim=True) - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, words.gather(1, place), 0.0)


class _EndsWith(StoppingCriteria):
    """Ends of several tokens."""

    def __init__(self, ends: Ends, at_least: int, where: torch.device) -> None:
        self.ends = [torch.tensor(list(end), device=where) for end in ends]
        self.at_least = at_least

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        """input_ids (B, tokens so far) -> (B,) bool."""
        met = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for end in self.ends:
            if input_ids.shape[1] >= self.at_least + len(end):
                met |= (input_ids[:, -len(end) :] == end).all(dim=1)
        return met


class _Watched(StoppingCriteria):
    """Ends all texts when whoever watches says so."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        """input_ids (B, tokens so far) -> (B,) bool."""
        return torch.full((len(input_ids),), self.watch(input_ids.tolist()), device=input_ids.device)


@contextmanager
def _given(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Every pass of `model` gets these arguments too: `generate` refuses to hand on what it does not know."""
    handle = model.register_forward_pre_hook(
        lambda module, given, named: (given, {**named, **arguments}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


__all__ = ["GenerationConfig", "check_positions", "cut", "generate", "is_sharded", "padded"]
