"""What inputs of systems that write share: text about videos of any number of frames, from examples to a batch.

An example has one video or image, or none; so has each of its rows. In a batch all frames lie end to end, and each row
knows which video is its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlm.data.features import read_tensor
from vlm.data.packing import pack
from vlm.data.tokenizers import tokenizer_of
from vlm.data.video import DecodeError
from vlm.types import IGNORE, Batch, Colours, Example, Record, Row, TextRows, Tokens, UserError

BLIND = "blind"
PROBES = (BLIND,)
"""Conditions that should break a model that looks at the video: it is zeroed."""
SEEN = ("other",)
"""What of an example's `extra` comes from looking at its video."""


def gather(examples: Sequence[Example], colours: Colours) -> Batch:
    """The videos, what else is known of them, and the counters of examples; rows come by `pack_rows`."""
    videos = [example for example in examples if has_video(example)]
    frames = [example.frames for example in videos if example.frames is not None]
    tokens = [example.frame_tokens for example in videos if example.frame_tokens is not None]
    assert not (frames and tokens), "pixels and features in one batch"
    return Batch(
        keys=tuple(example.key for example in examples),
        frames=torch.cat(frames) if frames else None,
        frame_tokens=torch.cat(tokens) if tokens else None,
        frame_counts=tuple(len(several) for several in frames or tokens),
        extra={
            name: torch.stack([video.extra[name] for video in videos])
            for name in (videos or [Example(key="")])[0].extra
        },
        colours=colours if frames else None,
        counters=counted(examples),
    )


def pack_rows(examples: Sequence[Example], num_video_tokens: int, rows_of: Sequence[Sequence[Row]]) -> TextRows | None:
    """Rows of each example end to end, each taking its example's video; None: there are none."""
    numbered = zip(_numbers(examples), rows_of, strict=True)
    rows = [row._replace(sample=video) for video, several in numbered for row in several]
    return pack(rows, num_video_tokens) if rows else None


def has_video(example: Example) -> bool:
    """Whether the example has a video, as pixels or as features."""
    return example.frames is not None or example.frame_tokens is not None


def _numbers(examples: Sequence[Example]) -> Iterator[int]:
    """Of each example its video's number, or that of the next one where it has none."""
    number = 0
    for example in examples:
        yield number
        number += has_video(example)


def check_probes(probes: Sequence[str]) -> None:
    """UserError for a probe that systems which write have not."""
    for probe in probes:
        if probe not in PROBES:
            near = difflib.get_close_matches(probe, PROBES, n=1, cutoff=0.0)[0]
            raise UserError(f"eval.probes: there is no probe {probe!r} for captions; did you mean {near!r}?")


def blinded(example: Example) -> Example:
    """The same prompts about a video that is zeroed, with all that encoders made of it; where it ends stays known."""

    def dark(seen: Tensor | None) -> Tensor | None:
        return None if seen is None else torch.zeros_like(seen)

    return replace(
        example,
        frames=dark(example.frames),
        frame_tokens=dark(example.frame_tokens),
        extra={name: torch.zeros_like(seen) if name in SEEN else seen for name, seen in example.extra.items()},
        counters={},
    )


def read_tokens(record: Record, name: str, frame_tokens: int, frame_dim: int) -> Tensor:
    """(T, Q, D) of a record; DecodeError where it has none, UserError where they are of another tower. What is stored
    as (T, D) is one token a frame."""
    tokens = read_tensor(record, name)
    if tokens.ndim == 2:
        tokens = tokens[:, None]
    if tokens.ndim != 3 or not len(tokens) or not tokens.is_floating_point():
        raise DecodeError(
            f"record {record.key!r} of {record.shard}: {name} is {list(tokens.shape)}, not (frames, tokens, width)"
        )
    if tuple(tokens.shape[1:]) != (frame_tokens, frame_dim):
        raise UserError(
            f"{record.shard}: a frame of {record.key!r} has {tokens.shape[1]} tokens of width {tokens.shape[2]}, but "
            f"inputs.frame_tokens={frame_tokens} and inputs.frame_dim={frame_dim}: these features are another tower's"
        )
    return tokens


def endings(tokenizer: Path | None, end: str) -> list[tuple[int, ...]]:
    """The tokens that a text's end may become: after a word, a line end, a blank."""
    known = tokenizer_of(tokenizer)
    found = []
    for before in ("a", "a\n", "a "):
        ids = known.encode(before + end)
        found.append(tuple(ids[known.tokens_before(before + end, len(before.rstrip(" "))) :]))
    return [ids for ids in dict.fromkeys(found) if ids]


def all_ends(tokenizer: Path | None, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Tokens that end a text which a model writes: the end token, and what these texts may become."""
    return ((tokenizer_of(tokenizer).eos,), *dict.fromkeys(ids for end in texts for ids in endings(tokenizer, end)))


def decoded(tokenizer: Path | None, ids: Sequence[int], texts: Sequence[str]) -> str:
    """The text of ids that a model wrote, up to the end token or one of these texts."""
    known, ids = tokenizer_of(tokenizer), list(ids)
    text = known.decode(ids[: ids.index(known.eos)] if known.eos in ids else ids)
    for end in texts:
        text = text.partition(end)[0]
    return text.strip()


def count_row(counters: dict[str, int], tokens: Tokens, *, too_long: bool) -> None:
    """Add what a training row lost, and whether anything is left of it to be learnt."""
    note(counters, "rows_shortened", bool(tokens.dropped))
    note(counters, "tokens_dropped", tokens.dropped)
    note(counters, "rows_too_long", too_long)
    note(counters, "rows_untaught", all(label == IGNORE for label in tokens.labels))


def counted(examples: Sequence[Example]) -> dict[str, int]:
    """What had to be cut of all of them."""
    counters: dict[str, int] = {}
    for example in examples:
        for name, count in example.counters.items():
            counters[name] = counters.get(name, 0) + count
    return counters


def note(counters: dict[str, int], name: str, number: int) -> None:
    """Add to a counter (`vlm.types.COUNTERS`)."""
    counters[name] = counters.get(name, 0) + int(number)
