"""launch/train.py, but rank 1 goes wrong: `hang_train.py KIND ARGUMENTS …`."""

import os
import sys
import time


def stall(kind: str) -> None:
    """Have KIND happen on this rank."""
    from vlm.data.shard_set import ShardSet
    from vlm.nn.vision import Block
    from vlm.run.eval_tasks import Task

    def sleeps_at_call(number: int, function):
        calls = 0

        def stalled(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == number:
                time.sleep(1000)
            return function(*arguments, **named)

        return stalled

    if kind == "read":  # of a file of shards, in the process that trains
        ShardSet.read = sleeps_at_call(6, ShardSet.read)
    elif kind == "forward":
        Block.forward = sleeps_at_call(9, Block.forward)
    elif kind == "fsync":
        os.fsync = sleeps_at_call(1, os.fsync)
    elif kind == "evaluate":
        Task.rows = sleeps_at_call(1, Task.rows)


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    if os.environ.get("RANK") == "1":
        stall(kind)
    from vlm.run.command import finish, train_main

    finish(train_main())
