"""Long captions of the moving-shapes corpus, questions about them, and a tiny LLaMA that reads such text.

A video here is a caption and no more: two shapes of the corpus (vlm/sources/common_shapes.py), each moving its own way,
among sentences about other things, 45 tokens or so. A question asks which way one of them moves. Of its four options
two are in the caption, so who sees which ways are told, but not of which shape, is right half of the time.

The LLaMA is trained on text alone, about other videos: the prompts of the view `answer` (vlm/data/views.py) with
captions whole, or as notes, which lack words, and plain questions with plain answers. A real LLaMA has read notes; this
one meets them here.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from vlm.data.prompts import PromptEncoder
from vlm.data.tokenizers import SentencePieceTokenizer
from vlm.data.views import VIEWS, Item
from vlm.models.llama_base import LlamaBaseConfig
from vlm.sources.common_shapes import CLASSES, COLOURS, NUM_CLASSES, SHAPES, plan
from vlm.types import IGNORE, Record, Text

CAPTION = "long"
OBJECTS = 2  # that move, in a video; each is asked about
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
SENTENCES = 7  # about other things, in a caption


class Video(NamedTuple):
    """A caption in words, and what may be asked."""

    sentences: tuple[tuple[str, ...], ...]
    asked: tuple[tuple[str, str, tuple[str, ...], int], ...]  # colour, shape, options, answer

    @property
    def caption(self) -> str:
        return " ".join(word for sentence in self.sentences for word in sentence)


def videos(number: int, seed: int) -> Iterator[Video]:
    """A pure function of the seed."""
    draw = random.Random(seed)
    clips = plan("train", -(-number // NUM_CLASSES) * NUM_CLASSES, seed)
    for clip in clips[:number]:
        question = clip.annotation["questions"][0]
        own = clip.scene
        options = list(question["options"])
        other = draw.choice([way for way in options if way != options[question["answer"]]])
        ways = {own.colour: options[question["answer"]]}
        colours = [own.colour, *draw.sample([c for c in COLOURS if c != own.colour], OBJECTS - 1)]
        draw.shuffle(colours)
        shapes = [own.shape if colour == own.colour else draw.choice(SHAPES) for colour in colours]
        told = [(colour, shape, "moves", ways.setdefault(colour, other), ".") for colour, shape in zip(colours, shapes)]
        others = [tuple(text.split()) for text in draw.sample(FILLERS, SENTENCES)]
        sentences = [*told, *others]
        draw.shuffle(sentences)
        asked = []
        for colour, shape in zip(colours, shapes):
            draw.shuffle(options)
            asked.append((colour, shape, tuple(options), options.index(ways[colour])))
        yield Video(tuple(sentences), tuple(asked))


def ask(colour: str, shape: str) -> str:
    return f"which way does the {colour} {shape} move?"


def records(number: int, seed: int) -> list[Record]:
    """As a shard would hold them."""
    found = []
    for place, video in enumerate(videos(number, seed)):
        questions = [
            {"question": ask(colour, shape), "options": list(options), "answer": answer, "kind": "motion"}
            for colour, shape, options, answer in video.asked
        ]
        annotation: dict[str, Any] = {"questions": questions, "captions": {CAPTION: video.caption}}
        found.append(
            Record(
                key=f"{seed}-{place:05d}",
                shard="none",
                row=place,
                video=None,
                annotation=annotation,
                num_frames=-1,
                fps=0.0,
                decoders=(),
            )
        )
    return found


def notes(video: Video, colour: str, answer: str, draw: random.Random) -> str:
    """The caption with words left out, such that the question about `colour` can still be answered.

    One in three is left whole; one in three loses words here and there but for what answers the question; of the rest
    the way asked for is the only one left, among a few other words.
    """
    style, share = draw.randrange(3), draw.random()
    if style == 0:
        return video.caption
    ways = {motion.words for motion in CLASSES}
    kept = []
    for sentence in video.sentences:
        own = colour in sentence
        for word in sentence:
            if own and word == answer:
                keep = True
            elif style == 1:
                keep = (own and word == colour) or draw.random() > share
            else:
                keep = word not in ways and draw.random() < 0.3 * share
            if keep:
                kept.append(word)
    return " ".join(kept)


# Tokens -----------------------------------------------------------------------------------------------


def make_tokenizer(file: Path) -> SentencePieceTokenizer:
    """A sentencepiece model with each word, each way of moving and each fixed line of the prompts as one piece."""
    blank = Item(question="?", options=("",) * 4, answer=0, context="x")
    lines = [
        line
        for segment in VIEWS["answer"](blank, 0)
        if isinstance(segment, Text)
        for line in (line.strip(" ?") for line in segment.text.split("\n"))
        if len(line) > 1
    ]
    words = {word for text in FILLERS for word in text.split()} | {"a", "moves", "move", *COLOURS, *SHAPES}
    words |= {"Which way does the", *(motion.words for motion in CLASSES)}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Sizes of the tiny LLaMA and of its training."""

    dim: int = 64
    layers: int = 4
    heads: int = 4
    hidden: int = 160
    videos: int = 8000
    steps: int = 700
    batch: int = 64
    lr: float = 1e-2
    matrix_lr: float = 2e-2
    seed: int = 1_000_003  # of its videos: no other part of the benchmark has it

    def llama(self, path: Path | None, words: int) -> LlamaBaseConfig:
        return LlamaBaseConfig(
            path=path,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
            vocab_size=words,
            rope_theta=100.0,
        )


class Line(NamedTuple):
    """Tokens of a text, and what of them is to be predicted."""

    ids: Tensor  # (L,) int64
    labels: Tensor  # (L,) int64: the token after each, or IGNORE


def lines_of_text(reader: Reader, tokenizer: SentencePieceTokenizer) -> list[Line]:
    """For each question the prompt up to the letter of its answer; for each video its questions and plain answers."""
    encoder = PromptEncoder(tokenizer=tokenizer, num_video_tokens=0)
    draw = random.Random(reader.seed)
    found = []
    for video in videos(reader.videos, reader.seed):
        for colour, shape, options, answer in video.asked:
            context = notes(video, colour, options[answer], draw)
            item = Item(question=ask(colour, shape), options=options, answer=answer, context=context)
            ids, other = (encoder.encode(VIEWS["answer"](item, n)).ids for n in (answer, (answer + 1) % len(options)))
            place = next(i for i, (a, b) in enumerate(zip(ids, other)) if a != b)
            found.append(_line(ids[: place + 1], [place]))
        spoken, learnt = tokenizer.encode(f"Video: {video.caption}\n"), []
        for colour, shape, options, answer in video.asked:
            spoken += tokenizer.encode(f"Question: {ask(colour, shape).capitalize()}\nAnswer: The answer is")
            spoken += tokenizer.encode(options[answer])
            learnt.append(len(spoken) - 1)
            spoken.append(tokenizer.newline)
        found.append(_line(spoken, learnt))
    return found


def _line(ids: Sequence[int], learnt: Sequence[int]) -> Line:
    labels = torch.full((len(ids) - 1,), IGNORE)
    for place in learnt:
        labels[place - 1] = ids[place]
    return Line(torch.tensor(ids[:-1]), labels)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warmup over the first twentieth, then half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )


def pretrain(reader: Reader, folder: Path, report: Callable[[str], None]) -> LlamaBaseConfig:
    """Train the LLaMA on text and write it into `folder` (a Hugging Face folder), where its tokenizer.model is."""
    tokenizer = make_tokenizer(folder / "tokenizer.model")
    lines = sorted(lines_of_text(reader, tokenizer), key=lambda line: len(line.ids))  # one learns by short ones first
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
        model = reader.llama(None, tokenizer.vocab_size).build()
    model.requires_grad_(True)
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():  # as the demo's: it learns in minutes when queries and keys start large
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.mul_(0.5)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(2)
            layer.self_attn.k_proj.weight.mul_(2)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=reader.matrix_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=reader.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [cosine(optimizer, reader.steps) for optimizer in optimizers]
    head: Any = model.lm_head
    draw = torch.Generator().manual_seed(reader.seed)
    right = 0.0
    for step in range(reader.steps):
        known = min(len(lines), int(len(lines) * (0.25 + step / (0.5 * reader.steps))))
        picked = [lines[i] for i in torch.randint(known, (reader.batch,), generator=draw).tolist()]
        ids = pad_sequence([line.ids for line in picked], batch_first=True)
        labels = pad_sequence([line.labels for line in picked], batch_first=True, padding_value=IGNORE)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[labels != IGNORE]
        logits, targets = head(hidden), labels[labels != IGNORE]
        functional.cross_entropy(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        right = 0.95 * right + 0.05 * float((logits.argmax(1) == targets).float().mean())
        if (step + 1) % 50 == 0:
            report(f"language model, step {step + 1} of {reader.steps}: {right:.2f} of its text's answers right")
    model.save_pretrained(folder)
    return reader.llama(folder, tokenizer.vocab_size)
