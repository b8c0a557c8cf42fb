"""The gradient audit: in the first steps of every run, does each tensor do what it is there for?

A dead tensor is silent: the loss falls by what the others learn. So the trainer looks, once, and stops by name:

* a trainable tensor without gradient. Looked for twice: in the backward pass (a hook that notes on the device whether
  the gradient has a value other than 0), and in Adam's first moment, which stays 0 where an engine computes a gradient
  and then loses it on the way to the optimizer.
* a frozen tensor that moved: a checksum of its bits at the start, after the audited steps and at the end of training.
* a tensor whose `requires_grad` is not what `System.trainable` says.

A trainable tensor that is missing from a checkpoint is found where checkpoints are written (vlm.run.checkpoint).

What is no fault: gates that start at 0 keep the gradient of what is behind them exactly 0 until they have moved, and
warmup may begin with a learning rate of 0, so only steps after the first real update count. A batch may have nothing
for a tensor (`System.reached`), so a step in which no rank's batch has counts neither; such a tensor is watched on.
Stochastic depth may leave a block out, so a tensor is judged after a number of records too.

Each rank makes the same collectives. When a tensor has been seen its hook is removed: the audit costs nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.loader import MicroBatch
from vlm.distributed import sum_over_ranks
from vlm.run import zero_state
from vlm.types import UserError

MIN_RECORDS = 16
"""A tensor is called dead after so many records at least: at a drop rate of 0.3 a branch is left out by chance in all
of them once in 2 * 10^8 times."""

_OFF = "audit_steps=0 turns the audit off"


@dataclass(slots=True)
class _Evidence:
    """Steps and records that should have given a tensor a gradient, and did not."""

    steps: int = 0
    records: int = 0


class Audit:
    """Watches an engine's tensors. Make it before the first step; call `after_step` after each, `finish` at the end.

    Args:
        engine: vlm.run.engine.Engine.
        steps: how many steps without a gradient make a tensor dead; 0: no audit.
        say: prints a line (on one rank).
    Raises:
        UserError: a tensor's `requires_grad` contradicts `System.trainable`.
    """

    def __init__(self, engine: Any, steps: int, say: Callable[[str], None]) -> None:
        self.engine, self.steps, self.say = engine, steps, say
        self._waiting: dict[str, _Evidence] = {}
        self._hooks: dict[str, Any] = {}
        self._unconfirmed: list[str] = []  # seen in the backward pass, not yet in the optimizer
        self._views: set[str] = set()  # views that had something to learn
        self._updated = False  # an earlier step had a learning rate above 0
        self._counted = 0  # steps after it
        self._first = self._last = 0  # steps seen, counted from 1
        self._told = False
        if steps == 0:
            return
        self._check_choice()
        parameters = dict(engine.model.named_parameters())
        trained = {name: parameters[name] for name in engine.names.values()}
        self._flags = torch.zeros(len(trained), dtype=torch.bool, device=engine.world.device)
        self._places = {name: place for place, name in enumerate(trained)}
        self._waiting = {name: _Evidence() for name in trained}
        self._hooks = {name: p.register_hook(self._note(self._places[name])) for name, p in trained.items()}
        self._frozen = {name: p for name, p in parameters.items() if name not in trained}
        self._sums = checksums(self._frozen)

    def after_step(self, step: int, lr: float, micro_batches: Sequence[MicroBatch], counts: Mapping[str, int]) -> None:
        """Look at the step just made. Collective.

        Args:
            step: its number, from 0. lr: its learning rate.
            micro_batches: what this rank learnt from. counts: what each view summed over, of all ranks.
        Raises:
            UserError: a trainable tensor has had no gradient, or a frozen one has changed.
        """
        self._first, self._last = self._first or step + 1, step + 1
        if self.steps == 0 or (self._told and not self._waiting):
            return
        self._views.update(name for name, count in counts.items() if count)
        self._counted += self._updated
        self._collect(micro_batches)
        self._updated |= lr > 0
        self._raise_if_dead()
        if not self._told and self._counted >= self.steps:
            self._told = True
            self.say(self._verdict())
        elif self._told and not self._waiting:
            late = list(self._unconfirmed)
            self._confirm()
            self.say(f"audit: step {step + 1}: gradients now in {_listed(late)} too")

    def disregard(self, *, moments: bool) -> None:
        """Nothing was learnt from the step just made: what its backward pass gave is no evidence.

        Args:
            moments: nor are Adam's moments, which are now those of an earlier step.
        """
        if self._waiting:
            self._flags.zero_()
        if moments:
            self._unconfirmed.clear()

    def finish(self) -> None:
        """The run is over: compare the frozen tensors once more, and say what could not be judged. Collective.

        Raises:
            UserError: a frozen tensor has changed, or the optimizer got no gradient of a tensor.
        """
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self.steps == 0 or not self._last:
            return
        if not self._told:
            self._told = True
            self.say(self._verdict())
        else:
            self._confirm()
            self._compare_frozen()
            if self._waiting:
                self.say(
                    f"audit: no batch of this run gave a gradient to {_listed(self._waiting)}: they have not learnt"
                )

    # ------------------------------------------------------------------------------------------------------ trainable

    def _note(self, place: int) -> Callable[[Tensor], None]:
        """A hook on a leaf: note on the device, without waiting for it, that a gradient is not all 0 (NaN counts)."""

        def hook(gradient: Tensor) -> None:
            self._flags[place] |= gradient.detach().any()

        return hook

    def _collect(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Put together what the ranks saw of each tensor that waits."""
        waiting = list(self._waiting)
        if not waiting:
            return
        seen = self._flags.tolist()
        reached = self.engine.model.reached
        records = [
            sum(len(item.batch.keys) for item in micro_batches if item.weight and reached(name, item.batch))
            for name in waiting
        ]
        summed = sum_over_ranks([*(seen[self._places[name]] for name in waiting), *records], self.engine.world.device)
        for name, flag, count in zip(waiting, summed, summed[len(waiting) :]):
            if flag:
                del self._waiting[name]
                self._hooks.pop(name).remove()
                self._unconfirmed.append(name)
            elif count and self._updated:
                self._waiting[name].steps += 1
                self._waiting[name].records += int(count)

    def _raise_if_dead(self) -> None:
        dead = [n for n, e in self._waiting.items() if e.steps >= self.steps and e.records >= MIN_RECORDS]
        if dead:
            raise UserError(
                f"gradient audit, steps {self._first} to {self._last}: no gradient, or zeros alone, reached "
                f"{_listed(dead)} ({len(dead)} of {len(self._places)} trainable tensors). They would stay as they were "
                "initialised while the loss falls by what the others learn. Mend: look between them and the loss for "
                "detach(), no_grad(), a module that is not called, reentrant checkpointing; or, if they are not to "
                f"train, say so in System.trainable; where batches may lack them, in System.reached; {_OFF}"
            )

    def _confirm(self) -> None:
        """What the backward pass gave must have arrived in Adam."""
        names, self._unconfirmed = self._unconfirmed, []
        lost = zero_state.without_gradient(self.engine, names) if names else []
        if lost:
            raise UserError(
                f"gradient audit, steps {self._first} to {self._last}: the backward pass computed gradients of "
                f"{_listed(lost)} ({len(lost)} of {len(self._places)} trainable tensors), but the optimizer got none: "
                "its moments of them are 0. They would stay as they were initialised. Mend: try another ZeRO stage, "
                f"or the DeepSpeed JSON without what groups or skips modules; report which one loses them; {_OFF}"
            )

    def _check_choice(self) -> None:
        model, trained = self.engine.model, set(self.engine.names.values())
        wrong = [name for name, _ in model.named_parameters() if model.trains(name) != (name in trained)]
        if wrong:
            raise UserError(
                f"gradient audit: {_listed(wrong)}: requires_grad says otherwise than "
                f"{type(model).__name__}.trainable, so it is not clear what trains and what a checkpoint must hold. "
                f"Mend: call freeze() at the end of the model's constructor, and set requires_grad nowhere else; {_OFF}"
            )

    # --------------------------------------------------------------------------------------------------------- frozen

    def _compare_frozen(self) -> None:
        now = checksums(self._frozen)
        differs = [float(now[name] != self._sums[name]) for name in self._frozen]
        moved = [n for n, d in zip(self._frozen, sum_over_ranks(differs, self.engine.world.device)) if d]
        if moved:
            raise UserError(
                f"gradient audit: between the start of this run and step {self._last}, frozen tensors changed: "
                f"{_listed(moved)} ({len(moved)} of {len(self._frozen)}). Checkpoints leave them out, so they would "
                "not fit the frozen weights they are loaded onto. Mend: find what writes to them (an operation in "
                f"place, memory shared with a trained tensor), or let System.trainable name them; {_OFF}"
            )

    def _verdict(self) -> str:
        """Check what has been seen, and say it in a line."""
        self._confirm()
        self._compare_frozen()
        trained, waiting = len(self._places), list(self._waiting)
        span = f"steps {self._first}–{self._last}" if self._last > self._first else f"step {self._last}"
        line = f"audit: {trained} trainable tensors all had gradients in {span}"
        if waiting:
            line = f"audit: {trained - len(waiting)} of {trained} trainable tensors had gradients in {span}"
        kept = len(self._frozen) - sum(value is None for value in self._sums.values())
        line += f"; {kept} frozen tensors unchanged"
        if kept < len(self._frozen):
            line += f", {len(self._frozen) - kept} on NVMe not looked at"
        if waiting:
            line += f"; not judged yet, for want of records that reach them: {_listed(waiting)}"
        idle = [name for name in self.engine.recipe.views if name not in self._views]
        return line + (f"; nothing to learn so far for the view {', '.join(idle)}" if idle else "")


def checksums(parameters: Mapping[str, nn.Parameter]) -> dict[str, int | None]:
    """A checksum of each tensor's bits on this rank (under ZeRO-3: of its part of it); None: they are not in memory."""
    sums = {name: _checksum(local) for name, p in parameters.items() if (local := _local(p)) is not None}
    if not sums:
        return dict.fromkeys(parameters)
    values = dict(zip(sums, _together(list(sums.values()))))
    return {name: values.get(name) for name in parameters}


def _local(parameter: nn.Parameter) -> Tensor | None:
    """What this rank stores of a parameter."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    return part.detach() if part.status.name == "AVAILABLE" else None


_WORDS = 1 << 20  # 8 MiB at a time: no copy of a large tensor is made
_MIX = (
    0x1E3779B97F4A7C15  # odd, so no two words become one; carries a bit's change to those above, folding to those below
)


def _checksum(tensor: Tensor) -> Tensor:
    """Sum modulo 2^64 of the tensor's 64-bit words, each mixed and multiplied by an odd number of its place.

    One changed word always changes it; several changes cancel by chance alone, exchanged words included.
    """
    data = tensor.contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 8 * 8
    aligned = data[:whole] if data.data_ptr() % 8 == 0 else data[:whole].clone()  # part of a storage, between words
    words = aligned.view(torch.int64)
    total = data[whole:].sum(dtype=torch.int64) + tensor.numel()
    odd = torch.arange(1, 2 * min(_WORDS, max(words.numel(), 1)), 2, dtype=torch.int64, device=data.device)
    for number, chunk in enumerate(words.split(_WORDS)):
        mixed = chunk * _MIX
        folded = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
        total = total + (folded * odd[: chunk.numel()]).sum() * (2 * number + 1)
    return total


def _together(sums: Sequence[Tensor]) -> list[int]:
    """Scalars of one or several devices, read at once."""
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(sums):
        by_device.setdefault(value.device, []).append(place)
    read = [0] * len(sums)
    for places in by_device.values():
        for place, value in zip(places, torch.stack([sums[p] for p in places]).tolist()):
            read[place] = value
    return read


def _listed(names: Sequence[str] | Mapping[str, Any], most: int = 20) -> str:
    """The names; of very many the first."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
