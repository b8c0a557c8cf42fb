"""A prompt is a tuple of segments; one encoder makes token ids, labels and the place of the video of it.

    encoder = PromptEncoder(load_tokenizer("pretrained/llama/tokenizer.model"), num_video_tokens=10, max_length=128)
    tokens = encoder.encode((Text("Video:"), Video(), NEWLINE, Text("Answer: ", apart=True), Text("(A)", learn=True)))

A row is the begin token, the segments, the end token. Texts that follow one another are joined before they are encoded
(LLaMA 3 has tokens such as ".\\n" that would not come from the pieces), and a token belongs to the segment of its last
character. Labels therefore follow from the segments, whatever words stand in a caption or an option.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from vlm.data.tokenizers import Tokenizer
from vlm.types import IGNORE, Control, Prompt, Text, Tokens, Video

NEWLINE = Text("\n", apart=True)
"""The token of a line end alone. What follows must stand apart too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The tokens of one segment, or the begin or end token."""

    ids: list[int]
    learn: bool = False
    shorten: bool = False
    skip: int = 0
    video: bool = False
    mark: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """Encodes prompts for one tokenizer."""

    tokenizer: Tokenizer
    num_video_tokens: int
    """Places that a `Video()` takes (N); 0: none, for models that read text alone."""
    video_words: tuple[int, ...] = (0,)
    """Ids in the place of a video: that which fills its places, and where it has marks (three ids), that which stands
    before it and that which stands after it."""
    max_length: int | None = None
    """Longest row, begin and end token included; None: rows may be of any length."""
    overflow: Literal["shorten", "tail"] = "shorten"
    """What a row that is too long loses. shorten: tokens from the end of its longest text that may be shortened, then
    of the next; a text that is itself to be predicted ends the row where it is cut (no end is taught there). Answers,
    questions and video stay whole: without enough text to shorten the row stays too long, which `Tokens.excess` says.
    tail: its last tokens whatever they are but the video, the answer first, as the published code did."""

    def encode(self, prompt: Prompt, *, end: bool = True) -> Tokens:
        """One row. `end`: close it with the end token, which is to be predicted where the last segment is."""
        pieces = self._pieces(prompt)
        if end:
            pieces.append(_Piece(ids=[self.tokenizer.eos], learn=pieces[-1].learn))
        length = sum(len(piece.ids) for piece in pieces)
        over = max(0, length - self.max_length) if self.max_length is not None else 0
        dropped = 0
        if over and self.overflow == "tail":
            keep = max(length - over, _video_end(pieces))
            pieces, dropped = _cut_tail(pieces, keep), length - keep
        elif over:
            pieces, dropped = _shorten(pieces, over)
        return _join(pieces, dropped, over - dropped)

    def _pieces(self, prompt: Prompt) -> list[_Piece]:
        assert sum(isinstance(segment, Video) for segment in prompt) <= 1, "a prompt has one place for video at most"
        pieces = [] if self.tokenizer.bos is None else [_Piece(ids=[self.tokenizer.bos])]
        for run in _runs(prompt):
            if isinstance(run, Video):
                fill, *marks = self.video_words
                ids = [*marks[:1], *[fill] * self.num_video_tokens, *marks[1:]]
                pieces.append(_Piece(ids=ids, video=True, skip=int(bool(marks))))
            elif isinstance(run, Control):
                token = self.tokenizer.bos if run.token == "begin" else self.tokenizer.eos
                pieces.append(_Piece(ids=[] if token is None else [token], learn=run.learn))
            elif run == [NEWLINE]:
                pieces.append(_Piece(ids=[self.tokenizer.newline]))
            else:
                pieces += self._encode_run(run)
        return pieces

    def _encode_run(self, run: list[Text]) -> list[_Piece]:
        """The pieces of texts that are one string to the tokenizer."""
        string = "".join(segment.text for segment in run)
        ids = self.tokenizer.encode(string)
        pieces: list[_Piece] = []
        place = start = 0
        for number, segment in enumerate(run, 1):
            place += len(segment.text)
            if number < len(run) and _same(segment, run[number]):
                continue  # no border that matters
            stop = len(ids) if number == len(run) else self.tokenizer.tokens_before(string, place)
            pieces.append(
                _Piece(
                    ids=ids[start:stop],
                    learn=segment.learn,
                    shorten=segment.shorten,
                    skip=segment.skip,
                    mark=segment.mark,
                )
            )
            start = stop
        return pieces


def _same(first: Text, second: Text) -> bool:
    """Whether two texts are plain: neither to be predicted nor to be shortened nor marked."""
    return not any(text.learn or text.shorten or text.mark for text in (first, second))


def _runs(prompt: Prompt) -> Iterator[list[Text] | Video | Control]:
    """Texts that are encoded as one string, and the video and control tokens between them."""
    run: list[Text] = []
    for segment in prompt:
        if run and (isinstance(segment, Video | Control) or segment.apart):
            yield run
            run = []
        if isinstance(segment, Video | Control):
            yield segment
        elif segment.text:
            run.append(segment)
    if run:
        yield run


def _shorten(pieces: list[_Piece], over: int) -> tuple[list[_Piece], int]:
    """(pieces without up to `over` tokens of the longest texts that may be shortened, tokens dropped)."""
    free = [place for place, piece in enumerate(pieces) if piece.shorten and not piece.learn]
    dropped = 0
    for place in sorted(free, key=lambda place: -len(pieces[place].ids)):
        piece = pieces[place]
        keep = max(0, len(piece.ids) - (over - dropped))
        dropped += len(piece.ids) - keep
        pieces[place] = replace(piece, ids=piece.ids[:keep])
    last = next((place for place, piece in enumerate(pieces) if piece.shorten and piece.learn), None)
    if dropped < over and last is not None:
        tail = sum(len(piece.ids) for piece in pieces[last:])
        kept = sum(len(piece.ids) for piece in pieces[:last]) + max(0, tail - (over - dropped))
        pieces, dropped = _cut_tail(pieces, kept), dropped + min(tail, over - dropped)
    return pieces, dropped


def _video_end(pieces: list[_Piece]) -> int:
    """Tokens up to the end of the video; 0 without one."""
    place = next((place for place, piece in enumerate(pieces, 1) if piece.video), 0)
    return sum(len(piece.ids) for piece in pieces[:place])


def _cut_tail(pieces: list[_Piece], length: int) -> list[_Piece]:
    """The first `length` tokens."""
    cut = []
    for piece in pieces:
        ids = piece.ids[: max(0, length)]
        length -= len(piece.ids)
        cut.append(replace(piece, ids=ids))
    return cut


def _join(pieces: list[_Piece], dropped: int, excess: int) -> Tokens:
    ids: list[int] = []
    labels: list[int] = []
    video = marked = (0, 0)
    for piece in pieces:
        if piece.video and len(piece.ids) > 2 * piece.skip:
            video = (len(ids) + piece.skip, len(ids) + len(piece.ids) - piece.skip)
        if piece.mark and piece.ids:
            marked = (len(ids), len(ids) + len(piece.ids))
        ids += piece.ids
        labels += [IGNORE if not piece.learn or place < piece.skip else token for place, token in enumerate(piece.ids)]
    return Tokens(tuple(ids), tuple(labels), video, dropped, excess, marked)
