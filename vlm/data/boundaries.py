"""What changes at a boundary of an action, in three captions: what LLMVA-GEBC (arXiv 2306.10354) trains on and writes.

A record is one video with its boundaries; in training one sample is one caption: of the subject, of its status before
the boundary, or of that after it. Beside the frames, or what the frozen tower made of them before, a model may read
other features of the video, and it knows where the boundary is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlm.data.features import read_tensor, tensor_members
from vlm.data.frames import CLIP_COLOURS, Look, see
from vlm.data.packing import row_of
from vlm.data.prompts import PromptEncoder
from vlm.data.rng import SampleRng
from vlm.data.sampling import uniform_frames
from vlm.data.shards import ShardSet
from vlm.data.tokenizers import tokenizer_of
from vlm.data.video import DecodeError
from vlm.data.video_rows import PROBES, blinded, check_probes, gather, note, pack_rows, read_tokens
from vlm.types import IGNORE, Ask, Batch, Colours, Control, Example, Prompt, Record, Row, Text, UserError, Video, Visit

KINDS = ("subject", "status_before", "status_after")
"""What is written of each boundary, in this order."""
LEADS = {
    "subject": "The subject is",
    "status_before": "Status before change is",
    "status_after": "Status after change is",
}
_LONGEST = "Change of Object Being Interacted"  # kind of boundary whose name is longest
_PLACEHOLDER = "/"


@dataclass(slots=True, kw_only=True)
class BoundaryConfig:
    """Captions of boundaries in videos (Kinetics-GEB+)."""

    tokenizer: Path | None = None
    """A tokenizer.model (sentencepiece or tiktoken) or a folder with one; none: bytes, for debugging only."""
    source: Literal["pixels", "features"] = "features"
    """features: what the frozen tower made of each frame before, as published. pixels: the frames of the records'
    videos, which the model's tower reads."""
    features: str = "q_former"
    """Name of the members (NAME.safetensors or NAME.npy) that hold these features, (frames, tokens, width) each."""
    frame_tokens: int = 32
    """Tokens of a frame, where frames come as features (Q)."""
    frame_dim: int = 768
    """Width of such a token."""
    num_video_tokens: int = 40
    """Places that a video takes in its row (N): for the tokens of its frames, then for those of other features."""
    num_frames: int = 12
    """Most frames of a video, evenly spread; a shorter one has fewer."""
    size: int = 224
    """Height and width of a frame, in pixels."""
    other_features: tuple[str, ...] = ("intern_video", "omni", "clip")
    """Names of the members that hold other features of the video, (places, width) each; (): there are none."""
    other_dims: tuple[int, ...] = (768, 1536, 768)
    """Their widths: InternVideo's, Omnivore's, CLIP's."""
    other_length: int = 96
    """Places that each of them is brought to (L), by taking the nearest; then they stand side by side."""
    max_caption_length: int = 30
    """Most tokens of a caption and its end; a longer one ends where it is cut."""
    placeholders: Literal["skip", "teach"] = "skip"
    """What becomes of captions such as "/0", an eighth of those before and after a boundary, that say nothing of it.
    skip: they are not taught. teach: as published; the challenge's references have them too."""

    def __post_init__(self) -> None:
        self.tokenizer = None if self.tokenizer is None else Path(self.tokenizer)
        names = ("frame_tokens", "frame_dim", "num_video_tokens", "num_frames", "size", "other_length")
        for name in (*names, "max_caption_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"inputs.{name} is {getattr(self, name)}; it must be at least 1")
        if len(self.other_features) != len(self.other_dims):
            raise ValueError(
                f"inputs.other_features names {len(self.other_features)} ({', '.join(self.other_features)}), but "
                f"inputs.other_dims has {len(self.other_dims)} widths: each needs one"
            )

    # ------------------------------------------------------------------------------------------ what the loader calls

    task = "caption"
    probes: ClassVar[tuple[str, ...]] = PROBES

    @property
    def members(self) -> tuple[str, ...]:
        """What is read of a record, beside its annotation."""
        others = tuple(member for name in self.other_features for member in tensor_members(name))
        return ("video", *others) if self.source == "pixels" else (*tensor_members(self.features), *others)

    def parts(self, shards: ShardSet) -> np.ndarray:
        """(records,) samples of each record: three captions a boundary."""
        if not shards.num_questions.any():
            raise UserError(
                f"{shards.path}: its index counts no boundaries, so there is nothing to write; make the shards of the "
                "source gebc (those made before boundaries were counted: once more)"
            )
        return shards.num_questions

    def lengths(self, shards: ShardSet) -> np.ndarray:
        """(samples,) tokens that a sample's row has at most."""
        longest = max(len(self._lead({"kind": _LONGEST}, kind)[1]) for kind in KINDS)
        return np.full(int(self.parts(shards).sum()), longest + self.max_caption_length, np.int64)

    def train(self, record: Record, rng: SampleRng, visit: Visit) -> list[Example]:
        """One caption of a boundary (`visit.part`).

        Raises:
            DecodeError: the record's features or boundaries are missing or damaged.
            UserError: its captions are not published; features are of other sizes than the recipe's.
        """
        self.check_views(visit.views)
        assert visit.part is not None
        at, kind = divmod(visit.part, len(KINDS))
        boundary, name = _boundaries(record)[at], KINDS[kind]
        if name not in boundary:
            raise UserError(
                f"boundary {boundary.get('id')!r} of {record.shard} has no published captions, so it cannot be trained "
                "on; use another split"
            )
        counters: dict[str, int] = {}
        rows: dict[str, tuple[Row, ...]] = {"caption": (self._row(boundary, name, counters),)}
        example = self._with_boundary(self._look(record, rng), record, boundary)
        return [replace(example, key=f"{record.key}/{visit.part}", rows=rows, counters=counters)]

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        """A training batch: the captions end to end."""
        rows = pack_rows(examples, self.num_video_tokens, [example.rows["caption"] for example in examples])
        assert rows is not None
        return replace(gather(examples, self.colours), views={"caption": rows})

    # ------------------------------------------------------------------------------------------ what tests call

    def asks(self, record: Record) -> tuple[Ask, ...]:
        """Three captions of each boundary; `id` is the boundary's."""
        return tuple(
            Ask(
                f"{record.key}/{at * len(KINDS) + number}",
                None,
                kind=kind,
                id=str(boundary["id"]),
                question=_question(boundary, kind),
                references=(boundary[kind],) if kind in boundary else (),
            )
            for at, boundary in enumerate(_boundaries(record))
            for number, kind in enumerate(KINDS)
        )

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """An example for each boundary, with the prompts of its captions, under "" and under each probe's name."""
        check_probes(probes)
        seen = self._look(record, rng)
        examples = []
        for boundary in _boundaries(record):
            prompts = tuple(row_of(self._encoder().encode(self._lead(boundary, kind)[0], end=False)) for kind in KINDS)
            examples.append(replace(self._with_boundary(seen, record, boundary), prompts=prompts))
        return {"": examples, **{probe: [blinded(example) for example in examples] for probe in probes}}

    def test_batch(self, examples: Sequence[Example]) -> Batch:
        """A test batch: all prompts, each a row alone."""
        prompts = pack_rows(examples, self.num_video_tokens, [example.prompts for example in examples])
        return replace(gather(examples, self.colours), prompts=prompts)

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to write."""
        prompt, _ = self._lead({"kind": KINDS[0]}, KINDS[0])
        example = Example(key="", prompts=(row_of(self._encoder().encode(prompt, end=False)),))
        example.extra["boundary"] = torch.zeros(2, dtype=torch.float64)
        if self.other_features:
            example.extra["other"] = torch.zeros(self.other_length, sum(self.other_dims))
        if self.source == "features":
            return replace(example, frame_tokens=torch.zeros(1, self.frame_tokens, self.frame_dim))
        return replace(example, frames=torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8))

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that end a text which a model writes: the end token."""
        return ((tokenizer_of(self.tokenizer).eos,),)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that a model wrote, up to its end token."""
        tokenizer = tokenizer_of(self.tokenizer)
        ids = list(ids)
        return tokenizer.decode(ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids).strip()

    # ------------------------------------------------------------------------------------------ parts

    @property
    def vocab_size(self) -> int:
        """Words that the model must know."""
        return tokenizer_of(self.tokenizer).vocab_size

    @property
    def colours(self) -> Colours:
        """What the model normalises pixels with: CLIP's."""
        return CLIP_COLOURS

    def check_views(self, views: Iterable[str]) -> None:
        """Refuse views that there are not (UserError)."""
        for view in views:
            if view != "caption":
                raise UserError(f"views: there is no view {view!r} of boundaries; known: caption")

    def _look(self, record: Record, rng: SampleRng) -> Example:
        """What is seen of a video, wherever the boundary is."""
        example = Example(key=record.key)
        if self.source == "pixels":
            example.frames = see(record, Look(self.num_frames, self.size, "uniform"), rng).frames
        else:
            tokens = read_tokens(record, self.features, self.frame_tokens, self.frame_dim)
            example.frame_tokens = tokens[torch.from_numpy(uniform_frames(len(tokens), self.num_frames))]
        if self.other_features:
            example.extra["other"] = torch.cat([self._other(record, *one) for one in self._others()], dim=1)
        return example

    def _others(self) -> Iterable[tuple[str, int]]:
        return zip(self.other_features, self.other_dims, strict=True)

    def _other(self, record: Record, name: str, width: int) -> Tensor:
        """(other_length, width) float32 of one kind of feature."""
        found = read_tensor(record, name)
        if found.ndim != 2 or not len(found):
            raise DecodeError(
                f"record {record.key!r} of {record.shard}: {name} is {list(found.shape)}, not (places, width)"
            )
        if found.shape[1] != width:
            raise UserError(
                f"{record.shard}: {name} of {record.key!r} is {found.shape[1]} wide, but inputs.other_dims says "
                f"{width} for it (inputs.other_features is {', '.join(self.other_features)})"
            )
        return found[torch.from_numpy(nearest_places(len(found), self.other_length))].float()

    def _with_boundary(self, seen: Example, record: Record, boundary: Mapping[str, Any]) -> Example:
        """The example of one boundary: when it is and how long what it parts, as shares of the video (fp64)."""
        duration = _duration(record)
        try:
            span = boundary["next_timestamp"] - boundary["prev_timestamp"]
            where = torch.tensor([boundary["timestamp"] / duration, span / duration], dtype=torch.float64)
        except (KeyError, TypeError) as error:
            raise DecodeError(f"record {record.key!r} of {record.shard}: a boundary is damaged ({error!r})") from error
        return replace(seen, extra=seen.extra | {"boundary": where})

    def _lead(self, boundary: Mapping[str, Any], kind: str) -> tuple[Prompt, tuple[int, ...]]:
        """(what stands before a caption, its tokens)."""
        prompt = (Text("Video:"), Video(), Text(_question(boundary, kind)))
        return prompt, self._encoder().encode(prompt, end=False).ids

    def _row(self, boundary: Mapping[str, Any], kind: str, counters: dict[str, int]) -> Row:
        """The prompt, the caption and its end."""
        caption = boundary[kind]
        learn = self.placeholders == "teach" or not caption.startswith(_PLACEHOLDER)
        prompt, ids = self._lead(boundary, kind)
        whole = (*prompt, Text(caption, learn=learn, apart=True), Control("end", learn=learn))
        tokens = self._encoder(len(ids) + self.max_caption_length).encode(whole, end=False)
        note(counters, "rows_shortened", bool(tokens.dropped))
        note(counters, "tokens_dropped", tokens.dropped)
        note(counters, "rows_untaught", all(label == IGNORE for label in tokens.labels))
        return row_of(tokens)

    def _encoder(self, length: int | None = None) -> PromptEncoder:
        return _encoder(self.tokenizer, self.num_video_tokens, length)


def nearest_places(length: int, count: int) -> np.ndarray:
    """Which of `length` places the nearest to each of `count` evenly spread ones is, both ends included, (count,); of
    two as near the first."""
    if count == 1 or length == 1:
        return np.zeros(count, dtype=np.int64)
    return np.ceil(np.arange(count) * (length - 1) / (count - 1) - 0.5).astype(np.int64)


def _question(boundary: Mapping[str, Any], kind: str) -> str:
    return f"This video describes the {boundary['kind'].lower()}.{LEADS[kind]}"


def _boundaries(record: Record) -> Sequence[Mapping[str, Any]]:
    found = record.annotation.get("boundaries")
    if not isinstance(found, list) or not found or not all(isinstance(one, Mapping) and "kind" in one for one in found):
        raise DecodeError(f"record {record.key!r} of {record.shard} has no boundaries, or damaged ones")
    return found


def _duration(record: Record) -> float:
    """Seconds of a video: as published, else as it was counted when its shard was made."""
    duration = record.annotation.get("duration")
    if isinstance(duration, int | float) and duration > 0:
        return float(duration)
    if record.num_frames > 0 and record.fps > 0:
        return record.num_frames / record.fps
    raise DecodeError(
        f"record {record.key!r} of {record.shard} has no duration, so it is not known where its boundaries are: give "
        "video_info.json when the shards are made"
    )


@lru_cache(maxsize=64)
def _encoder(path: Path | None, places: int, length: int | None) -> PromptEncoder:
    return PromptEncoder(tokenizer=tokenizer_of(path), num_video_tokens=places, max_length=length, overflow="tail")
