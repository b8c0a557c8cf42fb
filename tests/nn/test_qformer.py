"""Q-Formers over videos of different lengths. What they compute is tested against BLIP-2's in tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from vlm.nn.qformer import QFormerConfig, by_video, frame_numbers, read_memory


def small(**settings: object) -> QFormerConfig:
    return QFormerConfig(**{"dim": 16, "heads": 2, "hidden": 24, **settings})  # type: ignore[arg-type]


def test_frames_stand_by_video_in_order() -> None:
    frames = torch.arange(6.0).view(6, 1, 1).expand(6, 2, 3)
    memory, mask = by_video(frames, (1, 3, 2))
    assert mask is not None
    assert memory.shape == (3, 6, 3)
    assert memory[:, :, 0].tolist() == [[0, 0, 0, 0, 0, 0], [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert frame_numbers((1, 3, 2), frames.device).tolist() == [0, 0, 1, 2, 0, 1]


def test_videos_of_one_length_need_no_mask() -> None:
    memory, mask = by_video(torch.arange(4.0).view(4, 1, 1), (2, 2))
    assert mask is None
    assert memory[:, :, 0].tolist() == [[0, 1], [2, 3]]


@torch.no_grad()
def test_what_is_masked_is_not_read() -> None:
    torch.manual_seed(0)
    config = small()
    qformer = config.build(5).eval()
    queries, memory = torch.randn(2, 3, 16), torch.randn(2, 7, 5)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    both = read_memory(qformer, queries, memory, mask)
    assert_close(both[0], read_memory(qformer, queries[:1], memory[:1], None)[0], rtol=0, atol=1e-6)
    assert_close(both[1], read_memory(qformer, queries[1:], memory[1:, :4], None)[0], rtol=0, atol=1e-6)
    memory[1, 4:] = 1000.0
    assert torch.equal(both[1], read_memory(qformer, queries, memory, mask)[1])


def test_dropout_is_live_in_training_alone() -> None:
    torch.manual_seed(0)
    queries, memory = torch.randn(1, 3, 16), torch.randn(1, 7, 5)

    def changes(dropout: float, training: bool) -> bool:
        qformer = small(dropout=dropout).build(5).train(training)
        one, two = (read_memory(qformer, queries, memory, None) for _ in range(2))
        return not torch.equal(one, two)

    assert changes(0.1, training=True)
    assert not changes(0.1, training=False)
    assert not changes(0.0, training=True)


@pytest.mark.parametrize(("layers", "cross_every"), [(2, 1), (3, 2)])
def test_flops(layers: int, cross_every: int) -> None:
    config = small(layers=layers, cross_every=cross_every)
    qformer = config.build(5).eval()
    qformer.set_attn_implementation("eager")  # whose products the counter knows
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        read_memory(qformer, torch.randn(1, 3, 16), torch.randn(1, 7, 5), None)
    assert config.flops(5, 3, 7) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"heads": 3}, "divide"), ({"layers": 0}, "layers"), ({"dropout": 1.0}, "dropout")],
)
def test_sizes_that_cannot_be(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**settings)
