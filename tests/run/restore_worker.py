"""Started by test_restore.py in two processes: a run goes on with another choice of what trains, at ZeRO 2 and 3.

restore_worker.py FOLDER: checkpoints under FOLDER/WRITER-READER; their losses as one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.run.restoring import save, start, step
from vlm.distributed import end, join

OTHER = ("unfreeze=llama.layers.0.mlp.up_proj", "freeze=head")


def main(root: Path) -> None:
    world, losses = join(), {}
    for writer, reader in (("2", "2"), ("3", "3"), ("2", "3")):
        folder = root / f"{writer}-{reader}"
        first, _ = start(world, writer)
        found = [step(first, number) for number in range(2)]
        second, _ = start(world, reader, OTHER, save(first, folder, 2))
        losses[folder.name] = found + [step(second, number) for number in (2, 3)]
        save(second, folder, 4)
    if world.is_main:
        print("RESULT " + json.dumps(losses), flush=True)
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
