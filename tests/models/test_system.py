"""The contract of all systems: one predicate freezes, the hash tells frozen weights apart, predict goes by forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlm.models.system import System
from vlm.types import Batch, Losses, LossTerm, UserError


class Toy(System):
    """Two linear maps, the first frozen."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.base = nn.Linear(2, 3)
        self.head = nn.Linear(3, 4)
        nn.init.constant_(self.base.weight, value)
        nn.init.zeros_(self.base.bias)
        self.freeze()

    def trainable(self, name: str) -> bool:
        return name.startswith("head.")

    def losses(self, batch: Batch) -> Losses:
        scores = self.scores(batch)
        return {"sum": LossTerm(scores.sum(), len(scores))}

    def scores(self, batch: Batch) -> Tensor:
        assert batch.video is not None
        return self.head(self.base(batch.video))


class Blind(System):
    """Predicts nothing."""


BATCH = Batch(keys=("a", "b"), video=torch.ones(2, 2))


def test_freeze_follows_the_predicate() -> None:
    toy = Toy()
    assert {name for name, p in toy.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_frozen_hash_is_that_of_the_source() -> None:
    toy = Toy()
    assert toy.frozen_hash() == Toy().frozen_hash() != Toy(2.0).frozen_hash()
    before = toy.frozen_hash()
    toy.bfloat16()  # an engine's cast does not change where the weights came from
    assert toy.frozen_hash() == before
    toy.freeze()
    assert toy.frozen_hash() != before
    with torch.no_grad():
        toy.head.weight.add_(1.0)
    again = toy.frozen_hash()
    toy.freeze()
    assert toy.frozen_hash() == again  # trained weights do not count
    assert Blind().frozen_hash() == Blind().frozen_hash()


def test_losses_and_scores_both_call_the_hooks_of_the_module() -> None:
    toy, calls = Toy(), []
    toy.register_forward_pre_hook(lambda *_: calls.append(1))
    assert toy(BATCH)["sum"].count == 2
    assert toy.predict(BATCH).shape == (2, 4)
    assert len(calls) == 2


def test_a_system_without_classes_says_so() -> None:
    with pytest.raises(UserError, match="Blind predicts no classes"):
        Blind().predict(BATCH)


def test_no_decay() -> None:
    toy = Toy()
    spared = {name for name, p in toy.named_parameters() if toy.no_decay(name, p)}
    assert spared == {"base.bias", "head.bias"}
