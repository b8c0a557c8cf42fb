"""One rank of a toy run that goes wrong: `hang_worker.py FOLDER SECONDS KIND RANK`; rank RANK does KIND at step 3.

A step loads (sleeps), runs a stack of layers forward and backward, and meets the other ranks in an all-reduce.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vlm.distributed import World
from vlm.run.watchdog import Watchdog

STEPS, STEP_SECONDS = 100, 0.05


class Slow(nn.Module):
    """A layer that takes its time, in both directions."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        x = self.linear(x)
        x.register_hook(lambda _: time.sleep(self.seconds))
        return x


class Model(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Slow(seconds) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def fault(kind: str, dog: Watchdog) -> None:
    """What goes wrong; for some, never to return."""
    if kind == "sleep":
        dog.loading(lambda: [("0", "'clip-7' in shards/shard-000000.tar", 1.5)])
        time.sleep(1000)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "lock":
        library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # keeps the interpreter's lock
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "save":  # as if a file system hung: the thread that saves never comes back
        dog.phase("save")
        thread = threading.Thread(target=time.sleep, args=(1000,), name="saver", daemon=True)
        thread.start()
        thread.join()
    elif kind == "mismatch":  # this rank goes to another collective than the others, which gloo waits in for ever
        dog.phase("collective")
        dist.recv(torch.zeros(1), src=1 - dist.get_rank())


def step(number: int, model: nn.Module, dog: Watchdog, kind: str, bad: bool) -> None:
    dog.phase("load", step=number, keys=[f"clip-{number}"])
    time.sleep(STEP_SECONDS)
    if bad and number == 3:
        fault(kind, dog)
    dog.phase("forward")
    out = model(torch.ones(2, 4))
    dog.phase("backward")
    out.sum().backward()
    dog.phase("collective")
    dist.all_reduce(torch.ones(1))


def main(folder: Path, seconds: float, kind: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), "torchrun")
    model = Model(0.5 * seconds if kind == "slow" else 0.0)
    with Watchdog(folder, seconds, world) as dog:
        dog.watch(model)
        for number in range(1, (2 if kind == "slow" else STEPS) + 1):
            step(number, model, dog, kind, bad=world.rank == rank)
        dist.barrier()
    print("finished", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
