"""Long captions of the moving-shapes corpus, its questions, and a tiny LLaMA that reads such text.

A video here is a caption and no more: the sentence that tells it (vlm/sources/common_shapes.py) somewhere among
sentences about other things, 45 tokens or so. The corpus asks three things: which way the shape moves, what colour it
has, what shape it is. Of the four options one is in the caption; which words matter depends on the question.

The LLaMA is trained on text alone, about other videos: the prompts of the view `answer` (vlm/data/views.py) with
captions whole, or as notes, which lack words. A real LLaMA has read notes; this one meets them here.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
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
from vlm.types import Record, Text

CAPTION = "long"
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
    questions: tuple[dict[str, Any], ...]

    @property
    def caption(self) -> str:
        return " ".join(self.words)


def videos(number: int, seed: int) -> Iterator[Video]:
    """A pure function of the seed."""
    draw = random.Random(seed)
    for clip in plan("train", -(-number // NUM_CLASSES) * NUM_CLASSES, seed)[:number]:
        annotation, scene = clip.annotation, clip.scene
        told = (scene.colour, scene.shape, "moves", CLASSES[annotation["label"]].words, ".")
        sentences = [told, *(tuple(text.split()) for text in draw.sample(FILLERS, SENTENCES))]
        draw.shuffle(sentences)
        yield Video(tuple(word for sentence in sentences for word in sentence), tuple(annotation["questions"]))


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


def notes(video: Video, answer: str, draw: random.Random) -> str:
    """The caption; three times in four without some words, but never without the answer."""
    share = draw.random() if draw.randrange(4) else 0.0
    return " ".join(word for word in video.words if word == answer or draw.random() >= share)


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
    words = {word for text in FILLERS for word in text.split()} | {"moves", "move", "star", *COLOURS, *SHAPES}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Sizes of the tiny LLaMA and of its training."""

    dim: int = 64
    layers: int = 4
    heads: int = 4
    hidden: int = 160
    videos: int = 4000
    steps: int = 900
    batch: int = 48
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


def lines_of_text(reader: Reader, tokenizer: SentencePieceTokenizer) -> tuple[list[Tensor], Tensor]:
    """Prompts up to the letter of the answer, short ones first, and the letters."""
    encoder = PromptEncoder(tokenizer=tokenizer, num_video_tokens=0)
    draw = random.Random(reader.seed)
    found = []
    for video in videos(reader.videos, reader.seed):
        for asked in video.questions:
            options, answer = tuple(asked["options"]), asked["answer"]
            context = notes(video, options[answer], draw)
            item = Item(question=asked["question"], options=options, answer=answer, context=context)
            ids, other = (encoder.encode(VIEWS["answer"](item, n)).ids for n in (answer, (answer + 1) % len(options)))
            place = next(i for i, (a, b) in enumerate(zip(ids, other)) if a != b)
            found.append((torch.tensor(ids[:place]), ids[place]))
    found.sort(key=lambda line: len(line[0]))
    return [ids for ids, _ in found], torch.tensor([letter for _, letter in found])


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warmup over the first twentieth, then half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )


def pretrain(reader: Reader, folder: Path, report: Callable[[str], None]) -> LlamaBaseConfig:
    """Train the LLaMA on text and write it into `folder` (a Hugging Face folder), where its tokenizer.model is."""
    tokenizer = make_tokenizer(folder / "tokenizer.model")
    lines, letters = lines_of_text(reader, tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
        model = reader.llama(None, tokenizer.vocab_size).build()
    words: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    model.requires_grad_(True)
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():  # as the demo's: it learns in minutes when queries and keys start large
        words.weight.normal_(generator=torch.Generator().manual_seed(0))
        head.weight.mul_(0.5)
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
    draw = torch.Generator().manual_seed(reader.seed)
    right = 0.0
    for step in range(reader.steps):
        known = int(len(lines) * min(1.0, max(0.12, (step / reader.steps - 0.3) / 0.4)))  # one learns by short ones
        picked = torch.randint(known, (reader.batch,), generator=draw).tolist()
        ids = pad_sequence([lines[i] for i in picked], batch_first=True)
        last = torch.tensor([len(lines[i]) for i in picked]) - 1
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(len(picked)), last]
        logits, targets = head(hidden), letters[picked]
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
