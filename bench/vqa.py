"""What packing, shared prefixes and logits at learnt places alone save: our step against the original way, CPU seconds.

    python bench/vqa.py [--quick] [--json FILE]       (or: make bench)

One model with one set of weights is run both ways: ours (vlm.models.vamos on packed rows) and the original's
(rival_vqa.py: rows padded to max_seq_len, full score matrices, logits everywhere, a row an option). Rows have the
lengths of NExT-QA's validation questions (bench/data), captions 400 to 1,050 tokens. Calls of the two alternate in one
process, each making its own batches of the same questions; figures are CPU seconds of all threads, so that other work
on the machine counts little. Exits with 1 where losses or answers differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from figures import add_figures
from lengths import LEAD, LEARNT, Question, draw, read
from rival_vqa import PADDING, Rival
from torch import Tensor

from vlm.data.packing import Row, pack, pack_trees, share_prefixes
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.vamos import Vamos, vamos
from vlm.types import IGNORE, Batch

RECORDED = {"rival_cpu_128": 1.04, "rival_cpu_1200": 23.3}
"""CPU seconds that a training step of the original code took, on two cores of an x86 server."""

TOLERANCE = 1e-4
"""Losses, and scores of options, may differ by so much: rounding, and what AdamW makes of it in a few steps."""

TARGETS = {"train_128": 2.0, "train_1200": 4.5, "score": 3.5, "score_captions": 15.0}
"""What the ratios should reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of a benchmark. The defaults are the middle size that the original was timed at."""

    dim: int = 512
    layers: int = 8
    heads: int = 8
    hidden: int = 1536
    words: int = 32000
    batch: int = 4
    feature_dim: int = 768
    num_frames: int = 6
    short: int = 128
    long: int = 1200
    captions: tuple[int, int] = (400, 1050)

    def model(self) -> Vamos:
        """A random LLaMA with prompts in all blocks, whose gates are open."""
        llama = LlamaBaseConfig(
            dim=self.dim, layers=self.layers, heads=self.heads, hidden=self.hidden, vocab_size=self.words
        )
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
            model = vamos(llama=llama, feature_dim=self.feature_dim, num_frames=self.num_frames).build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate"):
                    parameter.normal_()
        return model

    def draw(self, rng: random.Random, counts: Sequence[int], length: int) -> list[Question]:
        """So many questions of each video; with captions where `length` is the long one."""
        captions = self.captions if length == self.long else None
        return draw(rng, counts, captions=captions, words=self.words, num_frames=self.num_frames)


class Measured(NamedTuple):
    """CPU seconds of one thing done both ways, and how far the results are apart."""

    ours: float
    rival: float
    padding: float  # share of the rival's tokens
    difference: float  # largest, of losses (training) or mean losses of options (scoring)
    same: bool = True  # scoring: every question has the same answer

    @property
    def ratio(self) -> float:
        return self.rival / self.ours


# Rows the two ways ------------------------------------------------------------------------------------


def own_row(size: Size, ids: Sequence[int], sample: int) -> Row:
    """A row whose last tokens, the answer's, are to be predicted."""
    labels = (*[IGNORE] * (len(ids) - LEARNT), *ids[-LEARNT:])
    return Row(tuple(ids), labels, (LEAD, LEAD + size.num_frames), sample)


def padded(rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """ids and labels of rows for the rival, (B, length) each."""
    ids, labels = (torch.full((len(rows), length), PADDING) for _ in range(2))
    for number, row in enumerate(rows):
        assert len(row) <= length, f"a row of {len(row)} tokens, max_seq_len {length}"
        ids[number, : len(row)] = torch.tensor(row)
        labels[number, len(row) - LEARNT : len(row)] = torch.tensor(row[-LEARNT:])
    return ids, labels


def seconds_of(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds of a call, and its result."""
    before = time.process_time()
    result = call()
    return time.process_time() - before, result


# Training ---------------------------------------------------------------------------------------------


def train(size: Size, length: int, steps: int, *, together: bool = False) -> Measured:
    """Both ways through the same steps: rows to batch, forward, backward, AdamW; medians. One step comes before.

    Args:
        length: the rival's max_seq_len.
        together: a batch's questions ask about one video and share its rows; else about any videos, as published.
    """
    rng, generator = random.Random(length), torch.Generator().manual_seed(length)
    ours = size.model()
    rival = Rival(ours, length)
    seconds: list[list[float]] = [[], []]
    shares, difference = [], 0.0
    our_step, rival_step = (_step(model) for model in (ours, rival))
    for _ in range(steps + 1):
        questions = size.draw(rng, [size.batch] if together else [1] * size.batch, length)
        right = [(q.rows[q.answer], q.video) for q in questions]
        features = torch.randn(questions[-1].video + 1, size.num_frames, size.feature_dim, generator=generator)

        def our_loss(right=right, features=features) -> Tensor:  # type: ignore[no-untyped-def]
            rows = [own_row(size, ids, video) for ids, video in right]
            packed = (
                pack_trees([share_prefixes([[row] for row in rows], learnt=False)], size.num_frames)
                if together
                else pack(rows, size.num_frames)
            )
            term = ours(Batch(keys=("benchmark",), features=features, views={"answer": packed}))["answer"]
            return term.total / term.count

        def rival_loss(right=right, features=features) -> Tensor:  # type: ignore[no-untyped-def]
            each = features[[video for _, video in right]]
            return rival.loss(*padded([ids for ids, _ in right], length), each, LEAD)

        pairs = [
            seconds_of(lambda: our_step(our_loss)),
            seconds_of(lambda: rival_step(rival_loss)),
        ]
        for times, (cpu, _) in zip(seconds, pairs):
            times.append(cpu)
        difference = max(difference, float((pairs[0][1] - pairs[1][1]).abs()))
        shares.append(padding(questions, length))
    mine, its = (median(times[1:]) for times in seconds)
    return Measured(mine, its, sum(shares) / len(shares), difference)


def _step(model: torch.nn.Module) -> Callable[[Callable[[], Tensor]], Tensor]:
    """A function that makes a training step with a loss and returns it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.14)

    def step(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def padding(questions: Sequence[Question], length: int) -> float:
    """Share of padding in the rival's rows."""
    return 1 - sum(question.length for question in questions) / (length * len(questions))


# Scoring ----------------------------------------------------------------------------------------------


def score(size: Size, length: int, videos: int, at_once: int) -> Measured:
    """Both ways through all questions of some videos: CPU seconds a question.

    Args:
        length: the rival's max_seq_len.
        videos: how many; one more comes before, with one question.
        at_once: questions in a batch of the rival.
    """
    rng, generator = random.Random(length), torch.Generator().manual_seed(length)
    ours = size.model().eval()
    rival = Rival(ours, length)
    histogram = read()["questions_per_video"]
    counts = rng.choices(list(histogram), list(histogram.values()), k=videos)
    total, asked, difference, same = [0.0, 0.0], 0, 0.0, True
    shares = []
    for number, count in enumerate([1, *counts]):
        questions = size.draw(rng, [count], length)
        features = torch.randn(1, size.num_frames, size.feature_dim, generator=generator)

        @torch.no_grad()
        def our_scores(questions=questions, features=features) -> Tensor:  # type: ignore[no-untyped-def]
            tree = share_prefixes([[own_row(size, ids, 0) for ids in q.rows] for q in questions])
            return ours.predict(
                Batch(keys=("benchmark",), features=features, options=pack_trees([tree], size.num_frames))
            )

        def rival_scores(questions=questions, features=features) -> Tensor:  # type: ignore[no-untyped-def]
            parts = []
            for first in range(0, len(questions), at_once):
                part = questions[first : first + at_once]
                ids, labels = padded([row for q in part for row in q.rows], length)
                shape = (len(part), -1, length)
                each = features.expand(len(part), -1, -1)
                parts.append(rival.option_losses(ids.view(shape), labels.view(shape), each, LEAD))
            return -torch.cat(parts)

        (our_cpu, a), (rival_cpu, b) = seconds_of(our_scores), seconds_of(rival_scores)
        difference = max(difference, float((a - b).abs().max()))
        same = same and torch.equal(a.argmax(1), b.argmax(1))
        shares.append(padding(questions, length))
        if number:
            total[0] += our_cpu
            total[1] += rival_cpu
            asked += count
    return Measured(total[0] / asked, total[1] / asked, sum(shares) / len(shares), difference, same)


# All of it --------------------------------------------------------------------------------------------


def measure(size: Size, *, quick: bool) -> dict[str, Any]:
    """Every figure by its key in the JSON file, printed as it comes.

    Ratios are the rival's CPU seconds by ours. `ours_cpu_*` and `rival_cpu_*`: of a training step, or (`score`) of a
    question with its options. `train_1200_shared`: the questions of a batch ask about one video.
    """
    results: dict[str, Any] = {}

    def note(name: str, done: Measured, pad: str | None = None) -> None:
        results[name] = round(done.ratio, 2)
        which = name.removeprefix("train_")
        results.update({f"rival_cpu_{which}": round(done.rival, 4), f"ours_cpu_{which}": round(done.ours, 4)})
        if pad:
            results[pad] = round(done.padding, 4)
        aim = f", aim {TARGETS[name]:g}" if name in TARGETS else ""
        known = RECORDED.get(f"rival_cpu_{which}")
        original = f" (the original code: {known:g})" if known else ""
        print(
            f"{name:18} {done.ratio:6.2f} x{aim}: rival {done.rival:.3f} s{original}, ours {done.ours:.3f} s; "
            f"padding {done.padding:.1%}, largest difference {done.difference:.1e}",
            flush=True,
        )

    short = train(size, size.short, 3 if quick else 12)
    note("train_128", short, "padding_128")
    long = train(size, size.long, 1 if quick else 4)
    note("train_1200", long, "padding_1200")
    trained = [short, long]
    if not quick:
        trained.append(train(size, size.long, 2, together=True))
        note("train_1200_shared", trained[-1])
    scored = [score(size, size.short, 1 if quick else 4, size.batch)]
    note("score", scored[0])
    scored.append(score(size, size.long, 1 if quick else 2, 1))
    note("score_captions", scored[1])
    return results | {
        "max_loss_diff": max(done.difference for done in trained),
        "max_score_diff": max(done.difference for done in scored),
        "argmin_equal": all(done.same for done in scored),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps and videos: a minute or two, rougher figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, beside those of others")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    results = measure(Size(), quick=chosen.quick)
    if chosen.json:
        add_figures(chosen.json, results)
    print(json.dumps(results))
    same = results["argmin_equal"] and max(results["max_loss_diff"], results["max_score_diff"]) <= TOLERANCE
    if not same:
        print("the two do not compute the same", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # threads that wait by spinning use CPU seconds for nothing, the more the busier the machine is
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    sys.exit(main())
