"""How long training stands still for a checkpoint, and how large it is.

    python bench/checkpoint.py [--quick] [--json FILE]       (also in: make bench)

A model that trains 43 million numbers (weights and two moments: 515 MB) saves as a run does, in one process on one
thread. By turns: a plain copy of as many bytes between two pieces of memory that are in use; our save, as long as it
keeps training waiting; `torch.save` of the same tensors and a flush to the disk, which is what a plain script does.
Each save is on disk before the next turn begins. Wall seconds, and CPU seconds of the thread that trains, which a
machine that others use disturbs less (and in which waiting for the disk costs nothing). Then a checkpoint of adapters
on a frozen language model is weighed against what trains and the optimizer's state of it. Exits with 1 where a
checkpoint holds other bits than training had, or is larger than 1.02 of what it has to hold.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import add_figures
from safetensors.torch import load_file
from torch import Tensor

from vlm.distributed import World, join
from vlm.recipe import load
from vlm.run import zero_state
from vlm.run.checkpoint import Progress, Saver
from vlm.run.engine import Engine, derive

TURNS = 7
LARGE = ("model.dim=768", "model.depth=6", "model.heads=12")
SMALL = ("model.dim=96",)
ADAPTERS = (
    *("model.llama.dim=1024", "model.llama.heads=8", "model.llama.kv_heads=8", "model.llama.hidden=2048"),
    *("model.adapter_len=10", "model.feature_dim=768", "inputs.feature_dim=768"),
)
MOST = {"blocking / memcpy": 1.3, "adapters / needed": 1.02}
LEAST = {"torch.save / blocking": 10.0}


def engine_of(recipe: str, overrides: Sequence[str], world: World, stage: int) -> Engine:
    """What trains a recipe's model, with moments that are not zero."""
    settings = load(recipe, [*overrides, "global_batch_size=1"])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = settings.model.build()
    hardware = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    engine = Engine(model, settings, derive(hardware, settings, world.size), world)
    for fragment in zero_state.fragments(engine, all_held=True):
        for kind in zero_state.MOMENTS:
            fragment.values[kind].uniform_()
    return engine


def held(engine: Engine) -> dict[str, Tensor]:
    """Copies of weights and moments, by their names in the files of a checkpoint."""
    values = dict(zero_state.read(engine))
    weights = {name: value["param"] for name, value in values.items()}
    return weights | {f"{kind}/{name}": v[kind] for name, v in values.items() for kind in zero_state.MOMENTS}


def same(folder: Path, wanted: dict[str, Tensor]) -> bool:
    """Whether a checkpoint holds these tensors, to the bit, and no others."""
    found = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    return found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in found)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds of a call, and CPU seconds of this thread."""
    began, before = time.perf_counter(), time.thread_time()
    run()
    return time.perf_counter() - began, time.thread_time() - before


def torch_save(tensors: dict[str, Tensor], path: Path) -> None:
    """A checkpoint by `torch.save`, on disk."""
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def stalls(place: Path, world: World, turns: int, overrides: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Seconds that each way keeps training waiting: the medians over turns, and of their ratios; and whether what was
    saved is what was held."""
    engine = engine_of("vit_llama.debug", overrides, world, stage=1)
    tensors = held(engine)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    source, target = (torch.ones(total, dtype=torch.uint8) for _ in range(2))
    saver = Saver(place / "checkpoints", engine, keep=1)
    wall: dict[str, list[float]] = {name: [] for name in ("memcpy", "blocking", "torch.save", "on disk")}
    cpu: dict[str, list[float]] = {name: [] for name in ("memcpy", "blocking", "torch.save")}
    for turn in range(turns + 1):  # the first one warms up
        copied = timed(lambda: target.copy_(source))
        began = time.perf_counter()
        blocked = timed(lambda step=turn + 1: saver.save(Progress(step=step), {"recipe": {}}))  # type: ignore[misc]
        saver.wait()
        wall["on disk"].append(time.perf_counter() - began)
        for name, (seconds, own) in zip(cpu, (copied, blocked, timed(lambda: torch_save(tensors, place / "plain.pt")))):
            wall[name].append(seconds)
            cpu[name].append(own)
    figures: dict[str, Any] = {"bytes": total, "turns": turns}
    for spent, what in ((wall, ""), (cpu, ", CPU")):
        kept = {name: seconds[1:] for name, seconds in spent.items()}
        figures |= {f"{name}{what}": median(seconds) for name, seconds in kept.items()}
        for above, below in (("blocking", "memcpy"), ("torch.save", "blocking")):
            figures[f"{above} / {below}{what}"] = median(a / b for a, b in zip(kept[above], kept[below], strict=True))
    return figures, same(saver.root / f"step-{turns + 1:08d}", tensors)


def adapters(place: Path, world: World, overrides: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Bytes of a checkpoint of Vamos's adapters by those of what trains, with its two moments, in fp32."""
    engine = engine_of("vamos.debug", overrides, world, stage=2)
    tensors = held(engine)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    saver = Saver(place / "adapters", engine, keep=1)
    folder = saver.save(Progress(step=1), {"recipe": {}})
    saver.wait()
    size = sum(path.stat().st_size for path in folder.iterdir())
    frozen = sum(p.numel() for p in engine.model.parameters() if not p.requires_grad)
    figures = {"needed": needed, "written": size, "frozen parameters": frozen, "adapters / needed": size / needed}
    return figures, same(folder, tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, once: does it run, are the bits the same?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (the temporary folder)")
    options = parser.parse_args(arguments)
    world = join()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        turns, size = (1, SMALL) if options.quick else (TURNS, LARGE)
        figures, right = stalls(place, world, turns, size)
        weighed, right_too = adapters(place, world, ADAPTERS)
    figures |= weighed
    mb = figures["bytes"] / 1e6
    for key in ("memcpy", "blocking", "torch.save", "on disk"):
        print(f"{key}: {figures[key] * 1e3:.1f} ms for {mb:.0f} MB ({mb / figures[key] / 1e3:.2f} GB/s)")
    for key in (*MOST, *LEAST):
        goal = f"wanted: at most {MOST[key]}" if key in MOST else f"wanted: at least {LEAST[key]}"
        own = f"; CPU {figures[f'{key}, CPU']:.3f}" if f"{key}, CPU" in figures else ""
        print(f"{key}: {figures[key]:.3f}{own} ({goal})")
    print(f"checkpoints hold what training had, to the bit: {right and right_too}")
    if options.json:
        add_figures(options.json, {**figures, "same bits": right and right_too}, "checkpoint")
    return int(not (right and right_too and figures["adapters / needed"] <= MOST["adapters / needed"]))


if __name__ == "__main__":
    sys.exit(main())
