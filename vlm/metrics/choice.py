"""Multiple choice: what predictions on questions are worth, by kind of question, as the papers report it.

Ties go to the lower option, as in `vlm.metrics.classify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlm.metrics.probes import names_of_probes
from vlm.types import Prediction, UserError


def choice_metrics(
    predictions: Sequence[Prediction], groups: Mapping[str, Sequence[str]] | None = None
) -> dict[str, float]:
    """What a list of predictions is worth, as fractions 0 … 1.

    Args:
        predictions: one a question, with a score an option (questions may differ in their number of options).
        groups: name -> kinds that are counted together (NExT-QA's C: CH and CW).
    Returns: `accuracy` over all questions, `chance` (the mean of 1 / options), `accuracy_<probe>` for each probe,
        `accuracy_<kind>` for each kind, `accuracy_<group>` for each group that has questions, and where there are
        several kinds `accuracy_mean_of_kinds` (STAR's own figure).
    Raises:
        UserError: no predictions; a score is NaN; a truth that is no option; a prediction that is not the highest
            score; rows that do not agree on the probes; a group named like a kind with other kinds in it.
    """
    if not predictions:
        raise UserError("there are no predictions to score: the evaluation wrote no rows")
    right = np.array([_is_right(row) for row in predictions])
    metrics = {
        "accuracy": float(right.mean()),
        "chance": float(np.mean([1 / len(row.scores) for row in predictions])),
    }
    for probe in names_of_probes(predictions, "question"):
        hits = [_best(row, row.probes[probe], f"its scores for {probe!r}") == row.truth for row in predictions]
        metrics[f"accuracy_{probe}"] = float(np.mean(hits))
    kinds = {kind: (kind,) for kind in sorted({row.kind for row in predictions if row.kind})}
    for name, members in (groups or {}).items():
        if name in kinds and tuple(members) != kinds[name]:
            raise UserError(f"eval.kinds: {name!r} is the name of a kind of question, so it cannot stand for {members}")
    for name, members in {**kinds, **(groups or {})}.items():
        chosen = np.array([row.kind in members for row in predictions])
        if chosen.any():
            metrics[f"accuracy_{name}"] = float(right[chosen].mean())
    if len(kinds) > 1:
        metrics["accuracy_mean_of_kinds"] = float(np.mean([metrics[f"accuracy_{kind}"] for kind in kinds]))
    return metrics


def _is_right(row: Prediction) -> bool:
    if not 0 <= row.truth < len(row.scores):
        raise UserError(f"question {row.key!r}: its truth is option {row.truth}, but it has {len(row.scores)} options")
    best = _best(row, row.scores, "its scores")
    if best != row.prediction:
        raise UserError(
            f"question {row.key!r}: its prediction is option {row.prediction}, but its highest score is option {best}: "
            "the row was changed after it was written"
        )
    return best == row.truth


def _best(row: Prediction, scores: Sequence[float], what: str) -> int:
    if len(scores) != len(row.scores) or not scores:
        raise UserError(f"question {row.key!r}: {what} are {len(scores)} numbers for {len(row.scores)} options")
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        raise UserError(f"question {row.key!r}: {what} hold NaN: the model diverged, or the checkpoint is damaged")
    return int(values.argmax())
