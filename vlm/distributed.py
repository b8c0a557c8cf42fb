"""Processes: find out how this one was started, join the group, and a few collectives with plain names.

Understood starters, in this order: `deepspeed` / `torchrun` (RANK, WORLD_SIZE, … are set), `srun` (SLURM_PROCID, …),
`mpirun` (found through mpi4py), and none of these (a single process).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from vlm.types import UserError

ValueT = TypeVar("ValueT")

# How many processes share a host: torchrun, deepspeed, mpirun.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all: `rank` of `size`, `local_rank` on its host, its device and who started it."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    starter: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def on_cuda() -> bool:
    """Whether this machine's GPU is to compute: there is one, and DS_ACCELERATOR=cpu does not say otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def alone() -> World:
    """The place of a process that no starter made and that joins no group: on the first GPU, else on the processor."""
    return World(0, 1, 0, torch.device("cuda", 0) if on_cuda() else torch.device("cpu"), "single")


def join(timeout_minutes: float = 30.0) -> World:
    """Join the process group (NCCL on CUDA, gloo on CPU) through DeepSpeed and return this process's place.

    Raises:
        UserError: the environment names a process group only in part, or fewer GPUs than processes on this host.
    """
    starter = _find_starter()
    cuda = on_cuda()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    # The shared-memory op serves inference only, yet init_distributed would compile it on every CPU host (a minute,
    # and for ever if an earlier compilation was killed).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this host has {torch.cuda.device_count()} GPU(s) but process {local_rank} of it was started: start "
                "one process a GPU (deepspeed --num_gpus N, or one Slurm task a GPU)"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        _share_cores()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=timeout_minutes)
    )
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, starter)


def _share_cores() -> None:
    """As many threads as this process has cores to itself, where the user has not said how many."""
    together = int(next((os.environ[name] for name in _LOCAL_SIZES if name in os.environ), 1))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // together))


def leave() -> None:
    """Leave the process group, so that no process is left waiting at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int = 0) -> NoReturn:
    """Leave, and end this process now, with all that it has to say said.

    ZeRO-3's parameters keep the process group, and so gloo's threads, alive until the interpreter is taken down. Then
    these abort the process in one of some forty runs ("terminate called without an active exception"): a run whose
    work is done would end with -6, and what waits for it (torchrun, `sbatch --dependency=afterok`) would not go on.
    """
    leave()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _find_starter() -> str:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT where they are missing; return who started us."""
    given = [name for name in _VARIABLES if name in os.environ]
    if len(given) == len(_VARIABLES):
        return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "deepspeed"
    several = int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if "SLURM_STEP_ID" in os.environ and (several or set(given) == {"MASTER_ADDR", "MASTER_PORT"}):
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ.get("SLURM_NTASKS", "1")
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"started by srun with {os.environ['SLURM_NTASKS']} tasks, but {' and '.join(missing)} is not set: "
                "export the address of the first node of the step and a free port before srun"
            )
        return "slurm"
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        _from_mpi()
        return "mpi"
    if given:
        raise UserError(
            f"only {', '.join(given)} of {', '.join(_VARIABLES)} are set: start through deepspeed, torchrun, srun or "
            "mpirun, or unset them for a single process"
        )
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    return "single"


def _from_mpi() -> None:
    """Ranks from MPI; rank 0's address and a free port of its host are sent to all."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the wheel found no libmpi
        raise UserError(
            f"started by mpirun, but mpi4py cannot be used ({error}): pip install -e '.[mpi]' and an MPI library "
            "(Debian: openmpi-bin libopenmpi3)"
        ) from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = local.Get_size() == world.Get_size()
    address = "127.0.0.1" if one_host else socket.gethostbyname(socket.gethostname())
    address, port = world.bcast((address, _free_port()) if world.Get_rank() == 0 else None, root=0)
    os.environ.update(
        RANK=str(world.Get_rank()),
        WORLD_SIZE=str(world.Get_size()),
        LOCAL_RANK=str(local.Get_rank()),
        MASTER_ADDR=os.environ.get("MASTER_ADDR", address),
        MASTER_PORT=os.environ.get("MASTER_PORT", str(port)),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise float64 sum of a short list over all ranks (one all-reduce)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any] | None:
    """Every rank's picklable `value` in rank order on rank 0, None elsewhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def share_object(value: Any) -> Any:
    """Rank 0's picklable `value` on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(world: World, make: Callable[[], ValueT]) -> ValueT:
    """What rank 0 makes, on every rank. So too its UserError: all raise together, and none waits for the others."""
    outcome: ValueT | UserError | None = None
    if world.is_main:
        try:
            outcome = make()
        except UserError as error:
            outcome = error
    outcome = share_object(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome  # type: ignore[return-value]


def stop_together(problem: UserError | None, device: torch.device) -> None:
    """Raise the first rank's problem on every rank, if any has one (one all-reduce), so that none waits for another."""
    if sum_over_ranks([float(problem is not None)], device)[0]:
        told = gather_objects(None if problem is None else str(problem))
        raise UserError(share_object(next(filter(None, told)) if told else None)) from problem


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def share(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """Rank `rank`'s contiguous part [start, stop) of `count` items; parts differ in size by at most one."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)
