"""Long captions of the moving-shapes corpus, its questions, and a tiny LLaMA that reads such text.

A video here is a caption and no more: the sentence that tells it (vlm/sources/common_shapes.py) somewhere among
sentences about other things, 45 tokens or so. The corpus asks three things: which way the shape moves, what colour it
has, what shape it is. Of the four options one is in the caption; which words matter depends on the question.

The LLaMA is trained on text alone, about other videos: the forms from which the demo's learns to tell and to choose
(vlm/models/story_rows.py, text_base.py), with captions as text of the prompt, whole, or as notes, which lack words. A
real LLaMA has read notes; this one meets them here. At the end it also meets words that are only half there (`Blur`).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
from torch import Tensor

from vlm.data.prompts import NEWLINE, PromptEncoder
from vlm.data.tokenizers import SentencePieceTokenizer
from vlm.data.views import VIEWS, Item
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.story_rows import FORMS, Rows, encode_rows, judged, told
from vlm.models.text_base import TextBaseConfig, initial_model, measure, train
from vlm.sources.common_shapes import CLASSES, COLOURS, NUM_CLASSES, SHAPES, plan
from vlm.types import Prompt, Record, Text, UserError

CAPTION = "long"
SETTINGS = "reader.json"  # in the language model's folder: what it was made with
FILLERS = (
    "the light is soft .",
    "some grass grows there .",
    "the camera stands still .",
    "behind hangs a curtain .",
    "the floor is stone .",
    "nobody is in sight .",
    "it is late .",
    "a lamp is lit .",
)
QUESTIONS = ("Which way does the", "What colour is the shape that moves", "What shape is it that moves")
SENTENCES = 8  # about other things, in a caption


class Video(NamedTuple):
    """A caption in words, and the corpus' questions."""

    words: tuple[str, ...]
    told: str  # what of them tells the video
    questions: tuple[dict[str, Any], ...]

    @property
    def caption(self) -> str:
        return " ".join(self.words)


def videos(number: int, seed: int) -> Iterator[Video]:
    """A pure function of the seed."""
    draw = random.Random(seed)
    for clip in plan("train", -(-number // NUM_CLASSES) * NUM_CLASSES, seed)[:number]:
        annotation, scene = clip.annotation, clip.scene
        telling = (scene.colour, scene.shape, "moves", CLASSES[annotation["label"]].words)
        sentences = [(*telling, "."), *(tuple(text.split()) for text in draw.sample(FILLERS, SENTENCES))]
        draw.shuffle(sentences)
        words = tuple(word for sentence in sentences for word in sentence)
        yield Video(words, " ".join(telling), tuple(annotation["questions"]))


def records(number: int, seed: int) -> list[Record]:
    """As a shard would hold them."""
    return [
        Record(
            key=f"{seed}-{place:05d}",
            shard="none",
            row=place,
            video=None,
            annotation={"questions": list(video.questions), "captions": {CAPTION: video.caption}},
            num_frames=-1,
            fps=0.0,
            decoders=(),
        )
        for place, video in enumerate(videos(number, seed))
    ]


def notes(video: Video, answers: Collection[str], draw: random.Random) -> str:
    """The caption; three times in four without some words, but never without the answers."""
    share = draw.random() if draw.randrange(4) else 0.0
    return " ".join(word for word in video.words if word in answers or draw.random() >= share)


# Tokens -----------------------------------------------------------------------------------------------


def make_tokenizer(file: Path) -> SentencePieceTokenizer:
    """A sentencepiece model with each word, each way of moving and each fixed line of the prompts as one piece."""
    blank = Item(question="?", options=("",) * 4, answer=0, context="x")
    lines = [
        line
        for view in ("answer", "caption")
        for segment in VIEWS[view](blank, 0)
        if isinstance(segment, Text)
        for line in (line.strip(" ?") for line in segment.text.split("\n"))
        if len(line) > 1
    ]
    words = {word for text in FILLERS for word in text.split()} | {
        "moves",
        "move",
        "star",
        "yes",
        "no",
        *COLOURS,
        *SHAPES,
    }
    words |= {*(motion.words for motion in CLASSES), *QUESTIONS}
    pieces = [*dict.fromkeys(lines), *(f"▁{word}".replace(" ", "▁") for word in sorted(words))]
    with file.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([".", "?", "a b"] * 3),
            model_writer=out,
            model_type="bpe",
            vocab_size=1000,
            hard_vocab_limit=False,
            user_defined_symbols=[piece.replace(" ", "▁") for piece in pieces],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    return SentencePieceTokenizer(file)


# The language model -----------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Reader(TextBaseConfig):
    """Sizes of the tiny LLaMA and of its training: as the demo's, on videos that are captions."""

    stories: int = 4000
    held_out: int = 100
    seed: int = 1_000_003  # of its videos: no other part of the benchmark has it
    choose_steps: int = 600
    blurred_steps: int = 250  # at the end, with words half there (`Blur`)
    sharp: float = 0.3  # share of rows whose context is not blurred even then
    words: int = 0  # of its tokenizer

    @property
    def blurred(self) -> Reader:
        """How it goes on when it can choose, with blurred words."""
        return replace(
            self, tell_steps=1, choose_steps=self.blurred_steps, lr=self.lr / 2, matrix_lr=self.matrix_lr / 2
        )

    def llama(self, path: Path | None) -> LlamaBaseConfig:
        """See `TextBaseConfig.llama`."""
        return replace(TextBaseConfig.llama(self, path), vocab_size=self.words)


QUICK = Reader(stories=64, held_out=8, tell_steps=4, choose_steps=4, blurred_steps=2)
"""Reads nothing, and is there in seconds."""


def encode_videos(tokenizer: SentencePieceTokenizer, number: int, seed: int, *, whole: bool = False) -> dict[str, Rows]:
    """The rows of each form (vlm/models/story_rows.py) about `number` videos: with notes, or with `whole` captions."""
    encoder = PromptEncoder(tokenizer=tokenizer, num_video_tokens=0)
    draw = random.Random(seed)
    found: dict[str, list[Prompt]] = {form: [] for form in FORMS}
    for video in videos(number, seed):
        answers = [asked["options"][asked["answer"]] for asked in video.questions]
        shown = video.caption if whole else notes(video, answers, draw)
        found["caption"].append(_described(shown, video))
        for asked, right in zip(video.questions, answers):
            shown = video.caption if whole else notes(video, [right], draw)
            item = Item(
                question=asked["question"], options=tuple(asked["options"]), answer=asked["answer"], context=shown
            )
            answer = VIEWS["answer"](item, asked["answer"])
            found[asked["kind"]].append(answer)
            found["told"].append(told(answer, item))
            found["judged"].append(judged(answer, item))
    no_frames = {form: torch.zeros(len(prompts), 0, 1, dtype=torch.int64) for form, prompts in found.items()}
    return {form: encode_rows(encoder, prompts, no_frames[form]) for form, prompts in found.items()}


def _described(shown: str, video: Video) -> Prompt:
    """Caption or notes -> the sentence of it that tells the video."""
    blank = Item(question="?", options=(), context=shown, caption=f"a {video.told}")
    place = VIEWS["caption"](blank, 0).index(NEWLINE) + 1
    context = (Text("Video: ", apart=True), Text(shown), Text("\n"))
    return (*VIEWS["caption"](blank, 0)[:place], *context, *VIEWS["caption"](blank, 0)[place:])


class Blur:
    """Mixes each word of a context with one that tells nothing, by a share of its own, in most rows.

    A selector learns from what the LLaMA would make of a little of another word where one word is. A LLaMA that has
    only read words that are wholly there or not at all makes nothing of a little, and the selector learns nothing.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, reader: Reader) -> None:
        self.newline = tokenizer.newline
        self.fillers = torch.tensor(sorted({token for text in FILLERS for token in tokenizer.encode(text)}))
        self.sharp = reader.sharp
        self.draw = torch.Generator().manual_seed(reader.seed)

    def __call__(self, embed: torch.nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
        """A forward hook of the embeddings: (R, L) ids, (R, L, D) -> (R, L, D)."""
        (ids,) = inputs
        if ids.ndim != 2:
            return embedded  # words of frames, of which there are none
        lines = (ids == self.newline).cumsum(1)
        context = (lines == 2) & (ids != self.newline)  # the third line
        share = 1 - torch.rand(ids.shape, generator=self.draw).square()  # most of them high
        share *= context & (torch.rand(len(ids), 1, generator=self.draw) >= self.sharp)
        other = self.fillers[torch.randint(len(self.fillers), ids.shape, generator=self.draw)]
        weight = embed.weight
        assert isinstance(weight, Tensor)
        return embedded + share[..., None] * (weight[other] - embedded)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warmup over the first twentieth, then half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )


def pretrain(reader: Reader, folder: Path, report: Callable[[str], None]) -> LlamaBaseConfig:
    """Train the LLaMA on text and write it into `folder` (a Hugging Face folder), where its tokenizer.model is.

    One that is finished there is used as it is. UserError: it is of other settings.
    """
    tokenizer = make_tokenizer(folder / "tokenizer.model")
    reader = replace(reader, words=tokenizer.vocab_size)
    settings, made = json.dumps(asdict(reader), indent=1), folder / SETTINGS
    if made.exists():
        if made.read_text() != settings:
            raise UserError(f"{folder} holds a language model of other settings ({made}): remove it, or name another")
        report(f"language model: the one in {folder}")
        return reader.llama(folder)
    model = initial_model(reader)

    def tell(done: int, most: int, how: str) -> None:
        if done % 50 == 0 or done == most:
            report(f"language model, step {done} of {most}: {how}")

    train(model, encode_videos(tokenizer, reader.stories, reader.seed), reader, tell)
    report(f"it reads words half there, {reader.blurred.choose_steps} more steps")
    handle = model.get_input_embeddings().register_forward_hook(Blur(tokenizer, reader))
    train(model, encode_videos(tokenizer, reader.stories, reader.seed + 77), reader.blurred, tell)
    handle.remove()
    for whole in (False, True):
        rows = encode_videos(tokenizer, reader.held_out, reader.seed + 1, whole=whole)
        right = ", ".join(f"{form} {measure(model, rows[form]):.2f}" for form in FORMS)
        report(f"it reads {'whole captions' if whole else 'notes'}: {right}")
    model.save_pretrained(folder)
    made.write_text(settings)
    return reader.llama(folder)
