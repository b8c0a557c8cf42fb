"""From a record with questions to rows of text, and from rows to a batch: what systems that answer questions train on.

A record is one video with all its questions. In training one sample is one question, as in the published code, or with
`share_questions` one video, whose questions then share the pass over its frames and caption. In a test a record is read
once for all its questions and options.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlm.data.features import MEMBER, cut_span, read_features, spread_frames
from vlm.data.packing import pack, pack_trees, row_of, share_prefixes
from vlm.data.passages import Picks, gather_passages, total_picks
from vlm.data.prompts import PromptEncoder
from vlm.data.question_lengths import Rows, question_lengths
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.data.tokenizers import content_hash, tokenizer_of
from vlm.data.video import DecodeError
from vlm.data.video_rows import all_ends, counted, decoded
from vlm.data.views import VIEWS, Item, caption, find_caption, free_question, items, random_suffix, task, without_lead
from vlm.types import IGNORE, Ask, Batch, Example, Passage, Prompt, Record, Row, UserError, Visit

BLIND = "blind"
PROBES = (BLIND,)
"""Conditions that should break a model that looks at the video: its features are zeroed."""


@dataclass(slots=True, kw_only=True)
class QuestionConfig:
    """Multiple-choice questions about videos whose frames' features were computed before."""

    tokenizer: Path | None = None
    """A tokenizer.model (sentencepiece or tiktoken) or a folder with one; none: bytes, for debugging only."""
    max_length: int = 128
    """Longest row, in tokens, its video included. Rows are never padded to it."""
    max_caption_length: int | None = None
    """Longest row of the view `caption`; none: as `max_length`."""
    overflow: Literal["shorten", "tail"] = "shorten"
    """What a row that is too long loses. shorten: the end of its caption or dialogue, never its answer. tail: its last
    tokens, the answer first, as in the published code."""
    num_frames: int = 10
    """Frames of a video (N), each one token."""
    feature_dim: int = 768
    """Width of a frame's features (CLIP ViT-L/14: 768)."""
    use_video: bool = True
    """Whether rows have video tokens. False: captions alone."""
    blind_placeholders: bool = False
    """Rows without video keep N places for it, filled with the token 0. Released Vamos weights on captions, or with
    `alternate`, were trained so; it serves nothing else."""
    caption: str | None = None
    """Name of the caption file (without .json) whose text stands in the prompt; none: no caption there."""
    keep_tokens: int | None = None
    """Tokens that a selector (model.selector) leaves of the caption in the prompt: Vamos' token bottleneck. None: the
    whole caption is read. `max_length` counts it whole in any case."""
    select_for: Literal["question", "question_options", "caption"] = "question"
    """What those tokens are chosen for. question: for each question, by its words (Vamos' figure); question_options: by
    its options too; caption: once for all questions of a video, which then share the pass over them."""
    caption_target: str | None = None
    """Name of the caption file whose text the view `caption` teaches."""
    caption_part: Literal["whole", "suffix"] = "suffix"
    """What of the caption is taught. suffix: from one of its sentences on, drawn anew each time (ViCo)."""
    caption_lead: bool = True
    """Whether the taught caption keeps the sentence that published files put before each."""
    caption_skip: int = 0
    """First tokens of the taught caption that are not to be predicted. Released ViCo weights were trained with 3, by a
    slip of the original."""
    dialogue: bool = False
    """Put what is said in the span of a question into its prompts (the originals' --sub)."""
    whole_spans: bool = False
    """Look beyond the seconds that a question of Perception Test is about, as the published code did; the rest of those
    videos gives the answer away."""
    alternate: bool = False
    """Vamos' --alter_train: in epochs 0, 2, 4, … training rows have no video tokens; tests always have."""
    share_questions: bool = False
    """One sample is one video with all its questions in one tree of rows. global_batch_size then counts videos."""

    def __post_init__(self) -> None:
        self.tokenizer = None if self.tokenizer is None else Path(self.tokenizer)
        for name in ("max_length", "num_frames", "feature_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"inputs.{name} is {getattr(self, name)}; it must be at least 1")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise ValueError(f"inputs.keep_tokens is {self.keep_tokens}; it must be at least 1, or none for all")
        if self.keep_tokens is not None and self.caption is None:
            raise ValueError("inputs.keep_tokens: without inputs.caption there is no caption to choose tokens from")
        if self.caption_skip < 0:
            raise ValueError(f"inputs.caption_skip is {self.caption_skip}; it must be 0 or more")
        if self.alternate and not self.use_video:
            raise ValueError(
                "inputs.alternate leaves the video out of every other epoch, but inputs.use_video is false"
            )
        if self.alternate and self.caption is None:
            raise ValueError(
                "inputs.alternate: without inputs.caption the epochs without video would have nothing to read"
            )

    # ------------------------------------------------------------------------------------------ what the loader calls

    @property
    def members(self) -> tuple[str, ...]:
        """What is read of a record, beside its annotation: not its video."""
        return (MEMBER,) if self.use_video else ()

    def parts(self, shards: ShardSet) -> np.ndarray | None:
        """(records,) samples of each record: its questions; None: each record is one."""
        if not shards.num_questions.any():
            raise UserError(
                f"{shards.path}: its records have no questions, so there is nothing to answer; make shards of a set "
                "that has them (nextqa, intentqa, perception_test, star, tvqa, shapes)"
            )
        return None if self.share_questions else shards.num_questions

    def lengths(self, shards: ShardSet) -> np.ndarray:
        """(samples,) tokens that each sample's row is expected to have, from the index."""
        about = Rows(
            read=replace(self, max_length=1 << 30)._answer_rows,
            prompt=len(self.blank().options[0][0].ids),
            most=self.max_length,
            shared=self.share_questions,
            caption=self.caption,
            dialogue=self.dialogue,
            tokenizer=None if self.tokenizer is None else content_hash(self.tokenizer),
        )
        return question_lengths(shards, about)

    def _answer_rows(self, record: Record) -> list[Row]:
        """Each question's row, its right option chosen; none of a damaged record, which is told when it is loaded."""
        try:
            asked = self._items(record)
        except DecodeError:
            return []
        blind = not self.use_video
        return [self._row(VIEWS["answer"](item, item.answer or 0), "answer", 0, blind, {})[0] for item in asked]

    def train(self, record: Record, rng: SampleRng, visit: Visit) -> list[Example]:
        """One question (`visit.part`), or all of a video, with a row for each view.

        Raises:
            DecodeError: the record's features or caption are missing or damaged.
            UserError: a question has no published answer; a view is unknown.
        """
        self.check_views(visit.views)
        asked = self._items(record)
        if visit.part is not None:
            asked = (asked[visit.part],)
        blind = not self.use_video or (self.alternate and visit.epoch % 2 == 0)
        features, cuts = self._features(record, asked)
        counters: dict[str, int] = {}
        picks = None if self.keep_tokens is None else Picks(self.keep_tokens)
        rows = {
            view: tuple(
                self._picked(self._row(self._prompt(view, item, rng), view, cut, blind, counters), item, picks)
                for item, cut in zip(asked, cuts)
            )
            for view in visit.views
        }
        key = record.key if visit.part is None else asked[0].key
        passages = () if picks is None else picks.passages
        return [Example(key=key, features=features, rows=rows, passages=passages, counters=counters)]

    def collate(self, examples: Sequence[Example], rng: SampleRng) -> Batch:
        """A training batch: the rows of each view end to end."""
        views = {}
        for view in examples[0].rows:
            several = [
                [_moved(row, *first) for row in example.rows[view]] for example, *first in self._counted(examples)
            ]
            if self.share_questions:
                trees = [share_prefixes(rows, learnt=False) for rows in several]
                views[view] = pack_trees(trees, self.num_frames)
            else:
                views[view] = pack([row for rows in several for row in rows], self.num_frames)
        return replace(self._batch(examples), views=views)

    # ------------------------------------------------------------------------------------------ what tests call

    task = "choice"
    probes: ClassVar[tuple[str, ...]] = PROBES

    def asks(self, record: Record) -> tuple[Ask, ...]:
        """The record's questions."""
        return tuple(
            Ask(item.key, item.answer, item.kind, item.id, item.question, item.options)
            for item in self._items(record, test=True)
        )

    def all_views(self, record: Record, rng: SampleRng, probes: Sequence[str]) -> dict[str, list[Example]]:
        """All questions of a record with all their options, under "" and under each probe's name."""
        for probe in probes:
            if probe not in PROBES:
                near = difflib.get_close_matches(probe, PROBES, n=1, cutoff=0.0)[0]
                raise UserError(f"eval.probes: there is no probe {probe!r} for questions; did you mean {near!r}?")
        asked = self._items(record)
        features, cuts = self._features(record, asked)
        counters: dict[str, int] = {}
        answer = VIEWS["answer"]
        picks = None if self.keep_tokens is None else Picks(self.keep_tokens)
        options = tuple(
            tuple(
                self._picked(self._row(answer(item, option), "answer", cut, not self.use_video, counters), item, picks)
                for option in range(len(item.options))
            )
            for item, cut in zip(asked, cuts)
        )
        passages = () if picks is None else picks.passages
        example = Example(key=record.key, features=features, options=options, passages=passages, counters=counters)
        dark = None if features is None else torch.zeros_like(features)
        return {"": [example], **{probe: [replace(example, features=dark, counters={})] for probe in probes}}

    def test_batch(self, examples: Sequence[Example]) -> Batch:
        """A test batch: for each video a tree of what its questions and options share, or the prompts of chats."""
        prompts = [_moved(row, *first) for example, *first in self._counted(examples) for row in example.prompts]
        if prompts:
            return replace(replace(self, keep_tokens=None)._batch(examples), prompts=pack(prompts, self.num_frames))
        trees = [
            share_prefixes([[_moved(row, *first) for row in options] for options in example.options])
            for example, *first in self._counted(examples)
        ]
        return replace(self._batch(examples), options=pack_trees(trees, self.num_frames))

    # ------------------------------------------------------------------------------------------ what a chat calls

    def look(self, record: Record) -> Example:
        """What a model sees of a record: features of its frames, evenly spread. UserError: it reads none."""
        if not self.use_video:
            raise UserError("inputs.use_video is false: this recipe answers from captions, and sees no video")
        features, _ = self._features(record, (Item(question="", options=()),))
        return Example(key=record.key, features=features)

    def converse(self, turns: Sequence[tuple[str, str | None]], example: Example) -> Example:
        """The example with one prompt: the last question alone, as these models know no dialogues; with the options
        that its lines after the first are (vlm.data.views.free_question), else for free words."""
        whole = replace(self, max_length=1 << 30)
        row, _ = whole._row(VIEWS["answer"](free_question(turns[-1][0]), 0), "answer", 0, False, {})
        asked = next(place for place, label in enumerate(row.labels) if label != IGNORE)
        prompt = row._replace(ids=row.ids[:asked], labels=row.labels[:asked])
        return replace(example, prompts=(prompt,), counters={"rows_too_long": int(asked > self.max_length)})

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that end an answer in free words: the end token, and a line end."""
        return all_ends(self.tokenizer, ("\n",))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that a model wrote, up to what ends it."""
        return decoded(self.tokenizer, ids, ("\n",))

    def blank(self) -> Example:
        """An example that stands in where a process has nothing left to score."""
        item = Item(question="?", options=("?",))
        row, _ = self._row(VIEWS["answer"](item, 0), "answer", 0, not self.use_video, {})
        features = torch.zeros(1, self.num_frames, self.feature_dim) if self.use_video else None
        return Example(key="", features=features, options=((row,),))

    # ------------------------------------------------------------------------------------------ parts

    @property
    def vocab_size(self) -> int:
        """Words that the model must know."""
        return tokenizer_of(self.tokenizer).vocab_size

    def _items(self, record: Record, test: bool = False) -> tuple[Item, ...]:
        """The record's questions with keys that are those of the order (vlm.data.stream.Samples), and captions."""
        context = target = ""
        if not test and self.caption is not None:
            context = without_lead(self._caption(record, self.caption))
        if not test and self.caption_target is not None:
            target = self._caption(record, self.caption_target)
            target = target if self.caption_lead else without_lead(target)
        try:
            found = items(record.annotation, context=context, caption=target)
        except (KeyError, TypeError, ValueError) as error:
            raise DecodeError(
                f"record {record.key!r} of {record.shard}: its questions are damaged ({error!r})"
            ) from error
        return tuple(
            replace(item, key=f"{record.key}/{number}", dialogue=item.dialogue if self.dialogue else "")
            for number, item in enumerate(found)
        )

    def _caption(self, record: Record, name: str) -> str:
        try:
            return find_caption(record.annotation, name)
        except UserError as error:
            raise DecodeError(f"record {record.key!r} of {record.shard}: {error}") from error

    def _features(self, record: Record, asked: Sequence[Item]) -> tuple[Tensor | None, list[int]]:
        """(V, N, D) features of each stretch of the video that is asked about, and which of them each question has."""
        if not self.use_video:
            return None, [0] * len(asked)
        whole = read_features(record)
        if whole.shape[1] != self.feature_dim:
            raise UserError(
                f"{record.shard}: the features of {record.key!r} are {whole.shape[1]} wide, but inputs.feature_dim = "
                f"{self.feature_dim}: they come from another encoder than the recipe's; set inputs.feature_dim and "
                "model.feature_dim, or make the shards with the right features"
            )
        spans = list(dict.fromkeys(item.span for item in asked))
        cuts = [spread_frames(self._cut(whole, record, span), self.num_frames) for span in spans]
        return torch.from_numpy(np.stack(cuts)), [spans.index(item.span) for item in asked]

    def _cut(self, whole: np.ndarray, record: Record, span: tuple[float, float] | None) -> np.ndarray:
        try:
            cut = cut_span(whole, record.annotation, span, whole=self.whole_spans)
        except KeyError as error:
            raise DecodeError(
                f"record {record.key!r} of {record.shard}: its questions have spans, but its annotation has no {error}"
            ) from error
        if len(cut) or span is None:
            return cut
        last = min(int(span[1] * record.annotation["features"]["fps"]), len(whole) - 1)  # no frame was within the span
        return whole[max(last, 0)][None]

    def check_views(self, views: Iterable[str]) -> None:
        """Refuse views that there are not, or for which a setting is missing (UserError)."""
        for view in views:
            if view not in VIEWS:
                raise UserError(f"views: there is no view {view!r}; known: {', '.join(VIEWS)}")
        if "caption" in views and self.caption_target is None:
            raise UserError("views: `caption` needs inputs.caption_target, the name of the file that it teaches")

    def _prompt(self, view: str, item: Item, rng: SampleRng) -> Prompt:
        if view == "caption":
            text = random_suffix(item.caption, rng.python) if self.caption_part == "suffix" else item.caption
            return caption(replace(item, caption=text), skip=self.caption_skip)
        if item.answer is None:
            raise UserError(
                f"question {item.key!r} has no published answer, so it cannot be trained on; use another split"
            )
        return VIEWS[view](item, item.answer)

    def _row(
        self, prompt: Prompt, view: str, cut: int, blind: bool, counters: dict[str, int]
    ) -> tuple[Row, tuple[int, int]]:
        """A row, and where in it the caption that it reads stands."""
        length = self.max_caption_length if view == "caption" and self.max_caption_length else self.max_length
        places = self.num_frames if self.blind_placeholders or not blind else 0
        tokens = _encoder(self.tokenizer, places, length, self.overflow).encode(prompt)
        counters["rows_shortened"] = counters.get("rows_shortened", 0) + bool(tokens.dropped)
        counters["tokens_dropped"] = counters.get("tokens_dropped", 0) + tokens.dropped
        counters["rows_too_long"] = counters.get("rows_too_long", 0) + bool(tokens.excess)
        return row_of(tokens, cut, blind=blind), tokens.marked

    def _picked(self, row_and_caption: tuple[Row, tuple[int, int]], item: Item, picks: Picks | None) -> Row:
        """The row with places for the chosen tokens where its caption stood; as it is if there is nothing to choose."""
        row, (start, end) = row_and_caption
        if picks is None or start == end:
            return row
        chosen_for: tuple[int, ...] = ()
        if self.select_for != "caption":
            words = task(item, options=self.select_for == "question_options")
            chosen_for = tuple(tokenizer_of(self.tokenizer).encode(words))
        first, count = picks.add(Passage(row.ids[start:end], chosen_for))
        assert row.video[1] <= start, "the video stands after the caption"
        return row._replace(
            ids=(*row.ids[:start], *[0] * count, *row.ids[end:]),
            labels=(*row.labels[:start], *[IGNORE] * count, *row.labels[end:]),
            picks=(start, start + count),
            first_pick=first,
        )

    def _counted(self, examples: Sequence[Example]) -> Iterable[tuple[Example, int, int]]:
        """Each example with the number of videos before it in the batch, and of chosen tokens."""
        first = first_pick = 0
        for example in examples:
            yield example, first, first_pick
            first += 0 if example.features is None else len(example.features)
            first_pick += 0 if self.keep_tokens is None else total_picks(example.passages, self.keep_tokens)

    def _batch(self, examples: Sequence[Example]) -> Batch:
        features = [example.features for example in examples if example.features is not None]
        assert len(features) in (0, len(examples))
        passages = [passage for example in examples for passage in example.passages]
        return Batch(
            keys=tuple(example.key for example in examples),
            features=torch.cat(features) if features else None,
            passages=None if self.keep_tokens is None else gather_passages(passages, self.keep_tokens),
            counters=counted(examples),
        )


def _moved(row: Row, first: int, first_pick: int) -> Row:
    return row._replace(sample=row.sample + first, first_pick=row.first_pick + first_pick if row.picks[1] else 0)


@lru_cache(maxsize=8)
def _encoder(path: Path | None, frames: int, length: int, overflow: Literal["shorten", "tail"]) -> PromptEncoder:
    return PromptEncoder(tokenizer=tokenizer_of(path), num_video_tokens=frames, max_length=length, overflow=overflow)
