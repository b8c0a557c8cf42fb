"""Started by test_modalities.py in two or three processes: patterns of modalities over ranks and micro-steps.

All patterns of a ZeRO stage run in one process group and one engine, in random order, since ZeRO-3 keeps a record of
the modules that ran. Each is compared with one pass of the plain model, in rank 0 alone, over the union of all ranks'
micro-batches. The result, one JSON line, holds for each stage how far apart the gradients were.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import vamos_worker
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from vlm.data.boundaries import BoundaryConfig
from vlm.data.dialogues import DialogueConfig
from vlm.data.frames import CLIP_COLOURS
from vlm.data.loader import MicroBatch
from vlm.data.packing import Row, pack
from vlm.data.questions import QuestionConfig
from vlm.distributed import World, end, join
from vlm.models.causal import CausalSystem
from vlm.models.eva import TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import LlmvaConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.models.video_llama import VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.run.audit import Audit
from vlm.run.engine import Engine, derive
from vlm.types import IGNORE, Batch

VIDEO, IMAGE, TEXT, MIXED, NOTHING = "VITM-"
KINDS = (VIDEO, IMAGE, TEXT, MIXED)
WORDS, SLOTS, FRAMES, SIDE = 300, 4, 5, 28
LR = 1e-3

Pattern = Sequence[Sequence[str]]  # for each rank the kinds of its micro-batches


# ------------------------------------------------------------------------------------------------------- the systems


@dataclass
class Case:
    """A system, and how its samples look."""

    build: Callable[[], CausalSystem]
    inputs: Any
    views: dict[str, float]
    watch: Callable[[int, torch.Generator], Tensor]  # so many frames -> what a batch has of a video
    holds: str  # in which field
    slots: int  # places of a video
    rows: dict[str, Sequence[tuple[str, Sequence[int]]]]  # a kind -> its samples: view, numbers of frames to draw from
    extra: Callable[[Tensor], dict[str, Tensor]] | None = None  # of a video, what else is known of it


SEVERAL, ONE, NONE = range(2, FRAMES + 1), (1,), (0,)


def learnt(model: CausalSystem) -> CausalSystem:
    """A model past its first steps: in a fresh one all tokens are nearly alike, and gradients of attention cancel."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(0, 1 if name.endswith("query_tokens") else parameter.shape[-1] ** -0.5 / 2)
    return model


def video_llama() -> Case:
    """Stage 2 from pixels: captions of images and videos, dialogues about videos or of text alone."""
    config = VideoLlamaConfig(
        tower=TowerConfig(
            image_size=SIDE,
            dim=32,
            layers=1,
            heads=4,
            hidden=48,
            queries=3,
            query_dim=16,
            query_layers=2,
            query_heads=2,
            query_hidden=32,
        ),
        frame_tokens=3,
        frame_dim=16,
        num_video_tokens=SLOTS,
        max_frames=FRAMES,
        qformer=QFormerConfig(dim=16, heads=2, hidden=32, layers=1, dropout=0.0),
        llama=LlamaBaseConfig(dim=32, layers=2, heads=4, hidden=48, vocab_size=WORDS),
        activation_checkpointing=True,
    )
    return Case(
        build=lambda: learnt(config.build()),
        inputs=DialogueConfig(num_video_tokens=SLOTS, num_frames=FRAMES, size=SIDE),
        views={"caption": 1.0, "dialogue": 0.5},
        watch=lambda count, noise: torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=noise).to(torch.uint8),
        holds="frames",
        slots=SLOTS,
        rows={
            VIDEO: [("caption", SEVERAL), ("dialogue", SEVERAL)],
            IMAGE: [("caption", ONE), ("caption", ONE)],
            TEXT: [("dialogue", NONE), ("dialogue", NONE)],
            MIXED: [("dialogue", NONE), ("caption", ONE), ("dialogue", SEVERAL)],
        },
    )


def llama_vqa() -> Case:
    """Features of frames, gated prompts, a loss of its own beside those of tokens. An image is not known to it: here
    its micro-batches lack the view that has that loss."""
    frames = vamos_worker.FRAMES
    any_number = (frames,)
    return Case(
        build=vamos_worker.build,
        inputs=QuestionConfig(num_frames=frames, feature_dim=12),
        views=vamos_worker.VIEWS,
        watch=lambda count, noise: torch.randn(1, frames, 12, generator=noise),
        holds="features",
        slots=frames,
        rows={
            VIDEO: [("answer", any_number), ("video_order", any_number)],
            IMAGE: [("question", any_number), ("answer", any_number)],
            TEXT: [("answer", NONE), ("answer", NONE)],
            MIXED: [("answer", NONE), ("question", any_number), ("video_order", any_number)],
        },
    )


def llmva() -> Case:
    """Stored tokens of frames, other features and a boundary of each video, OPT with its tied output layer."""
    config = LlmvaConfig(
        frame_tokens=3,
        frame_dim=16,
        num_video_tokens=SLOTS - 2,
        max_frames=FRAMES,
        qformer=QFormerConfig(dim=16, heads=2, hidden=32, layers=1, dropout=0.0),
        opt=OptBaseConfig(dim=32, layers=2, heads=4, hidden=48, vocab_size=WORDS, max_positions=64),
        other_tokens=2,
        other_dim=7,
        max_other=6,
    )
    return Case(
        build=lambda: learnt(config.build()),
        inputs=BoundaryConfig(
            frame_tokens=3,
            frame_dim=16,
            num_video_tokens=SLOTS,
            num_frames=FRAMES,
            other_features=("clip",),
            other_dims=(7,),
            other_length=6,
        ),
        views={"caption": 1.0},
        watch=lambda count, noise: torch.randn(count, 3, 16, generator=noise),
        holds="frame_tokens",
        slots=SLOTS,
        rows={
            VIDEO: [("caption", SEVERAL), ("caption", SEVERAL)],
            IMAGE: [("caption", ONE), ("caption", ONE)],
            TEXT: [("caption", NONE), ("caption", NONE)],
            MIXED: [("caption", NONE), ("caption", ONE), ("caption", SEVERAL)],
        },
        extra=lambda video: {"boundary": video[0, 0, :2].sigmoid(), "other": video.mean((0, 1))[:7].expand(6, 7)},
    )


CASES = {case.__name__: case for case in (video_llama, llama_vqa, llmva)}


# ------------------------------------------------------------------------------------------------------- their samples


@dataclass
class Item:
    """One row of a view, and its video."""

    view: str
    ids: tuple[int, ...]
    learnt: int
    video: Tensor | None


def items_of(case: Case, kind: str, seed: int) -> list[Item]:
    """The samples of one micro-batch."""
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    found = []
    for view, frames in case.rows.get(kind, ()):
        ids = tuple(draw.randrange(1, vamos_worker.WORDS) for _ in range(draw.randint(case.slots + 5, case.slots + 12)))
        count, learnt = draw.choice(frames), 0 if view == "video_order" else draw.randint(1, 4)
        found.append(Item(view, ids, learnt, case.watch(count, noise) if count else None))
    return found


def batch_of(case: Case, items: Sequence[Item]) -> Batch:
    """The samples as inputs collate them: what none of them has is not there."""
    videos = [item.video for item in items if item.video is not None]
    views: dict[str, list[Row]] = {}
    count = 0
    for item in items:
        labels = tuple(IGNORE if place < len(item.ids) - item.learnt else id for place, id in enumerate(item.ids))
        place = (0, 0) if item.video is None else (1, 1 + case.slots)
        views.setdefault(item.view, []).append(Row(item.ids, labels, place, count))
        count += item.video is not None
    media: dict[str, Any] = {case.holds: torch.cat(videos)} if videos else {}
    if videos and case.holds != "features":
        media["frame_counts"] = tuple(map(len, videos))
    if videos and case.holds == "frames":
        media["colours"] = CLIP_COLOURS
    if videos and case.extra is not None:
        known = [case.extra(video) for video in videos]
        media["extra"] = {name: torch.stack([one[name] for one in known]) for name in known[0]}
    return Batch(
        keys=tuple(f"{item.view}-{item.ids[0]}" for item in items),
        views={name: pack(rows, case.slots) for name, rows in views.items()},
        **media,
    )


def every(ranks: int, steps: int) -> list[Pattern]:
    """All patterns of the four kinds."""
    several = itertools.product(KINDS, repeat=ranks * steps)
    return [[kinds[rank * steps : (rank + 1) * steps] for rank in range(ranks)] for kinds in several]


def longer(ranks: int, steps: int, number: int) -> list[Pattern]:
    """Random patterns in which ranks have nothing in between, fewer micro-batches than others, or none at all; never
    nothing on all of them."""
    draw, found = random.Random(7), []
    while len(found) < number:
        lengths = [draw.choice((0, 1, steps, steps, steps)) for _ in range(ranks)]
        pattern = [draw.choices((*KINDS, NOTHING), k=length) for length in lengths]
        if any(kind != NOTHING for kinds in pattern for kind in kinds):
            found.append(pattern)
    return found


# ------------------------------------------------------------------------------------------------------- the comparison


@dataclass
class Compared:
    """An engine of a ZeRO stage, and the plain model that it is compared with."""

    case: Case
    stage: int
    steps: int
    world: World
    worst: tuple[float, str] = (0.0, "")  # relative error of a gradient (or of the loss), and whose
    lost_traces: int = 0  # micro-steps, but for the first two, for which ZeRO-3 had no record of the modules' order
    audit_said: list[str] = field(default_factory=list)
    got: dict[str, Tensor | None] = field(default_factory=dict)
    made: int = 0
    micro_steps_made: int = 0

    def __post_init__(self) -> None:
        settings = Recipe(
            model=None,
            inputs=self.case.inputs,
            data=TrainData(shards="none"),
            optim=OptimConfig(lr=LR, weight_decay=0.1, max_grad_norm=1.0),
            views=self.case.views,
            global_batch_size=self.world.size * self.steps,
            steps=1,
        )
        hardware = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": self.stage}}
        self.plain = self._model()
        self.engine = Engine(self._model(), settings, derive(hardware, settings, self.world.size), self.world)
        self._step = self.engine.deepspeed.step
        self.engine.deepspeed.step = self._look_and_step
        self.audit = Audit(self.engine, 3, self.audit_said.append)

    def _model(self) -> CausalSystem:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* RANDOM weights")
            return self.case.build()

    def _look_and_step(self) -> None:
        """In the place of DeepSpeed's step: note the gradients that its optimizer is about to get."""
        wrapped = self.engine.deepspeed
        self.micro_steps_made += 1
        if self.stage == 3 and self.micro_steps_made > 2:
            self.lost_traces += not wrapped.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
        if wrapped.is_gradient_accumulation_boundary():
            trained = [(n, p) for n, p in self.engine.model.named_parameters() if p.requires_grad]
            found = [(name, safe_get_full_grad(p)) for name, p in trained]
            self.got = {name: None if g is None else g.detach().clone() for name, g in found}
        self._step()

    def go(self, pattern: Pattern, seed: int) -> None:
        """One step of the engine against the union of what all ranks have."""
        cells = [
            [items_of(self.case, kind, 1000 * seed + 100 * rank + number) for number, kind in enumerate(kinds)]
            for rank, kinds in enumerate(pattern)
        ]
        trained = {name: p for name, p in self.engine.model.named_parameters() if p.requires_grad}
        with deepspeed.zero.GatheredParameters(list(trained.values())), torch.no_grad():
            for name, parameter in trained.items():
                self.plain.get_parameter(name).copy_(parameter)
        micro = [MicroBatch(batch_of(self.case, cell), int(bool(cell))) for cell in cells[self.world.rank]]
        result = self.engine.step(micro, lr=LR)
        self.audit.after_step(self.made, LR, micro, result.counts)
        self.made += 1
        if not self.world.is_main:  # its optimizer's gradients are those of all ranks
            return
        self.plain.zero_grad()
        terms = self.plain(batch_of(self.case, [item for rank in cells for cell in rank for item in cell]))
        loss = sum(self.case.views[name] * term.total / max(term.count, 1) for name, term in terms.items())
        if loss.requires_grad:
            loss.backward()
        self._compare("loss", torch.tensor(result.loss), loss.detach(), float(loss.detach()))
        self._compare_gradients(pattern, {n: p.grad for n, p in self.plain.named_parameters() if p.requires_grad})

    def _compare_gradients(self, pattern: Pattern, wanted: dict[str, Tensor | None]) -> None:
        assert set(self.got) == set(wanted)
        largest = max((float(g.abs().max()) for g in wanted.values() if g is not None), default=0.0)
        for name, want in wanted.items():
            found = self.got[name]
            assert found is not None, f"{pattern}: {name} has no gradient at all: Adam would pass it over"
            if want is None or not want.any():
                assert not found.any(), f"{pattern}: {name} has a gradient, but nothing reads it"
                continue
            # Attention whose tokens look alike has gradients that nearly cancel, and then fp32 alone is 2e-5 away from
            # fp64: they count against a hundredth of the largest gradient. That of a key's bias is nothing but
            # rounding, since it adds the same to all scores of a query.
            scale = max(float(want.abs().max()), largest / 100)
            self._compare(name, found, want, largest if name.endswith("key.bias") else scale)

    def _compare(self, name: str, got: Tensor, want: Tensor, scale: float) -> None:
        assert got.isfinite().all()
        self.worst = max(self.worst, (float((got - want).abs().max()) / scale, name))


def main(stages: Sequence[int], system: str, runs: dict[str, Sequence[Pattern]]) -> None:
    """`runs`: micro-steps of an engine -> the patterns that it makes."""
    world, results = join(timeout_minutes=1.0), []
    for stage in stages:
        for steps, patterns in runs.items():
            started = time.monotonic()
            compared = Compared(CASES[system](), stage, int(steps), world)
            order = random.Random(stage).sample(patterns, len(patterns))
            for number, pattern in enumerate(order):
                compared.go(pattern, number)
            compared.audit.finish()
            results.append(
                {
                    "stage": stage,
                    "patterns": len(order),
                    "error": compared.worst,
                    "lost_traces": compared.lost_traces,
                    "audit": compared.audit_said,
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
    if world.is_main:
        print("RESULT " + json.dumps(results), flush=True)
    end()


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
