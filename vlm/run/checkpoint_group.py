"""Ranks that write a checkpoint together in the background, beside the training that goes on.

They meet in a gloo group of their own: what goes wrong here ends with a sentence, after a time limit of its own, and
never in a collective of the training.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from vlm.distributed import World
from vlm.types import UserError

ValueT = TypeVar("ValueT")
ResultT = TypeVar("ResultT")


WAITING = "waiting for the other ranks"


def grace(seconds: float) -> float:
    """Seconds by which a rank that waits for another gives up later than the one that is stuck: that one speaks."""
    return min(10.0, seconds / 2)


class Group:
    """All ranks of a run (or this process alone: `world` None). Made collectively; used by one thread of each rank.

    Args:
        seconds: how long a checkpoint may take; ranks wait for each other somewhat longer.
    """

    def __init__(self, world: World | None, seconds: float) -> None:
        self.rank, self.size = (world.rank, world.size) if world is not None else (0, 1)
        self.limit = timedelta(seconds=seconds + 2 * grace(seconds))
        self._group = dist.new_group(backend="gloo", timeout=self.limit) if self.size > 1 else None
        self.doing = ""
        """What this rank does at the moment."""

    def together(self, what: str, mine: Callable[[], ValueT], main: Callable[[list[ValueT]], ResultT]) -> ResultT:
        """Each rank does `mine`; when all have, rank 0 makes of the results in rank order what all get. Collective.

        Raises:
            UserError: on every rank, where it failed on any (OSError or UserError of a rank; of rank 0 in `main`), or
                where a rank did not come within the time limit.
        """
        self.doing = what
        value, problem = _attempt(mine, self.rank)
        if self._group is None:
            if problem is None:
                result, problem = _attempt(lambda: main([value]), 0)  # type: ignore[list-item]
        else:
            result, problem = self._exchange(what, value, problem, main)
        if problem is not None:
            raise UserError(problem)
        return result  # type: ignore[return-value]

    def _exchange(
        self, what: str, value: Any, problem: str | None, main: Callable[[list[Any]], Any]
    ) -> tuple[Any, str | None]:
        """Results to rank 0, and what it makes of them back to all."""
        self.doing = WAITING
        told: list[Any] | None = [None] * self.size if self.rank == 0 else None
        answer: list[Any] = [None, None]
        try:
            dist.monitored_barrier(self._group, timeout=self.limit, wait_all_ranks=True)
            dist.gather_object((value, problem), told, dst=0, group=self._group)
            if told is not None:
                self.doing = what
                problem = next((other for _, other in told if other is not None), None)
                if problem is None:
                    answer = list(_attempt(lambda: main([one for one, _ in told]), 0))
                else:
                    answer = [None, problem]
                self.doing = WAITING
            dist.broadcast_object_list(answer, src=0, group=self._group)
        except RuntimeError as error:
            if problem is not None:
                return None, problem
            return None, f"rank {self.rank} waited {self.limit.total_seconds():g} s for the others ({what}): {error}"
        return answer[0], answer[1]

    def close(self) -> None:
        """Leave it. Collective."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def _attempt(make: Callable[[], Any], rank: int) -> tuple[Any, str | None]:
    """What `make` makes, or why it could not."""
    try:
        return make(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"rank {rank}: {error}"
    except Exception as error:  # a fault of ours: all ranks must still hear of it
        traceback.print_exc()
        return None, f"rank {rank}: {error!r}"
