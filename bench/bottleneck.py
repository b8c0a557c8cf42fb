"""Vamos' token bottleneck: accuracy against caption tokens kept, and the time that it saves.

    python bench/bottleneck.py [--quick] [--json FILE] [--llama FOLDER]

Two tables. **Accuracy**: a tiny LLaMA, trained on text alone and frozen (moving_texts.py), answers questions about
captions of some 45 tokens, of which a selector leaves so many as the row says; prompts, gates and selector are trained
anew for each row, the selector to choose for each `question` or once for all questions of a `caption`. `all`: no
selector. `even`: no selector either, but the middle token of each segment. **Time**: a middle-sized LLaMA of random
weights scores questions with captions as long as NExT-QA's (644 tokens), which is what the paper timed.

Figures are CPU seconds of one thread a question, each question by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from moving_texts import CAPTION, QUICK, Reader, cosine, pretrain, records
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from vlm.data.packing import Row, pack_trees, share_prefixes
from vlm.data.passages import Picks, gather_passages
from vlm.data.questions import QuestionConfig
from vlm.data.rng import SampleRng
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.vamos import SelectorConfig, Vamos, vamos
from vlm.types import IGNORE, Batch, Example, Passage, Passages, Record, Visit

KEPT = (16, 8, 4, 2, 1)
ROWS = (
    (None, "whole"),
    *((keep, "question") for keep in KEPT),
    *((keep, chosen) for chosen in ("even", "caption") for keep in (8, 2)),
)
"""Tokens kept, and how they are chosen."""
STEPS = 250
"""Training steps of prompts, gates and selector, 32 questions each; a quarter where nothing learns to choose."""
PROMPT_LR, SELECTOR_LR = 1e-3, 5e-4
"""Peak learning rates. A selector that learns faster is sure of a wrong choice before it has tried the others."""
TRAIN_SEED, TEST_SEED = 1, 2
CAPTION_LENGTH = 644
"""Tokens of an average caption that the paper read for NExT-QA, and …"""
CAPTION_KEEP = 40
"""… how many it kept."""


class MiddleTokens(torch.nn.Module):
    """Keeps the middle token of each segment: what a selector has to beat."""

    def forward(self, embedded: Tensor, passages: Passages) -> tuple[Tensor, Tensor]:
        lengths = (passages.segments >= 0).sum(1)
        chosen = passages.segments.gather(1, (lengths // 2)[:, None])[:, 0]
        return embedded[chosen], chosen


def build(base: LlamaBaseConfig, keep: int | None, even: bool) -> Vamos:
    torch.manual_seed(0)
    selector = None if keep is None else SelectorConfig(keep=keep, width=64, layers=2, heads=4)
    model = vamos(llama=base, use_video=False, adapter_len=4, selector=selector).build()
    if even:
        model.add_module("selector", MiddleTokens())
    return model


def train(model: Vamos, config: QuestionConfig, texts: Sequence[Record], steps: int, batch: int) -> None:
    """Prompts, gates and selector on the questions of these captions."""
    examples: list[Example] = []
    for record in texts:
        for part in range(len(record.annotation["questions"])):
            examples += config.train(record, SampleRng(0), Visit(part, 0, ("answer",)))
    parts = [
        [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("selector.") == chooses]
        for chooses in (False, True)
    ]
    groups = [{"params": part, "lr": lr} for part, lr in zip(parts, (PROMPT_LR, SELECTOR_LR)) if part]
    trained = parts[0] + parts[1]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = cosine(optimizer, steps)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        picked = torch.randint(len(examples), (batch,), generator=draw).tolist()
        term = model(config.collate([examples[i] for i in picked], SampleRng(0)))["answer"]
        (term.total / term.count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def test(model: Vamos, config: QuestionConfig, texts: Sequence[Record]) -> dict[str, float]:
    """Accuracy, CPU seconds a question and tokens that the LLaMA reads of a question with its options."""
    model.eval()
    right = asked = read = 0
    seconds = 0.0
    for record in texts:
        whole = config.all_views(record, SampleRng(0), ())[""][0]
        for row, options in zip(record.annotation["questions"], whole.options):
            start = time.process_time()
            batch = config.test_batch([_alone(whole, options)])
            scores = model.predict(batch)
            seconds += time.process_time() - start
            assert batch.options is not None
            read += sum(batch.options.lengths)
            right += int(scores.argmax()) == row["answer"]
            asked += 1
    return {"accuracy": right / asked, "cpu": seconds / asked, "tokens_read": read / asked, "questions": asked}


def _alone(whole: Example, options: tuple[Row, ...]) -> Example:
    """One question of a video, with its passage alone."""
    if not whole.passages:
        return Example(key=whole.key, options=(options,))
    starts = sorted({row.first_pick for question in whole.options for row in question})
    passage = whole.passages[starts.index(options[0].first_pick)]
    return Example(key=whole.key, options=(tuple(r._replace(first_pick=0) for r in options),), passages=(passage,))


# Time at the paper's size ------------------------------------------------------------------------------


def question_rows(words: int, keep: int | None, options: int = 5) -> tuple[list[Row], Picks | None]:
    """A question of NExT-QA's usual length: 18 tokens of instruction, a caption, 60 tokens of question and options."""
    draw = torch.Generator().manual_seed(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, words, (count,), generator=draw).tolist())

    lead, caption, question, end = some(18), some(CAPTION_LENGTH), some(60), some(2)
    picks = None if keep is None else Picks(keep)
    first, count = (0, 0) if picks is None else picks.add(Passage(caption, question[:15]))
    middle = caption if picks is None else (0,) * count
    rows = []
    for letter in range(options):
        ids = (*lead, *middle, *question, 3 + letter, *end)
        labels = (*[IGNORE] * (len(ids) - 3), *ids[-3:])
        rows.append(Row(ids, labels, picks=(18, 18 + count) if picks else (0, 0), first_pick=first))
    return rows, picks


@torch.no_grad()
def seconds_of(size: LlamaBaseConfig, keep: int | None, repeats: int) -> tuple[float, float]:
    """CPU seconds of a question with its options, and of choosing alone; the fastest of `repeats`."""
    torch.manual_seed(0)
    selector = None if keep is None else SelectorConfig(keep=keep)
    model = vamos(llama=size, use_video=False, selector=selector).build().eval()
    rows, picks = question_rows(size.vocab_size, keep)
    passages = None if picks is None else gather_passages(picks.passages, picks.keep)
    batch = Batch(keys=("benchmark",), options=pack_trees([share_prefixes([rows])], 0), passages=passages)
    whole, choice = [], [0.0]
    for _ in range(repeats + 1):
        start = time.process_time()
        model.predict(batch)
        whole.append(time.process_time() - start)
        if passages is not None:
            start = time.process_time()
            model.choose(passages)
            choice.append(time.process_time() - start)
    return min(whole[1:]), min(choice[2:] or [0.0])


# All of it --------------------------------------------------------------------------------------------


def accuracy_table(quick: bool, folder: Path) -> list[dict[str, Any]]:
    base = pretrain(QUICK if quick else Reader(), folder, lambda line: print(line, flush=True))
    learnt = records(64 if quick else 1500, TRAIN_SEED)
    asked = records(10 if quick else 140, TEST_SEED)
    print(f"{'kept':>6} {'chosen for':>12} {'accuracy':>9} {'ms a question':>14} {'tokens read':>12}")
    rows = []
    for keep, chosen in ((None, "whole"), *((keep, "question") for keep in KEPT)) if quick else ROWS:
        config = QuestionConfig(
            tokenizer=folder / "tokenizer.model",
            use_video=False,
            caption=CAPTION,
            max_length=400,
            keep_tokens=keep,
            select_for="caption" if chosen == "caption" else "question",
        )
        model = build(base, keep, even=chosen == "even")
        steps = STEPS if chosen in ("question", "caption") else STEPS // 4
        train(model, config, learnt, 5 if quick else steps, 32)
        found = test(model, config, asked)
        rows.append({"kept": keep, "chosen": chosen, **found})
        print(
            f"{keep or 'all':>6} {chosen:>12} {found['accuracy']:9.3f} {1000 * found['cpu']:14.1f} "
            f"{found['tokens_read']:12.1f}",
            flush=True,
        )
    return rows


def time_table(quick: bool) -> dict[str, float]:
    size = LlamaBaseConfig(dim=512, layers=8, heads=8, hidden=1536, vocab_size=32000)
    repeats = 1 if quick else 5
    whole, _ = seconds_of(size, None, repeats)
    kept, choosing = seconds_of(size, CAPTION_KEEP, repeats)
    print(
        f"{CAPTION_LENGTH} caption tokens, {CAPTION_KEEP} kept, LLaMA of {size.layers} blocks {size.dim} wide: "
        f"{whole:.3f} s a question whole, {kept:.3f} s with the bottleneck ({whole / kept:.1f} x), of which choosing "
        f"{choosing:.3f} s"
    )
    return {"cpu_whole": whole, "cpu_bottleneck": kept, "cpu_choosing": choosing, "speedup": whole / kept}


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="does everything run? seconds, and no figures of worth")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--llama", type=Path, metavar="FOLDER", help="keep the tiny LLaMA here, or use the one there")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
    with tempfile.TemporaryDirectory() as passing:
        folder = chosen.llama or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        results = {"time": time_table(chosen.quick), "accuracy": accuracy_table(chosen.quick, folder)}
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
