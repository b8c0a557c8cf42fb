"""Evaluation ends in a file: predictions.jsonl first; metrics.json is a pure function of it (tools/score.py)."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vlm.config import to_dict
from vlm.data.loader import TestItem, eval_loader
from vlm.data.shards import ShardSet
from vlm.distributed import World, from_main, gather_objects, share, stop_together, sum_over_ranks
from vlm.files import write_json, write_text
from vlm.metrics import caption
from vlm.metrics.segments import names_of_kinds
from vlm.recipe import Recipe
from vlm.run.checkpoint import Progress
from vlm.run.eval_tasks import Task, line_of, task_of
from vlm.run.run_folder import Rows, metrics_of
from vlm.run.streams import open_shards
from vlm.run.watchdog import NOBODY, Heart
from vlm.types import Segmentation, UserError, Writing


class Interrupted(Exception):
    """A test was to stop, and has on every rank together; nothing of it is kept."""


def _nobody() -> bool:
    return False


def run(
    recipe: Recipe, engine: Any, world: World, folder: Path, say: Callable[[str], None], heart: Heart = NOBODY
) -> dict[str, float]:
    """Score every test record once, with all views and probes; write predictions.jsonl, metrics.json, evaluation.json.

    Args:
        recipe: with `eval` set.
        engine: vlm.run.engine.Engine, or anything with `model` and `deepspeed`.
        world: this process among all.
        folder: where the files go.
        say: prints on rank 0.
        heart: is told what goes on.
    Returns:
        the metrics, on every rank.
    """
    assert recipe.eval is not None
    shards = open_shards(recipe.data, recipe.eval.shards)
    started = time.monotonic()
    say(f"evaluating {len(shards):,} records of {shards.path}")
    rows, unscored, counters = score(recipe, engine, world, shards, recipe.eval.probes, say, heart)
    lost = sum(row["lost"] for row in unscored)

    def write() -> dict[str, float]:
        if not rows:
            raise UserError(f"{shards.path}: nothing could be scored: {unscored[:3]}")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "predictions.jsonl", _lines(map(line_of, rows)))
        write_text(folder / "unscored.jsonl", _lines(unscored))
        metrics = metrics_of(rows, recipe.eval.kinds)  # type: ignore[union-attr]
        if metrics:
            write_json(folder / "metrics.json", metrics)
        else:
            (folder / "metrics.json").unlink(missing_ok=True)
        silent = sum(isinstance(row, Writing) and not row.references for row in rows)
        unparsable = [
            {"key": row.key, "problem": row.problem} for row in rows if isinstance(row, Segmentation) and row.problem
        ]
        about = {
            "shards": str(shards.path),
            "shards_fingerprint": shards.fingerprint,
            "records": len(shards),
            "scored": len(rows) - silent,
            "unscored": lost,
            **({"written_without_references": silent} if silent else {}),
            **({"texts_scored_by": caption.describe()} if metrics and isinstance(rows[0], Writing) else {}),
            **({"unparsable": unparsable} if isinstance(rows[0], Segmentation) else {}),
            **counters,
            "protocol": {"eval": to_dict(recipe.eval), "inputs": to_dict(recipe.inputs)},
            "seconds": time.monotonic() - started,
        }
        write_json(folder / "evaluation.json", about)
        for row in unscored[:10]:
            say(f"not scored: {row['key']}: {row['reason']}")
        for row in unparsable[:10]:
            say(f"cannot be read, so scored as an empty prediction: {row['key']}: {row['problem']}")
        if silent:
            rest = "the metrics are of the others" if metrics else "there are no metrics"
            say(f"{silent:,} of {len(rows):,} texts have no published captions to be scored by: {rest}")
        return metrics

    heart.phase("metrics")
    metrics = from_main(world, write)
    of_kinds = names_of_kinds([row for row in rows if isinstance(row, Segmentation)])
    shown = {name: value for name, value in metrics.items() if name not in of_kinds}
    say("  ".join(f"{name} {value:.4g}" for name, value in shown.items()) + f"  unscored {lost}")
    if any(counters.values()):
        say("  ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counters.items()))
    return metrics


def is_best(
    recipe: Recipe,
    engine: Any,
    world: World,
    progress: Progress,
    say: Callable[[str], None],
    heart: Heart = NOBODY,
    asked: Callable[[], bool] = _nobody,
) -> bool:
    """Evaluate without probes; whether the recipe's metric is the best so far (noted in `progress`).

    Args:
        asked: whether to stop; asked before each batch.
    Raises:
        Interrupted: on every rank; a rank was to stop.
    """
    assert recipe.eval is not None
    shards = open_shards(recipe.data, recipe.eval.shards)
    rows, unscored, _ = score(recipe, engine, world, shards, (), say, heart, asked)
    config = recipe.eval

    def measure() -> dict[str, float]:
        if not rows:
            raise UserError(f"{config.shards}: nothing could be scored: {unscored[:3]}")
        metrics = metrics_of(rows, config.kinds)
        if not metrics:
            raise UserError(
                f"{config.shards}: its records have no published captions, so eval.every cannot tell which checkpoint "
                "is best; use a split that has them, or eval.every=0"
            )
        return metrics

    heart.phase("metrics")
    metrics = from_main(world, measure)
    if recipe.eval.metric not in metrics:
        raise UserError(f"eval.metric={recipe.eval.metric}: this evaluation has {', '.join(metrics)}")
    value = metrics[recipe.eval.metric]
    say(f"step {progress.step}: {recipe.eval.metric} {value:.4f} on {len(rows)}, unscored {len(unscored)}")
    if math.isnan(value) or (progress.best_metric is not None and value <= progress.best_metric):
        return False
    progress.best_metric, progress.best_step = value, progress.step
    return True


@torch.no_grad()
def score(
    recipe: Recipe,
    engine: Any,
    world: World,
    shards: ShardSet,
    probes: tuple[str, ...],
    say: Callable[[str], None],
    heart: Heart = NOBODY,
    asked: Callable[[], bool] = _nobody,
) -> tuple[Rows, list[dict[str, Any]], dict[str, int]]:
    """(rows of predictions.jsonl in the order of the shards, records that could not be read with their reasons, what
    had to be cut of rows of text); whole on rank 0.

    Each rank scores its contiguous share, so every record comes exactly once whatever the number of processes. All
    ranks make the same number of forward passes (ZeRO-3 gathers weights in each).
    """
    config = recipe.eval
    assert config is not None
    start, stop = share(len(shards), world.size, world.rank)
    largest_share = math.ceil(len(shards) / world.size)
    rounds = math.ceil(largest_share / config.batch_size)
    engine.deepspeed.eval()
    task = task_of(recipe, engine, world)
    rows: list[Any] = []
    unscored: list[dict[str, Any]] = []
    counters: Counter[str] = Counter()
    loader = eval_loader(
        shards,
        recipe.inputs,
        probes,
        recipe.seed,
        range(start, stop),
        config.workers,
        recipe.data.sample_seconds,
        recipe.data.worker_memory,
    )
    heart.loading(loader.at_work)
    told = time.monotonic()
    for number in range(rounds):
        heart.phase("load")
        group, problem = _next_group(loader, config.batch_size, task)
        heart.phase("collective", keys=[item.key for item in group])
        failed, stopping = sum_over_ranks([float(problem is not None), float(asked())], world.device)
        if failed:
            stop_together(problem, world.device)
        if stopping:
            raise Interrupted
        heart.phase("evaluate")
        unscored += [{"key": item.key, "reason": item.reason, "lost": item.lost} for item in group if item.reason]
        good = [item for item in group if not item.reason]
        rows += task.rows(good, probes)
        for example in (example for item in good for example in item.views[""]):
            counters.update(example.counters)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"  evaluated {min((number + 1) * config.batch_size * world.size, len(shards))}/{len(shards)}")
    heart.phase("collective")
    gathered = gather_objects((rows, unscored, counters))
    if gathered is None:
        return rows, unscored, dict(counters)
    return (
        [row for part, _, _ in gathered for row in part],
        [row for _, part, _ in gathered for row in part],
        dict(sum((part for _, _, part in gathered), Counter())),
    )


def _next_group(loader: Iterator[TestItem], size: int, task: Task) -> tuple[list[TestItem], UserError | None]:
    """The next records of this rank; or why there are none, to be told to all ranks together."""
    try:
        group = list(itertools.islice(loader, size))
    except UserError as error:
        return [], error
    problems = (task.problem(ask) for item in group for ask in item.asks)
    problem = next((problem for problem in problems if problem is not None), None)
    return ([], problem) if problem is not None else (group, None)


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
