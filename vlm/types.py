"""The words every floor speaks: what a source yields, what a shard record holds, what a model eats and answers.

Letters, everywhere in the project: B batch, C channels, T frames, H height, W width, N visual tokens, D width of a
vector, L text length, K classes; S tokens of all rows of text together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, device

from vlm.errors import UserError as UserError  # every floor takes it from here


class StoredArray(NamedTuple):
    """A tensor inside a published file (.pth, .safetensors): it becomes an `.npy` member when its shard is built, or,
    of any dtype, a `.safetensors` member: as the member is called."""

    file: Path
    name: str  # its key in the file
    nbytes: int


@dataclass(slots=True, kw_only=True)
class Sample:
    """One item of a published dataset, as its annotation file states it, before it is sharded.

    `annotation` becomes the `.json` member of the record and must be JSON-able. Names used in it:
    `label` (int class index), `name` (class name), `caption` (str), `questions` (list of {question, options, answer,
    kind; optionally id, span in seconds, dialogue}), `captions` (name -> text), `segments` (list of {start, end,
    label, name}, frames, end exclusive), `conversations` (list of {from: human, gpt or system; value}, the video's
    place being `<video>`; with `span` in seconds where they are about a part), `boundaries` (list of {id, kind,
    timestamp, prev_timestamp, next_timestamp, subject, status_before, status_after}, seconds), `chat` (list of {kind,
    question, answer}, times in them being `<t:F>`, the border of frames F, 0 … number of frames).
    """

    key: str  # unique in its shard set; "." is not allowed in a key (webdataset cuts member names at the first dot)
    video: Path | None = None
    annotation: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Path | StoredArray] = field(default_factory=dict)  # further members: "features.npy" -> a file
    warnings: tuple[str, ...] = ()  # what the user should know about this item though it is kept


class Rejected(NamedTuple):
    """A row of an annotation file, or a media file, that cannot become a record: goes into the manifest by reason."""

    key: str
    reason: str  # one sentence naming file, row or column, and the value
    file: str = ""


@dataclass(slots=True, kw_only=True)
class Record:
    """One record read back from a shard: the bytes of its media and its annotation, plus what the index knows."""

    key: str
    shard: str
    row: int  # row of the index
    video: bytes | None
    annotation: dict[str, Any]
    num_frames: int  # -1: unknown (sharded with --no-check), counted when decoded
    fps: float  # 0: unknown
    decoders: tuple[str, ...]  # decoders that were checked to return the reference frames, best first
    members: dict[str, bytes | memoryview] = field(default_factory=dict)
    """The other members: "features.npy" -> its bytes; of large arrays a view into the file."""


class Text(NamedTuple):
    """A piece of a prompt. Texts that follow one another are one string to the tokenizer, unless one stands apart."""

    text: str
    learn: bool = False  # its tokens are to be predicted
    shorten: bool = False  # free text (caption, dialogue): a row that is too long loses tokens from the end of it
    apart: bool = False  # begins a string of its own; a lone newline that stands apart is the newline token itself
    skip: int = 0  # of its tokens, so many at the beginning are not to be predicted after all
    mark: bool = False  # `Tokens.marked` is to say where it stands; at most one text of a prompt


class Video(NamedTuple):
    """The place in a prompt that video tokens take."""


class Control(NamedTuple):
    """The begin or end token of the model, where a prompt has one between its texts (dialogues of LLaMA-2)."""

    token: Literal["begin", "end"]
    learn: bool = False


Segment = Text | Video | Control
Prompt = tuple[Segment, ...]

IGNORE = -100  # label of a token that is not to be predicted; never an id, since 0 is a word of some tokenizers


class Tokens(NamedTuple):
    """One encoded prompt, without padding. Made by vlm.data.prompts."""

    ids: tuple[int, ...]  # (L,); 0 where the video goes
    labels: tuple[int, ...]  # (L,): the id itself where it is to be predicted (from the token before), else IGNORE
    video: tuple[int, int]  # first place of the video and the one after its last; (0, 0): no video
    dropped: int = 0  # tokens that truncation took away
    excess: int = 0  # tokens beyond the limit that stayed, since nothing was left that may be shortened
    marked: tuple[int, int] = (0, 0)  # first token of the marked text and the one after its last; (0, 0): there is none


class Passage(NamedTuple):
    """A text of which a selector lets few tokens through to the language model (the token bottleneck of Vamos)."""

    ids: tuple[int, ...]  # (L,)
    task: tuple[int, ...] = ()  # what they are chosen for: a question; (): by the text alone


class Row(NamedTuple):
    """One row of tokens, or the part of it that comes after its parent row (vlm.data.packing)."""

    ids: tuple[int, ...]  # (L,) as in Tokens
    labels: tuple[int, ...]  # (L,)
    video: tuple[int, int] = (0, 0)  # first of the places that the video takes and the one after the last
    sample: int = 0  # which video of the batch goes there
    parent: int = -1  # the row (counted in the list given to `pack`) that this one goes on from
    picks: tuple[int, int] = (0, 0)  # first of the places that tokens chosen by a selector take, and the one after
    first_pick: int = 0  # which of the batch's chosen tokens comes first there


class Visit(NamedTuple):
    """Why a record is read in training: one position of the order."""

    part: int | None = None  # which of its questions; None: the record is one sample
    epoch: int = 0  # in which pass over the data, from 0
    views: tuple[str, ...] = ()  # the losses that the recipe weighs


Span = tuple[int, int, str]
"""A stretch of a video: its first frame, counted from 0, the one after its last, and what happens there."""


class Ask(NamedTuple):
    """One thing that a test record is asked: a row of predictions.jsonl to be."""

    key: str
    truth: int | None  # class or option; None: not published
    kind: str | None = None  # kind of a question ("" where its dataset has none); None: it is no question
    id: str = ""  # of a question, as its dataset calls it
    question: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()  # what people wrote, where a text is to be written
    segments: tuple[Span, ...] = ()  # what happens when, where a video is to be segmented …
    num_frames: int = 0  # … and how many frames it has


class Incident(NamedTuple):
    """A record that could not be used at run time: a row of the quarantine ledger."""

    key: str
    shards: str  # folder or address of its shard set
    shard: str  # file name
    offset: int  # bytes from the start of the shard, and …
    nbytes: int  # … how many
    reason: str
    attempts: int  # how often it was tried
    replaced_by: str  # key of the record that took its place
    position: int  # position in the endless training order at which it was met


COUNTERS = ("rows_shortened", "tokens_dropped", "rows_too_long", "packs_too_long", "rows_untaught")
"""What is counted of rows of text that do not fit: rows that lost tokens, the tokens, rows that stayed too long,
micro-batches of packs whose rows are longer together than the packs may be (lengths are planned from the index), rows
that have nothing to be predicted left."""


class Colours(NamedTuple):
    """Mean and deviation of red, green, blue (0 … 1) that pixels are normalised with."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Patch(NamedTuple):
    """What takes the place of a rectangle of every frame of a clip (random erasing), once it is normalised."""

    top: int
    left: int
    pixels: Tensor  # (C, T, h, w) float32


class Mixing(NamedTuple):
    """How clip i of a batch of B is mixed with clip B - 1 - i, once both are normalised and patched."""

    share: float  # of each clip that stays its own
    cut: tuple[int, int, int, int] | None  # CutMix: rows top … bottom - 1, columns left … right - 1 are the partner's


@dataclass(slots=True, kw_only=True)
class Example:
    """One training or test item after decoding and transforms, before collation."""

    key: str
    video: Tensor | None = None  # (C, T, H, W) 0 … 255, uint8 or (not rounded after resizing) float32
    patch: Patch | None = None  # a part of `video` that is replaced
    label: int | None = None
    features: Tensor | None = None  # (V, N, D) float32: features of frames of each cut of the video that is asked about
    frames: Tensor | None = None  # (T, C, H, W) uint8, or float32 normalised: any number of frames; an image is one
    frame_tokens: Tensor | None = None  # (T, Q, D): what a frozen encoder made of each frame, in the place of `frames`
    extra: dict[str, Tensor] = field(default_factory=dict)  # what else is known of its video, of one shape in a batch
    told: tuple[bool, str] = (False, "")  # for dialogues about it: whether it is an image, what is said after it
    rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)  # view name -> rows; Row.sample counts cuts
    options: tuple[tuple[Row, ...], ...] = ()  # test: for each question a row for each option
    prompts: tuple[Row, ...] = ()  # test: a row for each text that is to be written
    passages: tuple[Passage, ...] = ()  # what a selector is to choose from, in the order of its rows' `first_pick`
    counters: dict[str, int] = field(default_factory=dict)  # what had to be cut, by `COUNTERS`


def _no_places() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(slots=True, kw_only=True)
class Passages:
    """The passages of a batch, cut into G segments of each of which one token is chosen. Built by vlm.data.passages.

    T tokens of all passages and tasks; n of the longest segment, q of the longest task.
    """

    tokens: Tensor  # (T,) int64, end to end
    segments: Tensor  # (G, n) int64: places in `tokens`; -1 after a segment's end
    tasks: Tensor  # (G, q) int64: places in `tokens` of what each segment is chosen for; -1 after its end

    def to(self, where: device | str) -> Passages:
        """The same passages on a device."""
        return Passages(**{f.name: getattr(self, f.name).to(where, non_blocking=True) for f in fields(self)})


@dataclass(slots=True, kw_only=True)
class TextRows:
    """Rows of tokens laid end to end, without padding: what a language model reads in one pass.

    Rows form trees: a row whose parent is not -1 goes on where its parent ends (a question after its video, an option
    after its question), so what rows have in common is there once. Row r sees itself and its ancestors, nothing else.
    Trees stand depth first: a row, then all that hangs on it. S is the number of tokens of all rows, M of
    those that the video fills, R of those that a selector fills, Z of those that must be predicted. Built by
    vlm.data.packing.
    """

    tokens: Tensor  # (S,) int64; any id where the video goes
    positions: Tensor  # (S,) int64: tokens before this one in its row and its row's ancestors
    slots: Tensor  # (M,) int64: places in `tokens` that video tokens take
    sources: Tensor  # (M,) int64: which video token takes each, sample * N + n
    predictors: Tensor  # (Z,) int64: places whose output must predict …
    targets: Tensor  # (Z,) int64: … these ids
    after_video: Tensor  # (S,) bool: the whole video stands before this token
    lengths: tuple[int, ...]  # tokens of each row, in order; their sum is S
    parents: tuple[int, ...]  # for each row, the row that it goes on from, or -1
    target_counts: tuple[int, ...]  # for each row, how many of the Z predictions are of its tokens, in order
    leaves: tuple[tuple[int, ...], ...] = ()  # options alone: for each question, the row that ends each of its options
    pick_slots: Tensor = field(default_factory=_no_places)  # (R,) int64: places that tokens chosen by a selector take
    pick_sources: Tensor = field(default_factory=_no_places)  # (R,) int64: which chosen token of the batch takes each
    blind: tuple[int, ...] = ()  # places that do not see themselves, and that none sees (vlm.models.padded_prompts)

    def to(self, where: device | str) -> TextRows:
        """The same rows on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: v.to(where, non_blocking=True) for name, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(slots=True, kw_only=True)
class Batch:
    """One micro-batch of one rank."""

    keys: tuple[str, ...]
    video: Tensor | None = None  # (B, C, T, H, W)
    label: Tensor | None = None  # (B,) int64
    target: Tensor | None = None  # (B, K) float: soft labels, where mixup or smoothing made them
    mask: Tensor | None = None  # (B, N) bool, True = hidden (masked pretraining)
    features: Tensor | None = None  # (B, N, D) float: features of frames, computed before; None: rows have no video
    frames: Tensor | None = None  # (F, C, H, W): the frames of all videos end to end; images are videos of one frame
    frame_tokens: Tensor | None = None  # (F, Q, D): what a frozen encoder made of each frame, in the place of `frames`
    frame_counts: tuple[int, ...] = ()  # frames of each video of the batch (rows without a video have none); sum: F
    extra: dict[str, Tensor] = field(default_factory=dict)  # (videos, …): what else is known of each video, by name
    colours: Colours | None = None  # `video` and `frames` are 0 … 255, these still to be applied; None: normalised
    patches: tuple[Patch | None, ...] = ()  # for each clip, with `colours`: what then takes the place of a part of it
    mixing: Mixing | None = None  # with `colours`: how clips are then mixed (vlm.data.pixels)
    views: dict[str, TextRows] = field(default_factory=dict)  # view name (= loss name) -> its rows
    options: TextRows | None = None  # rows that score the options of questions (evaluation)
    prompts: TextRows | None = None  # rows that a language model is to go on from (generation); each is a row alone
    passages: Passages | None = None  # what a selector chooses tokens from; None: rows hold whole texts
    incidents: tuple[Incident, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)  # what had to be cut, by `COUNTERS`

    def to(self, where: device | str) -> Batch:
        """The same batch on a device. Precision is not touched: a model casts what it multiplies, targets stay fp32."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(where, non_blocking=True)
            elif isinstance(value, (TextRows, Passages)):
                moved[f.name] = value.to(where)
        moved["patches"] = tuple(
            patch and patch._replace(pixels=patch.pixels.to(where, non_blocking=True)) for patch in self.patches
        )
        moved["views"] = {name: rows.to(where) for name, rows in self.views.items()}
        moved["extra"] = {name: value.to(where, non_blocking=True) for name, value in self.extra.items()}
        return replace(self, **moved)


class LossTerm(NamedTuple):
    """One named loss of one micro-batch, not yet averaged: the engine divides by the count of the *global* batch."""

    total: Tensor  # scalar: sum over elements, with a graph
    count: int  # type: ignore[assignment]  # elements summed (clips, tokens, pixels); tuple has a method of this name


Losses = dict[str, LossTerm]  # loss name (= view name = weight key = log key) -> term


@dataclass(slots=True, kw_only=True)
class Writing:
    """One row of predictions.jsonl of a system that writes: captions, answers in free words."""

    key: str
    text: str
    references: list[str]  # what people wrote; empty: not published
    kind: str = ""  # which text of its video it is: subject, status_before …; "": there is one kind
    video: str = ""  # the record that it is about
    id: str = ""  # as its dataset calls it
    question: str = ""  # what the language model was given beside the video
    probes: dict[str, str] = field(default_factory=dict)  # the texts under conditions that should break the model


@dataclass(slots=True, kw_only=True)
class Segmentation:
    """One row of predictions.jsonl of a system that says what happens when, in words.

    The text is an answer whose numbers are borders on the time axis of the model; what was read from it is in frames.
    """

    key: str
    text: str  # as written
    truth: list[Span]  # in order, without overlap
    prediction: list[Span]  # what was read from the text; empty where it could not be read
    num_frames: int  # of the video
    problem: str = ""  # why the text could not be read
    kind: str = ""  # activity of the video; "": there is one
    video: str = ""  # the record that it is about
    question: str = ""  # what the language model was given beside the video
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)  # {text, prediction, problem} under each condition


@dataclass(slots=True, kw_only=True)
class Prediction:
    """One row of predictions.jsonl. `probes` holds the scores under conditions that should break the model.

    Rows of clips have a score a class, rows of questions a score an option: the largest is the prediction.
    """

    key: str
    truth: int
    prediction: int
    scores: list[float]
    probes: dict[str, list[float]] = field(default_factory=dict)
    kind: str | None = None  # kind of a question ("" where its dataset has none); None: a clip and its classes
    video: str = ""  # of a question: the record that it is about
    id: str = ""  # of a question, as its dataset calls it
    question: str = ""
    options: list[str] = field(default_factory=list)
