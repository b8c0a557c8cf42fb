"""The order is a pure function: every record once an epoch, epochs differ, seeking costs nothing."""

import numpy as np
import pytest

from vlm.data.order import BLOCK, WINDOW, Order, batch_digest, permutation


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 4095, 4096, 4097, 10_001])
def test_each_epoch_holds_each_record_once(size):
    order = Order(size, seed=3)
    for epoch in (0, 1, 7):
        rows = order.rows(range(epoch * size, (epoch + 1) * size))
        assert sorted(rows) == list(range(size))
        assert {order.epoch(p) for p in (epoch * size, (epoch + 1) * size - 1)} == {epoch}


def test_order_depends_on_seed_and_epoch_only():
    size = 1000
    first = Order(size, seed=1).rows(range(2 * size))
    fresh = Order(size, seed=1)
    backwards = [fresh.row(p) for p in reversed(range(2 * size))][::-1]
    assert first == backwards
    assert first[:size] != first[size:]
    assert first[:size] != Order(size, seed=2).rows(range(size))
    assert first[:size] != sorted(first[:size])


def test_order_is_the_same_on_every_machine():
    """Pinned values: a change here would change the data order of every run that is resumed."""
    assert permutation(8, "pin", 0).tolist() == [7, 6, 4, 5, 2, 0, 3, 1]
    assert Order(10, seed=0).rows(range(10)) == [0, 1, 3, 9, 5, 6, 4, 7, 8, 2]
    assert Order(5000, seed=0).rows([0, 1, 4096, 4999, 123456]) == [1826, 2910, 807, 2496, 3150]


def test_reads_stay_nearly_sequential():
    size = 200_000
    rows = np.array(Order(size, seed=0).rows(range(BLOCK * WINDOW)))
    assert len(np.unique(rows // BLOCK)) == WINDOW


def test_seeking_far_replays_nothing():
    order = Order(10_000_000, seed=0)
    order.row(10**9 + 12345)
    assert len(order._cache) == 2, "one permutation of blocks, one of a window"


def test_batch_digest_sees_order():
    assert batch_digest(["a", "b"]) != batch_digest(["b", "a"])
    assert len(batch_digest(["a"])) == 16
