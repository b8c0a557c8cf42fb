"""Evaluation ends in a file: predictions.jsonl first; metrics.json is a pure function of it (tools/score.py)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.config import to_dict
from vlm.data.loader import eval_loader
from vlm.data.shards import ShardSet
from vlm.distributed import World, gather_objects, share, share_object
from vlm.metrics.classify import classification_metrics, mean_probabilities
from vlm.recipe import EvalConfig, Recipe
from vlm.run.checkpoint import Progress
from vlm.types import Batch, Example, Prediction, UserError


def run(recipe: Recipe, engine: Any, world: World, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Score every test clip once, with all views and probes; write predictions.jsonl, metrics.json, evaluation.json.

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
    shards = ShardSet(recipe.eval.shards)
    started = time.monotonic()
    say(f"evaluating {len(shards):,} clips of {shards.path}")
    predictions, unscored = score(recipe, engine, world, shards, recipe.eval.probes, say)
    metrics: dict[str, float] = {}
    if world.is_main:
        if not predictions:
            raise UserError(f"{shards.path}: no clip could be scored: {unscored[:3]}")
        metrics = classification_metrics(predictions)
        _write_lines(folder / "predictions.jsonl", [asdict(p) for p in predictions])
        _write_lines(folder / "unscored.jsonl", unscored)
        _write(folder / "metrics.json", metrics)
        about = {
            "shards": str(shards.path),
            "shards_fingerprint": shards.fingerprint,
            "clips": len(shards),
            "unscored": len(unscored),
            "protocol": {"eval": to_dict(recipe.eval), "inputs": to_dict(recipe.inputs)},
            "seconds": time.monotonic() - started,
        }
        _write(folder / "evaluation.json", about)
        for row in unscored[:10]:
            say(f"not scored: {row['key']}: {row['reason']}")
    metrics = share_object(metrics)
    say("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) + f"  unscored {len(unscored)}")
    return metrics


def is_best(recipe: Recipe, engine: Any, world: World, progress: Progress, say: Callable[[str], None]) -> bool:
    """Evaluate without probes; whether the recipe's metric is the best so far (noted in `progress`)."""
    assert recipe.eval is not None
    predictions, unscored = score(recipe, engine, world, ShardSet(recipe.eval.shards), (), say)
    metrics = share_object(classification_metrics(predictions) if world.is_main else None)
    if recipe.eval.metric not in metrics:
        raise UserError(f"eval.metric={recipe.eval.metric}: this evaluation has {', '.join(metrics)}")
    value = metrics[recipe.eval.metric]
    say(f"step {progress.step}: {recipe.eval.metric} {value:.4f} on {len(predictions)} clips, unscored {len(unscored)}")
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
) -> tuple[list[Prediction], list[dict[str, str]]]:
    """(predictions in the order of the shards, clips that could not be read with their reasons); whole on rank 0.

    Each rank scores its contiguous share, so every clip comes exactly once whatever the number of processes. All ranks
    make the same number of forward passes (ZeRO-3 gathers weights in each).
    """
    config = recipe.eval
    assert config is not None
    start, stop = share(len(shards), world.size, world.rank)
    largest_share = math.ceil(len(shards) / world.size)
    rounds = math.ceil(largest_share / config.batch_size)
    engine.deepspeed.eval()
    predictions: list[Prediction] = []
    unscored: list[dict[str, str]] = []
    groups = _groups(recipe, config, shards, probes, range(start, stop))
    told = time.monotonic()
    for number in range(rounds):
        group = next(groups, [])
        good = [item for item in group if not item[3]]
        unscored += [{"key": key, "reason": reason} for key, _, _, reason in group if reason]
        predictions += _score_group(recipe, engine, world, good, probes)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"  evaluated {min((number + 1) * config.batch_size * world.size, len(shards))}/{len(shards)}")
    gathered = gather_objects((predictions, unscored))
    if gathered is None:
        return predictions, unscored
    return [p for part, _ in gathered for p in part], [u for _, part in gathered for u in part]


Item = tuple[str, int | None, dict[str, list[Example]], str]


def _groups(
    recipe: Recipe, config: EvalConfig, shards: ShardSet, probes: tuple[str, ...], rows: range
) -> Iterator[list[Item]]:
    group: list[Item] = []
    for item in eval_loader(shards, recipe.inputs, probes, recipe.seed, rows, config.workers):
        group.append(item)
        if len(group) == config.batch_size:
            yield group
            group = []
    if group:
        yield group


def _score_group(
    recipe: Recipe, engine: Any, world: World, items: list[Item], probes: tuple[str, ...]
) -> list[Prediction]:
    """Forward all views of a few clips, one pass for each condition."""
    scores: dict[str, list[np.ndarray]] = {}
    for condition in ("", *probes):
        views = [example for _, _, conditions, _ in items for example in conditions[condition]]
        logits = _forward(recipe, engine, world, views)
        sizes = [len(conditions[condition]) for _, _, conditions, _ in items]
        scores[condition] = [mean_probabilities(part.numpy()) for part in logits.split(sizes)] if items else []
    rows = []
    for number, (key, label, _, _) in enumerate(items):
        if label is None:
            raise UserError(f"{recipe.eval.shards}: {key} has no label, so it cannot be scored; use a labelled split")  # type: ignore[union-attr]
        own = _listed(scores[""][number])
        rows.append(
            Prediction(
                key=key,
                truth=label,
                prediction=int(np.argmax(own)),  # of the rounded scores, so that the row agrees with itself
                scores=own,
                probes={probe: _listed(scores[probe][number]) for probe in probes},
            )
        )
    return rows


def _forward(recipe: Recipe, engine: Any, world: World, views: list[Example]) -> Tensor:
    """Logits (views, K) in fp32 on CPU. With nothing to score a zero clip keeps this rank in step with the others."""
    if views:
        assert views[0].video is not None
        video = torch.stack([example.video for example in views])  # type: ignore[misc]
    else:
        video = torch.zeros(1, *engine.model.input_shape)
    batch = Batch(keys=tuple(example.key for example in views) or ("",), video=video)
    logits = engine.model.predict(batch.to(world.device)).float().cpu()
    return logits[: len(views)]


def _listed(scores: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in scores]


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
