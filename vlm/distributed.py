"""Processes: join the group that this one was started for (vlm.starters), and a few collectives with plain names."""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from vlm.meeting import join_group, open_meeting
from vlm.starters import end_with_launcher, find_starter
from vlm.types import UserError

ValueT = TypeVar("ValueT")

# How many processes share a host: torchrun, deepspeed, mpirun.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


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
        NoRendezvous: rank 0 is not reached, a rank does not come, or a first sum over all fails: one line that says
            which (vlm.meeting), after VLM_RENDEZVOUS_SECONDS at the latest.
    """
    starter = find_starter()
    end_with_launcher(starter)
    meeting = open_meeting(starter)
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
        device = torch.device("cuda", _gpu_of(local_rank, meeting.starter))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the GPU
    else:
        device = torch.device("cpu")
        _share_cores()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    join_group(meeting, backend, device, timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return World(meeting.rank, meeting.size, local_rank, device, meeting.starter)


def _gpu_of(local_rank: int, starter: str) -> int:
    """The number of a process's GPU among those that it sees. Slurm may show each task its own alone
    (--gpus-per-task=1, --gpu-bind=single:1), and says how many the host's tasks have together.

    Raises:
        UserError: fewer GPUs than processes on this host.
    """
    seen, together = torch.cuda.device_count(), os.environ.get("SLURM_GPUS_ON_NODE", "")
    if local_rank < seen:
        return local_rank
    if starter == "slurm" and seen == 1 and together.isdecimal() and local_rank < int(together):
        return 0
    raise UserError(
        f"this host has {seen} GPU(s) but process {local_rank} of it was started: start one process a GPU (deepspeed "
        "--num_gpus N, or one Slurm task a GPU)"
    )


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
        told = gather_objects(problem)
        first: UserError = share_object(next(filter(None, told)) if told else None)
        raise copy.copy(first) from problem  # an error is not to be its own cause


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def share(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """Rank `rank`'s contiguous part [start, stop) of `count` items; parts differ in size by at most one."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)
