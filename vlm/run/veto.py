"""Keeps Adam from making a step whose numbers are not to be trusted, at every ZeRO stage, on all ranks together.

The gradient's global norm is known to every rank, and is the same, only once DeepSpeed has reduced and clipped the
gradients, in the middle of its own `step()`. So the last moment to refuse is where its wrapper calls Adam, group after
group: there each Adam's `step` asks first. Refused, it leaves masters, moments and its count of steps as they are, to
the bit; the wrapper goes on, copies the unchanged masters to the weights and clears its gradients as always.

Some wrappers find by themselves that a norm is not finite, and do not call Adam at all. That comes to the same, and is
told in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

Reason = Literal["loss", "gradient", "spike"]
"""Why a step was not made: a loss, or the gradient, is not finite; the gradient's norm is above the limit."""


class Veto:
    """Stands before the `step` of some optimizers. `begin` before DeepSpeed's step, `outcome` after it.

    Args:
        adams: the optimizers that DeepSpeed's wrapper steps (or the only one, where there is no wrapper).
        norm: the gradient's global norm, once Adam is called.
    """

    def __init__(self, adams: Sequence[torch.optim.Optimizer], norm: Callable[[], float]) -> None:
        self._norm_of = norm
        self._norm: float | None = None  # of the step that is being made; None: Adam has not been called yet
        self._loss_is_finite, self._limit = True, math.inf
        for adam in adams:
            adam.step = self._gated(adam.step)  # type: ignore[method-assign]

    def begin(self, loss: float, limit: float) -> None:
        """A step is about to be made.

        Args:
            loss: over the global batch.
            limit: largest norm of the gradient that is no spike.
        """
        self._loss_is_finite, self._limit, self._norm = math.isfinite(loss), limit, None

    def outcome(self) -> tuple[Reason | None, float]:
        """Why the step was not made (None: it was), and the gradient's norm (inf where it is not finite)."""
        norm = math.inf if self._norm is None else self._norm
        return self._reason(norm), norm

    def _reason(self, norm: float) -> Reason | None:
        if not self._loss_is_finite:
            return "loss"
        if not math.isfinite(norm):
            return "gradient"
        return "spike" if norm > self._limit else None

    def _gated(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*arguments: Any, **options: Any) -> Any:
            if self._norm is None:
                norm = self._norm_of()
                self._norm = norm if math.isfinite(norm) else math.inf
            return step(*arguments, **options) if self._reason(self._norm) is None else None

        return gated
