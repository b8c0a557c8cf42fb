"""Processes that load data: what they load comes in order, and what goes wrong in one is told as if it were here."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from vlm.types import UserError

_LIKELY = {
    "SIGKILL": "most likely memory ran out and the kernel killed it (see dmesg, or the job's memory limit), so load "
    "with fewer processes or ask for more memory",
    "SIGBUS": "most likely the shared memory through which batches travel is full, so enlarge /dev/shm (docker: "
    "--shm-size) or load with fewer processes",
    "SIGSEGV": "most likely a decoder crashed on a damaged clip, which tools/make_shards.py without --no-check finds "
    "and leaves out",
}


class _Failure(NamedTuple):
    """A UserError on its way from a loader process."""

    message: str


class _Guarded(Dataset[Any]):
    """A dataset whose UserErrors are items: raised in a loader process they would come wrapped in its traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except UserError as error:
            return _Failure(str(error))


class Loaded(Iterator[Any]):
    """What `workers` processes load of a dataset, in the order of `sampler`. They begin at once.

    Args:
        knob: the recipe's field of `workers`, for messages.
    Raises:
        UserError: loading met one, or a process ended by itself.
    """

    def __init__(self, dataset: Dataset[Any], sampler: Iterable[Any], workers: int, knob: str) -> None:
        self._knob, self._workers = knob, workers
        self._items: Any = iter(DataLoader(_Guarded(dataset), sampler=sampler, **_arguments(workers)))

    def __next__(self) -> Any:
        try:
            item = next(self._items)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise UserError(self._how_lost()) from error
        if isinstance(item, _Failure):
            raise UserError(item.message)
        return item

    def _how_lost(self) -> str:
        codes = [process.exitcode for process in getattr(self._items, "_workers", ()) if process.exitcode]
        code = codes[0] if codes else None
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return (
            f"a process that loads data ended by itself ({how}): {_LIKELY.get(how, 'what it printed says why')}. There "
            f"were {self._knob}={self._workers} of them for each process that trains or tests"
        )


def _arguments(workers: int) -> dict[str, Any]:
    """DataLoader arguments: batches come whole from the dataset; workers start from a clean server process, since a
    process that runs collective threads must not be forked."""
    if workers == 0:
        return {"batch_size": None, "num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm.data.loader", "vlm.data.clips", "vlm.data.questions"])
    return {
        "batch_size": None,
        "num_workers": workers,
        "prefetch_factor": 4,
        "persistent_workers": False,
        "multiprocessing_context": context,
    }
