"""A training step of Video-LLaMA against the same model stepped the plain way: CPU seconds and peak memory.

    python bench/video_llama.py [--quick] [--json FILE]       (also in: make bench)

Ours: tokens of frames stored once (tools/extract_features.py), rows end to end without padding, the vocabulary scored
where something is learnt. The plain way (rival_video_llama.py): pixels through EVA and Q-Former in every step, rows
padded to the longest of their batch, the vocabulary scored everywhere. In between stands ours from pixels, so that what
stored features save is told apart from the rest. The same weights, a mid size; steps take turns in one process; figures
are CPU seconds, medians, and the most memory that a process of its own needed beyond the model. Exits with 1 where
losses differ.

Lengths: captions of 5 to 25 words, dialogues of 60 to 400 tokens about half of which are learnt, as WebVid's and
VideoChat's are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from figures import add_figures
from rival_video_llama import Padded, Rival, pad
from torch import Tensor

from vlm.data.packing import Row, pack
from vlm.models.eva import TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.video_llama import VideoLlama, VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.types import IGNORE, Batch

TOLERANCE = 1e-4
"""Losses may differ by so much: rounding, and what AdamW makes of it in a few steps."""

LEAD = 1  # tokens before the video: the begin token
KINDS = {"caption": (8, 30), "dialogue": (60, 400)}
"""What is trained -> fewest and most tokens behind the video."""
WAYS = ("features", "pixels", "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of the benchmark."""

    dim: int = 512
    layers: int = 8
    heads: int = 8
    hidden: int = 1536
    words: int = 32000
    image: int = 112
    tower_dim: int = 384
    tower_layers: int = 8
    frame_dim: int = 384
    query_layers: int = 4
    queries: int = 32
    frames: int = 8
    batch: int = 8

    def model(self) -> VideoLlama:
        """Random weights; nothing is dropped, so that losses can be compared."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*RANDOM weights")
            return VideoLlamaConfig(
                tower=TowerConfig(
                    image_size=self.image, dim=self.tower_dim, layers=self.tower_layers, heads=6,
                    hidden=4 * self.tower_dim, queries=self.queries, query_dim=self.frame_dim,
                    query_layers=self.query_layers, query_heads=6, query_hidden=4 * self.frame_dim,
                ),
                frame_tokens=self.queries,
                frame_dim=self.frame_dim,
                num_video_tokens=self.queries,
                qformer=QFormerConfig(dim=self.frame_dim, heads=6, hidden=4 * self.frame_dim, dropout=0.0),
                llama=LlamaBaseConfig(
                    dim=self.dim, layers=self.layers, heads=self.heads, hidden=self.hidden, vocab_size=self.words
                ),
            ).build()  # fmt: skip


class Drawn(NamedTuple):
    """A batch: the same rows for all ways."""

    frames: Tensor  # (videos * frames, 3, H, W), normalised
    tokens: Tensor  # what the tower makes of them, once
    rows: list[list[int]]
    learnt: list[list[bool]]


def draw(size: Size, model: VideoLlama, kind: str, rng: random.Random) -> Drawn:
    """A batch of random rows of this kind."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    frames = torch.randn(size.batch * size.frames, 3, size.image, size.image, generator=generator)
    rows, learnt = [], []
    for _ in range(size.batch):
        text = rng.randint(*KINDS[kind])
        asked = 0 if kind == "caption" else text // 2  # a question, then its answer
        rows.append([1, *[0] * size.queries, *(rng.randrange(3, size.words) for _ in range(text))])
        learnt.append([*[False] * (LEAD + size.queries + asked), *[True] * (text - asked)])
    with torch.no_grad():
        return Drawn(frames, model.tower(frames), rows, learnt)


def our_loss(size: Size, model: VideoLlama, drawn: Drawn, kind: str, way: str) -> Tensor:
    """Rows to batch to loss, from stored tokens or from pixels."""
    rows = [
        Row(
            tuple(row),
            tuple(token if wanted else IGNORE for token, wanted in zip(row, told)),
            (LEAD, LEAD + size.queries),
            video,
        )
        for video, (row, told) in enumerate(zip(drawn.rows, drawn.learnt))
    ]
    seen = {"frame_tokens": drawn.tokens} if way == "features" else {"frames": drawn.frames}
    batch = Batch(
        keys=("benchmark",), frame_counts=(size.frames,) * size.batch, views={kind: pack(rows, size.queries)}, **seen
    )
    term = model(batch)[kind]
    return term.total / term.count


def padding(rows: Padded) -> float:
    """Share of padding among the tokens of padded rows."""
    return 1 - float(rows.mask.float().mean())


def make_step(model: torch.nn.Module) -> Callable[[Callable[[], Tensor]], Tensor]:
    """A function that makes a training step with a loss and returns it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)

    def step(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def steps_of(
    size: Size, kind: str, steps: int, ways: Sequence[str] = WAYS
) -> tuple[dict[str, list[float]], float, float]:
    """CPU seconds of the steps of each way, which take turns (one comes before); how far losses are apart; the share
    of padding."""
    rng = random.Random(kind)
    base = size.model().train()
    models: dict[str, VideoLlama | Rival] = {}
    for way in ways:
        models[way] = Rival(base) if way == "plain" else _shared(size, base)
    step = {way: make_step(model) for way, model in models.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    apart, share = 0.0, []
    for number in range(steps + 1):
        drawn = draw(size, base, kind, rng)
        losses = []
        for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
            model = models[way]

            def loss(model: Any = model, way: str = way, drawn: Drawn = drawn) -> Tensor:
                if way == "plain":
                    return model.loss(drawn.frames, pad(drawn.rows, drawn.learnt), LEAD)
                return our_loss(size, model, drawn, kind, way)

            before = time.process_time()
            losses.append(step[way](loss))
            if number:
                seconds[way].append(time.process_time() - before)
        apart = max(apart, float(torch.stack(losses).max() - torch.stack(losses).min()))
        share.append(padding(pad(drawn.rows, drawn.learnt)))
    return seconds, apart, sum(share) / len(share)


def _shared(size: Size, base: VideoLlama) -> VideoLlama:
    """Our model with the base's weights; what is frozen is the base's own, not a copy."""
    model = size.model().train()
    model.tower, model.llm = base.tower, base.llm
    trained = {name: value for name, value in base.state_dict().items() if base.trainable(name)}
    model.load_state_dict(trained, strict=False)
    return model


def peak_memory(kind: str, way: str, threads: int) -> float:
    """Most MiB that two steps of one way needed beyond what was there before, in a process of its own that has made a
    step with one video."""
    command = [sys.executable, __file__, "--memory-of", kind, way, "--threads", str(threads)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(told.splitlines()[-1])


def memory_of(size: Size, kind: str, way: str) -> float:
    """See `peak_memory`; this is that process. The longest rows of the kind."""
    base = size.model().train()
    model: VideoLlama | Rival = Rival(base) if way == "plain" else base
    step, rng = make_step(model), random.Random(kind)
    sizes = [replace(size, batch=1), size, size]
    before = 0.0
    for one_size, drawn in [(one, draw(one, base, kind, rng)) for one in sizes]:

        def loss(one_size: Size = one_size, drawn: Drawn = drawn) -> Tensor:
            if isinstance(model, Rival):
                return model.loss(drawn.frames, pad(drawn.rows, drawn.learnt), LEAD)
            return our_loss(one_size, base, drawn, kind, way)

        step(loss)
        before = before or _resident()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident() -> float:
    """MiB of this process now; what was the most is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(size: Size, *, steps: int, threads: int) -> dict[str, Any]:
    """Every figure by its key in the JSON file, printed as it comes. Ratios are the plain way's by ours."""
    results: dict[str, Any] = {"max_loss_diff": 0.0}
    for kind in KINDS:
        seconds, apart, share = steps_of(size, kind, steps)
        cpu = {way: median(times) for way, times in seconds.items()}
        memory = {way: peak_memory(kind, way, threads) for way in WAYS}
        results["max_loss_diff"] = max(results["max_loss_diff"], apart)
        results[f"padding_{kind}"] = round(share, 4)
        for way in WAYS:
            results[f"cpu_{kind}_{way}"] = round(cpu[way], 4)
            results[f"mib_{kind}_{way}"] = round(memory[way], 1)
        for way in ("features", "pixels"):
            results[f"{kind}_{way}"] = round(median(b / a for a, b in zip(seconds[way], seconds["plain"])), 2)
            results[f"memory_{kind}_{way}"] = round(memory["plain"] / memory[way], 2)
            print(
                f"{kind:9} from {way:8} {results[f'{kind}_{way}']:5.2f} x: plain {cpu['plain']:.3f} s of CPU a step, "
                f"ours {cpu[way]:.3f} s; memory {results[f'memory_{kind}_{way}']:.2f} x: plain {memory['plain']:.0f} "
                f"MiB, ours {memory[way]:.0f} MiB; padding {share:.0%}, losses apart by {apart:.1e}",
                flush=True,
            )
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps: a minute, rougher figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here under the name video_llama")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--memory-of", nargs=2, metavar=("KIND", "WAY"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.memory_of:
        print(memory_of(Size(), *chosen.memory_of))
        return 0
    results = measure(Size(), steps=2 if chosen.quick else 8, threads=chosen.threads)
    if chosen.json:
        add_figures(chosen.json, results, under="video_llama")
    print(json.dumps(results))
    if results["max_loss_diff"] > TOLERANCE:
        print("the ways do not compute the same", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # threads that wait by spinning use CPU seconds for nothing, the more the busier the machine is
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    sys.exit(main())
