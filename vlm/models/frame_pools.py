"""What is kept of the features of a video's frames: all of them, or their means over time and space.

A pool takes in the rows of one video as they are computed, in the order of its frames, and keeps no more than it needs.
It is what an encoder's `pool` returns (vlm/run/encode.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Pool(Protocol):
    """What takes in rows of one video."""

    def add(self, rows: dict[str, Tensor]) -> None:
        """Rows of the next frames, (n, …) by name."""

    def finish(self) -> dict[str, Tensor]:
        """What is stored of the video, on the CPU, by name."""


class Rows:
    """All rows of a tensor."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.rows.append(rows.cpu())

    def finish(self) -> Tensor:
        return torch.cat(self.rows)


class SpatioTemporal:
    """Video-ChatGPT's pooling (arXiv 2306.05424, section 3.1): patches (t, S, D) -> (max(places, t) + S, D).

    First the mean over the patches of each frame, filled up with zeros behind to `places`; then the mean over all
    frames of each patch. Sums are float32 and run along with the frames, so no frame is kept; the result has the rows'
    dtype. Equal to the published code to the last bit of float16.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.temporal: list[Tensor] = []
        self.spatial: Tensor | None = None
        self.dtype = torch.float32

    def add(self, rows: Tensor) -> None:
        self.dtype = rows.dtype
        self.temporal.append(rows.float().mean(1).to(rows.dtype).cpu())
        for frame in rows:  # one after the other: the same sum in batches of any size
            self.spatial = frame.to(torch.float32, copy=True) if self.spatial is None else self.spatial.add_(frame)

    def finish(self) -> Tensor:
        assert self.spatial is not None
        temporal = torch.cat(self.temporal)
        filling = temporal.new_zeros(max(0, self.places - len(temporal)), temporal.shape[1])
        spatial = (self.spatial / len(temporal)).to(self.dtype).cpu()
        return torch.cat([temporal, filling, spatial])


class Pools:
    """One pool a tensor; those that none is named for keep all rows."""

    def __init__(self, pools: Mapping[str, SpatioTemporal] | None = None) -> None:
        self.pools: dict[str, SpatioTemporal | Rows] = dict(pools or {})

    def add(self, rows: dict[str, Tensor]) -> None:
        for name, these in rows.items():
            self.pools.setdefault(name, Rows()).add(these)

    def finish(self) -> dict[str, Tensor]:
        return {name: pool.finish() for name, pool in self.pools.items()}
