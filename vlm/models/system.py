"""What every system is to the trainer: losses by name, scores to predict with, which parameters train, and how.

    class MySystem(System):
        def losses(self, batch): ...      # a view's name is its loss's name
        def counts(self, batch): ...      # the same names, known before the forward pass

The trainer calls the module itself, `system(batch)`; evaluation calls `system.predict(batch)`. Both go through
`forward`, so whatever hooks an engine has put on the module run for both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm.data.pixels import finished
from vlm.nn.mixed import adapt
from vlm.types import Batch, Losses, UserError
from vlm.weights import hash_of_hashes, tensor_hash

_NO_WEIGHTS = "no weights: built on the meta device"


class Cost(NamedTuple):
    """What the forward pass over one batch costs.

    Training adds the backward pass: twice the forward for `trained_flops` (gradients of weights and of inputs), once
    for `frozen_flops` (gradients of inputs alone). What recomputing activations adds is not counted.
    """

    tokens: int
    trained_flops: float  # products with a trained weight, and of activations with activations; 2 a multiply-add
    frozen_flops: float  # products with a frozen weight
    unlearned_flops: float = 0.0  # of parts through which no gradient goes: they have no backward pass


class System(nn.Module):
    """Base of all systems. Parameters are named as in the published weights; none has zero dimensions."""

    input_shape: tuple[int, int, int, int]
    """Shape of one clip: (C, T, H, W)."""

    reads_text: bool = False
    """Whether its losses are views of text (`Batch.views`), in which samples may lack a video or a view; else every
    sample is a clip."""

    carried: dict[str, Tensor]
    """What has learnt and trains no more, or is kept from training: name -> its value, whole, fp32, on the CPU, the
    same on every rank whatever an engine makes of the parameter. A checkpoint holds it, as it holds what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.carried = {}
        self._chosen: frozenset[str] | None = None
        self._sources: dict[str, str] | None = None

    def forward(
        self, batch: Batch, scores: bool = False, instead: Callable[[Batch], Any] | None = None
    ) -> Losses | Tensor | Any:
        """The losses of a batch, or with `scores` its class scores (see `predict`), or what `instead` makes of it
        (vlm.models.generation). What the loader left to do to pixels is done first (vlm.data.pixels)."""
        batch = finished(batch)
        if instead is not None:
            return instead(batch)
        return self.scores(batch) if scores else self.losses(batch)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores before the softmax (logits), (B, K) fp32. Call it in evaluation mode, without gradients."""
        return self(batch, scores=True)

    def losses(self, batch: Batch) -> Losses:
        """Every loss of this system by name: its sum over elements and their number, never a mean."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """Loss name -> elements that `losses` will sum for this batch: the trainer needs them beforehand."""
        raise NotImplementedError

    def scores(self, batch: Batch) -> Tensor:
        """Class scores, (B, K) fp32; UserError in a system that knows no classes."""
        raise UserError(f"{type(self).__name__} predicts no classes, so it cannot be evaluated; set eval to none")

    def cost(self, batch: Batch) -> Cost:
        """What the forward pass over this batch costs, where what trains is what `trainable` names."""
        raise NotImplementedError

    def chosen_cost(self, batch: Batch) -> Cost:
        """`cost` with what a recipe froze or unfroze, each part's by its share of the weights of all matrices there."""
        cost = self.cost(batch)
        if self._chosen is None:
            return cost
        stopped, base, tower = (self._other_share(part) for part in ("", "base", "tower"))
        trained = cost.trained_flops * (1 - stopped) + cost.frozen_flops * base + cost.unlearned_flops * tower
        frozen = cost.trained_flops * stopped + cost.frozen_flops * (1 - base)
        if tower:  # gradients go through what of it is frozen
            return Cost(cost.tokens, trained, frozen + cost.unlearned_flops * (1 - tower))
        return Cost(cost.tokens, trained, frozen, cost.unlearned_flops)

    def _other_share(self, part: str) -> float:
        """Of the weights of one part ("": what trains by nature, "base", or its "tower"), how many a recipe chose
        otherwise."""
        sizes = {True: 0, False: 0}
        for name, parameter in self.named_parameters():
            where = "" if self.trainable(name) else "tower" if name.startswith("tower.") else "base"
            if where == part and len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
                sizes[self.trains(name) != self.trainable(name)] += getattr(parameter, "ds_numel", parameter.numel())
        return sizes[True] / max(1, sizes[True] + sizes[False])

    def trainable(self, name: str) -> bool:
        """Whether the parameter of this name is one that this system trains, by its nature: the one predicate that
        says so. All others are its frozen base, whose values come from a source of their own."""
        return True

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name trains: `trainable`, unless a recipe chose otherwise (`train_only`)."""
        return self.trainable(name) if self._chosen is None else name in self._chosen

    def reached(self, name: str, batch: Batch) -> bool:
        """Whether the losses of this batch depend on the trainable parameter of this name (see vlm.run.audit).

        False excuses the parameter from having a gradient: text alone does not reach what reads video. A parameter
        whose gradient is zero only because a gate in front of it still is counts as reached.
        """
        return True

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Of a recipe's `model` settings, as a checkpoint stores them: those without which trained tensors of the same
        names and shapes compute something else. A checkpoint loads only where they are the recipe's."""
        return {}

    def shared_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Of `decisive` settings those that another system, part of whose tensors this one may take, has too."""
        return {}

    def misfit(self, made: Mapping[str, Any]) -> str:
        """Why stored features are not what this system's frozen parts would make of the same frames, by what their
        shard set says of them (tools/extract_features.py); "": they are, or that is not known."""
        return ""

    def take_published(self, file: Path) -> str:
        """Set what trains from a published file, in a system whose config says `reads_published`; what was read."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Set `requires_grad` by `trainable`, and remember the hashes of what is frozen: where it came from."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trainable(name))
        self._chosen, self._sources = None, self._hash_each()

    def train_only(self, names: Collection[str]) -> None:
        """Train the parameters of these names and no others. What `trainable` names, or has learnt before, and is not
        among them is carried on as it is. What begins to train is fp32 from here on."""
        parameters = dict(self.named_parameters())
        unknown = set(names) - parameters.keys()
        assert not unknown, unknown
        learnt = {name for name in parameters if self.trains(name) or self.trainable(name)} | self.carried.keys()
        self._chosen = frozenset(names)
        self.keep_wide(names)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        for name in self.carried.keys() & self._chosen:
            del self.carried[name]
        self.carry(learnt - self._chosen - self.carried.keys())

    def carry(self, names: Collection[str]) -> None:
        """Remember the values that these parameters have now, as `carried`; they do not train."""
        parameters = dict(self.named_parameters())
        self.keep_wide(names)
        for name in sorted(names):
            assert not parameters[name].requires_grad, f"{name} trains, so the optimizer has its value"
            self.carried[name] = parameters[name].detach().to("cpu", copy=True)

    def keep_wide(self, names: Collection[str]) -> None:
        """Store the layers that own these parameters in fp32, among others of fewer bits too."""
        narrow = {}
        for owner in {name.rpartition(".")[0] for name in names}:
            for name, parameter in self.get_submodule(owner).named_parameters(prefix=owner, recurse=False):
                if parameter.is_floating_point() and parameter.dtype != torch.float32:
                    narrow[name] = parameter
        for parameter in narrow.values():
            parameter.data = parameter.data.float()
        for part in {name.partition(".")[0] for name in narrow if "." in name}:
            adapt(self.get_submodule(part))

    def frozen_hash(self) -> str:
        """sha256 of names, shapes, dtypes and bytes of the frozen base, taken when `freeze` was called.

        It identifies the source that frozen weights came from. An engine may cut or cast parameters later, and a
        recipe may have some of them train; the hash does not change with that.
        """
        return self._joined(self.frozen_hashes()) if self._has_weights() else _NO_WEIGHTS

    def frozen_hashes(self) -> dict[str, str]:
        """`vlm.weights.tensor_hash` of each tensor of the frozen base, as it was when `freeze` was called."""
        if self._sources is None:
            self._sources = self._hash_each()
        return self._sources

    def _hash_frozen(self) -> str:
        """What `frozen_hash` would be of the values that are there now."""
        return self._joined(self._hash_each()) if self._has_weights() else _NO_WEIGHTS

    def _hash_each(self) -> dict[str, str]:
        """`frozen_hashes` of the values that are there now; nothing on the meta device."""
        frozen = {name: p for name, p in self.named_parameters() if not self.trainable(name)}
        if any(p.is_meta for p in frozen.values()):
            return {}
        return {name: tensor_hash(self.sourced(name, p)) for name, p in frozen.items()}

    def _has_weights(self) -> bool:
        return not any(p.is_meta for name, p in self.named_parameters() if not self.trainable(name))

    def sourced(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a frozen tensor that its source holds."""
        return tensor

    def _joined(self, hashes: Mapping[str, str]) -> str:
        """One hash of those of the frozen tensors."""
        return hash_of_hashes(hashes)

    def frozen_fits(self, stated: str) -> bool:
        """Whether trained tensors of a checkpoint whose frozen weights had the hash `stated` mean the same here."""
        return stated == self.frozen_hash()

    def frozen_misfits(self, stated: Mapping[str, str], held: Collection[str]) -> list[str]:
        """The same of hashes tensor by tensor: names of those on which the two disagree.

        Args:
            stated: `frozen_hashes` that a checkpoint states.
            held: tensors that the checkpoint holds itself, so that it does not matter what they were.
        """
        own = self.frozen_hashes()
        return [name for name in own if name not in held and own[name] != stated.get(name)]

    @property
    def num_layers(self) -> int | None:
        """Depth that layer-wise learning-rate decay counts with; None: this system has no such order."""
        return None

    def layer_id(self, name: str) -> int | None:
        """Position of a parameter for layer-wise decay: 0 the input … num_layers + 1 the head."""
        return None

    def no_decay(self, name: str, tensor: Tensor) -> bool:
        """Whether weight decay passes a parameter over: biases, norms and all else that is one-dimensional."""
        return tensor.ndim <= 1 or name.endswith(".bias")


def check_same(model: Any, inputs: Any, **fields: str) -> None:
    """UserError where a field of a model's config differs from the field of its inputs that `fields` names for it."""
    for ours, theirs in fields.items():
        stated, fed = getattr(model, ours), getattr(inputs, theirs)
        if stated != fed:
            raise UserError(f"model.{ours} is {stated}, but inputs.{theirs} is {fed}: both must be the same")


def as_clips(batch: Batch) -> Tensor:
    """The clips of a batch that must have some, (B, C, T, H, W)."""
    assert batch.video is not None, "a batch without video reached a system that sees only video"
    return batch.video
