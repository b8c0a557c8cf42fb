"""The processes of `mpirun` as builders of shards, through mpi4py.futures.

    with mpi_ranks() as ranks:
        if ranks is not None:                      # rank 0; the others serve until it leaves
            write_shards(…, ranks=ranks)

A rank drives a process of its own, as everywhere (`shard_pool`), so that a clip that crashes a decoder costs neither
the rank nor the job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from typing import cast

from vlm.data.shard_plan import Cut
from vlm.data.shard_pool import Work, build_shards
from vlm.types import UserError

# How many processes there are, as Open MPI, MPICH and its kin, and Slurm say.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


def count_ranks() -> int:
    """Processes that an MPI launcher says it started; 1: none did."""
    sizes = [os.environ[name] for name in _SIZES if name in os.environ]
    if "PMIX_RANK" in os.environ and "SLURM_STEP_ID" in os.environ:
        sizes.append(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return max((int(size) for size in sizes if size.isdigit()), default=1)


@contextmanager
def mpi_ranks() -> Iterator[Executor | None]:
    """The other ranks as an executor, on rank 0; on each of them None, after rank 0 has left.

    Raises UserError where mpi4py or the MPI library is missing.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:  # RuntimeError: the wheel found no libmpi
        raise UserError(
            f"started by an MPI launcher, but mpi4py cannot be used ({error}): pip install mpi4py and an MPI library "
            "(Debian: libopenmpi-dev), or use --workers on one machine"
        ) from error
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as ranks:
        yield cast("Executor | None", ranks)


def build_on_ranks(ranks: Executor, work: Work, cuts: Mapping[int, Cut], *, progress: Callable[[int], None]) -> None:
    """`build_shards` by the other ranks, which take shards from the front, and this one, which takes from the end."""
    futures: dict[int, Future[None]] = {
        number: ranks.submit(_build_one, work, number, cut) for number, cut in sorted(cuts.items())
    }
    mine: dict[int, int] = {}  # shard that this rank builds -> its items that are done

    def tell() -> None:
        done = [number for number, future in futures.items() if future.done() and number not in mine]
        for number in done:
            futures[number].result()  # what went wrong there goes wrong here
        progress(sum(cuts[number].items for number in done) + sum(mine.values()))

    def build_here(number: int) -> None:
        def tell_here(items: int) -> None:
            mine[number] = items
            tell()

        tell_here(0)
        build_shards(work, {number: cuts[number]}, workers=1, progress=tell_here)

    try:
        for number in reversed(list(futures)):
            if futures[number].cancel():
                build_here(number)
        while wait(futures.values(), timeout=1.0).not_done:
            tell()
        tell()
    except BaseException:
        for future in futures.values():
            future.cancel()
        raise


def _build_one(work: Work, number: int, cut: Cut) -> None:
    """On another rank: one shard, in a process."""
    build_shards(work, {number: cut}, workers=1, progress=_quietly)


def _quietly(done: int) -> None:
    """Nobody listens: rank 0 counts whole shards of other ranks."""
