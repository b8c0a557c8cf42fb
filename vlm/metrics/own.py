"""Figures of a laboratory's own: with a line here they are in metrics.json beside the published ones, `tools/score.py`
makes them again, the report explains them, and `eval.metric` may choose by them (docs/extending_metric.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """One function and the figures that it gives."""

    figures: Callable[[Sequence[Any]], Mapping[str, float]]
    """From the rows of a predictions.jsonl, all of one kind (vlm.types: Prediction, Writing, Segmentation), to figures
    by name, always the same names; a pure function."""
    means: Mapping[str, str]
    """Name of each figure -> what it is, in a few words."""
    chooses: tuple[str, ...] = ()
    """Those of them that the best checkpoint may be chosen by: the larger, the better."""


OWN: dict[str, tuple[Own, ...]] = {
    "classes": (),  # rows: Prediction, of clips
    "choice": (),  # rows: Prediction, of questions
    "caption": (),  # rows: Writing that have references
    "segments": (),  # rows: Segmentation
}
"""By the task of a recipe's inputs."""


def with_own(task: str, rows: Sequence[Any], figures: Mapping[str, float]) -> dict[str, float]:
    """`figures` and those of the task's own functions.

    Raises:
        UserError: a function gives other names than it says, one that is there already, or no finite number.
    """
    found = dict(figures)
    for own in OWN[task]:
        where = f"{own.figures.__module__}.{own.figures.__name__}"
        made = own.figures(rows)
        if made.keys() != own.means.keys():
            raise UserError(
                f"{where} gives {', '.join(made) or 'nothing'}, but vlm/metrics/own.py says what "
                f"{', '.join(own.means)} is: the names must be the same"
            )
        for name, value in made.items():
            if name in found:
                raise UserError(f"{where}: there is a figure {name!r} already; give it another name")
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{where}: {name} is {value!r}, not a finite number")
            found[name] = value
    return found


def chosen_by(task: str) -> tuple[str, ...]:
    """Names that `eval.metric` may have beside the published ones."""
    return tuple(name for own in OWN.get(task, ()) for name in own.chooses)


def meanings() -> dict[str, str]:
    """Name -> what it is, for the report."""
    return {name: said for several in OWN.values() for own in several for name, said in own.means.items()}
