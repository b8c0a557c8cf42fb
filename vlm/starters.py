"""Who started this process, and so its place among all: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

Understood, in this order: `deepspeed` and `torchrun` (all five are set), `mpirun` (through mpi4py), `srun`
(SLURM_PROCID and so on; the address from the step's list of hosts, the port from its number), and none of these (a
single process).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from typing import Any

from vlm import rendezvous
from vlm.errors import NoRendezvous, UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def find_starter() -> str:
    """Fill in VARIABLES where they are missing; return deepspeed, torchrun, mpi, slurm or single.

    Raises:
        UserError: the environment names a process group only in part.
        NoRendezvous: the hosts of mpirun do not reach that of rank 0.
    """
    given = [name for name in VARIABLES if name in os.environ]
    if len(given) == len(VARIABLES):
        return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "deepspeed"
    # mpirun starts its daemons on other hosts by srun, so that processes of both kinds have Slurm's variables.
    if "OMPI_COMM_WORLD_SIZE" not in os.environ and _of_slurm(set(given)):
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = str(_slurm_tasks())
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = rendezvous.first_address()
        os.environ.setdefault("MASTER_PORT", str(rendezvous.hashed_port()))
        return "slurm"
    if _of_mpi():
        _from_mpi()
        return "mpi"
    if given:
        raise UserError(
            f"only {', '.join(given)} of {', '.join(VARIABLES)} are set: start through deepspeed, torchrun, srun or "
            "mpirun, or unset them for a single process"
        )
    port = str(rendezvous.free_port())
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return "single"


def end_with_launcher(starter: str) -> None:
    """Have the kernel end this process with the one that launched it.

    torchrun and deepspeed look after their processes, but one that is itself killed leaves them behind, training on and
    holding the run folder, in the way of the next start. mpirun's and Slurm's are ended by daemons.

    Args:
        starter: as `find_starter` says.
    """
    if starter != "torchrun" and "CROSS_RANK" not in os.environ:  # which deepspeed's launcher sets
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it went meanwhile
        os.kill(os.getpid(), signal.SIGKILL)


def _of_slurm(given: set[str]) -> bool:
    """Whether this is a task of a Slurm step, and not of one that MPICH's own mpirun made to start its daemons."""
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return False
    own = (os.environ["SLURM_PROCID"], str(_slurm_tasks()))
    if "PMI_SIZE" in os.environ and (os.environ.get("PMI_RANK"), os.environ["PMI_SIZE"]) != own:
        return False
    return _slurm_tasks() > 1 or given == {"MASTER_ADDR", "MASTER_PORT"}


def _of_mpi() -> bool:
    """Whether an mpirun started this process. Where Slurm speaks PMI by itself (MpiDefault=pmix or pmi2), a step of one
    task has variables of it too: that is a single process, which needs no MPI."""
    by_slurm = os.environ.get("PMI_SIZE") == "1" or os.environ.get("PMIX_NAMESPACE", "").startswith("slurm.")
    if by_slurm and "OMPI_COMM_WORLD_SIZE" not in os.environ and "SLURM_STEP_ID" in os.environ and _slurm_tasks() == 1:
        return False
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"))


def _slurm_tasks() -> int:
    # SLURM_NTASKS in the shell that salloc opens (a step of one task) is that of the job.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def _from_mpi() -> None:
    """Ranks from MPI; an address of rank 0's host that all others reach, and a free port there, are told to all."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the wheel found no libmpi
        raise UserError(
            f"started by mpirun, but mpi4py cannot be used ({error}): pip install -e '.[mpi]' and an MPI library "
            "(Debian: openmpi-bin libopenmpi3)"
        ) from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        address, port = _meet_by_mpi(world)
        os.environ.update(
            RANK=str(world.Get_rank()),
            WORLD_SIZE=str(world.Get_size()),
            LOCAL_RANK=str(local.Get_rank()),
            MASTER_ADDR=os.environ.get("MASTER_ADDR", address),
            MASTER_PORT=os.environ.get("MASTER_PORT", str(port)),
        )
    finally:
        # MPI has served: torch's own group does the rest. mpirun takes a process that ends without this for one that
        # failed, and `vlm.distributed.end` leaves no time for it.
        MPI.Finalize()


def _meet_by_mpi(world: Any) -> tuple[str, int]:
    """(address, port) of rank 0: 127.0.0.1 where all are on its host, else the first of its addresses that all reach.

    A host's own name is no help: that of Debian and Ubuntu is 127.0.1.1 to itself.
    """
    here = rendezvous.network()
    networks = world.allgather(here)
    with socket.create_server(("", 0), backlog=len(networks)) as server:
        port = server.getsockname()[1]
        own = ["127.0.0.1"]
        if len(set(networks)) > 1:
            own = [each for each in rendezvous.own_addresses() if not rendezvous.is_loopback(each) and ":" not in each]
        own, port = world.bcast((own, port), root=0)
        tries = networks.index(here) == world.Get_rank()  # one process of each host, for all of it
        reached = [not tries or _answers(address, port) for address in own]
        everywhere = [all(column) for column in zip(*world.allgather(reached))]
    if not any(everywhere):
        raise NoRendezvous(
            f"started by mpirun: not all of {len(set(networks))} hosts reach rank 0 at any of its addresses "
            f"({', '.join(own)}). Mend: open the ports between them, or mpirun -x MASTER_ADDR=ADDRESS -x MASTER_PORT=N"
        )
    return own[everywhere.index(True)], port


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True
