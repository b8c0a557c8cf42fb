"""launch/train.py with faults at steps (from 1) that the environment variable GUARD_FAULTS names, a JSON object:

{"rank": R, "nan": [steps in which a sample of rank R is NaN], "spike": [steps in which all gradients are 10,000 times
larger], "frozen": step from which a frozen tensor of rank R holds inf}
"""

import json
import os
from dataclasses import replace

import torch

from vlm.data.loader import MicroBatch, TrainLoader
from vlm.data.pixels import finished
from vlm.run.command import finish, train_main
from vlm.run.engine import Engine

FAULTS = {"rank": 0, "nan": [], "spike": [], "frozen": 0, **json.loads(os.environ.get("GUARD_FAULTS", "{}"))}
now = {"step": 0}


def next_step(self):
    batches = load(self)
    now["step"] = self._step  # as it counts, the one before has been made
    return batches


def backward(self, item, totals, tally):
    here = self.world.rank == FAULTS["rank"]
    if here and now["step"] in FAULTS["nan"]:
        batch = finished(item.batch)
        batch.video[0] = float("nan")
        item = MicroBatch(replace(batch), item.weight)
    if here and now["step"] == FAULTS["frozen"]:
        name, frozen = next((n, p) for n, p in self.model.named_parameters() if not p.requires_grad)
        getattr(frozen, "ds_tensor", frozen).data.view(-1)[0] = float("inf")
        print(f"damaged {name}", flush=True)
    hooks = []
    if now["step"] in FAULTS["spike"]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [p.register_hook(lambda gradient: gradient * 1e4) for p in trained]
    learn(self, item, totals, tally)
    for hook in hooks:
        hook.remove()


if __name__ == "__main__":
    torch.set_num_threads(1)
    load, learn = TrainLoader.__next__, Engine._backward
    TrainLoader.__next__, Engine._backward = next_step, backward
    finish(train_main())
