"""What of a checkpoint this rank writes: which bytes of which file, and the host memory in which they wait.

Every rank knows the layout of both files from names and shapes alone, and ZeRO tells it which elements it holds. So
nothing is gathered: each rank copies its own fragments, and writes them at their places.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.models import trained
from vlm.run import zero_state
from vlm.tensor_files import Described, Layout, layout_of
from vlm.types import UserError
from vlm.weights import diff_keys

LARGE = 1 << 20
"""Elements from which on it pays to copy a tensor by two threads."""
WEIGHTS, OPTIMIZER = trained.WEIGHTS, "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class Source:
    """Elements of one tensor of a file that this rank holds."""

    file: str
    name: str
    start: int  # of the first one, in the flattened tensor
    values: Tensor  # (n,)


@dataclass(frozen=True, slots=True)
class Region:
    """The same elements as bytes: where they wait and where they go."""

    file: str
    name: str
    begin: int  # in the host memory
    end: int
    offset: int  # in the file


def describe(engine: Any) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Every tensor of both files: file -> name -> dtype and shape. The same on every rank.

    Raises:
        UserError: what trains now is not what the engine was built to train.
    """
    shapes = zero_state.shapes(engine)
    trains = {name: (0,) for name, p in engine.model.named_parameters() if p.requires_grad}
    difference = diff_keys(trains, dict.fromkeys(shapes, (0,)))
    if difference:
        raise UserError(
            f"what trains is not what the engine was built to train, so a run that resumes would lose it: {difference}"
            "\nMend: look for requires_grad that was changed after the model was built, or a parameter that was "
            "replaced"
        )
    weights = {name: (torch.float32, shape) for name, shape in shapes.items()}
    weights |= {name: (value.dtype, tuple(value.shape)) for name, value in _others(engine).items()}
    moments = {
        f"{kind}/{name}": (torch.float32, shape) for name, shape in shapes.items() for kind in zero_state.MOMENTS
    }
    return {WEIGHTS: weights, OPTIMIZER: moments}


def sources(engine: Any) -> list[Source]:
    """What this rank holds of it, as views. Of all that ranks hold alike, each has a share."""
    found = []
    for fragment in zero_state.fragments(engine):
        found.append(Source(WEIGHTS, fragment.name, fragment.start, fragment.values["param"]))
        for kind in zero_state.MOMENTS:
            found.append(Source(OPTIMIZER, f"{kind}/{fragment.name}", fragment.start, fragment.values[kind]))
    world = engine.world
    for number, (name, value) in enumerate(sorted(_others(engine).items())):
        # Buffers may differ between ranks (running statistics): those of rank 0 count.
        if world.rank == (number % world.size if name in engine.model.carried else 0):
            found.append(Source(WEIGHTS, name, 0, value.detach().contiguous().view(-1)))
    return found


def _others(engine: Any) -> dict[str, Tensor]:
    """What a checkpoint holds besides what trains: whole on every rank."""
    return engine.model.carried | trained.persistent_buffers(engine.model)


class Plan:
    """This rank's part of a checkpoint, and host memory for it that is used again for each one.

    Args:
        described: `describe`.
        held: `sources`; of later checkpoints alike, but for the values.
        pinned: whether the values come from a GPU.
        rank, size: this process among those that write.
    """

    def __init__(
        self,
        described: Mapping[str, Described],
        held: Sequence[Source],
        *,
        pinned: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.described = described
        self.layouts: dict[str, Layout] = {file: layout_of(part, {"format": "pt"}) for file, part in described.items()}
        self.key = _key(described, held)
        self.regions: list[Region] = []
        dtypes = [described[source.file][source.name][0] for source in held]
        self._runs = _neighbours(held, dtypes)
        places = [(0, 0)] * len(held)
        end = 0
        for index in (index for run in self._runs for index in run):
            source, dtype = held[index], dtypes[index]
            first, last = self.layouts[source.file].places[source.name]
            begin = -(-end // dtype.itemsize) * dtype.itemsize
            end = begin + source.values.numel() * dtype.itemsize
            offset = first + source.start * dtype.itemsize
            assert offset + end - begin <= last, f"{source.name}: more than there is"
            self.regions.append(Region(source.file, source.name, begin, end, offset))
            places[index] = (begin, end)
        # Touched now: pages that are asked for while training waits would take longer than the copy itself.
        self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned).fill_(0)
        self._targets = [self.memory[a:b].view(dtype) for (a, b), dtype in zip(places, dtypes)]
        moments = described.get(OPTIMIZER, {})
        self._trained = [
            number for number, one in enumerate(held) if one.file == OPTIMIZER or f"exp_avg/{one.name}" in moments
        ]
        self._names = [one.name for one in held]
        self.bytes = self.memory.numpy().data
        self._starts = {(region.file, region.name, region.offset): region for region in self.regions}
        self.hashes = _shared_out(self.layouts, rank, size)
        """(file, name) of the tensors whose hash this rank computes."""

    def not_finite(self) -> list[str]:
        """Names of copied fragments, of what trains and of its moments, that hold inf or nan."""
        return [self._names[n] for n in self._trained if not bool(torch.isfinite(self._targets[n]).all())]

    def fits(self, described: Mapping[str, Described], held: Sequence[Source]) -> bool:
        """Whether it serves for these too."""
        return self.key == _key(described, held)

    def copy(self, held: Sequence[Source]) -> None:
        """Values into the host memory: all that training waits for."""
        for run in self._runs:
            values = [held[index].values for index in run]
            targets = [self._targets[index] for index in run]
            if all(map(_adjacent, values, values[1:])):  # one copy of all: a group that ZeRO flattened
                values, targets = [_joined(values)], [_joined(targets)]
            for target, value in zip(targets, values):
                _copy_large(target, value) if value.numel() >= LARGE else target.copy_(value, non_blocking=True)
        if self.memory.is_pinned():
            torch.cuda.current_stream().synchronize()

    def files(self) -> dict[str, list[Region]]:
        """Its regions by file, in the order of the file."""
        found: dict[str, list[Region]] = {}
        for region in sorted(self.regions, key=lambda region: region.offset):
            found.setdefault(region.file, []).append(region)
        return found

    def place(self, file: str, name: str) -> tuple[int, int]:
        """First byte of a tensor in its file, and the one after the last."""
        return self.layouts[file].places[name]

    def whole(self, file: str, name: str) -> memoryview | None:
        """The bytes of a tensor, if this rank holds all of it."""
        begin, end = self.place(file, name)
        region = self._starts.get((file, name, begin))
        if region is None or region.end - region.begin != end - begin:
            return None
        return self.bytes[region.begin : region.end]

    def intervals(self) -> np.ndarray:
        """(n, 3) int64: number of the file, first byte and the one after the last; neighbours are joined."""
        found: list[list[int]] = []
        for number, file in enumerate(self.layouts):
            for region in self.files().get(file, []):
                end = region.offset + region.end - region.begin
                if found and found[-1][0] == number and found[-1][2] == region.offset:
                    found[-1][2] = end
                else:
                    found.append([number, region.offset, end])
        return np.array(found, np.int64).reshape(-1, 3)

    def missing(self, intervals: Sequence[np.ndarray]) -> list[str]:
        """Tensors of which the ranks' `intervals` together leave out elements."""
        found = []
        for number, layout in enumerate(self.layouts.values()):
            held = np.concatenate([part[part[:, 0] == number, 1:] for part in intervals])
            held = held[np.argsort(held[:, 0], kind="stable")]
            reached = np.maximum.accumulate(np.concatenate([[len(layout.header)], held[:, 1]]))
            begins = np.append(held[:, 0], layout.size)
            gaps = [(int(reached[i]), int(begins[i])) for i in np.flatnonzero(begins > reached)]
            found += [n for n, (a, b) in layout.places.items() if any(x < b and a < y for x, y in gaps)]
        return found

    def entries(self, file: str, hashes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What the manifest says of each tensor of a file."""
        return {
            name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "sha256": hashes[name]}
            for name, (dtype, shape) in self.described[file].items()
        }


def whole_tensors(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> tuple[Plan, list[Source]]:
    """A plan for tensors that this process holds whole."""
    files = {WEIGHTS: weights, OPTIMIZER: moments}
    described = {f: {n: (t.dtype, tuple(t.shape)) for n, t in part.items()} for f, part in files.items()}
    held = [
        Source(f, n, 0, t.detach().cpu().contiguous().view(-1)) for f, part in files.items() for n, t in part.items()
    ]
    return Plan(described, held), held


def _neighbours(held: Sequence[Source], dtypes: Sequence[torch.dtype]) -> list[list[int]]:
    """Sources, by their indices, in the order of memory; those that lie side by side and are copied as they are, in one
    list."""
    found: list[list[int]] = []
    order = [index for index, source in enumerate(held) if source.values.numel()]
    for index in sorted(order, key=lambda index: held[index].values.data_ptr()):
        last = found[-1][-1] if found else index
        plain = held[index].values.dtype == dtypes[index] == dtypes[last]
        if found and plain and _adjacent(held[last].values, held[index].values):
            found[-1].append(index)
        else:
            found.append([index])
    return found


def _adjacent(one: Tensor, other: Tensor) -> bool:
    """Whether the second begins where the first ends."""
    same = one.dtype == other.dtype and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and one.data_ptr() + one.numel() * one.itemsize == other.data_ptr()


def _copy_large(target: Tensor, value: Tensor) -> None:
    """As `copy_`, but from the host's memory by two threads: one does not use all that the memory gives."""
    if value.device.type != "cpu" or len(os.sched_getaffinity(0)) < 2:
        target.copy_(value, non_blocking=True)
        return
    half = value.numel() // 2
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(target[half:].copy_, value[half:])
        target[:half].copy_(value[:half])
        other.result()


def _joined(neighbours: Sequence[Tensor]) -> Tensor:
    """What lies side by side as one."""
    total = sum(one.numel() for one in neighbours)
    return neighbours[0].as_strided((total,), (1,), neighbours[0].storage_offset())


def _key(described: Mapping[str, Described], held: Sequence[Source]) -> Any:
    """Equal where the same elements go to the same places."""
    return described, [(source.file, source.name, source.start, source.values.numel()) for source in held]


def _shared_out(layouts: Mapping[str, Layout], rank: int, size: int) -> list[tuple[str, str]]:
    """Neighbouring tensors of about the same number of bytes for each rank."""
    total = sum(layout.size for layout in layouts.values())
    found, passed = [], 0
    for file, layout in layouts.items():
        for name, (begin, end) in layout.places.items():
            if (passed + (begin + end) // 2) * size // total == rank:
                found.append((file, name))
        passed += layout.size
    return found


def missing_message(folder: Path, names: Sequence[str]) -> str:
    """What a user is told of tensors that no rank holds whole."""
    told = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return (
        f"{folder}: would not hold what trains, so a run that resumes from it would lose it: {len(names)} missing or "
        f"in part: {told}\nThe checkpoint before it is intact, and `latest` still names it. Mend: look for "
        "requires_grad that was changed after the model was built, or a parameter that was replaced"
    )
