"""Putting video tokens into rows of text. Letters: S tokens of the rows, M places for video tokens, B videos of N
tokens, D width."""

from __future__ import annotations

from torch import Tensor


def splice(text: Tensor, video: Tensor, slots: Tensor, sources: Tensor) -> Tensor:
    """Embedded rows in which video tokens have taken their places; gradients reach both.

    Args:
        text: (S, D) embedded tokens; what stands at a slot is lost.
        video: (B, N, D), cast to the text's dtype.
        slots: (M,) int64, places in `text`, each once.
        sources: (M,) int64, the video token for each, sample * N + n; one video may fill the slots of many rows.
    Returns:
        (S, D).
    """
    assert len(slots) == len(sources), f"{len(slots)} slots, {len(sources)} sources"
    return text.index_copy(0, slots, video.flatten(0, 1)[sources].to(text.dtype))
