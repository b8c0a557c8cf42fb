"""The one error that users cause. It stands alone so that a wrong command line is told before torch is loaded."""

from __future__ import annotations


class UserError(ValueError):
    """An error a user can cause and mend. Its message names the file, the value, why it matters and the mend."""


class NoRendezvous(UserError):
    """The processes of a run did not find one another: another start, on other hosts or at another port, may do."""


class Stuck(UserError):
    """A file system does not answer: another start, on other hosts or later, may do."""

    rank: int | None = None
    """Whose."""


class DamagedMemory(FloatingPointError):
    """Tensors in memory are no longer what they were: another start loads them anew."""


class Preempted(Exception):
    """The run was told to stop (a signal), has saved, and goes on when the same command is given again."""


PREEMPTED, HUNG = 85, 86
"""Exit statuses that ask for the same command again: stopped by a signal and saved; stalled (also a file
system that a checkpoint goes to), processes that did not find one another, or a machine that fails, told and ended."""

# What CUDA's errors say (the runtime API's cudaError) that are a device's own fault; not those that a program's mistake
# or the end of another process can give (illegal address, launch failure, out of memory, NCCL's).
_OF_A_DEVICE = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "hardware error",
    "hardware stack error",
    "no CUDA-capable device",
    "busy or unavailable",
    "system not yet initialized",
)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether a GPU says that it has failed: another start, on other hosts, may do."""
    text = str(error)
    return isinstance(error, RuntimeError) and "CUDA" in text and any(part in text for part in _OF_A_DEVICE)
