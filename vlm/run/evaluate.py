"""Evaluation ends in a file: predictions.jsonl first; metrics.json is a pure function of it (tools/score.py)."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm.config import to_dict
from vlm.data.loader import TestItem, eval_loader
from vlm.data.shards import ShardSet
from vlm.distributed import World, from_main, gather_objects, share, stop_together
from vlm.files import write_json, write_text
from vlm.metrics.classify import mean_probabilities
from vlm.recipe import Recipe
from vlm.run.checkpoint import Progress
from vlm.run.run_folder import metrics_of
from vlm.run.streams import open_shards
from vlm.types import Prediction, UserError


def run(recipe: Recipe, engine: Any, world: World, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Score every test record once, with all views and probes; write predictions.jsonl, metrics.json, evaluation.json.

    Args:
        recipe: with `eval` set.
        engine: vlm.run.engine.Engine, or anything with `model` and `deepspeed`.
        world: this process among all.
        folder: where the files go.
        say: prints on rank 0.
    Returns:
        the metrics, on every rank.
    """
    assert recipe.eval is not None
    shards = open_shards(recipe.data, recipe.eval.shards)
    started = time.monotonic()
    say(f"evaluating {len(shards):,} records of {shards.path}")
    predictions, unscored, counters = score(recipe, engine, world, shards, recipe.eval.probes, say)
    lost = sum(row["lost"] for row in unscored)

    def write() -> dict[str, float]:
        if not predictions:
            raise UserError(f"{shards.path}: nothing could be scored: {unscored[:3]}")
        metrics = metrics_of(predictions, recipe.eval.kinds)  # type: ignore[union-attr]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "predictions.jsonl", _lines([_row(prediction) for prediction in predictions]))
        write_text(folder / "unscored.jsonl", _lines(unscored))
        write_json(folder / "metrics.json", metrics)
        about = {
            "shards": str(shards.path),
            "shards_fingerprint": shards.fingerprint,
            "records": len(shards),
            "scored": len(predictions),
            "unscored": lost,
            **counters,
            "protocol": {"eval": to_dict(recipe.eval), "inputs": to_dict(recipe.inputs)},
            "seconds": time.monotonic() - started,
        }
        write_json(folder / "evaluation.json", about)
        for row in unscored[:10]:
            say(f"not scored: {row['key']}: {row['reason']}")
        return metrics

    metrics = from_main(world, write)
    say("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) + f"  unscored {lost}")
    if any(counters.values()):
        say("  ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counters.items()))
    return metrics


def is_best(recipe: Recipe, engine: Any, world: World, progress: Progress, say: Callable[[str], None]) -> bool:
    """Evaluate without probes; whether the recipe's metric is the best so far (noted in `progress`)."""
    assert recipe.eval is not None
    predictions, unscored, _ = score(recipe, engine, world, open_shards(recipe.data, recipe.eval.shards), (), say)
    kinds = recipe.eval.kinds

    def measure() -> dict[str, float]:
        if not predictions:
            raise UserError(f"{recipe.eval.shards}: nothing could be scored: {unscored[:3]}")  # type: ignore[union-attr]
        return metrics_of(predictions, kinds)

    metrics = from_main(world, measure)
    if recipe.eval.metric not in metrics:
        raise UserError(f"eval.metric={recipe.eval.metric}: this evaluation has {', '.join(metrics)}")
    value = metrics[recipe.eval.metric]
    say(f"step {progress.step}: {recipe.eval.metric} {value:.4f} on {len(predictions)}, unscored {len(unscored)}")
    if progress.best_metric is not None and value <= progress.best_metric:
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
) -> tuple[list[Prediction], list[dict[str, Any]], dict[str, int]]:
    """(predictions in the order of the shards, records that could not be read with their reasons, what had to be cut
    of rows of text); whole on rank 0.

    Each rank scores its contiguous share, so every record comes exactly once whatever the number of processes. All
    ranks make the same number of forward passes (ZeRO-3 gathers weights in each).
    """
    config = recipe.eval
    assert config is not None
    start, stop = share(len(shards), world.size, world.rank)
    largest_share = math.ceil(len(shards) / world.size)
    rounds = math.ceil(largest_share / config.batch_size)
    engine.deepspeed.eval()
    predictions: list[Prediction] = []
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
    told = time.monotonic()
    for number in range(rounds):
        group, problem = _next_group(loader, config.batch_size)
        stop_together(problem, world.device)
        unscored += [{"key": item.key, "reason": item.reason, "lost": item.lost} for item in group if item.reason]
        good = [item for item in group if not item.reason]
        predictions += _score_group(recipe, engine, world, good, probes)
        for example in (example for item in good for example in item.views[""]):
            counters.update(example.counters)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"  evaluated {min((number + 1) * config.batch_size * world.size, len(shards))}/{len(shards)}")
    gathered = gather_objects((predictions, unscored, counters))
    if gathered is None:
        return predictions, unscored, dict(counters)
    return (
        [prediction for part, _, _ in gathered for prediction in part],
        [row for _, part, _ in gathered for row in part],
        dict(sum((part for _, _, part in gathered), Counter())),
    )


def _next_group(loader: Iterator[TestItem], size: int) -> tuple[list[TestItem], UserError | None]:
    """The next records of this rank; or why there are none, to be told to all ranks together."""
    try:
        group = list(itertools.islice(loader, size))
    except UserError as error:
        return [], error
    for ask in (ask for item in group for ask in item.asks):
        if ask.truth is None:
            return [], UserError(
                f"{ask.key} has no published answer or label, so it cannot be scored; use a labelled split "
                "(eval.shards)"
            )
    return group, None


def _score_group(
    recipe: Recipe, engine: Any, world: World, items: list[TestItem], probes: tuple[str, ...]
) -> list[Prediction]:
    """Forward all views of a few records, one pass for each condition."""
    scores = {condition: _forward(recipe, engine, world, items, condition) for condition in ("", *probes)}
    rows = []
    for number, item in enumerate(items):
        for place, ask in enumerate(item.asks):
            assert ask.truth is not None
            options = len(ask.options) or None
            own = {condition: _listed(several[number][place][:options]) for condition, several in scores.items()}
            rows.append(
                Prediction(
                    key=ask.key,
                    truth=ask.truth,
                    prediction=int(np.argmax(own[""])),  # of the rounded scores, so that the row agrees with itself
                    scores=own[""],
                    probes={probe: own[probe] for probe in probes},
                    kind=ask.kind,
                    video="" if ask.kind is None else item.key,
                    id=ask.id,
                    question=ask.question,
                    options=list(ask.options),
                )
            )
    return rows


def _forward(
    recipe: Recipe, engine: Any, world: World, items: list[TestItem], condition: str
) -> list[list[np.ndarray]]:
    """For each record the scores of each thing asked about it, (K,). With nothing to score a blank example keeps this
    rank in step with the others."""
    inputs = recipe.inputs
    examples = [example for item in items for example in item.views[condition]]
    batch = inputs.test_batch(examples or [inputs.blank()])
    scores = engine.model.predict(batch.to(world.device)).float().cpu().numpy()
    merged, first = [], 0
    for item in items:
        if inputs.task == "choice":
            count = len(item.asks)
            merged.append(list(scores[first : first + count]))
        else:
            count = len(item.views[condition])
            merged.append([mean_probabilities(scores[first : first + count])])
        first += count
    assert not items or first == len(scores)
    return merged


def _row(prediction: Prediction) -> dict[str, Any]:
    """A line of predictions.jsonl; clips have none of the fields of questions."""
    row = asdict(prediction)
    if prediction.kind is None:
        for name in ("kind", "video", "id", "question", "options"):
            del row[name]
    return row


def _listed(scores: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in scores]


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
