"""The loader of clips against the limit and against other loaders: CPU seconds, bytes, memory.

    python bench/data.py [--quick] [--json FILE] [--real] [--rivals FOLDER]       (also in: make bench)

mp4 in tar -> batches of 16 x 3 x 224 x 224, by `vlm.data.loader` over `vlm.data.stream`. Those who are compared take
turns, a few clips each, in one process with one thread, on the same clips; figures are CPU seconds (and wall seconds),
their ratio the median over the turns with its 95 % bootstrap interval. Against

    limit        the bare loop: bytes from the tar, the same frames by the same decoder, the same resize, to uint8
    finished     ours with what the model does to pixels (normalising, erasing, mixing) done in the same process
    webdataset   plain webdataset and decord, the same pixels by the same resize, finished: normalised float32
    litdata, energon    the same, where they are installed (in FOLDER, say, by pip install --target)
    each_view    a loader built as VideoMAE's is (rival_loaders.py): training with full augmentation, six-view test

and what else a loader must be good at: `bytes_read` over bytes needed, what a clip that breaks off costs, the first
batch of a set of 10,000 shards in a process of its own, resident memory over many samples. Exits with 1 where a
rival's pixels differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rival_loaders
import torch
from data_clips import Corpus, draw, make_corpus, real_clips
from data_loaders import (
    BATCH,
    QUICK,
    Size,
    each_view_test,
    each_view_training,
    finished_too,
    limit_test,
    limit_training,
    our_test,
    our_training,
    pixels,
)
from data_more import Undecoded, bytes_over_needed, cost_of_poison, first_batch, memory_slope
from figures import add_figures
from turns import ratio, take_turns

from vlm.data.clips import IMAGENET_STD
from vlm.data.worker_process import keep_memory

TOLERANCE = {"train": 1.01 / 255 / min(IMAGENET_STD), "test": 1e-4}
"""Normalised pixels of the rival that must show the same may differ by so much: in training a level that ours are
rounded by, in tests the order of floating-point sums."""

TARGETS = {
    "limit_train": 0.95,
    "limit_test": 0.95,
    "webdataset": 1.0,
    "litdata": 1.0,
    "energon": 1.0,
    "each_view_train": 2.0,
    "each_view_test": 4.0,
}
"""What the ratios should reach: another's seconds by ours."""


def compare(
    kind: str, contestants: dict[str, Iterator[Any]], size: Size, videos: int, *, batches: int
) -> dict[str, Any]:
    """The figures of one comparison; the first contestant is ours. `videos`: of a turn."""
    spent = take_turns(contestants, size.turns, batches)
    ours, *others = contestants
    finished = next(name for name in others if name.endswith("finished"))
    results: dict[str, Any] = {}
    for name in contestants:
        for unit in ("cpu", "wall"):
            value = float(np.median([getattr(turn, unit) for turn in spent[name]])) / videos
            results[f"{unit}_{kind}_{name}"] = round(value, 5)
    for name in others:
        found = ratio([turn.cpu for turn in spent[name]], [turn.cpu for turn in spent[ours]])
        walls = ratio([turn.wall for turn in spent[name]], [turn.wall for turn in spent[ours]])
        key = name if name in TARGETS else f"{name}_{kind}"
        results |= {key: round(found.median, 3), f"{key}_interval": [round(found.low, 3), round(found.high, 3)],
                    f"{key}_wall": round(walls.median, 3)}  # fmt: skip
        if name not in (finished, "limit"):
            whole = ratio([turn.cpu for turn in spent[name]], [turn.cpu for turn in spent[finished]])
            results |= {f"{key}_over_finished": round(whole.median, 3),
                        f"{key}_over_finished_interval": [round(whole.low, 3), round(whole.high, 3)]}  # fmt: skip
        aim = f", aim {TARGETS[key]:g}" if key in TARGETS else ""
        print(
            f"{key:16} {found.median:6.2f} x [{found.low:.2f}, {found.high:.2f}]{aim}: "
            f"{1000 * results[f'cpu_{kind}_{name}']:.1f} ms of CPU a video, "
            f"ours {1000 * results[f'cpu_{kind}_{ours}']:.1f} ms; wall {walls.median:.2f} x",
            flush=True,
        )
    return results


def compare_loaders(corpus: Corpus, size: Size, scratch: Path) -> dict[str, Any]:
    """Against the limit and other loaders, without augmentation."""
    config, shards = size.plain(), corpus.shards
    tars = [Path(shards.path) / name for name in shards.shard_names]
    makers: dict[str, tuple[str, Callable[[], Iterator[Any]]]] = {
        "webdataset": ("webdataset", lambda: rival_loaders.webdataset_batches(tars, config, BATCH, 0)),
        "litdata": (
            "litdata",
            lambda: rival_loaders.litdata_batches(corpus.files, scratch / "litdata", config, BATCH, 0),
        ),
        "energon": (
            "megatron.energon",
            lambda: rival_loaders.energon_batches(tars, scratch / "energon", config, BATCH, 0),
        ),
    }
    contestants: dict[str, Iterator[Any]] = {
        "ours": our_training(shards, config),
        "limit": limit_training(shards, config),
        "finished": finished_too(our_training(shards, config)),
    }
    skipped: dict[str, str] = {}
    for name, (package, make) in makers.items():
        problem = rival_loaders.missing(package)
        if problem:
            skipped[name] = problem
            print(f"{name:16} skipped: {package} cannot be imported ({problem})", flush=True)
        else:
            contestants[name] = make()
    videos = BATCH * size.batches
    results = compare("train", contestants, size, videos, batches=size.batches) | {"skipped": skipped}
    test = {
        "ours": our_test(shards, config, BATCH),
        "limit": limit_test(shards, config),
        "finished": finished_too(our_test(shards, config, BATCH)),
    }
    return results | compare("test", test, size, videos, batches=size.batches)


def compare_each_view(corpus: Corpus, size: Size) -> dict[str, Any]:
    """Against the loader built as VideoMAE's is: the recipe's training and its six-view test."""
    config, shards = size.recipe(), corpus.shards
    training: dict[str, Iterator[Any]] = {
        "recipe": our_training(shards, config, 2),
        "each_view": each_view_training(corpus, config, 2),
        "recipe_finished": finished_too(our_training(shards, config, 2)),
    }
    apart = [_apart(training) for _ in range(2)]
    results = compare("train", training, size, 2 * size.batches, batches=size.batches)
    test: dict[str, Iterator[Any]] = {
        "recipe": our_test(shards, config, 1),
        "each_view": each_view_test(corpus, config),
        "recipe_finished": finished_too(our_test(shards, config, 1)),
    }
    results["max_pixel_diff_train"] = max(apart)
    apart_in_test = _apart(test)
    results |= compare("test", test, size, 2 * size.batches, batches=2 * size.batches)
    if rival_loaders.missing("cv2"):
        print("each_view_test resizes with Pillow: OpenCV cannot be imported, so its pixels are not compared")
        return results
    return results | {"max_pixel_diff_test": apart_in_test}


def _apart(contestants: dict[str, Iterator[Any]]) -> float:
    """The largest difference of the next normalised pixels of ours and of the rival."""
    found = float((pixels(next(contestants["recipe"])) - next(contestants["each_view"])).abs().max())
    next(contestants["recipe_finished"])
    return found


def compare_processes(corpus: Corpus, size: Size) -> dict[str, Any]:
    """Videos a second by the clock with loader processes, ours and webdataset's by turns."""
    config = size.plain()
    tars = [Path(corpus.shards.path) / name for name in corpus.shards.shard_names]
    makers: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: our_training(corpus.shards, config, BATCH, size.workers),
        "webdataset": lambda: rival_loaders.webdataset_batches(tars, config, BATCH, size.workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(3):
        for name, make in makers.items():
            batches = make()
            for _ in range(4 * size.workers):  # what was loaded ahead meanwhile is not to count
                next(batches)
            start, count = time.perf_counter(), 12 * size.workers
            for _ in range(count):
                next(batches)
            rates[name].append(count * BATCH / (time.perf_counter() - start))
            del batches
    results = {f"rate_{name}": round(float(np.median(found)), 1) for name, found in rates.items()}
    print(f"{size.workers} processes: videos a second by the clock {results}", flush=True)
    return results


# All of it -----------------------------------------------------------------------------------------------------------


PARTS = ("loaders", "each_view", "processes", "bytes", "poison", "first_batch", "memory")


def measure(size: Size, clips: Sequence[bytes], scratch: Path, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Every figure by its key in the JSON file, printed as it comes.

    `NAME`: NAME's CPU seconds by ours, with `NAME_interval` (95 %) and `NAME_wall` (by the clock); `cpu_*`, `wall_*`:
    seconds a video.
    """
    corpus = make_corpus(scratch / "corpus", clips, size.records)
    results: dict[str, Any] = {
        "clips": len(clips),
        "records": size.records,
        "mean_bytes": round(sum(map(len, clips)) / len(clips)),
    }
    if "loaders" in parts:
        results |= compare_loaders(corpus, size, scratch)
    if "each_view" in parts:
        results |= compare_each_view(corpus, size)
    if "processes" in parts and size.workers:
        results |= compare_processes(corpus, size)
    if "bytes" in parts:
        results |= bytes_over_needed(corpus, size.plain())
    if "poison" in parts:
        results |= cost_of_poison(corpus, size, scratch)
    if "first_batch" in parts or "memory" in parts:
        found, vast = first_batch(corpus, size, scratch)
        results |= found
    if "memory" in parts:
        results |= memory_slope("undecoded", vast, Undecoded(), size.undecoded, 64)
        results |= memory_slope("decoded", corpus.shards, size.plain(), size.decoded, BATCH)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few clips and turns: a minute or two, rougher figures")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here, beside those that another benchmark left"
    )
    parser.add_argument("--real", action="store_true", help="the real clips of VLM_REALDATA in place of drawn ones")
    parser.add_argument(
        "--rivals", type=Path, metavar="FOLDER", help="also look here for litdata, megatron-energon and OpenCV"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    for name in ("undecoded", "decoded", "turns"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"(default {getattr(Size(), name):,})")
    chosen = parser.parse_args(arguments)
    if chosen.rivals:
        sys.path.append(str(chosen.rivals.resolve()))
    size = QUICK if chosen.quick else Size()
    given = {name: getattr(chosen, name) for name in ("undecoded", "decoded", "turns")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    torch.set_num_threads(1)
    keep_memory()  # as processes that load data do; all who are compared have it
    clips = real_clips()[: size.clips] if chosen.real else [draw(seed, size.drawn) for seed in range(size.clips)]
    if not clips:
        parser.error("--real: no H.264 clip was found; set VLM_REALDATA to the folder that holds videos/")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        results = measure(size, clips, Path(scratch), chosen.only)
    if chosen.json:
        add_figures(chosen.json, results)
    print(json.dumps(results))
    for kind, most in TOLERANCE.items():
        if results.get(f"max_pixel_diff_{kind}", 0.0) > most:
            print(f"the two do not show the same ({kind})", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
